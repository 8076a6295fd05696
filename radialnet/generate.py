"""Continue a prompt with a trained run.

    python -m radialnet.generate --workdir=DIR --prompt="def " --max_new_tokens=64 [--temperature=0.8]

The plain way: each new token is the last logit of a whole forward pass over the last S tokens, in one compiled
program. No cache is kept between tokens.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from radialnet import cli
from radialnet.config import Config, ConfigError
from radialnet.data import PADDING
from radialnet.router import Controllers, schedule
from radialnet.train_step import forward
from radialnet.trained import TrainedModel, load_trained


@partial(jax.jit, static_argnames=("config", "graph"))
def _next_logits(params, controllers: Controllers, step, token_S, length, *, config: Config, graph: nnx.GraphDef):
    """Logits [V] after the first `length` tokens of a row."""
    index_S = jnp.arange(token_S.shape[0])
    batch = {
        "token": token_S[None],
        "document": jnp.where(index_S < length, 0, PADDING)[None],
        "position": index_S[None],
    }
    at = schedule(config.router, config.model.max_depth, step).for_evaluation()
    output = forward(graph, params, batch, controllers, at, jax.random.key(0))
    return output.logits_BSV[0, length - 1]


def generate(trained: TrainedModel, prompt: str, max_new_tokens: int, temperature: float = 0.0, seed: int = 0) -> str:
    """The continuation of a prompt, without the prompt; it ends early where the model ends the document.

    Args:
        temperature: 0 takes the most likely token.
    """
    seq_len = trained.config.train.seq_len
    tokens = [trained.tokenizer.separator_id, *trained.tokenizer.encode(prompt)]
    num_prompt, rng = len(tokens), np.random.default_rng(seed)
    for _ in range(max_new_tokens):
        window = tokens[-seq_len:]
        row = np.zeros(seq_len, np.int32)
        row[: len(window)] = window
        logits_V = np.asarray(
            _next_logits(
                trained.params,
                trained.controllers,
                trained.step,
                row,
                len(window),
                config=trained.config,
                graph=trained.graph,
            ),
            np.float64,
        )
        if temperature > 0:
            # Adding Gumbel noise to the logits and taking the largest samples from their softmax.
            logits_V = logits_V / temperature + rng.gumbel(size=logits_V.shape)
        token = int(logits_V.argmax())
        if token == trained.tokenizer.separator_id:
            break
        tokens.append(token)
    return trained.tokenizer.decode(tokens[num_prompt:])


def main() -> None:
    if _MAX_NEW_TOKENS.value < 1:
        raise ConfigError(f"--max_new_tokens={_MAX_NEW_TOKENS.value}: at least 1 is needed")
    if not 0 <= _TEMPERATURE.value < np.inf:
        raise ConfigError(f"--temperature={_TEMPERATURE.value}: a finite number of at least 0 is needed")
    if not 0 <= _SEED.value < 2**32:
        raise ConfigError(f"--seed={_SEED.value}: at least 0 and less than 2**32 is needed")
    try:
        _PROMPT.value.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"--prompt={_PROMPT.value!a}: not UTF-8") from None
    trained = load_trained(Path(_WORKDIR.value))
    print(_PROMPT.value + generate(trained, _PROMPT.value, _MAX_NEW_TOKENS.value, _TEMPERATURE.value, _SEED.value))


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "The run folder.", required=True)
    _PROMPT = flags.DEFINE_string("prompt", "", "What to continue.")
    _MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Length of the continuation at most.")
    _TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Of the sampling; 0 takes the most likely token.")
    _SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.")
    cli.run(main)

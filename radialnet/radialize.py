"""Make a radial network of a pretrained model: a folder of Llama's or OPT's format, or a GGUF file.

    python -m radialnet.radialize --model=PATH --workdir=DIR [--check] [--data=PATH] [--max_tokens=N] [--json]

Its layers become the pool, and every token goes through them in their order, in the view `same_layer`: the run in DIR
predicts what the model does. `--check` compares the two on held-out text, which takes PyTorch and `transformers`
(requirements-torch.txt). What follows is training, as in configs/distill_smollm2.py.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
from absl import flags
from flax import nnx

from radialnet import cli
from radialnet.checks import expanded
from radialnet.config import Config
from radialnet.controllers import Controllers
from radialnet.files import finite
from radialnet.interchange import import_pretrained
from radialnet.sections import ConfigError
from radialnet.shards import Batch
from radialnet.sources import Document, Source, documents, evenly
from radialnet.torch_models import check_installed, load
from radialnet.train_step import forward_as_evaluated
from radialnet.trained import TrainedModel, load_trained


@partial(jax.jit, static_argnames=("config", "graph"))
def _logits(params, controllers: Controllers, step, batch: Batch, *, config: Config, graph: nnx.GraphDef) -> jax.Array:
    return forward_as_evaluated(config, graph, params, batch, controllers, step).logits_BSV


def compare(trained: TrainedModel, their_logits: Callable[[list[int]], np.ndarray], rows: list[list[int]]) -> dict:
    """The perplexities of a run and of the model that it was made of, and how far their logits are apart.

    Args:
        their_logits: of a row of tokens, [S, V].
        rows: tokens, each row a text from its beginning, with the separator.
    """
    nats, differences, largest = {"ours": 0.0, "theirs": 0.0}, [], 0.0
    of_run = {"config": trained.config, "graph": trained.graph}
    longest = max(map(len, rows))
    for row in rows:
        # All of one length, for one program.
        token_BS = np.asarray([row + [0] * (longest - len(row))], np.int32)
        position_BS = np.arange(longest, dtype=np.int32)[None]
        batch = {"token": token_BS, "document": np.where(position_BS < len(row), 0, -1), "position": position_BS}
        ours_BSV = _logits(trained.params, trained.controllers, trained.step, batch, **of_run)
        ours_SV = np.asarray(ours_BSV)[0, : len(row)]
        theirs_SV = their_logits(row)
        for name, logits_SV in (("ours", ours_SV), ("theirs", theirs_SV)):
            nats_S = optax.softmax_cross_entropy_with_integer_labels(logits_SV[:-1], np.asarray(row[1:]))
            nats[name] += float(nats_S.sum())
        # Of theirs there may be more, that are of no token.
        differences.append(np.abs(ours_SV - theirs_SV[:, : ours_SV.shape[1]]).max())
        largest = max(largest, float(np.abs(theirs_SV).max()))
    num_targets = sum(len(row) - 1 for row in rows)
    perplexity = {name: math.exp(total / num_targets) for name, total in nats.items()}
    return {
        "tokens": num_targets,
        "perplexity": perplexity["ours"],
        "their_perplexity": perplexity["theirs"],
        "logits_differ_by": float(max(differences)),
        "largest_logit": largest,
    }


def logits_of_transformers(path: Path) -> Callable[[list[int]], np.ndarray]:
    """Of a row of tokens, in fp32: [S, V]. Raises ConfigError: a library is missing, or can't read the model."""
    check_installed(path)
    import torch

    model = load(path, "AutoModelForCausalLM", dtype=torch.float32)

    def logits_of(row: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([row])).logits[0].numpy()

    return logits_of


def text_rows(trained: TrainedModel, texts: Source | list[Document], max_tokens: int) -> list[list[int]]:
    """The beginnings of documents, as long as a row of evaluation. Raises ConfigError: there is nothing to score."""
    tokenizer, seq_len = trained.tokenizer, trained.config.train.seq_len
    chosen = [texts[index].content for index in evenly(len(texts), -(-max_tokens // seq_len))]
    rows = [[tokenizer.separator_id, *tokenizer.encode(text)][:seq_len] for text in chosen]
    if not (rows := [row for row in rows if len(row) > 1]):
        raise ConfigError(f"--check: no text that rows of {seq_len} tokens can tell the next token of")
    return rows


def main() -> None:
    model, workdir = expanded(_MODEL.value), expanded(_WORKDIR.value)
    # Before the work: what is needed for the comparison.
    if _CHECK.value:
        texts, _ = documents(expanded(_DATA.value) if _DATA.value else None)
        their_logits = logits_of_transformers(model)
    found = {"workdir": str(workdir), **import_pretrained(model, workdir)}
    told = ["{workdir}: {format}, {parameters:,} parameters in {tensors} tensors"]
    if _CHECK.value:
        trained = load_trained(workdir)
        rows = text_rows(trained, texts, _MAX_TOKENS.value)
        found |= compare(trained, their_logits, rows)
        told += [
            "{tokens:,} tokens: perplexity {perplexity:.4f}, of the model itself {their_perplexity:.4f}",
            "logits, up to {largest_logit:.1f}, differ by {logits_differ_by:.1e} at most",
        ]
    print(json.dumps(finite(found)) if _JSON.value else "\n".join(told).format(**found))


if __name__ == "__main__":
    _MODEL = flags.DEFINE_string("model", None, "Folder of safetensors, or .gguf file.", required=True)
    _WORKDIR = flags.DEFINE_string("workdir", None, "The run folder to make; it must not be there yet.", required=True)
    _CHECK = flags.DEFINE_bool("check", False, "Compare it with the model in transformers.")
    _DATA = flags.DEFINE_string("data", None, "Of --check: text in place of the standard library's held-out part.")
    _MAX_TOKENS = flags.DEFINE_integer("max_tokens", 10_000, "Of --check: about so many tokens.", lower_bound=1)
    _JSON = flags.DEFINE_bool("json", False, "Print a JSON line alone.")
    cli.run(main)

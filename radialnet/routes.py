"""The ways of held-out tokens through a trained model: the layers that each one took, its depth, its text."""

import dataclasses
from functools import partial

import jax
import numpy as np
from flax import nnx

from radialnet.config import Config
from radialnet.controllers import Controllers
from radialnet.data import Rows, eval_batches
from radialnet.shards import PADDING, Batch
from radialnet.tokenizer import Tokenizer
from radialnet.train_step import forward_as_evaluated
from radialnet.trained import TrainedModel

# Tokens whose text is kept; tokens of a forward pass at a time.
SHOWN_TOKENS, _TOKENS_AT_A_TIME = 400, 4096
# What is shown of the token between documents, and of one that is a part of a character.
DOCUMENT, PART_OF_CHARACTER = "⟦document⟧", "◌"


@dataclasses.dataclass(frozen=True)
class ShownToken:
    text: str
    layers: tuple[int, ...]  # That it executed, in their order.

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def way(self) -> str:
        return " → ".join(map(str, self.layers)) or "none"


@dataclasses.dataclass(frozen=True)
class Routes:
    """The ways of held-out tokens, in the order of the text, through the model of a checkpoint."""

    step: int
    num_layers: int  # L.
    layer_TN: np.ndarray  # The layer that each executed at each depth step; L for none.
    shown: tuple[ShownToken, ...]  # The first of them.

    @property
    def num_tokens(self) -> int:
        return self.layer_TN.shape[1]

    def use_TL(self) -> np.ndarray:
        """The share of the tokens that execute each layer at each depth step."""
        counts = [np.bincount(layer_N, minlength=self.num_layers + 1)[: self.num_layers] for layer_N in self.layer_TN]
        return np.stack(counts) / self.num_tokens

    def depth_hist_D(self) -> np.ndarray:
        """The share of the tokens that execute 0…T layers."""
        depth_N = (self.layer_TN < self.num_layers).sum(0)
        return np.bincount(depth_N, minlength=len(self.layer_TN) + 1) / self.num_tokens


@partial(jax.jit, static_argnames=("config", "graph"))
def _layers(params, controllers: Controllers, step, batch: Batch, *, config: Config, graph: nnx.GraphDef) -> jax.Array:
    """The layer of each token at each depth step, [T, B, S]."""
    return forward_as_evaluated(config, graph, params, batch, controllers, step).layer_TBS


def read_routes(trained: TrainedModel, rows: Rows, max_tokens: int) -> Routes:
    """The ways of the tokens of the first rows, as many as have `max_tokens` tokens."""
    config, seq_len = trained.config, trained.config.train.seq_len
    rows_at_a_time = min(len(rows), max(1, min(_TOKENS_AT_A_TIME, max_tokens) // seq_len))
    layer_of = partial(_layers, config=config, graph=trained.graph)
    tokens, layers = [], []
    for batch in eval_batches(rows, rows_at_a_time, max(1, max_tokens // (rows_at_a_time * seq_len))):
        layer_TBS = np.asarray(layer_of(trained.params, trained.controllers, np.int32(trained.step), batch))
        is_real_BS = batch["document"] != PADDING
        tokens.append(batch["token"][is_real_BS])
        layers.append(layer_TBS[:, is_real_BS])
    layer_TN = np.concatenate(layers, axis=1)
    shown = shown_tokens(trained.tokenizer, np.concatenate(tokens)[:SHOWN_TOKENS], layer_TN, config.model.pool_size)
    return Routes(trained.step, config.model.pool_size, layer_TN, shown)


def shown_tokens(
    tokenizer: Tokenizer, token_N: np.ndarray, layer_TN: np.ndarray, num_layers: int
) -> tuple[ShownToken, ...]:
    """The text of each token. A character of several tokens stands at the last of them."""
    shown, done, pending = [], [], []
    for token, layer_T in zip(token_N.tolist(), layer_TN.T, strict=False):
        layers = tuple(layer_T[layer_T < num_layers].tolist())
        if token == tokenizer.separator_id:
            text, done, pending = DOCUMENT, [], []
        else:
            # With those before it: alone, a word would lose its space and a part of a character its meaning.
            pending.append(token)
            text = tokenizer.decode(pending, after=done)
            if text.endswith("\ufffd") and len(pending) < 8:
                text = PART_OF_CHARACTER
            else:
                done, pending = [*done, *pending][-16:], []
        shown.append(ShownToken(text, layers))
    return tuple(shown)


def transitions(layer_TN: np.ndarray, num_layers: int) -> np.ndarray:
    """How many tokens went from where to where, [L+1, L+1].

    Rows are the start and the layers, columns the layers and the exit. A step at which a token is idle is passed over.
    """
    counts_FT = np.zeros((num_layers + 1, num_layers + 1), int)
    from_N = np.zeros(layer_TN.shape[1], int)
    for layer_N in layer_TN:
        runs_N = layer_N < num_layers
        np.add.at(counts_FT, (from_N[runs_N], layer_N[runs_N]), 1)
        from_N = np.where(runs_N, layer_N + 1, from_N)
    np.add.at(counts_FT, (from_N, num_layers), 1)
    return counts_FT

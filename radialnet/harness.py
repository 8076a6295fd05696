"""A trained run as a model of the lm-evaluation-harness, `lm_eval`: what its tasks ask of a model.

Texts are scored by the parallel pass, in rows of a few lengths, so that few programs are compiled; they are continued
by `decode`. As in training, the document separator stands before every text.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
import optax
from flax import nnx
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import Collator, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows
from tqdm import tqdm

from radialnet.cli import warn
from radialnet.config import Config
from radialnet.controllers import Controllers
from radialnet.decode import Decoder
from radialnet.decode_requests import Request
from radialnet.sampling import Sampling
from radialnet.sections import ConfigError
from radialnet.shards import PADDING, Batch
from radialnet.train_step import forward_as_evaluated
from radialnet.trained import TrainedModel

MIN_WIDTH = 16  # Of the rows; wider ones are powers of two, and the widest as long as those of training.
# What is read of a task's generation_kwargs: what `Sampling` has, and what the harness makes the same of.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_READ = {*_SAMPLING, *_LENGTHS, "do_sample", "until"}

# The task that a text is of, its tokens with the separator, and how many of its last ones are to be scored.
Text = tuple[str, list[int], int]


@partial(jax.jit, static_argnames=("config", "graph", "max_depth"))
def _score(
    params: dict,
    controllers: Controllers,
    step: jax.Array,
    batch: Batch,
    *,
    config: Config,
    graph: nnx.GraphDef,
    max_depth: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The log-probability of each target, whether it is the most likely token, and the executed depth, [B, S]."""
    output = forward_as_evaluated(config, graph, params, batch, controllers, step, max_depth)
    nats_BS = optax.softmax_cross_entropy_with_integer_labels(output.logits_BSV, batch["target"])
    return -nats_BS, output.logits_BSV.argmax(-1) == batch["target"], output.depth_BS


class RadialLM(TemplateLM):
    """A trained model that answers the requests of tasks, and counts how deep their tokens went.

    Attributes:
        num_tokens: by task, the tokens that were run: contexts, as often as they were, and what follows them, but for
            the last token of a text, which nothing follows.
        num_executed: by task, the layers of the pool that those tokens executed.
        num_cut: by task, the texts that were longer than a row of training and lost their beginning.
    """

    def __init__(self, trained: TrainedModel, batch_size: int, max_depth: int | None = None, exit_bias: float = 0.0):
        """
        Args:
            batch_size: texts at a time.
            max_depth: T in place of the trained one.
            exit_bias: added to the trained exit bias: more makes tokens leave early.
        """
        super().__init__()
        self.trained, self.batch_size, self.exit_bias = trained, batch_size, exit_bias
        self.max_depth = max_depth or trained.config.model.max_depth
        self.max_length = trained.config.train.seq_len
        self.controllers = trained.controllers.lean(exit_bias)
        self.num_tokens, self.num_executed, self.num_cut = Counter(), Counter(), Counter()

    @property
    def eot_token_id(self) -> int:
        return self.trained.tokenizer.separator_id

    def depth(self, task: str) -> float:
        """Mean executed layers of the tokens of a task; NaN where none was run."""
        return self.num_executed[task] / self.num_tokens[task] if self.num_tokens[task] else float("nan")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """The tokens of a text, without the separator."""
        return self.trained.tokenizer.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the log-probability of the continuation, and whether it is the greedy one.

        Raises:
            ConfigError: a continuation alone is longer than a row of training.
        """
        pairs = []
        for request in requests:
            context, continuation = request.args
            encoded = self._encode_pair(context, continuation) if context else ([], self.tok_encode(continuation))
            pairs.append((request.task_name, *encoded))
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As the harness does; but where it would leave the continuation without a token, for its beginning became one
        with the end of the context, the last token is the continuation: what is empty would be certain."""
        of_context, rest = super()._encode_pair(context, continuation)
        if rest or not continuation:
            return of_context, rest
        whole = self.tok_encode(context + continuation)
        return whole[:-1], whole[-1:]

    def _loglikelihood_tokens(
        self, requests: list[tuple[str, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """`loglikelihood` of (task, tokens of the context, tokens of the continuation)."""
        texts = []
        for task, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ConfigError(
                    f"task {task}: a continuation of {len(continuation)} tokens; at most the "
                    f"config.train.seq_len={self.max_length} of the run can be scored at once"
                )
            tokens = [self.eot_token_id, *context, *continuation]
            self.num_cut[task] += len(tokens) > self.max_length + 1
            texts.append((task, tokens[-self.max_length - 1 :], len(continuation)))
        return self._scores(texts, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in windows as long as a row of training.

        As in rows of training, no window sees what another one predicts: the last one begins where the one before
        it ended, and not, as the harness would have it, as early as its length allows.
        """
        texts, owner = [], []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for inputs, targets in get_rolling_token_windows(tokens, self.eot_token_id, self.max_length, 1):
                size = len(targets)
                texts.append((request.task_name, [*inputs[-size:], targets[-1]], size))
                owner.append(index)
        log_p = [log_p for log_p, _ in self._scores(texts, disable_tqdm)]
        return np.bincount(np.asarray(owner, int), log_p, len(requests)).tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, until a stop string, the end of its document or enough tokens."""
        unknown = {(request.task_name, name) for request in requests for name in request.args[1].keys() - _READ}
        for task, name in sorted(unknown):
            warn(f"task {task}: generation_kwargs.{name}: unknown, left out")
        asked = [self._to_request(index, request) for index, request in enumerate(requests)]
        decoder = Decoder(self.trained, min(self.batch_size, len(asked)), self.max_depth, self.exit_bias)
        stages, texts = decoder.decoding.stages, [""] * len(asked)
        with tqdm(total=len(asked), desc="continued", disable=disable_tqdm) as bar:
            for piece in decoder.stream(asked, every=64):
                if done := piece.completion:
                    texts[done.index] = done.text
                    ran_ST = done.ran_ST[:, stages.prelude : stages.first_coda] >= 0
                    self._count(requests[done.index].task_name, ran_ST.sum(1))
                    bar.update()
        return texts

    def _to_request(self, index: int, request: Instance) -> Request:
        """A request to the decoder. A context that leaves no room in a row for the new tokens loses its beginning, but
        never more than half a row is kept free for them: they may go on beyond it."""
        context, given = request.args
        settings = normalize_gen_kwargs(given)
        try:
            sampling = Sampling(seed=index, **{name: settings[name] for name in _SAMPLING if name in settings})
        except ConfigError as error:
            raise ConfigError(f"task {request.task_name}: generation_kwargs.{error}") from None
        prompt = self.tok_encode(context)
        room = max(self.max_length - 1 - settings["max_gen_toks"], self.max_length // 2)
        self.num_cut[request.task_name] += len(prompt) > room
        stop = tuple(text for text in settings["until"] if text)
        return Request(tuple(prompt[-room:]), settings["max_gen_toks"], sampling, stop)

    def _scores(self, texts: Sequence[Text], disable_tqdm: bool) -> list[tuple[float, bool]]:
        """Log-probability of the scored tokens of each text together, and whether each of them is the most likely."""
        by_length, found = Collator(texts, sort_fn=lambda text: -len(text[1])), []
        with tqdm(total=len(texts), desc="scored", disable=disable_tqdm) as bar:
            for some in by_length.get_batched(n=self.batch_size):
                batch = self._side_by_side(some)
                static = {"config": self.trained.config, "graph": self.trained.graph, "max_depth": self.max_depth}
                scores = _score(self.trained.params, self.controllers, self.trained.step, batch, **static)
                for (task, tokens, num_scored), log_p_S, is_greedy_S, depth_S in zip(
                    some, *(np.asarray(array)[: len(some)] for array in scores), strict=True
                ):
                    end = len(tokens) - 1
                    scored = slice(end - num_scored, end)
                    found.append((float(log_p_S[scored].sum(dtype=np.float64)), bool(is_greedy_S[scored].all())))
                    self._count(task, depth_S[:end])
                bar.update(len(some))
        return by_length.get_original(found)

    def _side_by_side(self, texts: Sequence[Text]) -> Batch:
        """Rows of some texts, filled up to one of a few shapes; the first text is the longest."""
        width = max(MIN_WIDTH, 1 << (len(texts[0][1]) - 2).bit_length())
        shape = (self.batch_size, min(width, self.max_length))
        batch = {name: np.zeros(shape, np.int32) for name in ("token", "target")}
        batch["document"] = np.full(shape, PADDING, np.int32)
        batch["position"] = np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1))
        for row, (_, tokens, _) in enumerate(texts):
            end = len(tokens) - 1
            batch["token"][row, :end], batch["target"][row, :end] = tokens[:-1], tokens[1:]
            batch["document"][row, :end] = 0
        return batch

    def _count(self, task: str, depth_N: np.ndarray) -> None:
        self.num_tokens[task] += len(depth_N)
        self.num_executed[task] += int(depth_N.sum())

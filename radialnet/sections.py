"""The sections of a configuration: frozen dataclasses. Defaults and the meaning of each field: `configs/base.py`."""

import dataclasses
import math
import shlex

VIEWS = ("all", "latest", "same_step", "first", "same_layer")
TRAINED_FORMS = ("factored", "flat", "early_exit", "hash_exit", "skip", "mod", "recursion")
# Trained forms whose layers are given: what they learn is when to leave.
EXIT_FORMS = ("early_exit", "hash_exit")
FIXED_FORMS = ("sequential", "cyclic", "random", "hash")
# Step t has layer t mod L, for all tokens that execute it.
IN_ORDER_FORMS = ("sequential", "cyclic", "early_exit", "skip", "mod", "recursion")
GROUPED_BACKENDS = ("block_loop", "ragged_dot", "pallas", "masked_dense")
ATTENTION_BACKENDS = ("tiles", "pallas")
NORMS, MLPS, POSITIONS = ("rms", "layer"), ("swiglu", "relu", "gelu"), ("rotary", "learned")
NETWORKS = ("mlp", "low_rank", "linear")
ESTIMATORS = ("straight_through", "score", "weighted", "dense")
# Of a model's parameters, by name.
PARTS = (
    "embedding", "positions", "prelude", "router", "pool", "coda", "final_norm", "final_norm_bias", "head",
)  # fmt: skip
# Where metrics go besides metrics.jsonl.
WRITERS = ("tensorboard", "wandb", "trackio")
# Entries of a page of the decode cache.
PAGE_SIZE = 16
SOURCES = ("stdlib", "text", "jsonl", "hf", "tfds", "tokens")
# Symbols that rows of the hop task are made of (`hop_task`).
HOPS_ALPHABET = 16


class ConfigError(ValueError):
    """A configuration or an input that can't work. Its message is the one line that the user reads."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    pool_size: int
    max_depth: int
    min_depth: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    d_ff: int
    prelude_layers: int
    coda_layers: int
    num_groups: int
    init: str
    upcycle_from: str
    rope_base: float
    qk_norm: bool
    norm: str
    norm_eps: float
    mlp: str
    biases: bool
    positions: str
    max_positions: int
    dtype: str
    grouped_backend: str
    attention_backend: str
    remat: str

    @property
    def fewest_rounds(self) -> int:
        """Of `recursion`: how often a token goes through the pool at least."""
        return max(1, -(-self.min_depth // self.pool_size))

    @property
    def num_layer_groups(self) -> int:
        """Into how many groups of consecutive layers the pool is cut. Step t has group t, or the last one."""
        return self.num_groups or self.max_depth

    @property
    def head_size(self) -> int:
        return self.d_model // self.num_heads


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    form: str
    estimator: str
    network: str
    hidden: int
    sees_step: bool
    every: int
    prior: str
    hash_span: int
    prior_weight: float
    prior_steps: int
    noise: float
    noise_steps: int
    load_coef: float
    z_coef: float
    depth_loss: str
    depth_coef: float
    depth_target: float
    exit_warmup_steps: int
    depth_ramp_steps: int
    exit_bias_init: float
    exit_bias_rate: float
    exit_training: str
    exit_sees: str
    read_coef: float
    read_every: int
    explore: float
    load_bias_rate: float
    capacity: float
    capacity_every: int

    def hidden_size(self, model: ModelConfig) -> int:
        """Of the router's hidden layer; 0 where it has none."""
        return 0 if self.network == "linear" else self.hidden or model.d_model

    @property
    def is_trained(self) -> bool:
        return self.form in TRAINED_FORMS

    @property
    def gives_layers(self) -> bool:
        """Whether it chooses no layer: that is settled by the step and the tokens."""
        return self.form in EXIT_FORMS

    @property
    def looks_at_states(self) -> bool:
        """Whether a network of it decides anything by the residual stream."""
        return self.is_trained and not (self.gives_layers and self.has_exit_table)

    @property
    def learns_choices(self) -> bool:
        """Whether a layer's update is scaled by what its choice, or survival, has for a gradient: then the backward
        pass needs what the layer gave."""
        return self.is_trained and self.form != "skip" and not (self.gives_layers and self.predicts_benefit)

    @property
    def needs_groups(self) -> bool:
        """Whether it gives or favours layers of the step's group alone."""
        if self.form in ("factored", "flat"):
            return self.prior in ("group", "group_hash")
        return self.form == "hash_exit"

    @property
    def hashes(self) -> bool:
        """Whether a token's hash says, or favours, where it goes."""
        if self.form in ("factored", "flat"):
            return self.prior in ("hash", "group_hash")
        return self.form in ("hash", "hash_exit")

    @property
    def is_in_order(self) -> bool:
        return self.form in IN_ORDER_FORMS

    @property
    def predicts_benefit(self) -> bool:
        return self.is_trained and self.exit_training == "benefit"

    @property
    def has_exit_table(self) -> bool:
        return self.predicts_benefit and self.exit_sees == "token"


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    view: str
    capacity: int
    when_full: str


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: str
    path: str
    subset: str
    split: str
    text_key: str
    mixture: str
    streaming: bool
    tokenizer: str
    vocab_size: int
    eval_fraction: float
    hops_symbols: int
    hops_max: int
    cache_dir: str

    def parts(self) -> list[tuple[float, "DataConfig"]]:
        """Each source and its weight; that is one, but for a mixture. Raises ConfigError: a mixture can't be read."""
        if self.source != "mixture":
            return [(1.0, self)]
        return [self._part(told.strip()) for told in self.mixture.split(";") if told.strip()]

    def _part(self, told: str) -> tuple[float, "DataConfig"]:
        """Of `0.7 jsonl books.jsonl text_key=body`."""
        try:
            weight, source, *words = shlex.split(told)
            weight, path = float(weight), [word for word in words if "=" not in word]
            fields = dict(word.split("=", 1) for word in words if "=" in word)
            if not (0 < weight < math.inf and len(path) <= 1 and fields.keys() <= {"subset", "split", "text_key"}):
                raise ValueError
        except ValueError:
            raise ConfigError(
                f"config.data.mixture: {told!r}: a weight above 0, a source and its path are needed, and after them "
                "what of subset=…, split=…, text_key=… is not that of config.data"
            ) from None
        return weight, dataclasses.replace(self, source=source, path="".join(path), mixture="", **fields)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float
    warmup_steps: int
    final_fraction: float
    router_scale: float
    b2: float
    weight_decay: float
    group_decay: float
    group_decay_init: float
    group_decay_steps: int
    clip_norm: float
    frozen: str
    low_rank: int

    @property
    def frozen_parts(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.frozen.split(",") if name.strip())


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    num_steps: int
    batch_size: int
    seq_len: int
    seed: int
    max_skipped_steps: int
    spike_sigmas: float
    stall_factor: float
    teacher: str
    distill_weight: float
    accumulate_steps: int


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int
    fsdp: int
    pool: int
    tensor: int
    pool_dispatch: str


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every_steps: int
    num_batches: int


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int
    keep: int
    keep_every: int


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every_steps: int
    writers: str
    project: str
    profile_steps: str
    alarms: str
    sample_prompt: str
    sample_tokens: int

    @property
    def writer_names(self) -> list[str]:
        return [name.strip() for name in self.writers.split(",") if name.strip()]

    @property
    def profiled(self) -> tuple[int, int] | None:
        """The first and the last training step of the trace, if there is to be one."""
        return tuple(map(int, self.profile_steps.split(","))) if self.profile_steps else None


@dataclasses.dataclass(frozen=True)
class Sections:
    """All of them."""

    model: ModelConfig
    router: RouterConfig
    cache: CacheConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    mesh: MeshConfig
    log: LogConfig

    @property
    def has_exits(self) -> bool:
        """Whether a router chooses the depth, once exits are open."""
        return self.router.is_trained and self.model.min_depth < self.model.max_depth

    @property
    def holds_depth(self) -> bool:
        """Whether the exit bias holds the mean depth."""
        return self.has_exits and self.router.exit_bias_rate > 0

    def view_over(self, max_depth: int) -> str:
        """`cache.view` over so many depth steps, or the one that shows the same and has less to look through."""
        return view_over(self.cache.view, self.router.is_in_order, self.model.pool_size, max_depth)


def view_over(view: str, is_in_order: bool, pool_size: int, max_depth: int) -> str:
    """`Sections.view_over` of a model that knows no more of its config."""
    # Where each layer comes once, all entries of a layer are of one step.
    comes_once = is_in_order and max_depth <= pool_size
    return "same_step" if view == "same_layer" and comes_once else view

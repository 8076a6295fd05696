"""The router: at each depth step it sends every active token to a layer of the pool or to the output node.

A router that learns routes gives L layer logits and an exit logit e, in two forms that are written with the same two
probabilities, of leaving and of each layer when staying:

    p_layer = softmax(layer logits + prior)
    p_exit  = sigmoid(e + b)                                 factored
    p_exit  = sigmoid(e + b - logsumexp(layer logits + prior))   flat: the softmax over all L+1 nodes, written out

so that a node's probability is p_exit or (1 - p_exit) · p_layer. They differ in the hard choice as well: `flat` takes
the largest of the L+1 nodes, `factored` decides to leave (p_exit > 1/2) before it picks the largest layer.
Everything here is fp32.
"""

from collections.abc import Callable
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from radialnet.controllers import Controllers, Schedule
from radialnet.layers import rms_norm
from radialnet.sections import ModelConfig, RouterConfig
from radialnet.sharding import ALONE, Axes, Parallel


@flax.struct.dataclass
class Decision:
    """The hard choice at one depth step."""

    layer_BS: jax.Array  # 0…L-1, also for tokens that don't execute it.
    exits_BS: jax.Array
    # Forms in which tokens may sit a step out (`skip`, `mod`): those that do.
    idles_BS: jax.Array | None = None
    # Forms in which the depth is chosen once: the depth step at which each token leaves.
    leaves_at_BS: jax.Array | None = None


@flax.struct.dataclass
class Plan:
    """What of a step is kept for those after it; most forms keep nothing."""

    leaves_at_BS: jax.Array | None = None  # `Decision.leaves_at_BS`.
    logits_BSN: jax.Array | None = None  # Of the nodes, where `router.every` is more than 1.


@flax.struct.dataclass
class StepInputs:
    """What a router looks at in a depth step, beside the residual stream."""

    recent_BSW: jax.Array  # `recent_tokens`, `router.hash_span` of them.
    begins_BS: jax.Array  # The first tokens of their documents.
    active_BS: jax.Array
    depth_step: jax.Array
    rng_B: jax.Array  # A key for each row, so that what is drawn for it doesn't depend on the others.
    plan: Plan  # `Route.plan` of the step before.
    # Choices to keep to, made before from the same inputs: a backward pass that computes the probabilities again must
    # not choose again, for the last bit of a logit could choose otherwise.
    decided: Decision | None = None

    @property
    def token_BS(self) -> jax.Array:
        return self.recent_BSW[..., 0]


@flax.struct.dataclass
class Route:
    """Where each token goes at one depth step. A token that neither executes nor exits is idle for the step."""

    layer_BS: jax.Array  # 0…L-1; L for a token that executes nothing.
    executes_BS: jax.Array
    exits_BS: jax.Array
    decided: Decision
    plan: Plan
    log_p_layer_BS: jax.Array  # Of the chosen layer, given that the token stays.
    log_survive_BS: jax.Array  # log(1 - p_exit); 0 where no exit is allowed.
    p_layer_BSL: jax.Array
    layer_lse_BS: jax.Array  # logsumexp of the layer logits without prior, for the z-loss.
    exit_logit_BS: jax.Array  # e, without the exit bias; 0 where given routes don't look, and of `recursion`.
    z_exit_BS: jax.Array  # e for the z-loss; 0 where e predicts something, whose size is given by that.
    leave_logit_BS: jax.Array  # e + b; of `recursion` with b for each round after the first.
    can_exit: jax.Array  # Whether an exit is allowed at this step at all.
    predictor_nats_BS: jax.Array  # Loss of a predictor of the choice that looks at earlier tokens only; else 0.

    @classmethod
    def of(cls, decided: Decision, active_BS: jax.Array, num_layers: int, **more) -> "Route":
        """The route of a decision; what is not given is as if nothing was learned: log p = 0, logits 0, no exit."""
        zeros_BS, shape = jnp.zeros(active_BS.shape), active_BS.shape
        executes_BS = active_BS & ~decided.exits_BS
        if decided.idles_BS is not None:
            executes_BS &= ~decided.idles_BS
        of_layer = dict.fromkeys(("log_p_layer_BS", "log_survive_BS", "layer_lse_BS", "predictor_nats_BS"), zeros_BS)
        of_exit = dict.fromkeys(("exit_logit_BS", "leave_logit_BS", "z_exit_BS"), zeros_BS)
        one_hot = {} if "p_layer_BSL" in more else {"p_layer_BSL": jax.nn.one_hot(decided.layer_BS, num_layers)}
        assert decided.layer_BS.shape == shape
        return cls(
            layer_BS=jnp.where(executes_BS, decided.layer_BS, num_layers),
            executes_BS=executes_BS,
            exits_BS=decided.exits_BS,
            decided=decided,
            **{**of_layer, **of_exit, **one_hot, "can_exit": jnp.bool_(False), "plan": Plan(), **more},
        )


def group_of_layer(num_layers: int, num_groups: int) -> np.ndarray:
    """The number of each layer's group, [L]: groups of consecutive layers, as equal as can be."""
    return np.arange(num_layers) * num_groups // num_layers


def in_group(num_layers: int, num_groups: int, depth_step: jax.Array) -> jax.Array:
    """Whether each layer is of a depth step's group, [L]. Steps beyond the last group share it."""
    return group_of_layer(num_layers, num_groups) == jnp.minimum(depth_step, num_groups - 1)


def prior_logits(kind: str, num_layers: int, num_groups: int, depth_step: jax.Array) -> jax.Array:
    """1 for the layers that a prior favours at a depth step whatever the token, else 0; none of a hash. [L]"""
    if kind == "sequential":
        return (jnp.arange(num_layers) == depth_step % num_layers).astype(jnp.float32)
    if kind == "group":
        return in_group(num_layers, num_groups, depth_step).astype(jnp.float32)
    return jnp.zeros(num_layers, jnp.float32)


class Router(nnx.Module):
    """RMSNorm, plus a step embedding, then an MLP to the L+1 nodes; `router.network`, `sees_step` and `every` make it
    cheaper."""

    def __init__(
        self,
        model_cfg: ModelConfig,
        cfg: RouterConfig,
        rngs: nnx.Rngs,
        parallel: Parallel = ALONE,
        num_outputs: int | None = None,
        vocab_size: int = 0,
    ):
        """
        Args:
            num_outputs: of its network, L + 1 by default; 0 where what predicts exits is all that there is.
            vocab_size: of `router.exit_sees="token"`, which has a number for each token.
        """
        d_model, num_layers = model_cfg.d_model, model_cfg.pool_size
        num_outputs = num_layers + 1 if num_outputs is None else num_outputs
        self.cfg, self.num_layers, self.num_outputs, self.parallel = cfg, num_layers, num_outputs, parallel
        self.min_depth, self.max_depth = model_cfg.min_depth, model_cfg.max_depth
        self.num_layer_groups = model_cfg.num_layer_groups
        self.norm_eps = model_cfg.norm_eps
        if not cfg.is_trained:
            return

        if cfg.looks_at_states:
            self.norm = nnx.Param(jnp.ones(d_model), axes=(None,))
            if cfg.sees_step:
                self.step_embedding = _normal(rngs, model_cfg.max_depth, d_model, 1.0, (None, "embed"))
        if num_outputs:
            # Small: at first all layers are nearly as likely, and a token's exit depends on the exit bias alone.
            self.hidden, self.out = self._new_network(model_cfg, num_outputs, 0.1, rngs)
        self.out_bias = nnx.Param(jnp.zeros(num_outputs or 1), axes=(None,))
        if cfg.has_exit_table:
            assert vocab_size > 0
            self.exit_table = nnx.Param(jnp.zeros((model_cfg.max_depth, vocab_size)), axes=(None, None))
        elif cfg.predicts_benefit:
            self.exit_hidden, self.exit_out = self._new_network(model_cfg, 1, 0.0, rngs)

    def _new_network(
        self, model_cfg: ModelConfig, num_outputs: int, scale: float, rngs: nnx.Rngs
    ) -> tuple[nnx.Param | None, nnx.Param]:
        """Both matrices of a network; of a linear one the second alone. `scale`: of its logits."""
        d_model, width = model_cfg.d_model, self.cfg.hidden_size(model_cfg)
        if self.cfg.network == "linear":
            return None, _normal(rngs, d_model, num_outputs, scale * d_model**-0.5, ("embed", None))
        hidden = _normal(rngs, d_model, width, d_model**-0.5, ("embed", "hidden"))
        return hidden, _normal(rngs, width, num_outputs, scale * width**-0.5, ("hidden", None))

    def __call__(self, h_BSD: jax.Array, step: StepInputs, controllers: Controllers, at: Schedule) -> Route:
        """Route the active tokens. A depth step beyond the trained max depth is treated as the last trained one.

        Args:
            h_BSD: the residual stream.
        """
        active_BS, depth_step, decided = step.active_BS, step.depth_step, step.decided
        rng_B = keys_at_step(step.rng_B, depth_step)
        if not self.cfg.is_trained:
            return self._fixed_route(self._guide(step, depth_step), active_BS, depth_step, rng_B)
        trained_step = jnp.minimum(depth_step, self.max_depth - 1)
        plan = step.plan
        if self.cfg.every == 1:
            logits_BSN = self._look(h_BSD, step.token_BS, trained_step)
        else:
            is_looking = depth_step % self.cfg.every == 0
            given = h_BSD, step.token_BS, trained_step
            logits_BSN = jax.lax.cond(is_looking, self._look, lambda *_: plan.logits_BSN, *given)
            plan = Plan(logits_BSN=logits_BSN)
        layer_logits_BSL, exit_logit_BS = logits_BSN[..., :-1], logits_BSN[..., -1]
        biased_BSL = layer_logits_BSL + at.prior_weight * self._prior(self._guide(step, trained_step), trained_step)
        leave_BS = exit_logit_BS + controllers.exit_bias
        # The logit of leaving: against 0 in the factored form, against all layers together in the flat one.
        odds_BS = leave_BS if self.cfg.form != "flat" else leave_BS - jax.nn.logsumexp(biased_BSL, axis=-1)

        can_exit = self._can_exit(depth_step, at)
        if decided is None:
            may_exit_BS = self._may_exit(step, at)
            decided = self._decide(biased_BSL + controllers.load_bias, leave_BS, may_exit_BS, at, rng_B)
        log_p_BSL = jax.nn.log_softmax(biased_BSL, axis=-1)
        return Route.of(
            decided,
            active_BS,
            self.num_layers,
            log_p_layer_BS=jnp.take_along_axis(log_p_BSL, decided.layer_BS[..., None], axis=-1)[..., 0],
            log_survive_BS=jnp.where(can_exit, jax.nn.log_sigmoid(-odds_BS), 0),
            p_layer_BSL=jnp.exp(log_p_BSL),
            layer_lse_BS=jax.nn.logsumexp(layer_logits_BSL, axis=-1),
            exit_logit_BS=exit_logit_BS,
            z_exit_BS=jnp.zeros_like(exit_logit_BS) if self.cfg.predicts_benefit else exit_logit_BS,
            leave_logit_BS=leave_BS,
            can_exit=can_exit,
            plan=plan,
        )

    def no_plan(self, shape: tuple[int, ...]) -> Plan:
        """That of the first step."""
        return Plan() if self.cfg.every == 1 else Plan(logits_BSN=jnp.zeros((*shape, self.num_outputs)))

    def _can_exit(self, depth_step: jax.Array, at: Schedule) -> jax.Array:
        """With min and max depth equal exits are off, at a larger max depth in evaluation too: none was trained."""
        return at.may_exit & (self.min_depth < self.max_depth) & (depth_step >= self.min_depth)

    def _may_exit(self, step: StepInputs, at: Schedule) -> jax.Array:
        """Of each token, [B, S]: those that explore do not, at any step."""
        may_exit_BS = step.active_BS & self._can_exit(step.depth_step, at)
        if not self.cfg.explore:
            return may_exit_BS
        return may_exit_BS & (draw(jax.random.uniform, step.rng_B, may_exit_BS.shape) >= at.explore)

    def _look(self, h_BSD: jax.Array, token_BS: jax.Array, trained_step: jax.Array) -> jax.Array:
        """The logits of the nodes."""
        x_BSD = self._inputs(h_BSD, trained_step)
        logits_BSN = self._logits(x_BSD)
        if not self.cfg.predicts_benefit:
            return logits_BSN
        # It learns to predict, and changes nothing of what it predicts from.
        predicted_BS = self._benefit(jax.lax.stop_gradient(x_BSD), token_BS, trained_step)
        return jnp.concatenate([logits_BSN[..., :-1], predicted_BS[..., None]], axis=-1)

    def _benefit(self, x_BSD: jax.Array | None, token_BS: jax.Array, trained_step: jax.Array) -> jax.Array:
        """e of exits by benefit, [B, S], from the network's inputs, or by the token alone."""
        if self.cfg.has_exit_table:
            predicted_BS = self.exit_table[...][trained_step, token_BS]
        else:
            predicted_BS = self._network(x_BSD, self.exit_hidden, self.exit_out)[..., 0]
        return predicted_BS + self.out_bias[...][-1]

    def _inputs(self, h_BSD: jax.Array, trained_step: jax.Array) -> jax.Array:
        normed_BSD = rms_norm(h_BSD.astype(jnp.float32), self.norm[...], self.norm_eps)
        return normed_BSD + self.step_embedding[...][trained_step] if self.cfg.sees_step else normed_BSD

    def _guide(self, step: StepInputs, depth_step: jax.Array) -> jax.Array:
        """The tokens whose hash counts at a depth step, [B, S]: by turns each token itself and those before it."""
        span = self.cfg.hash_span
        assert step.recent_BSW.shape[-1] == span
        return jnp.take(step.recent_BSW, depth_step % span, axis=-1)

    def _prior(self, guide_BS: jax.Array, depth_step: jax.Array) -> jax.Array:
        """1 for the layers that the prior favours, else 0: [L], or [B, S, L] where it goes by the token."""
        if self.cfg.prior in ("hash", "group_hash"):
            num_groups = 1 if self.cfg.prior == "hash" else self.num_layer_groups
            return jax.nn.one_hot(hashed_layer(guide_BS, depth_step, self.num_layers, num_groups), self.num_layers)
        return prior_logits(self.cfg.prior, self.num_layers, self.num_layer_groups, depth_step)

    def _logits(self, x_BSD: jax.Array) -> jax.Array:
        return self._network(x_BSD, self.hidden, self.out) + self.out_bias[...]

    def _network(self, x_BSD: jax.Array, hidden: nnx.Param | None, out: nnx.Param) -> jax.Array:
        """`router.network`, in fp32 on accelerators too, where the default is less."""
        matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        if hidden is None:
            return matmul(x_BSD, out[...])
        hidden_BSF = matmul(x_BSD, hidden[...])
        if self.cfg.network == "mlp":
            hidden_BSF = jax.nn.gelu(hidden_BSF)
        return self.parallel.sum_tensor(matmul(hidden_BSF, out[...]))

    def _decide(self, selection_BSL, leave_BS, may_exit_BS, at: Schedule, rng_B) -> Decision:
        """The hard choice, by the logits and the selection noise."""
        if self.cfg.noise > 0:
            layer_rng_B, exit_rng_B = jnp.moveaxis(jax.vmap(jax.random.split)(rng_B), 1, 0)
            selection_BSL += at.noise * draw(jax.random.gumbel, layer_rng_B, selection_BSL.shape)
            # The two forms compare the exit with a constant and with a noisy maximum.
            exit_noise = jax.random.gumbel if self.cfg.form == "flat" else jax.random.logistic
            leave_BS += at.noise * draw(exit_noise, exit_rng_B, leave_BS.shape)
        threshold_BS = 0.0 if self.cfg.form != "flat" else selection_BSL.max(axis=-1)
        layer_BS = jnp.argmax(selection_BSL, axis=-1).astype(jnp.int32)
        return Decision(layer_BS, may_exit_BS & (leave_BS > threshold_BS))

    def _fixed_route(self, guide_BS, active_BS, depth_step, rng_B) -> Route:
        shape, num_layers = guide_BS.shape, self.num_layers
        if self.cfg.form in ("sequential", "cyclic"):
            layer_BS = jnp.full(shape, depth_step % num_layers, jnp.int32)
        elif self.cfg.form == "random":
            layer_BS = draw(partial(jax.random.randint, minval=0, maxval=num_layers, dtype=jnp.int32), rng_B, shape)
        else:
            layer_BS = hashed_layer(guide_BS, depth_step, num_layers)
        return Route.of(Decision(layer_BS, jnp.zeros(shape, bool)), active_BS, self.num_layers)


def _normal(rngs: nnx.Rngs, rows: int, columns: int, scale: float, axes: Axes) -> nnx.Param:
    # What begins at 0 draws nothing, so that it takes no number from what is drawn after it.
    drawn = jax.random.normal(rngs.params(), (rows, columns)) * scale if scale else jnp.zeros((rows, columns))
    return nnx.Param(drawn, axes=axes)


def hashed_layer(token_BS: jax.Array, depth_step: jax.Array, num_layers: int, num_groups: int = 1) -> jax.Array:
    """The layer of a depth step's group that the token's hash says, another one at each step (arXiv 2106.04426)."""
    in_group_L = in_group(num_layers, num_groups, depth_step)
    return jnp.argmax(in_group_L) + _hash(token_BS, depth_step, in_group_L.sum())


def recent_tokens(token_BS: jax.Array, start_BS: jax.Array, span: int) -> jax.Array:
    """Each token and those before it in its document, the newest first, [B, S, W]; W = `router.hash_span`. The first
    one that the row has of a document stands for those that would be before it.

    Args:
        start_BS: that first token, by its index in the row.
    """
    index_BSW = jnp.arange(token_BS.shape[1])[None, :, None] - jnp.arange(span)
    return jnp.take_along_axis(token_BS[..., None], jnp.maximum(index_BSW, start_BS[..., None]), axis=1)


def _hash(token_BS: jax.Array, depth_step: jax.Array, num_choices: jax.Array) -> jax.Array:
    """A number below `num_choices` by token id and step: the murmur3 finaliser."""
    step = (jnp.asarray(depth_step, jnp.uint32) + 1) * jnp.uint32(0x85EBCA77)
    x = token_BS.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + step
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return ((x ^ (x >> 16)) % num_choices.astype(jnp.uint32)).astype(jnp.int32)


def keys_at_step(rng_B: jax.Array, depth_step: jax.Array) -> jax.Array:
    """The keys of rows at a depth step, where each has its own."""
    return jax.vmap(lambda rng: jax.random.fold_in(rng, depth_step))(rng_B)


def row_keys(rng: jax.Array, first_row: jax.Array | int, num_rows: int) -> jax.Array:
    """A key for each row of a batch, by its number: the same whichever device has the row."""
    return jax.vmap(lambda row: jax.random.fold_in(rng, row))(first_row + jnp.arange(num_rows))


def draw(distribution: Callable[..., jax.Array], rng_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random numbers [B, …], those of each row by its own key."""
    return jax.vmap(lambda rng: distribution(rng, shape=shape[1:]))(rng_B)


def choice_gate(log_p: jax.Array, estimator: str) -> jax.Array:
    """The factor on a chosen update that carries the gradient of the choice, by estimator.

    `straight_through`, `dense`: value 1, gradient of p (arXiv 1308.3432). `score`: value 1, gradient of log p, the
    score function of REINFORCE. `weighted`: value p (Switch, arXiv 2101.03961).
    """
    if estimator == "score":
        return jnp.exp(log_p - jax.lax.stop_gradient(log_p))
    p = jnp.exp(log_p)
    return p if estimator == "weighted" else p + jax.lax.stop_gradient(1 - p)

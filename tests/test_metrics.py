import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radialnet.baseline import VOCAB as BASELINE_VOCAB
from radialnet.baseline import dense_logits, dense_params
from radialnet.metrics import BatchSums, add, figures, flops_per_token, route_mutual_information
from tests.tiny import VOCAB, Model, make_batch, make_config, zero_sums


def test_mutual_information_of_known_routings():
    rng = np.random.default_rng(0)
    independent = rng.multinomial(20_000, np.full(12 * 4, 1 / 48)).reshape(1, 12, 4)
    assert route_mutual_information(independent) < 0.002
    # Each token id has a layer of its own: the entropy of the layer.
    determined = np.zeros((2, 12, 4))
    determined[:, np.arange(12), np.arange(12) % 4] = 500
    assert route_mutual_information(determined) == pytest.approx(np.log(4), abs=0.01)
    # The layer follows the step alone: given the step, nothing is left to know.
    by_step = np.zeros((2, 12, 4))
    by_step[0, :, 1] = by_step[1, :, 3] = 100
    assert route_mutual_information(by_step) == 0
    # Steps count by their executions.
    mixed = np.stack([determined[0], by_step[0] * 5])
    assert route_mutual_information(mixed) == pytest.approx(np.log(4) / 2, abs=0.01)
    assert route_mutual_information(np.zeros((2, 12, 4))) == 0


def test_small_samples_show_little_information_where_there_is_none():
    """Uncorrected, 60 executions of 12 tokens by 4 layers show about 0.3 nats."""
    rng = np.random.default_rng(0)
    found = [route_mutual_information(rng.multinomial(60, np.full(48, 1 / 48)).reshape(1, 12, 4)) for _ in range(200)]
    assert np.mean(found) < 0.06


def sums_of(config, seed):
    model, batch = Model(config).with_mixed_exits(), make_batch(config, seed, packed=True)
    routing = model(batch).routing
    num_targets = jnp.float32(batch["is_target"].sum())
    return BatchSums({"loss": 3 * num_targets, "ce": 2 * num_targets}, num_targets, 4 * num_targets, routing)


def test_figures_of_sums():
    config = make_config()
    sums = add(sums_of(config, 0), sums_of(config, 1))
    found = figures(sums)
    assert found["loss"] == pytest.approx(3) and found["ce"] == pytest.approx(2)
    assert found["bpb"] == pytest.approx(2 / np.log(2) / 4)
    assert sum(found["depth_hist"]) == pytest.approx(1) and len(found["depth_hist"]) == 4
    assert found["depth"] == pytest.approx(np.dot(found["depth_hist"], range(4)))
    assert found["depth"] == pytest.approx(np.sum(found["load_by_step"]))
    assert sum(found["load"]) == pytest.approx(1) and len(found["load"]) == 5
    assert 0 < found["padding"] < 1
    load = np.asarray(found["load"])[np.asarray(found["load"]) > 0]
    assert found["load_entropy"] == pytest.approx(-(load * np.log(load)).sum() / np.log(5))


def test_an_interval_of_skipped_steps_has_no_loss():
    """Its sums are zero; a loss of 0 would be a perfect one."""
    zero = jnp.float32(0)
    found = figures(BatchSums({"loss": zero, "ce": zero}, zero, zero, zero_sums(3, 5)))
    for name in ("loss", "ce", "bpb", "depth"):
        assert np.isnan(found[name])


def count_flops(function, *arguments) -> int:
    """2 per multiply-add of every matrix product of a program without loops."""

    def count(jaxpr) -> int:
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                shape = equation.invars[0].aval.shape
                total += 2 * equation.outvars[0].aval.size * int(np.prod([shape[axis] for axis in contracted]))
        return total

    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_flop_model_against_a_plain_program():
    """A row through a router and one layer twice, and the head, as products of matrices of these shapes."""
    config = make_config(model__max_depth=2, cache__view="all", router__hidden=9)
    seq, d_model, q_width, kv_width, d_ff = 13, 24, 24, 8, 20
    h = jnp.ones((seq, d_model))

    def layer_and_router(num_slots):
        q, k, v = h @ jnp.ones((d_model, q_width)), h @ jnp.ones((d_model, kv_width)), h @ jnp.ones((d_model, kv_width))
        # The half of the slots that causality leaves on average.
        keys, values = jnp.ones((4, num_slots, 6)), jnp.ones((4, num_slots, 6))
        mixed = jnp.einsum("hst,htk->hsk", jnp.einsum("hsk,htk->hst", q.reshape(4, seq, 6), keys), values)
        mlp = (h @ jnp.ones((d_model, d_ff))) * (h @ jnp.ones((d_model, d_ff)))
        routed = (h @ jnp.ones((d_model, 9))) @ jnp.ones((9, 6))
        return q, k, v, mixed, h @ jnp.ones((q_width, d_model)), mlp @ jnp.ones((d_ff, d_model)), routed

    half = (seq + 1) // 2
    steps = [count_flops(lambda t=t: layer_and_router(t * half)) for t in (1, 2)]
    head = count_flops(lambda: h @ jnp.ones((d_model, VOCAB)))
    assert flops_per_token(config, VOCAB, [1, 1]) == pytest.approx((sum(steps) + head) / seq)


def test_flops_follow_the_depth():
    """Half of the tokens leave after one layer, the others never do: by hand, for each view."""
    layer, attention, router = 2 * (24 * (24 + 16) + 24 * 24 + 3 * 24 * 20), 4 * 24 * 14 / 2, 2 * 24 * (24 + 6)
    head = 2 * 24 * VOCAB
    # The others decide three times, those that leave at the second decision twice.
    seen = {"all": 1 + 0.5 * 1.5 + 0.5 * 2, "latest": 2, "first": 2, "same_step": 1 + 0.25 + 0.25}
    for view, entries in seen.items():
        found = flops_per_token(make_config(cache__view=view), VOCAB, [1, 0.5, 0.5])
        assert found == pytest.approx(2 * layer + entries * attention + 2.5 * router + head), view


def test_a_token_that_skipped_the_first_step_is_seen_in_latest_once_it_executed_another():
    config = make_config(router__form="skip", model__min_depth=0, cache__view="latest")
    late, early = (flops_per_token(config, VOCAB, executes_T) for executes_T in ([0.1, 0.9, 0.9], [0.9, 0.9, 0.1]))
    attention = 4 * 24 * 14 / 2
    # By the tokens that have an entry at each step: 0.1, 0.9, 0.9, and 0.9 at all three.
    assert late - early == pytest.approx(attention * (0.1 * 0.1 - 0.9 * 0.9 + 0.9 * 0.9 - 0.1 * 0.9))


def test_flop_model_against_what_xla_counts():
    """Of a dense transformer of realistic width, written plainly: within 2 %. XLA counts all of S x S."""
    config = make_config(
        model__d_model=256,
        model__num_heads=4,
        model__num_kv_heads=4,
        model__d_ff=1024,
        model__pool_size=3,
        train__seq_len=64,
        router__form="sequential",
        cache__view="latest",
    )
    token_BS = jnp.zeros((2, 64), jnp.int32)
    program = jax.jit(lambda params: dense_logits(params, token_BS, config)).lower(dense_params(config)).compile()
    counted = program.cost_analysis()["flops"] / token_BS.size
    beyond_causal = 3 * 4 * 256 * 63 / 2
    model = flops_per_token(config, BASELINE_VOCAB, [1, 1, 1]) + beyond_causal
    assert model == pytest.approx(counted, rel=0.02)

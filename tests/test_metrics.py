import jax.numpy as jnp
import numpy as np
import pytest

from radialnet.metrics import BatchSums, add, figures, route_mutual_information
from tests.tiny import Model, make_batch, make_config, zero_sums


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

import jax.numpy as jnp
import numpy as np

from radialnet.layers import rms_norm, rope, rotation
from tests.tiny import make_config

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def test_rope_scores_depend_on_the_distance_only():
    q, k = normal(1, 1, 8), normal(1, 1, 8)
    config = make_config(model__d_model=48, model__rope_base=100.0).model
    assert config.head_size == 8

    def turned(x, at):
        return rope(x, rotation(jnp.array([at]), config))

    def score(i, j):
        return float(jnp.sum(turned(q, i) * turned(k, j)))

    np.testing.assert_allclose(score(9, 4), score(25, 20), rtol=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3
    np.testing.assert_array_equal(turned(q, 0), q)
    # The slowest pair of four, (3, 7), turns by 1/100^(3/4) of a radian a position.
    np.testing.assert_allclose(turned(jnp.eye(8)[3][None, None], 1)[0, 0, 7], np.sin(100**-0.75), rtol=1e-5)


def test_rms_norm_is_fp32_inside_and_keeps_the_dtype():
    x = 1000 * normal(3, 300)
    wanted = x / np.sqrt((x**2).mean(-1, keepdims=True)) * 2
    np.testing.assert_allclose(rms_norm(x, 2.0, 1e-6), wanted, rtol=1e-5)
    half = rms_norm(jnp.asarray(x, jnp.bfloat16), 2.0, 1e-6)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), wanted, rtol=0.02)

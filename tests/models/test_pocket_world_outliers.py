"""Outlier channels folded into pocket world's weights: another K and V, the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.pocket_world.config import PocketWorldConfig
from models.pocket_world.modeling import PocketWorld
from models.pocket_world.outliers import with_outliers

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def outputs(model):
    """Predicted patches, K and V of two frames that attend to each other, with RoPE."""
    cfg = model.cfg
    rng = np.random.default_rng(0)
    tokens = 2 * cfg.tokens_per_frame
    x = jnp.asarray(rng.normal(size=(1, tokens, cfg.token_channels)), jnp.float32)
    feature = jnp.asarray(rng.normal(size=(1, 2, cfg.features)), jnp.float32)
    position = jnp.asarray(rng.normal(size=(1, tokens, 4)) * 3, jnp.float32)

    def attend(_, q, k, v):
        rope = cfg.rope()
        q, k = (rope.rotate(a.swapaxes(1, 2), rope.table(position)) for a in (q, k))
        logits = jnp.einsum("bhqd,bhtd->bhqt", q, k) / np.sqrt(cfg.head_dim)
        return jnp.einsum("bhqt,bthd->bqhd", jax.nn.softmax(logits, -1), v)

    return model(x, jnp.full((1, 2), 0.5), feature, attend)


@pytest.fixture(scope="module")
def model():
    return PocketWorld(PocketWorldConfig.smoke(), rngs=nnx.Rngs(0))


def test_the_function_stays_and_channels_grow(model):
    plain, (k, v) = outputs(model)
    folded, (more_k, more_v) = outputs(with_outliers(model, 8.0, 4))
    np.testing.assert_array_equal(plain, folded)
    for small, large in ((k, more_k), (v, more_v)):
        ratio_LD = np.asarray(large / small)[:, 0, 0, 0]
        np.testing.assert_array_equal((ratio_LD == 8).sum(1), 4)
        np.testing.assert_array_equal((ratio_LD == 1).sum(1), ratio_LD.shape[1] - 4)


def test_any_factor_keeps_the_function_nearly(model):
    plain, folded = outputs(model)[0], outputs(with_outliers(model, 13.0, 6, seed=2))[0]
    np.testing.assert_allclose(plain, folded, atol=2e-5)


def test_bad_settings_name_themselves(model):
    with pytest.raises(ValueError, match=r"factor=0 is not accepted"):
        with_outliers(model, 0)
    with pytest.raises(ValueError, match=r"channels=3 is not accepted: give 0, 2, ... 128"):
        with_outliers(model, channels=3)

"""Shapes and dtypes in the signatures of the codecs are what really goes in and out."""

import subprocess
import sys
import textwrap


def test_annotations_hold():
    """Shapes and dtypes in the signatures are checked against a run of every preset."""
    program = """
        from jaxtyping import install_import_hook
        with install_import_hook("qvg_jax", "beartype.beartype"):
            from qvg_jax.codecs import accounting, presets
            from qvg_jax.codecs.smoothing.lloyd import assign
        import jax, jax.numpy as jnp
        x = jnp.linspace(-1, 1, 2 * 96 * 128).reshape(1, 2, 96, 128).astype(jnp.bfloat16)
        for name in [*presets.PRESETS, *presets.PAIRS]:
            clusters = any(word in name for word in ("qvg", "midrise", "kmeans", "auto", "dither"))
            small = {"num_centroids": 4} if clusters else {}
            for codec in presets.pair(name, **small):
                packed, _ = jax.eval_shape(codec.encode, x, codec.init(x.shape, x.dtype))
                jax.eval_shape(codec.decode, packed)
                accounting.bits_per_element(codec, x.shape)
        try:
            assign(x[0], x[0])
        except Exception as error:
            print("checked", type(error).__name__)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.startswith("checked TypeCheckError"), run.stdout

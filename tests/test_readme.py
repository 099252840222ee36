"""The README's code runs as it is pasted."""

import jax.numpy as jnp

from tests.support.pages import ROOT, code_blocks


def test_the_snippet_runs_and_saves_memory(capsys):
    (snippet,) = code_blocks(ROOT / "README.md", "python")
    names = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert names["size"].tokens == 32 * 64
    assert int(names["cache"].num_spans) == 3
    assert names["size"].in_use.total * 2 < names["size"].bf16
    out = names["out_LBTHD"]
    assert out.shape == (2, 1, 64, 4, 128) and bool(jnp.isfinite(out).all())
    assert "2048 tokens" in capsys.readouterr().out

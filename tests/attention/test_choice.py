"""What serves a call of attend, what refuses it, and how that is said."""

import jax
import jax.numpy as jnp
import pytest

import qvg_jax as qvg
from qvg_jax import backends
from qvg_jax.attention import choice, cudnn
from qvg_jax.backends import Candidate, resolve
from qvg_jax.cache.key_bias import KeyBias


def cache_of(codec="qvg:num_centroids=8", head_dim=128, **settings):
    key_codec, value_codec = qvg.presets.parse_pair(codec)
    return qvg.KVCache.create(
        heads=2, head_dim=head_dim, block_tokens=32, span_blocks=2, max_spans=2, pos_dims=0,
        key_codec=key_codec, value_codec=value_codec, **settings,
    )  # fmt: skip


def queries(head_dim=128, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((1, 32, 2, head_dim), dtype)


def gpu(monkeypatch, capability, triton=True):
    """As on a GPU that is not Hopper, with jax_triton or without; nothing is run."""
    monkeypatch.setattr(backends, "capability", lambda: capability)
    monkeypatch.setattr(cudnn, "capability", lambda: capability)
    missing = None if triton and capability >= (8, 0) else "Triton kernels need jax_triton"
    monkeypatch.setattr(choice, "no_triton", lambda: missing)


@pytest.fixture
def hopper(monkeypatch):
    """As on an H100 with jax_triton; nothing is run."""
    monkeypatch.setattr(choice, "no_hopper", lambda: None)
    monkeypatch.setattr(choice, "no_triton", lambda: None)
    monkeypatch.setattr(backends, "capability", lambda: (9, 0))
    monkeypatch.setattr(cudnn, "capability", lambda: (9, 0))


def chosen(cache, q=None, **names):
    found = choice.explain(cache, queries() if q is None else q, **names)
    return found.implementation, found.precision, found.decoding


def test_the_order_of_preference_on_hopper(hopper):
    assert chosen(cache_of()) == ("mosaic", "fp8", "kernels")
    # XLA decodes what kernels do not know, and the attention kernel still runs.
    assert chosen(cache_of("kivi")) == ("mosaic", "bf16", "xla")
    # cuDNN takes widths that the kernels do not.
    assert chosen(cache_of("rtn", head_dim=96), queries(96)) == ("cudnn", "bf16", "xla")
    assert chosen(cache_of(), queries(dtype=jnp.float32)) == ("xla", None, "xla")
    assert chosen(cache_of(key_bias=KeyBias(offset=-0.5))) == ("cudnn", "bf16", "kernels")


def test_ampere_gets_cudnn_and_a_t4_xla(monkeypatch):
    for capability, name in (((8, 6), "cudnn"), ((8, 9), "cudnn"), ((7, 5), "xla")):
        gpu(monkeypatch, capability, triton=False)
        assert chosen(cache_of())[0] == name


def test_triton_decodes_for_cudnn_where_it_is_installed_and_can(monkeypatch):
    gpu(monkeypatch, (8, 6))
    cache, by_xla = cache_of(), ("cudnn", "bf16", "xla")
    for names in ({}, dict(precision="bf16"), dict(implementation="cudnn")):
        assert chosen(cache, **names) == ("cudnn", "bf16", "kernels")
        assert chosen(cache_of("kivi"), **names) == by_xla
    found = choice.explain(cache, queries())
    assert found.runs == "cudnn in bf16, spans decoded by kernels"
    assert found.others["cudnn in bf16, spans decoded by xla"].endswith("comes later")
    assert found.others["triton in bf16, spans decoded by kernels"].endswith("comes later")
    why = choice.explain(cache_of("kivi"), queries()).others[found.runs]
    assert "do not decode the key codec kivi" in why
    assert chosen(cache, implementation="triton") == ("triton", "bf16", "kernels")
    # Ampere's cuDNN does not read 256 channels: Triton attends.
    assert chosen(cache_of(head_dim=256), queries(256)) == ("triton", "bf16", "kernels")
    gpu(monkeypatch, (8, 6), triton=False)
    assert chosen(cache) == by_xla
    assert "need jax_triton" in choice.explain(cache, queries()).others[found.runs]


def test_names_choose_precision_and_implementation(hopper):
    cache = cache_of()
    fp8 = ("mosaic", "fp8", "kernels")
    assert chosen(cache, implementation="mosaic") == ("mosaic", "bf16", "kernels")
    assert chosen(cache, implementation="mosaic", precision="fp8") == fp8
    assert chosen(cache, precision="fp8") == fp8
    assert chosen(cache, implementation="mosaic_fp8") == fp8
    assert chosen(cache, precision="bf16") == ("mosaic", "bf16", "kernels")
    assert chosen(cache_of("qvg-pro:num_centroids=8"), precision="fp8") == fp8
    assert chosen(cache, implementation="triton") == ("triton", "bf16", "kernels")
    assert chosen(cache, implementation="cudnn") == ("cudnn", "bf16", "kernels")
    assert chosen(cache_of("kivi"), implementation="cudnn") == ("cudnn", "bf16", "xla")
    assert chosen(cache, implementation="xla") == ("xla", None, "xla")


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (dict(implementation="cuda"), ValueError, "implementation='cuda' is not accepted: give one of"),
        (dict(precision="int8"), ValueError, "precision='int8' is not accepted"),
        (dict(implementation="mosaic_fp8", precision="bf16"), ValueError, "beside.*give implementation='mosaic'"),
        (dict(implementation="xla", precision="fp8"), NotImplementedError,
         "precision='fp8': these do not go together; there is xla, spans decoded by xla; 'mosaic'"),
    ],
)  # fmt: skip
def test_names_that_do_not_exist(hopper, names, error, message):
    with pytest.raises(error, match=message):
        choice.explain(cache_of(), queries(), **names)


@pytest.mark.parametrize(
    ("codec", "parts"),
    [
        ("kivi", ["the key codec kivi", "zero points of a channel"]),
        ("quarot", ["the key codec quarot", "hadamard"]),
        ("qvg:num_centroids=8:scale_dtype=bf16", ["key codec", "bf16 scales"]),
        ("klt", ["the key codec klt"]),
    ],
)
@pytest.mark.parametrize("name", ["mosaic", "triton"])
def test_a_named_kernel_never_leaves_the_decoding_to_xla(hopper, codec, parts, name):
    with pytest.raises(NotImplementedError) as error:
        choice.explain(cache_of(codec), queries(), implementation=name)
    assert all(part in str(error.value) for part in (*parts, "do not decode")), error.value
    assert "serves it" in str(error.value)


@pytest.mark.parametrize("codec", ["dither", "dither-asym", "qvg-asym"])
def test_kernels_decode_a_dither_and_zero_points(hopper, codec):
    """Among them is the default of models that nobody has measured."""
    cache = cache_of(f"{codec}:num_centroids=8")
    assert choice.explain(cache, queries(), implementation="mosaic").decoding == "kernels"


@pytest.mark.parametrize(
    ("codec", "precision", "why"),
    [
        ("qvg:num_centroids=8", "fp8", None),
        ("rtn:bits=2", "fp8", None),
        ("dither:num_centroids=8", "fp8", None),
        ("midrise:num_centroids=8", "fp8", None),
        ("qvg-pro:num_centroids=8", "bf16", "key codec qvg-pro has 4 stages of k-means"),
        ("qvg:num_centroids=8:bits=4", "bf16", "key codec qvg has codes of 4 bits"),
        ("midrise-k2v4:num_centroids=8", "bf16", "value codec midrise-k2v4 has codes of 4 bits"),
        ("bf16", "bf16", "e4m3 attention needs a bound"),
    ],
)
def test_products_are_in_fp8_where_the_codes_are_coarser(hopper, codec, precision, why):
    found = choice.explain(cache_of(codec), queries())
    assert (found.implementation, found.precision) == ("mosaic", precision)
    assert why is None or why in found.others["mosaic in fp8, spans decoded by kernels"]


def test_a_cache_without_spans_is_read_in_bf16(hopper):
    window = qvg.KVCache.create(
        heads=2, head_dim=128, block_tokens=32, max_spans=0, window_blocks=2, pos_dims=0,
        overflow="drop",
    )  # fmt: skip
    assert chosen(window) == ("mosaic", "bf16", "kernels")


def test_an_explanation_has_a_line_for_each_way(hopper):
    lines = str(qvg.explain(cache_of("kivi"), queries())).splitlines()
    assert lines[0] == "runs: mosaic in bf16, spans decoded by xla"
    assert len(lines) == len(choice.CANDIDATES)
    assert any(
        "not mosaic in bf16, spans decoded by kernels: the kernels do not" in x for x in lines
    )
    assert any("not xla" in x and "comes later" in x for x in lines)


def test_attend_runs_what_is_explained():
    """On this machine, whatever it is."""
    cache = cache_of("rtn")
    x = jnp.ones((1, 32, 2, 128), jnp.bfloat16)
    found = qvg.explain(cache, x)
    named = qvg.attend(x, cache, x, x, implementation=found.implementation)
    assert jnp.array_equal(qvg.attend(x, cache, x, x), named)


def test_a_call_that_nothing_serves_says_all_reasons():
    table = (Candidate("a", lambda _: "a is shut"), Candidate("b", lambda _: "b is far"))
    with pytest.raises(NotImplementedError, match="a is shut; b is far; nothing serves it"):
        resolve(table, None)
    table = (Candidate("a", lambda _: "fp8 is shut", "fp8"), Candidate("a", lambda _: None, "bf16"))
    with pytest.raises(NotImplementedError, match="is shut; 'a' serves it without precision='fp8'"):
        resolve(table, None, implementation="a", precision="fp8")


def test_kernels_are_offered_on_their_release_of_jax_only(monkeypatch):
    monkeypatch.setattr(backends, "is_hopper", lambda: True)
    for version in ("0.8.3", "0.12.0.1"):
        monkeypatch.setattr(jax, "__version__", version)
        why = backends.no_hopper()
        assert f"jax {version} is installed" in why and f"for jax {backends.KERNELS_JAX}" in why
    monkeypatch.setattr(jax, "__version__", f"{backends.KERNELS_JAX}.9")
    assert backends.no_hopper() is None

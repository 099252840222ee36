"""Transform coding within a budget."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvg_jax.codecs.transform_codec import transform_codec
from tests.support.spans import correlated_tokens as span
from tests.support.spans import relative_error as error
from tests.support.spans import round_trip

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@given(
    budget=st.floats(1.2, 5.5),
    t=st.sampled_from([96, 384, 768, 1111, 5120, 37_440]),
    d=st.sampled_from([64, 128]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_budget_is_kept_and_used(budget, t, d):
    codec = transform_codec(budget)
    bits = codec.bits_per_element((2, 3, t, d))
    assert budget - 8 / d < bits <= budget


def test_budgets_that_cannot_be_kept():
    with pytest.raises(
        ValueError, match=r"budget=1.6 bits leaves too few code bits for a span of 24"
    ):
        transform_codec(1.6).init((1, 1, 24, 128))
    for budget in (0, 17):
        with pytest.raises(ValueError, match=f"budget={budget} is not accepted"):
            transform_codec(budget)
    capped = transform_codec(6.9, max_bits=6)
    assert capped.bits_per_element((1, 1, 37_440, 64)) < 6.3


def test_decoding_needs_no_shape():
    """One decode serves spans of any length: rank and bits are in the packed shapes."""
    codec = transform_codec(3.0)
    for shape in ((1, 1, 60, 64), (1, 2, 300, 64)):
        x = span(5, shape)
        _, _, hat = round_trip(codec, x)
        assert hat.shape == shape and error(x, hat) < 0.25

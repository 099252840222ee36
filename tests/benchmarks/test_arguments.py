"""What a benchmark of a model is asked for is checked before anything is loaded."""

import pytest

from benchmarks import longcat, self_forcing, worldplay


@pytest.mark.parametrize(
    "benchmark, argument, said",
    [
        (self_forcing, ["--model", "wan"], "'wan' is not known; accepted: self-forcing, "),
        (self_forcing, ["--parts", "arms,more"], "'more' is not known; accepted: arms, forward"),
        (self_forcing, ["--arms", "bf16,zip"], "codec='zip' is not known"),
        (self_forcing, ["--limit-arm", "qvg@cuda"], "'cuda' is not known; accepted: mosaic, cudnn"),
        (self_forcing, ["--repeats", "0"], "'0'; accepted: a whole number of at least 1"),
        (longcat, ["--arms", "midrise,zip"], "codec='zip' is not known"),
        (longcat, ["--implementation", "cuda"], "'cuda' is not known; accepted: mosaic, cudnn"),
        (longcat, ["--opponents", "torch"], "'torch' is not known; accepted: concat, merge"),
        (worldplay, ["--parts", "blocs"], "'blocs' is not known; accepted: blocks, limit"),
        (worldplay, ["--arms", "single,qvg"], "'qvg' is not known; accepted: single, packed"),
        (worldplay, ["--limit-arm", "single@cuda"], "'cuda' is not known; accepted: mosaic"),
        (worldplay, ["--codec", "zip"], "codec='zip' is not known"),
    ],
)
def test_the_first_wrong_word_is_named(benchmark, argument, said, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", [benchmark.__name__, "--out", str(tmp_path), *argument])
    with pytest.raises(SystemExit, match="2"):
        benchmark.main()
    assert said in capsys.readouterr().err

"""The benchmark of compilation, on a small network."""

import json

import pytest

from benchmarks import compiling, self_forcing


@pytest.mark.slow
def test_a_first_block_is_taken_apart_and_a_kept_program_is_not_compiled_again(tmp_path, capsys):
    small = ["--layers", "1", "--height", "32", "--width", "64", "--history", "6"]
    argv = ["--out", str(tmp_path), "--arm", "rtn", *small]
    assert compiling.main(argv) == 0
    found = json.loads((tmp_path / "compiling.json").read_text())
    block = found["programs"][compiling.BLOCK]
    assert block["compiling"] > 0 and found["first_block_seconds"] >= block["compiling"]
    first, header, _, row, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("rtn on cpu") and "compiling" in header and compiling.BLOCK in row


@pytest.mark.parametrize(
    "argument, said",
    [
        (["--model", "wan"], "'wan' is not known; accepted: self-forcing, "),
        (["--parts", "arms,more"], "'more' is not known; accepted: arms, forward, limit"),
        (["--arms", "bf16,zip"], "codec='zip' is not known"),
        (["--limit-arm", "qvg@cuda"], "'cuda' is not known; accepted: mosaic, cudnn"),
        (["--repeats", "0"], "'0'; accepted: a whole number of at least 1"),
    ],
)
def test_what_a_benchmark_is_asked_for_is_checked_first(
    argument, said, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr("sys.argv", ["self_forcing", "--out", str(tmp_path), *argument])
    with pytest.raises(SystemExit, match="2"):
        self_forcing.main()
    assert said in capsys.readouterr().err

"""The benchmark of compilation, on a small network."""

import json

import pytest

from benchmarks import compiling


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

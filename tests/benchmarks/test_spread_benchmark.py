"""The benchmark of one cache over several devices runs, at a size where its times mean nothing."""

import json
import subprocess
import sys
import types

import pytest

from benchmarks.collectives import exchanges
from benchmarks.spread_table import ring_bytes

LOOPS = """HloModule loops

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%scattered (p: f32[4,6]) -> f32[2,6] {
  %p = f32[4,6]{1,0} parameter(0)
  ROOT %part = f32[2,6]{1,0} reduce-scatter(%p), channel_id=2, dimensions={0}, to_apply=%add
}

%body (state: (s32[], bf16[8,2])) -> (s32[], bf16[8,2]) {
  %state = (s32[], bf16[8,2]{1,0}) parameter(0)
  %x = bf16[8,2]{1,0} get-tuple-element(%state), index=1
  %sent = (bf16[8,2]{1,0}, bf16[8,2]{1,0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %come = bf16[8,2]{1,0} collective-permute-done(%sent)
  %i = s32[] get-tuple-element(%state), index=0
  ROOT %next = (s32[], bf16[8,2]{1,0}) tuple(%i, %come)
}

%condition (state: (s32[], bf16[8,2])) -> pred[] {
  %state.1 = (s32[], bf16[8,2]{1,0}) parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (q: f32[4,6], start: (s32[], bf16[8,2])) -> f32[4,6] {
  %q = f32[4,6]{1,0} parameter(0)
  %start = (s32[], bf16[8,2]{1,0}) parameter(1)
  %all = f32[4,6]{1,0} all-reduce(%q), replica_groups={}, to_apply=%add
  %begun = ((f32[4,6]{1,0}), f32[2,6]{1,0}) async-start(%all), calls=%scattered
  %ended = f32[2,6]{1,0} async-done(%begun), calls=%scattered
  %either = f32[2,6]{1,0} conditional(%yes, %all, %all), true_computation=%scattered, false_computation=%add
  %loop = (s32[], bf16[8,2]{1,0}) while(%start), condition=%condition, body=%body, TRIPS
  ROOT %out = f32[4,6]{1,0} copy(%all)
}
""".replace("TRIPS", 'backend_config={"known_trip_count":{"n":"30"}}')


def test_collectives_count_as_often_as_their_loop_runs():
    found = exchanges(LOOPS)
    assert found == {
        "all-reduce": (1, 96),
        "collective-permute": (30, 30 * 32),
        "reduce-scatter": (2, 2 * 96),
    }
    assert [x.sent(name, 2) for name, x in found.items()] == [96, 960, 96]
    with pytest.raises(ValueError, match="no ENTRY computation"):
        exchanges("nothing")


def test_a_ring_is_compared_with_bf16_of_the_same_slots():
    lay = types.SimpleNamespace(batch=1, heads=2, head_dim=8, max_spans=4, span_tokens=100)
    spans, new = 3 * 64 * 2 * 100, 3 * 64 * 10  # three hops of two slots, and of half a block
    found = ring_bytes({"collective-permute": {"sent": spans // 5 + new}}, lay, 3, 20, 2)
    assert found["bf16_bytes"] == spans + new and found["of_spans_alone"] == 5


@pytest.mark.nightly
def test_two_devices_and_one_at_hardly_any_size(tmp_path):
    argv = ["--tiny", "--layers", "1", "--height", "32", "--width", "64", "--capacity", "39"]
    argv += ["--histories", "12,24", "--repeats", "1", "--encodes", "27", "--span", "6"]
    argv += ["--arms", "qvg:num_centroids=4:group=32", "--plans", "spans"]
    command = [sys.executable, "-m", "benchmarks.spread", *argv, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    results = json.loads((tmp_path / "spread.json").read_text())
    alone, spans = results["rows"]
    assert not [row for row in results["rows"] if "error" in row], done.stdout
    assert all(row["finite"] and row["encoding_block_seconds"] > 0 for row in results["rows"])
    assert alone["exchanges"] == {} and spans["exchanges"]["all-reduce"]["count"] >= 4
    assert (
        spans["share_of_the_cache"] == pytest.approx(0.5, rel=0.03)
        and spans["predicted_seconds"] > 0
    )
    assert results["link"]["bytes_a_second"] > 0 and "GB/s" in done.stdout

"""Every kind of bad word on the command line: one line that names it, at once, and no traceback."""

import time

import pytest

from models.longcat import job as _longcat  # noqa: F401 - imports take long and are not timed
from models.pocket_world import capture
from models.runs import latent_job
from models.self_forcing import job as _self_forcing  # noqa: F401
from models.worldplay import job as _worldplay  # noqa: F401
from qvg_jax.app import cli, generate
from qvg_jax.app.play import server
from tests.support.bad_files import ESCAPE
from tests.support.outputs import beside_progress
from tests.support.tiny_world import as_in_its_own_process

SECONDS = 2.0  # of the processor, for other tests run beside this one
LARGE = "9" * 30
ABOVE = "whole number above 0"
WHOLE = "give a whole number"
KNOWN = "accepted: qvg, qvg-4bit"
WRITTEN = "NAME:SETTING=VALUE"
FOX = "generate self-forcing --weights random --layers 1 --prompt fox"
WALK = "generate worldplay --weights random --layers 1 --prompt fox"
LONG = "generate longcat --weights random --layers 1 --prompt fox"

NUMBERS = {
    "generate --frames": {
        ABOVE: ("0", "-1", "1.5", "many", "", "1e3", "0x10", "٣", "+4", " 4", "1_0"),
        "at most 1000000": (LARGE, "99999999999"),
    },
    "generate --steps": {ABOVE: ("0", "-3", "2.5", "nan"), "at most 10000": (LARGE, "300000000")},
    "generate --fps": {ABOVE: ("0", "-1", "x"), "at most 1000": (LARGE, "100000")},
    "generate --seed": {
        WHOLE: ("-1", "1.0", "x"), "at most 1": (LARGE,), "0 to 2147483647": ("2147483648",),
    },
    "generate --tour": {ABOVE: ("0", "-8", "x"), "at most": (LARGE,), "at least one block": ("2",)},
    "generate --codec": {
        KNOWN: (
            "zip", "qvg;rm", f"qvg{ESCAPE}", "chain(", "identity() >", "open('x')", "qvg.key",
            "__import__('os')", "kivi.other", "(" * 300,
        ),
        WRITTEN: ("qvg:", "qvg:bits", "qvg:bits=", ":", "::", "qvg:bits=2:", "qvg:=3"),
        "give an integer": (
            "qvg:bits=3.5", "qvg:bits=x", "qvg:num_centroids=1.5", "midrise:num_centroids=1.5",
            "qvg:num_centroids=[1]", "qvg:num_centroids={}", "qvg:num_centroids=None",
            "qvg:num_centroids=True", "qvg:num_centroids=1e400", "qvg:num_centroids=" + "(" * 300,
        ),
        "give 2, 3, 4 or 8": ("qvg:bits=99", "qvg:bits=0", "qvg:bits=-2"),
        "give 1 to 65536": (
            "qvg:num_centroids=0", "qvg:num_centroids=-4", "qvg:num_centroids=99999999999",
        ),
        "give 1 or more": ("qvg:group=0", "qvg:stages=0", "qvg:iters=-1"),
        "accepted: 1, 2, 4": ("qvg:group=48",),
        "does not accept": ("qvg:mood=1", "trellis:beam=-1"),
        "gives bits twice": ("qvg:bits=2:bits=4",),
        "'symmetric'": ("qvg:mode=none",),
        "e4m3": ("qvg:scale_dtype=f7",),
        "True or False": ("qvg:warm_start=perhaps",),
    },
    "generate --compare": {KNOWN: ("zip", "rtn,zip"), "one comma": (",", ",,", "rtn,,qvg", "rtn,")},
    "generate --actions": {
        "unknown action": ("w", "w--3", "jump-2", "", "w-8;d-4", "-8", f"{ESCAPE}-3", "w-8,"),
        "frames above 0": ("w-", "w-0", "w-1.5", "w-٣", "w-000"),
        "at most 100000": ("w-100000000", "w-" + LARGE, "w-90000,d-90000"),
    },
    "generate --weights": {"missing or corrupt": ("nowhere", "/", ESCAPE)},
    "generate --model": {"accepted: pocket-world": ("wan", "", ESCAPE)},
    "generate --out": {"path of a file": ("",)},
    "codecs --shape": {
        "four whole numbers": (
            "", "1,2,3", "1,1,512,0", "1,1,512,x", "1,1,1,1,1", "0,0,0,0", "-1,1,512,128",
            f"1,1,{LARGE},128", "1.5,1,512,128", "1;1;512;128",
        ),
        "group=64 must divide": ("1,1,512,96",),
        "num_centroids=256": ("1,1,100,128",),
    },
    "tune no.npz --budget": {
        "give bits": ("", "0", "-1", "nan", "inf", "17", "x", "1e-400", "2.3.3", LARGE),
    },
    "tune no.npz --span-tokens": {ABOVE: ("0", "-1", "x"), "at most": (LARGE,)},
    "tune no.npz --model": {"is not known": ("nope",), "no loop": ("longcat",)},
    "tune no.npz --out": {"path of a file": ("",)},
    "tune": {"not an .npz": ("no.npz", "/", f"{ESCAPE}.npz"), "path of a file": ("",)},
    "plan self-forcing --memory": {
        "give a size": (
            "0", "-1", "x", "24TBB", "1e999", "", "nan", "24 apples", f"{LARGE}GB", "0.0000001",
            "1e" + LARGE,
        ),
    },
    "plan self-forcing --memory 24GB --frames": {"nearest are": ("22",), ABOVE: ("0",)},
    "plan self-forcing --memory 24GB --height": {"multiple of 16": ("7",), "at most": (LARGE,)},
    "plan self-forcing --memory 24GB --width": {"at most 16384": ("9999999",)},
    "plan self-forcing --memory 24GB --layers": {"at most 1024": ("100000000",), ABOVE: ("0",)},
    "plan self-forcing --memory 24GB --codec": {KNOWN: ("zip",), "one comma": ("qvg,,rtn",)},
    "plan self-forcing --memory 24GB --window": {"at least 4": ("1",), "at most": (LARGE,)},
    "plan self-forcing --memory 24GB --sink": {WHOLE: ("-1",), "at most": ("99999999",)},
    "plan self-forcing --memory 24GB --span": {"at most": ("99999999",)},
    "plan self-forcing --memory 24GB --recent": {"at most": ("99999999999999",)},
    "plan longcat --memory 24GB --cond-frames": {"1 + 4 k": ("2",), "at most": (LARGE,)},
    "plan worldplay --memory 24GB --frames": {"multiple of 4": ("3",)},
    "capture --layers": {WHOLE: ("x", "-1", "", ",", "1,,2"), "0 to 5": ("9", "0,9")},
    "capture --frames": {ABOVE: ("0", "x", "-4"), "block_frames=4": ("3",), "at most": (LARGE,)},
    "capture --seed": {"0 to 2147483647": ("9999999999999",), "at most": (LARGE,)},
    "capture --out": {"is a folder": ("/tmp",), "path of": ("",), "can be written": ("/proc/x/y",)},
    "convert no.pt": {
        "in .safetensors": ("w.bin",), "not a file": ("w.safetensors",), "path of a file": ("",),
    },
    "convert": {"requires an argument": ("no.pt",), "path of a file": ("",)},
    "fetch": {"nothing to fetch": ("pocket-world",), "is not known": ("nope", ESCAPE)},
    "play --port": {"a port": ("-1", "x", "1.5"), "at most 65535": ("65536", LARGE)},
    "play --seed": {WHOLE: ("-1",), "0 to 2147483647": ("2147483648",)},
    "play --codec": {KNOWN: ("zip",)},
    "play --memory": {ABOVE: ("0",)},
    "play --steps": {ABOVE: ("0",)},
    "play --tour": {WHOLE: ("-1",)},
    "play --weights": {"missing or corrupt": ("nowhere",)},
    f"{FOX} --attention": {
        "Choose from": ("bogus", ""), "a Hopper GPU": ("mosaic", "mosaic_fp8"),
        "8.0 or more": ("triton", "cudnn"),
    },
    f"{FOX} --precision": {"Choose from": ("fp4",), "a Hopper GPU": ("fp8",)},
    f"{FOX} --steps": {"give 1 to 1000": ("1001",)},
    f"{FOX} --frames": {"nearest are 6 and 9": ("7",)},
    f"{FOX} --height": {"multiple of 16": ("40",)},
    f"{FOX} --window": {"at least 4": ("1",)},
    f"{FOX} --span": {"at least 3": ("1",)},
    f"{FOX} --image": {
        "not readable": ("no.png", "/", "http://localhost:1/x.png", "concat:a|b", f"{ESCAPE}.png"),
        "path of a file": ("",),
    },
    f"{FOX} --video": {"not readable": ("no.mp4",), "path of a file": ("",)},
    f"{FOX} --image a --video": {"one of them": ("b",)},
    f"{FOX} --tour": {"Models that have it: pocket-world": ("8",)},
    f"{FOX} --seed": {"0 to 2147483647": ("2147483648",)},
    f"{WALK} --actions": {
        "at most 10000": ("w-100000", "w-1e300"), "unknown action": ("jump-1", ESCAPE),
        "no action": (",", ""), "whole number of latent frames": ("w-nan", "w-0", "w-inf"),
    },
    f"{WALK} --actions w-8 --frames": {"multiple of 4": ("3",), "cameras of the walk": ("64",)},
    f"{WALK} --actions w-8 --codec": {"storage": ("qvg:storage=x",)},
    f"{LONG} --frames": {"nearest are": ("25",)},
    f"{LONG} --cond-frames": {"1 + 4 k": ("4",)},
    f"{LONG} --height": {"multiple of 16": ("100",)},
    f"{LONG} --image": {"not readable": ("no.png",)},
    f"{LONG} --video": {"not readable": ("no.mp4",)},
    f"{LONG} --lora": {"path of a file": ("",)},
    "generate self-forcing --weights": {"prompt is missing": ("random",)},
    "generate self-forcing --prompt x --weights": {
        "is not a folder": ("nowhere",), "not understood": ("hf:x", "hf:a/b:../c", "hf:"),
        "weights is missing": ("",),
    },
    "generate": {"is not known": ("extra", ESCAPE), "needs a name": ("--model",),
                 "Unknown option": ("--loud",)},
    "": {"not a command": ("dance", "-", ESCAPE, "generatee", "")},
}  # fmt: skip

TABLE = [
    ([*command.split(), bad], words)
    for command, answers in NUMBERS.items()
    for words, many in answers.items()
    for bad in many
]
TABLE += [([], "COMMAND is missing"), (["tune"], "requires an argument"), (["plan"], "--memory")]


class Accepted(BaseException):
    """What is raised in place of work that takes long: a bad word came through."""


@pytest.fixture(scope="module", autouse=True)
def process(tmp_path_factory):
    def came_through(*args, **kwargs):
        raise Accepted(args)

    with (
        as_in_its_own_process(tmp_path_factory.getbasetemp()),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(generate, "generate", came_through)
        patch.setattr(server, "serve", came_through)
        patch.setattr(capture, "rollout", came_through)
        patch.setattr(latent_job.LatentModel, "encode_prompt", came_through)
        cli.main(["tune", "no.npz"])  # imports what it needs
        yield


def test_the_table_is_long():
    assert len(TABLE) >= 200


@pytest.mark.parametrize("argv, words", TABLE, ids=lambda x: ascii(x)[-50:])
def test_a_bad_word(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    start = time.process_time()
    code = cli.main(argv)
    seconds = time.process_time() - start
    out, err = capsys.readouterr()
    *before, line = err.splitlines()
    assert code == 2 and beside_progress(out) == ""
    assert line.startswith("qvg: error: ") and words in line
    assert all(said.startswith("qvg: ") for said in before) and "Traceback" not in err
    assert "\x1b" not in err and "\x07" not in err
    assert seconds < SECONDS
    assert list(tmp_path.iterdir()) == []

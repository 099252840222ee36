"""The options of the `qvg` command, and what of them is accepted."""

import argparse
from pathlib import Path
from typing import NoReturn

from qvg_jax.app.versions import own_version

__all__ = ["MODELS", "WALKS", "BadInput", "parser"]

# Looked up by name when wanted: the library does not import models.
MODELS = {
    "pocket-world": "models.pocket_world.job",
    "self-forcing": "models.self_forcing.job",
    "worldplay": "models.worldplay.job",
    "longcat": "models.longcat.job",
}

# Those with actions, for `qvg play`.
WALKS = {"pocket-world": "models.pocket_world.walk"}


class BadInput(Exception):
    """Something that the user can mend; its message is what they are told."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(message)


def parser() -> argparse.ArgumentParser:
    """The command line; the parsed `command` says which part of it was used."""
    top = _Parser(prog="qvg", description="Long videos with a KV cache of about two bits.")
    top.add_argument("--version", action="version", version=f"qvg {own_version()}")
    commands = top.add_subparsers(required=True, metavar="COMMAND", dest="command")

    make = commands.add_parser("generate", help="make a video with compressed and bf16 caches")
    add = make.add_argument
    add("--model", default="pocket-world", metavar="NAME", help=", ".join(MODELS))
    add(
        "--frames",
        type=_count,
        metavar="N",
        help="to generate (240); latent frames (21)*, the walk's**, 24 + 5 k (29)***",
    )
    add("--seed", type=_whole, default=0, metavar="N", help="world, path and noise (0)")
    add(
        "--codec",
        metavar="NAME",
        help="of the cache (auto: trellis, midrise*/**/***); see `qvg codecs`",
    )
    add("--compare", default="", metavar="NAMES", help="more codecs, such as rtn,qvg-pro")
    add("--steps", type=_count, metavar="N", help="denoising steps per block (4, 50***)")
    add("--fps", type=_count, metavar="N", help="of the video (8, 16*, 15***)")
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for the files (out)")
    add("--stream", action="store_true", help="a video that can be played while it grows")
    add("--weights", metavar="PATH", help="other weights than the model's own; a folder or random*")
    add = make.add_argument_group("pocket-world").add_argument
    add("--tour", type=_count, metavar="N", help="real frames before the generated ones (128)")
    add("--actions", metavar="LIST", help="where to go after the tour, or at all**: w-8,d-4 (back)")
    add = make.add_argument_group("*self-forcing, **worldplay, ***longcat").add_argument
    add("--prompt", metavar="TEXT", help="what to see")
    add("--height", type=_count, metavar="N", help="in pixels, of whole tokens (480, 704**)")
    add("--width", type=_count, metavar="N", help="in pixels, of whole tokens (832, 1280**)")
    add("--image", metavar="FILE", help="first frame of the video")
    add("--video", metavar="FILE", help="video to go on from*/***")
    add("--window", type=_count, metavar="N", help="latent frames in sight at most (all)*")
    add("--sink", type=_whole, metavar="N", help="first latent frames, never compressed (0)*")
    add("--span", type=_count, metavar="N", help="latent frames compressed together (24)*")
    add("--recent", type=_whole, metavar="N", help="newest latent frames, not compressed (0)*")
    add("--layers", type=_count, metavar="N", help="of a transformer of random weights (30, 48***)")
    add("--attention", metavar="NAME", help="xla, mosaic, mosaic_fp8, triton; see `qvg_jax.attend`")
    add("--cond-frames", type=_count, metavar="N", help="that a segment goes on from (73)***")
    add("--lora", metavar="FILE", help="merged into the weights: 16 steps, no guidance***")
    add("--resume", action="store_true", help="go on with an interrupted run in --out")
    late = "pictures only when all latents are made, in less memory*/**"
    add("--decode-last", action="store_true", help=late)

    play = commands.add_parser("play", help="walk through a generated world in a browser")
    add = play.add_argument
    add("--model", default="pocket-world", metavar="NAME", help=", ".join(WALKS))
    add("--codec", metavar="NAME", help="to begin with (midrise-k1v3); see `qvg codecs`")
    add("--seed", type=_whole, default=0, metavar="N", help="world, tour and noise (0)")
    add("--steps", type=_count, metavar="N", help="denoising steps per block (4)")
    add("--tour", type=_whole, metavar="N", help="real frames to begin with (64)")
    add("--memory", type=_count, metavar="N", help="frames to remember at least (256)")
    add("--weights", metavar="PATH", help="other weights than the model's own")
    add("--host", default="127.0.0.1", metavar="NAME", help="to listen at (127.0.0.1)")
    add("--port", type=_port, default=8080, metavar="N", help="to listen at, 0 for any (8080)")
    add("--no-browser", action="store_true", help="do not open one")

    plan = commands.add_parser("plan", help="say what of a video fits into a GPU's memory")
    add = plan.add_argument
    add("--model", default="self-forcing", metavar="NAME", help="self-forcing, worldplay, longcat")
    add("--frames", type=_count, metavar="N", help="latent frames (21, 48, any)")
    add("--codec", default="bf16,qvg", metavar="NAMES", help="codecs to compare (bf16,qvg)")
    add("--memory", type=_bytes, required=True, metavar="SIZE", help="such as 24GB or 22.4GiB")
    add("--height", type=_count, metavar="N", help="in pixels (480, 704)")
    add("--width", type=_count, metavar="N", help="in pixels (832, 1280)")
    add("--window", type=_count, metavar="N", help="latent frames in sight at most (all)")
    add("--sink", type=_whole, metavar="N", help="first latent frames, never compressed (0)")
    add("--span", type=_count, metavar="N", help="latent frames compressed together (24)")
    add("--recent", type=_whole, metavar="N", help="newest latent frames, not compressed (0)")
    add("--layers", type=_count, metavar="N", help="of the transformer (30, 48)")
    add("--cond-frames", type=_count, metavar="N", help="of longcat: that a segment reads (73)")
    add("--decode-last", action="store_true", help="pictures when the cache is gone")

    convert = commands.add_parser("convert", help="make safetensors of a .pt or .pth file")
    convert.add_argument("source", type=Path, metavar="FILE", help="a checkpoint of PyTorch")
    convert.add_argument("target", type=Path, metavar="OUT.safetensors", help="the file to write")
    convert.add_argument(
        "--entry", metavar="NAME", help="which of its entries (generator_ema, ...)"
    )

    capture = commands.add_parser("capture", help="write K, V and Q of a model, to try codecs on")
    add = capture.add_argument
    add("--model", default="pocket-world", metavar="NAME", help="pocket-world")
    add("--frames", type=_count, default=128, metavar="N", help="of history (128)")
    add("--layers", type=_indices, default=(0, 2, 5), metavar="LIST", help="which ones (0,2,5)")
    add("--seed", type=_whole, default=0, metavar="N", help="world, path and noise (0)")
    add("--out", type=Path, default=Path("captured.npz"), metavar="FILE", help="(captured.npz)")

    tune = commands.add_parser("tune", help="measure codecs on captured K, V and Q")
    add = tune.add_argument
    add("file", type=Path, metavar="FILE", help="from `qvg capture`")
    add("--budget", type=_bits, metavar="BITS", help="per element, everything counted (no limit)")
    add("--span-tokens", type=_count, metavar="N", help="compressed together (all, up to 4096)")
    add("--codec", default="", metavar="NAMES", help="only these, comma-separated (all)")
    add("--model", metavar="NAME", help="try the best in this model's loop, too: pocket-world")
    add("--out", type=Path, default=Path("tuned"), metavar="FOLDER", help="for the files (tuned)")

    codecs = commands.add_parser("codecs", help="list the codecs with their size")
    codecs.add_argument(
        "--shape",
        type=_shape,
        default=(1, 12, 37440, 128),
        metavar="B,H,T,D",
        help="span to measure them on: batch, heads, tokens, head dim (1,12,37440,128)",
    )
    return top


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: give a whole number")
    return int(text)


def _indices(text: str) -> tuple[int, ...]:
    return tuple(_whole(part) for part in text.split(","))


def _bits(text: str) -> float:
    try:
        bits = float(text)
    except ValueError:
        bits = 0.0
    if not 0 < bits <= 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: give bits, such as 2.33")
    return bits


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: give a whole number above 0")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: give a port, 0 to 65535")
    return int(text)


def _bytes(text: str) -> int:
    from qvg_jax.app.memory_plan import parse_bytes  # here, for it needs JAX

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _shape(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) != 4 or not all(p.isdecimal() and int(p) for p in parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not accepted: give four whole numbers above 0, such as 1,12,37440,128"
        )
    return tuple(map(int, parts))

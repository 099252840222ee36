"""The `qvg` command: arguments in, files and a small table out, errors of the user in one line.

Exit codes: 0 done, 1 nothing fits (plan), 2 bad input or a file that could not be written, 130 Ctrl-C,
141 the reader of the output went away.

Each model is a subcommand with exactly its own options, made from the dataclasses of its `ModelEntry`;
without a model, `generate` and its likes take a default. JAX is imported when a command runs, so help
and wrong options are answered at once.

The parser is cyclopts (Apache-2.0): it builds options from typed dataclasses and their docstrings, and it
raises its errors, where tyro (MIT), the other candidate, prints several lines and leaves the process.
"""

import contextlib
import errno
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import App, Parameter

from qvg_jax.app.model_entry import ModelEntry
from qvg_jax.app.option_types import Bits, Count, File, Names, Shape, Share, Whole
from qvg_jax.app.protocol import VerifyOptions
from qvg_jax.app.streams import drop_output, give_streams
from qvg_jax.app.versions import own_version
from qvg_jax.errors import LostDeviceError, UserError, printable

__all__ = ["main"]

LONGEST_LINE = 600  # characters of an error; a checkpoint can be wrong in a hundred places

# Commands that work on a model: the model without a name, and what they do.
TASKS = {
    "generate": ("pocket-world", "Make a video with compressed and with bf16 caches."),
    "verify": ("pocket-world", "Compare codecs with bf16 by a protocol, and published numbers."),
    "play": ("pocket-world", "Walk through a generated world in a browser."),
    "plan": ("self-forcing", "Say what of a video fits into a GPU's memory."),
    "capture": ("pocket-world", "Write K, V and Q of a model, to try codecs on."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    give_streams()
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except cyclopts.CycloptsError as error:
        return _told(_explained(error, words))
    except LostDeviceError as error:
        from qvg_jax.app.lost_devices import leave

        return leave(_told(str(error)))
    except UserError as error:
        return _told(str(error))
    except BrokenPipeError:  # who reads our output has seen enough, such as `head`
        drop_output()
        return 141
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        drop_output()
        return _told(f"standard output: {error.strerror}; accepted: a disk with room")
    except KeyboardInterrupt:
        print("qvg: interrupted", file=sys.stderr)
        return 130


def _run(words: list[str]) -> int:
    if not words:
        raise UserError(f"COMMAND is missing; accepted: {', '.join((*TASKS, *_OTHERS))}")
    if {*words} == {"--version", "--verbose"}:
        from qvg_jax.app.jax_setup import verbose_version

        print(verbose_version())
        return 0
    words = _with_model(words)
    result = _app(words)(words, exit_on_error=False, print_error=False)
    return result if isinstance(result, int) else 0


def _told(message: str) -> int:
    line = printable(message)
    if len(line) > LONGEST_LINE:
        line = line[: LONGEST_LINE - 4] + " ..."
    with contextlib.suppress(OSError):  # nobody can be told on an output that is full or closed
        print(f"qvg: error: {line}", file=sys.stderr)
    return 2


def _registry() -> Any:
    """The module that knows the models: looked up here, for the library does not import models."""
    import importlib

    return importlib.import_module("models.registry")


def _with_model(words: list[str]) -> list[str]:
    """The words with the model as the subcommand, where it was given as `--model NAME`."""
    command, *rest = words
    if command not in TASKS:
        return words
    for i, word in enumerate(rest):
        name, equals, value = word.partition("=")
        if name != "--model":
            continue
        if not equals and i + 1 == len(rest):
            raise UserError("--model needs a name")
        chosen = value if equals else rest[i + 1]
        left = rest[:i] + rest[i + (1 if equals else 2) :]
        _runner(command, _registry().named(chosen), _registry())  # says what is accepted
        print(f"qvg: --model goes in the next release: qvg {command} {chosen}", file=sys.stderr)
        return [command, chosen, *left]
    return words


def _app(words: Sequence[str]) -> App:
    """The parser of all commands, with the models of the command that is wanted."""
    app = App(
        name="qvg",
        help="Long videos with a KV cache of about two bits.",
        version=f"qvg {own_version()}",
        help_format="plaintext",
        result_action="return_value",
        default_parameter=Parameter(negative=(), allow_repeating=True),
        suppress_keyboard_interrupt=False,
    )
    for task, (default, summary) in TASKS.items():
        app.command(_task_app(task, default, summary, words))
    for name, function in _OTHERS.items():
        app.command(function, name=name)
    return app


def _task_app(task: str, default: str, summary: str, words: Sequence[str]) -> App:
    """A command that works on a model: a subcommand for each, and the default's options."""
    app = App(name=task, help=summary, help_format="plaintext", result_action="return_value")
    if words[0] != task:
        return app  # its models are not looked at
    registry = _registry()
    asked = words[1] if len(words) > 1 and not words[1].startswith("-") else None
    if asked is not None:
        entry = registry.named(asked)
        app.command(_runner(task, entry, registry), name=asked)
        return app
    entry = registry.named(default)
    app.default(_runner(task, entry, registry))
    app.help_epilogue = f"Without a model: {default}."
    if {"--help", "-h"} & {*words}:
        for name in registry.names():
            _listed(app, task, name, registry)
    return app


def _listed(app: App, task: str, name: str, registry: Any) -> None:
    """Adds a model to the list in a command's help, if the model knows the command."""
    try:
        entry = registry.named(name)
    except UserError as error:
        app.command(App(name=name, help=str(error), help_format="plaintext"))
        return
    if entry.task_options(task) is not None:
        app.command(App(name=name, help=entry.summary, help_format="plaintext"))


def _runner(task: str, entry: ModelEntry, registry: Any) -> Callable[..., int]:
    """The function behind a subcommand; its parameter is the model's dataclass of options.

    `verify` has a second one, for its options beside those of `generate`.
    """
    options = entry.task_options(task)
    if options is None:
        able = [n for n in registry.names() if _knows(registry, n, task)]
        raise UserError(
            f"model={entry.name!r} cannot be used with `qvg {task}`; accepted: {', '.join(able)}"
        )

    def run(given: Any) -> int:
        from qvg_jax.app.progress import saying

        said = saying(f"{entry.name}: loading JAX") if task == "generate" else nullcontext()
        with said:
            from qvg_jax.app import commands
        return getattr(commands, task)(entry, given)

    def verify(given: Any, how: Any) -> int:
        from qvg_jax.app import commands

        return commands.verify(entry, given, how)

    flat = Parameter(name="*")
    function = verify if task == "verify" else run
    function.__doc__ = entry.summary
    function.__annotations__ = {"given": Annotated[options, flat], "return": int}
    defaults = () if _required(options) else (options(),)
    if task == "verify":
        function.__annotations__["how"] = Annotated[VerifyOptions, flat]
        defaults += (VerifyOptions(),)
    function.__defaults__ = defaults
    return function


def _required(options: type) -> bool:
    import dataclasses

    return any(
        f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        for f in dataclasses.fields(options)
    )


def _knows(registry: Any, name: str, task: str) -> bool:
    try:
        return registry.named(name).task_options(task) is not None
    except UserError:
        return False


def _explained(error: cyclopts.CycloptsError, words: Sequence[str]) -> str:
    """What was wrong with the arguments, in the words of this command."""
    if isinstance(error, cyclopts.UnknownCommandError):
        return f"{words[0]!r} is not a command; accepted: {', '.join((*TASKS, *_OTHERS))}"
    message = str(error)
    if isinstance(error, cyclopts.UnknownOptionError) and words[0] in TASKS:
        option = next((w.split("=")[0] for w in words if w.split("=")[0] in message), "")
        if models := _accepting(words[0], option):
            return f"{message.split(' Did you mean')[0]} Models that have it: {', '.join(models)}"
    return message


def _accepting(task: str, option: str) -> list[str]:
    """Models whose options for a command include one."""
    import dataclasses

    registry, field = _registry(), option.lstrip("-").replace("-", "_")
    known = [name for name in registry.names() if _knows(registry, name, task)]
    options = {name: registry.named(name).task_options(task) for name in known}
    return [name for name in known if field in {f.name for f in dataclasses.fields(options[name])}]


def _tune(
    file: Annotated[File, Parameter(name="FILE")],
    /,
    *,
    budget: Bits | None = None,
    span_tokens: Count | None = None,
    codec: Names = (),
    model: str | None = None,
    heads: bool = False,
    also: Names = (),
    share: Share = 0.3,
    block_tokens: Count | None = None,
    sink: Whole = 1,
    newest: Whole = 2,
    out: File = Path("tuned"),
) -> int:
    """Measure codecs, or heads, on captured K, V and Q.

    Args:
        file: captured tensors, from `qvg capture`.
        budget: bits per element, everything counted; no limit if left out.
        span_tokens: tokens that are compressed together; all captured ones, at most 4096, if left out.
        codec: only these codecs; all if left out.
        model: model in whose loop the best ones are tried, too.
        heads: measure which heads look back, and write a list for `qvg generate --heads`; no codecs.
        also: more captured files of the same layers, for --heads.
        share: share of the heads that the list makes local.
        block_tokens: tokens of a block of the model's cache, for --heads.
        sink: first blocks that a local head reads.
        newest: newest blocks that a local head reads.
        out: folder for the files.
    """
    from qvg_jax.app import commands

    if heads:
        return commands.tune_heads([file, *also], out, share, block_tokens, sink, newest)
    entry = None if model is None else _registry().named(model)
    return commands.tune(file, entry, budget, span_tokens, codec, out)


def _fetch(model: Annotated[str, Parameter(name="MODEL")], /, *, yes: bool = False) -> int:
    """Download the released weights of a model.

    Args:
        model: name of the model, such as self-forcing.
        yes: accept the licences without being asked; they are those of the repositories.
    """
    from qvg_jax.app import commands

    return commands.fetch(_registry().named(model), yes)


def _convert(
    file: Annotated[File, Parameter(name="FILE")],
    target: Annotated[File, Parameter(name="OUT.safetensors")],
    /,
    *,
    entry: str | None = None,
) -> int:
    """Make safetensors of a .pt or .pth file.

    Args:
        file: checkpoint of PyTorch.
        target: file to write.
        entry: entry of the checkpoint that has the weights, such as generator_ema.
    """
    from qvg_jax.app import commands

    return commands.convert(file, target, entry)


def _codecs(*, shape: Shape = (1, 12, 37440, 128)) -> int:
    """List the codecs with their size.

    Args:
        shape: span to measure them on: batch, heads, tokens, head dim.
    """
    from qvg_jax.app import commands

    return commands.codecs(shape)


_OTHERS = {"fetch": _fetch, "tune": _tune, "convert": _convert, "codecs": _codecs}


if __name__ == "__main__":
    sys.exit(main())

"""The command that asks for a model's options again, for reports."""

import dataclasses
import shlex
from typing import Any

__all__ = ["command_line"]


def command_line(task: str, model: str, options: Any) -> str:
    """The shell command with the same options: those that differ from their defaults.

    Args:
        task, model: words of the command, such as "generate", "pocket-world".
        options: the model's dataclass of options.
    """
    words = ["qvg", task, model]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if value == default:
            continue
        name = "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(name)
        elif isinstance(value, (tuple, list)):
            words += [name, ",".join(map(str, value))]
        else:
            words += [name, str(value)]
    return shlex.join(words)

"""Builds the wheel: all code under the one name `qvg_jax`.

In a checkout `models` and `pallas_kernels` are packages of their own at the top level. Those names belong to many
projects, so in site-packages they would break, or be broken by, somebody else's folder. The wheel therefore has
them as `qvg_jax.models` and `qvg_jax.pallas_kernels`, and this hook writes the longer names where the sources say
the short ones: in imports, in names of modules inside strings, in docstrings. Lines keep their numbers.

Hatch's `sources` option alone moves files and leaves the imports as they are. Relative imports would read the same
under both names within a package, but not from one package to another, and an alias in `sys.modules` would take
the short names from everybody again. So the names are changed once, when the wheel is built; an editable
installation is the checkout itself, with the short names.
"""

import re
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

__all__ = ["CustomBuildHook", "renamed"]

HOME = "qvg_jax"
MOVED = ("models", "pallas_kernels")
KINDS = (".py", ".typed", ".safetensors", ".md", ".json")  # files that a wheel needs


def renamed(code: str, modules: dict[str, set[str]]) -> str:
    """The source text with the names of the wheel in place of those of a checkout.

    Args:
        code: source text of a module.
        modules: for each package that moves, the names of the modules and packages right in it. Only
            `package.name` with such a name is changed, so that attributes of a variable that
            happens to be called `models` stay.
    """
    for package, inner in modules.items():
        names = "|".join(sorted(inner))
        code = re.sub(rf"(?<![\w.]){package}(?=\.(?:{names})\b)", f"{HOME}.{package}", code)
        code = re.sub(
            rf"^(\s*from ){package}(?= import )", rf"\1{HOME}.{package}", code, flags=re.M
        )
    return code


class CustomBuildHook(BuildHookInterface):
    """Fills the wheel with the files of all packages, renamed."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds the files to what hatch puts into the wheel; an editable one gets none."""
        if version == "editable":
            return
        root = Path(self.root)
        modules = {
            package: {
                path.stem for path in (root / package).iterdir() if path.suffix in ("", ".py")
            }
            for package in MOVED
        }
        self._folder = tempfile.TemporaryDirectory()
        for package in (HOME, *MOVED):
            for path in sorted((root / package).rglob("*")):
                if path.suffix not in KINDS or "__pycache__" in path.parts or not path.is_file():
                    continue
                inside = path.relative_to(root)
                target = inside if package == HOME else Path(HOME, inside)
                if path.suffix in (".py", ".md"):
                    path = Path(self._folder.name, target)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    text = renamed((root / inside).read_text(encoding="utf-8"), modules)
                    path.write_text(text, encoding="utf-8")
                build_data["force_include"][str(path)] = str(target)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Removes the renamed copies."""
        if version != "editable":
            self._folder.cleanup()

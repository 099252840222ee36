"""Pages of Markdown: their code blocks, links and commands."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def pages() -> list[Path]:
    """All pages of the repository."""
    folders = ("docs", "models", "pallas_kernels")
    inner = (path for folder in folders for path in (ROOT / folder).rglob("*.md"))
    return sorted([*ROOT.glob("*.md"), *inner])


def code_blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return [code for name, code in _FENCE.findall(page.read_text()) if name == language]


def links(page: Path) -> list[str]:
    """Targets of the page's links to files of the repository, and to headings of them."""
    return [link for link in _LINK.findall(page.read_text()) if "://" not in link]


def anchors(page: Path) -> set[str]:
    """Names by which links reach the page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def listed_files(page: Path) -> list[Path]:
    """Modules that the first column of a table names, and test files that the text names."""
    text = page.read_text()
    cells = re.findall(r"^\| (`[^|]*\.py`(?:, `[^|]*\.py`)*) \|", text, re.MULTILINE)
    names = [name for cell in cells for name in re.findall(r"`([^`]*)`", cell)]
    modules = [page.parent / name for name in names if not name.startswith("tests/")]
    return modules + [ROOT / name for name in re.findall(r"`(tests/[\w/]+\.py)", text)]


def commands(page: Path) -> Iterator[list[str]]:
    """Commands of the page's shell blocks, as words: without comments, variables and `uv run`."""
    for language, block in _FENCE.findall(page.read_text()):
        if language not in ("", "bash", "sh"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if words[:2] == ["uv", "run"]:
                    words = words[2:]
                    while words[0] in ("--extra", "--group"):
                        words = words[2:]
                if words and "=" not in words[0]:
                    yield words

"""Settings of the documentation: `sphinx-build -W docs site` writes the pages to `site/`.

Some pages stand elsewhere in the repository, such as the README of a model; `<!-- page: FILE -->` brings one in. Links
are written for the place of the file in the repository, and `_links_for_site` turns them into links between pages.
"""

import inspect
import os
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

from docstrings import as_rst  # noqa: E402

import qvg_jax  # noqa: E402

REPOSITORY = "https://github.com/OWNER/qvg_jax/blob/main"

project = "qvg_jax"
author = "qvg_jax contributors"
version = release = qvg_jax.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
default_role = "code"

html_theme = "furo"
html_title = "qvg_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False

myst_heading_anchors = 4
nb_execution_mode = "off"  # tests/test_notebook.py runs the notebooks
suppress_warnings = ["mystnb.unknown_mime_type", "misc.highlighting_failure"]
autodoc_member_order = "bysource"
autodoc_typehints = (
    "none"  # types and shapes stand in the signature of the source, shapes in the text too
)
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_use_rtype = False
maximum_signature_line_length = 70
pygments_style = "friendly"

_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_NAMES = re.compile(r"^<!-- names: ([\w. ]+) -->$", re.MULTILINE)
_PAGE = re.compile(r"^<!-- page: (\S+) -->$", re.MULTILINE)

# Sphinx reads what lies below its own folder.
shutil.copytree(ROOT / "notebooks", HERE / "notebooks", dirs_exist_ok=True)


def _file_of(page: Path) -> Path:
    """The file that a page shows: itself, or the one that it brings in."""
    found = _PAGE.match(page.read_text()) if page.suffix == ".md" else None
    return ROOT / found[1] if found else page


def _pages() -> dict[Path, Path]:
    """The page that shows a file, by the file."""
    pages = {_file_of(page): page for page in HERE.rglob("*.md")}
    return pages | {ROOT / "notebooks" / p.name: p for p in (HERE / "notebooks").glob("*.ipynb")}


def _links_for_site(text: str, file: Path, page: Path) -> str:
    """The text with links to files turned into links to pages, or to the repository."""
    pages = _pages()

    def link(match: re.Match) -> str:
        target, mark, heading = match[2].partition("#")
        path = (file.parent / target).resolve()
        if "://" in target or not target or not path.exists():
            return match[0]
        if path in pages:
            target = os.path.relpath(pages[path], page.parent)
        elif path.suffix in (".png", ".svg"):
            target = os.path.relpath(path, page.parent)
        else:
            target = f"{REPOSITORY}/{path.relative_to(ROOT).as_posix()}"
        return f"{match[1]}{target}{mark}{heading}{match[3]}"

    return _LINK.sub(link, text)


def _directive(name: str) -> str:
    """What documents one public name, a class or a function; modules have places of their own."""
    value = getattr(qvg_jax, name)
    if inspect.ismodule(value):
        return ""
    if inspect.isclass(value):
        return f".. autoclass:: qvg_jax.{name}\n   :members:\n"
    return f".. autofunction:: qvg_jax.{name}\n"


def _documented(match: re.Match) -> str:
    """The public names whose modules are in the named folders, or have these names."""
    modules = qvg_jax._MODULES.items()
    names = sorted((n for n, of in modules if of.split(".")[0] in match[1].split()), key=str.lower)
    return "```{eval-rst}\n" + "\n".join(_directive(name) for name in names) + "```"


def _read(app, name: str, source: list[str]) -> None:
    page = Path(app.env.doc2path(name))
    if page.suffix == ".md":
        file = _file_of(page)
        shown = _links_for_site(file.read_text(), file, page)
        source[0] = _PAGE.sub(lambda _: shown, source[0]) if file != page else shown
        source[0] = _NAMES.sub(_documented, source[0])


def _docstring(app, what, name, value, options, lines: list[str]) -> None:
    lines[:] = as_rst(lines)


def setup(app):
    """Connects what this file adds to Sphinx."""
    app.connect("source-read", _read)
    app.connect("autodoc-process-docstring", _docstring, priority=100)  # before napoleon

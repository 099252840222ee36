"""What the house style of docstrings means in reStructuredText: examples, lists of results and signs.

Docstrings are Google's form with plain text around it: code in single backticks, examples and formulas as indented
lines, `name`: text for the parts of a result. napoleon reads the sections; the rest is done here, before it.
"""

import re

_SECTION = re.compile(r"^[A-Z][\w ]*:$")
_CODE = re.compile(r"(`[^`]+`)(?=\w)")
_PART = re.compile(r"^(\s+)(`\w+`: )")


def as_rst(lines: list[str]) -> list[str]:
    """The lines of a docstring with literal blocks, bullets and escapes where Sphinx needs them."""
    out, section, inside = [], False, ""
    for line in lines:
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if text and not indent:
            section, inside = bool(_SECTION.match(text)), _close(out, inside)
        elif text and not section and not inside:
            inside = "list" if text.startswith("- ") else "literal"
            out += ["", *(["::", ""] if inside == "literal" else [])]
        if inside != "literal":
            line = _escaped(line)
            if section:
                line = _PART.sub(r"\1*   \2", line)
        out.append(line)
    return out


def _close(out: list[str], inside: str) -> str:
    if inside:
        out.append("")
    return ""


def _escaped(line: str) -> str:
    """The line with `|` and `**`, which are signs here and markup there, escaped outside of code; plurals of code."""
    parts = line.split("`")
    parts[::2] = [part.replace("|", r"\|").replace("**", r"\*\*") for part in parts[::2]]
    return _CODE.sub(r"\1\\ ", "`".join(parts))

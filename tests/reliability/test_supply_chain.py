"""What the package brings along: dependencies that the code imports, their licences, known faults."""

import ast
import importlib.metadata as metadata
import json
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
BY_TEXT = ("import_module", "_import")
ADVISORIES = "api.osv.dev"

# Beginnings of licences that ask for no more than a notice, or that a library may be linked under.
ACCEPTED = (
    "apache", "bsd", "mit", "isc", "python software foundation", "psf", "python-2.0", "mpl", "mozilla",
    "hpnd", "zlib", "cc0", "unlicense", "0bsd", "historical permission", "the unlicense",
    "cmu license", "lgpl", "gnu lesser", "3-clause bsd", "public domain",
)  # fmt: skip


def requirements():
    """The requirements of the package and of all its extras, but for the GPU's."""
    extras = PROJECT["optional-dependencies"]
    texts = PROJECT["dependencies"] + [
        r for name in extras if not name.startswith("gpu") for r in extras[name]
    ]
    return sorted({canonicalize_name(Requirement(text).name) for text in texts})


def imported():
    """Top-level modules that the packages import: at the top, inside a function, or by a text."""
    names = set()
    for folder in ("qvg_jax", "models", "pallas_kernels"):
        for file in (REPO / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    names |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    names.add(node.module.split(".")[0])
                elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(BY_TEXT):
                    texts = (a.value for a in node.args if isinstance(a, ast.Constant))
                    names |= {text.split(".")[0] for text in texts if isinstance(text, str)}
    return names


def test_every_dependency_is_imported_by_the_code():
    modules, used = metadata.packages_distributions(), imported()
    brought = {}
    for module, names in modules.items():
        for name in names:
            brought.setdefault(canonicalize_name(name), set()).add(module)
    idle = []
    for name in requirements():
        if not brought.get(name, {name.replace("-", "_")}) & used:
            idle.append(name)
    assert idle == []


def test_every_import_is_a_dependency():
    own = {"qvg_jax", "models", "pallas_kernels"} | set(sys.stdlib_module_names)
    modules, extras = metadata.packages_distributions(), PROJECT["optional-dependencies"]
    named = {*requirements(), *(canonicalize_name(Requirement(r).name) for r in extras["gpu"])}
    strange = []
    for module in sorted(imported() - own):
        names = {canonicalize_name(name) for name in modules.get(module, [module])}
        if not names & (named | closure(named)):
            strange.append(module)
    assert strange == []


def closure(names):
    """Those distributions and what they need, as far as they are installed here."""
    found, waiting = set(), list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                waiting.append(need.name)
    return found


def licence(name):
    """What a distribution says of its licence, in its words."""
    said = metadata.metadata(name)
    classifiers = [c for c in said.get_all("Classifier") or [] if c.startswith("License ::")]
    texts = [said.get("License-Expression"), *[c.split(" :: ")[-1] for c in classifiers]]
    texts.append((said.get("License") or "").split("\n")[0])
    return [text for text in texts if text]


def accepted(text):
    """Whether one of the alternatives of an expression begins like an accepted licence."""
    words = re.split(r"\s+(?:OR|AND)\s+|[()/;,]", text)
    return any(word.strip().lower().startswith(ACCEPTED) for word in words if word.strip())


@pytest.mark.slow
def test_licences_ask_for_no_more_than_a_notice():
    said = {name: licence(name) for name in sorted(closure(requirements()))}
    print({name: texts[:1] for name, texts in said.items()})
    assert len(said) > 20
    refused = {
        name: texts for name, texts in said.items()
        # torch's CUDA parts are NVIDIA's own; the extra `convert` brings them on Linux.
        if not name.startswith("nvidia-") and not any(map(accepted, texts))
    }  # fmt: skip
    assert refused == {}


@pytest.mark.slow
def test_no_known_fault_in_what_is_installed(tmp_path):
    try:
        socket.create_connection((ADVISORIES, 443), timeout=5).close()
    except OSError as error:
        pytest.skip(f"the advisory database {ADVISORIES} is out of reach: {error}")
    names = closure(requirements())
    listed = tmp_path / "requirements.txt"
    listed.write_text("".join(f"{name}=={metadata.version(name)}\n" for name in sorted(names)))
    command = [sys.executable, "-m", "pip_audit", "--vulnerability-service", "osv", "--no-deps"]
    command += ["--disable-pip", "--format", "json", "--requirement", str(listed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout, done.stderr
    found = [d for d in json.loads(done.stdout)["dependencies"] if d.get("vulns")]
    assert found == [], found

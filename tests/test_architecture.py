"""The rooms of the packages and the direction of their imports; run with `-s` it prints the floors.

A room is a folder or a module at the root of `qvg_jax`. `docs/architecture.md` draws what is tested here.
"""

import ast
import graphlib
import re
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("models", "qvg_jax", "pallas_kernels")  # each imports those behind it only

# A room imports rooms of lower floors only.
FLOORS = (
    ("app",),
    ("study", "loop", "sharding"),
    ("attention",),
    ("cache",),
    ("codecs", "reading"),
    ("backends", "errors", "files"),
)
# Modules at the root that belong to the room of another name.
PART_OF = {"__main__": "app", "capability": "backends", "devices": "backends"}
MOST_ROOMS = 12
MOST_LINES = 350
LEAST_LINES = 15  # of a module that only passes names on


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True, cache_dir=None)


def _imports(graph):
    """Pairs of modules, the first of which imports the second."""
    for module in sorted(graph.modules):
        for imported in sorted(graph.find_modules_directly_imported_by(module)):
            yield module, imported


def _room(module):
    """The room of a module: `app` for `qvg_jax.app.cli`, the package's name for its root."""
    package, *inner = module.split(".")
    room = inner[0] if inner else package
    return PART_OF.get(room, room)


def _rooms(graph, package):
    """The rooms of a package, and for each pair of rooms an import from the first to the second."""
    rooms = {_room(module) for module in graph.modules if module.startswith(f"{package}.")}
    arrows = {}
    for module, imported in _imports(graph):
        inside = module.startswith(f"{package}.") and imported.split(".")[0] == package
        if inside and _room(module) != _room(imported):
            arrows.setdefault((_room(module), _room(imported)), f"{module} imports {imported}")
    return rooms, arrows


def _sources():
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_packages_import_one_way(graph):
    wrong = [
        f"{module} imports {imported}"
        for module, imported in _imports(graph)
        if PACKAGES.index(module.split(".")[0]) > PACKAGES.index(imported.split(".")[0])
    ]
    assert not wrong


def test_rooms_import_lower_floors_only(graph):
    rooms, arrows = _rooms(graph, "qvg_jax")
    floor = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    for number, names in enumerate(FLOORS):
        here = sorted(rooms & {*names})
        below = sorted({to for at, to in arrows if at in here})
        print(f"floor {len(FLOORS) - number}: {', '.join(here)} -> {', '.join(below) or 'nothing'}")
    assert rooms <= floor.keys(), "a new room needs a floor in FLOORS"
    assert len(rooms) <= MOST_ROOMS
    assert len(FLOORS) <= 6
    # The root passes names on to users; a room that imports it would close a circle.
    wrong = [why for (at, to), why in arrows.items() if floor[at] >= floor.get(to, -1)]
    assert not wrong


def test_the_picture_shows_all_rooms(graph):
    page = (ROOT / "docs" / "architecture.md").read_text()
    picture = page.split("```")[1]
    _, *parts = re.split(r"^ (\w+)/ ", picture, flags=re.MULTILINE)
    assert tuple(parts[::2]) == PACKAGES
    for package, shown in zip(parts[::2], parts[1::2], strict=True):
        rooms, _ = _rooms(graph, package)
        assert not [room for room in rooms if not re.search(rf"\b{room}\b", shown)]
    for number, names in enumerate(FLOORS):
        (line,) = re.findall(rf"^ +{len(FLOORS) - number}  (.*)$", picture, re.MULTILINE)
        assert all(re.search(rf"\b{name}\b", line) for name in names)


def test_no_circle_of_modules(graph):
    imports = {m: graph.find_modules_directly_imported_by(m) for m in graph.modules}
    graphlib.TopologicalSorter(imports).prepare()  # its error lists the circle


def test_models_build_on_common_parts(graph):
    rooms, arrows = _rooms(graph, "models")
    order = graphlib.TopologicalSorter({room: () for room in rooms})
    for at, to in arrows:
        order.add(at, to)
    order.prepare()
    assert not [why for (at, _), why in arrows.items() if at == "common"]


def test_only_the_command_looks_up_models():
    named = re.compile(r"models(\.\w+)+")
    users = {
        str(path.relative_to(ROOT))
        for path in _sources()
        if path.is_relative_to(ROOT / "qvg_jax")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and named.fullmatch(node.value)
    }
    assert users == {"qvg_jax/app/cli.py"}


def test_modules_are_neither_long_nor_empty_rooms():
    lines = {path: len(path.read_text().splitlines()) for path in _sources()}
    assert not {str(path): n for path, n in lines.items() if n > MOST_LINES}
    short = (p for p, n in lines.items() if 0 < n < LEAST_LINES and p.name != "__init__.py")
    assert not [str(path) for path in short if _only_passes_names_on(path)]


def _only_passes_names_on(path):
    def passes(node):
        if isinstance(node, ast.Assign):
            return [ast.unparse(target) for target in node.targets] == ["__all__"]
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        return docstring or isinstance(node, ast.Import | ast.ImportFrom)

    return all(passes(node) for node in ast.parse(path.read_text()).body)

"""Imports point one way: no circle between modules, no package that imports one above it."""

import ast
from pathlib import Path

import pytest

import inplace_ttt

Graph = dict[str, set[str]]
ROOT = Path(inplace_ttt.__file__).parent
LAYERS = (
    {"version"},
    {"errors", "plots", "records", "shipped"},
    {"hub", "text_files"},
    {"core"},
    {"fast"},
    {"config"},
    {"hf"},
    {"session"},
    {"eval"},
    {"rl", "serve", "train"},
    {"bench", "demo"},
    {"cli"},
    {"__init__", "__main__"},
)
"""What lies directly in the package, from the lowest layer to the highest. Each imports itself and what is lower."""


def import_graph(root: Path) -> Graph:
    """Return for each module below ``root`` the modules there that it imports, by names such as "hf.cache".

    Imports in functions and for type checkers count. A package's ``__init__`` has the package's name, that of ``root``
    itself is "__init__".
    """
    files = {_name(path, root): path for path in root.rglob("*.py")}
    return {name: set(_imported(name, path, set(files), root.name)) - {name} for name, path in files.items()}


def _name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _imported(name: str, path: Path, modules: set[str], top: str):
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [] if name == "__init__" else package
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == top:
                    yield ".".join(alias.name.split(".")[1:]) or "__init__"
        elif isinstance(node, ast.ImportFrom):
            inside = (node.module or "").split(".") if node.module else []
            if node.level:
                start = package[: len(package) - node.level + 1] + inside
            elif inside[:1] == [top]:
                start = inside[1:]
            else:
                continue
            for alias in node.names:
                whole = ".".join([*start, alias.name])
                yield whole if whole in modules else ".".join(start) or "__init__"


def circle(graph: Graph) -> list[str] | None:
    """Return modules that import each other in a ring, the first one again at the end; None where there is none."""
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        path.append(name)
        found = next((ring for other in sorted(graph.get(name, ())) if (ring := visit(other))), None)
        path.pop()
        done.add(name)
        return found

    return next((ring for name in sorted(graph) if (ring := visit(name))), None)


def upward(graph: Graph) -> list[str]:
    """Return the imports of a layer that is not lower, as "importer -> imported"."""
    layer = {package: i for i, packages in enumerate(LAYERS) for package in packages}
    found = []
    for name, others in graph.items():
        for other in others:
            own, its = name.split(".")[0], other.split(".")[0]
            if own != its and layer[own] <= layer[its]:
                found.append(f"{name} -> {other}")
    return sorted(found)


def test_every_package_has_a_layer():
    placed = {package for packages in LAYERS for package in packages}
    missing = {name.split(".")[0] for name in import_graph(ROOT)} - placed
    assert not missing, f"say in LAYERS what {missing} may import"


def test_no_circle():
    ring = circle(import_graph(ROOT))
    assert ring is None, " -> ".join(ring)


def test_imports_point_down():
    assert upward(import_graph(ROOT)) == []


@pytest.mark.parametrize(
    ("files", "ring", "up"),
    [
        ({"hf/a.py": "from .b import x", "hf/b.py": "from ..core import y"}, None, []),
        ({"hf/a.py": "from .b import x", "hf/b.py": "def f():\n    from . import a"}, ["hf.a", "hf.b", "hf.a"], []),
        (
            {"hf/a.py": "import top.hf.b", "hf/b.py": "if TYPE_CHECKING:\n    from top.hf.a import x"},
            ["hf.a", "hf.b", "hf.a"],
            [],
        ),
        ({"core/a.py": "from ..session import x"}, None, ["core.a -> session"]),
        ({"eval/a.py": "from .. import is_attached"}, None, ["eval.a -> __init__"]),
        ({"serve/a.py": "from ..train.x import y"}, None, ["serve.a -> train.x"]),
        ({"cli/__init__.py": "from .a import x", "cli/a.py": "from . import app"}, ["cli", "cli.a", "cli"], []),
        ({"__init__.py": "from .hf import x", "hf/a.py": "import top"}, ["__init__", "hf", "hf.a", "__init__"], None),
    ],
)
def test_of_the_graph_itself(tmp_path, files, ring, up):
    """Circles and upward imports are seen in every form in which they can be written."""
    root = tmp_path / "top"
    known = {f"{package}/__init__.py": "" for package in ("core", "hf", "session", "eval", "cli")}
    if "__init__.py" in files:
        known["hf/__init__.py"] = "from .a import y"
    for name, text in {"__init__.py": "", "train/x.py": "", **known, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    graph = import_graph(root)
    assert circle(graph) == ring
    assert up is None or upward(graph) == up

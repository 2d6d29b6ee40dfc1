"""Docstrings open with a verb, a noun or a name, and say "not a" where a habit of this code base was "no"."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import inplace_ttt

ROOT = Path(inplace_ttt.__file__).parent
CHECKED = ("cli", "core", "fast", "hf", "session", "eval", "train", "serve", "rl", "bench", "demo", ".")
"""Packages that follow this ("." stands for the files beside them)."""
OPENINGS = re.compile(r"(what|how|whether|where)\b", re.IGNORECASE)
HABITS = re.compile(r"\b(is|are) no\b(?! (longer|more))|\b(is|are) none of\b|\bgo(es)? on\b")
HOME = Path(__file__).parents[1]
TEXTS = [ROOT / "serve" / "page.html", *HOME.glob("*.md"), *HOME.glob("docs/*.md"), *HOME.glob("benchmarks/**/*.py")]


def wrong(source: str) -> Iterator[str]:
    """Yield the texts that open or speak as they should not, docstrings of attributes included."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for statement in node.body if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) else ():
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str) and OPENINGS.match(value.value):
                yield value.value
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from habits(node.value)
    yield from habits(source)  # comments too


def habits(text: str) -> Iterator[str]:
    """Yield the phrases of a text (or of code with its comments) that speak as they should not, across lines."""
    text = re.sub(r"\bthere (is|are) no\b", "", re.sub(r"\s+(# )?", " ", text), flags=re.IGNORECASE)
    for found in HABITS.finditer(text):
        yield text[max(found.start() - 40, 0) : found.end() + 40]


@pytest.mark.parametrize("package", CHECKED)
def test_docstrings_and_messages(package):
    files = ROOT.glob("*.py") if package == "." else (ROOT / package).rglob("*.py")
    found = [(file, text) for file in files for text in wrong(file.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize("file", [file for file in TEXTS if file.name != "log.md"], ids=lambda file: file.name)
def test_pages_and_scripts(file):
    text = file.read_text(encoding="utf-8")
    assert list(wrong(text) if file.suffix == ".py" else habits(text)) == []


def test_a_public_class_has_a_name_of_its_own():
    places: dict[str, list[str]] = {}
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert len(places) > 100
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


@pytest.mark.parametrize(
    "source",
    [
        '"""What it is."""',
        'X = 1\n"""Whether it is."""',
        'def f():\n    """How it is."""',
        'f("that is no text")',
        'f("that is "\n"no text")',
        "x = 1  # that is\n# no text",
        'f("x is none of y")',
    ],
)
def test_what_is_found(source):
    assert list(wrong(source))


@pytest.mark.parametrize(
    "source", ['"""Write it."""', 'f("there is no such file")', 'f(f"{x} is not text")', "# none of it"]
)
def test_what_is_not(source):
    assert not list(wrong(source))

"""The pages hold together: links lead somewhere, commands and names exist, pictures say in words what they show."""

import importlib.util
import re
import subprocess
import sys

import pytest
from line_links import LINK, PAGE, mended
from locations import ROOT

import inplace_ttt as ittt
from inplace_ttt.cli import app

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")


def slugs(page: str) -> set[str]:
    """Return the anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    page = path.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)", page):
        beside = path if not target else path.parent / target
        made = {"contributing.md", "changelog.md"} if path.parent != ROOT else set()
        assert beside.exists() or target in made, f"{path.name}: {target}"
        if anchor and beside.suffix == ".md" and beside.exists():
            assert anchor in slugs(beside.read_text(encoding="utf-8")), f"{path.name}: {target}#{anchor}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pictures_say_in_words_what_they_show(path):
    for words, picture in re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", path.read_text(encoding="utf-8")):
        assert len(words.split()) >= 6, f"{path.name}: {picture}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_tables_have_a_head(path):
    prose = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    tables = re.findall(r"(?:^\|.*\n)+", prose, re.MULTILINE)
    assert [table for table in tables if not re.match(r"\|.*\n\|( :?-+:? \|)+\n", table)] == []


def test_nothing_is_installed_by_a_name_that_pypi_does_not_have():
    """Until the package is there, an install line begins in a clone."""
    files = [*PAGES, *(p for d in ("src", "tests", "examples") for p in (ROOT / d).rglob("*.py"))]
    lines = [f"{path.name}: {line}" for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line for line in lines if re.search(r"pip install\b.*inplace-ttt\[", line)] == []


def test_every_picture_has_its_page():
    pages = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert [picture.name for picture in (ROOT / "docs" / "images").iterdir() if picture.name not in pages] == []


def test_lines_that_are_linked_define_the_name():
    page = PAGE.read_text(encoding="utf-8")
    assert len(LINK.findall(page)) > 30
    assert mended(page) == page, "lines have moved: python tests/line_links.py"


def test_the_first_page_is_short_and_names_what_there_is():
    assert len(README.splitlines()) <= 120
    table = README[README.index("## What to use when") : README.index("## More")]
    named = re.findall(r"`([A-Za-z_]+)`", table)
    assert {"attach", "Session", "DecodingGraph", "register_rule"} <= set(named)
    missing = [name for name in named if name not in (*ittt.__all__, "parallel", *commands())]
    assert missing == []


def commands() -> set[str]:
    return {command.name or command.callback.__name__ for command in app.registered_commands}


def test_commands_of_the_pages_exist():
    known = commands()
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        for name in re.findall(r"inplace-ttt ([a-z]+)\b", page):
            assert name in known, f"{path.name}: inplace-ttt {name}"
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([a-z-]+)", README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        assert re.search(rf"^{target}:", rules, re.MULTILINE), target


def test_the_reference_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert set(ittt.__all__) == {
        *re.findall(r"^::: inplace_ttt\.(\w+)$", page, re.MULTILINE),
        *re.findall(r"`(DEFAULT_MODEL|__version__)`", page),
    }


def test_the_tree_names_real_folders():
    tree = PAGE.read_text(encoding="utf-8").split("## The tree")[1]
    inner, outer = (re.findall(rf"^{space}(\w+)/ ", tree, re.MULTILINE) for space in ("  ", ""))
    assert len(inner) > 10
    assert all((ROOT / "src" / "inplace_ttt" / name).is_dir() for name in inner)
    assert all((ROOT / name).is_dir() for name in outer)


@pytest.mark.skipif(importlib.util.find_spec("mkdocstrings") is None, reason="needs the extra [docs]")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "inplace_ttt.attach" in (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")

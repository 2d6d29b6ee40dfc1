"""The pages hold together: links lead somewhere, commands and names exist, pictures say in words what they show."""

import importlib.util
import re
import shlex
import subprocess
import sys
from importlib import import_module

import pytest
import typer
import yaml
from line_links import LINK, PAGE, mended
from locations import ROOT

import inplace_ttt as ittt
from inplace_ttt.cli import app
from inplace_ttt.train.recipe import make_recipe

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
    missing = [name for name in named if name not in (*ittt.__all__, "parallel", *COMMANDS)]
    assert missing == []


COMMANDS = typer.main.get_command(app).commands
RUNS = ("inplace-ttt", "make", "python", "pip", "torchrun", "curl", "serve")
"""What a block of commands begins with."""

HISTORY = ("CHANGELOG.md", "log.md")
"""Pages with commands of their time."""

SHOWN = {
    "extending.md": (5, "output, compared by test_extending.py"),
    "parallel.md": (1, "part of a recipe, read by test_the_settings_of_the_page_make_a_recipe"),
    "serving.md": (3, "Ray's file, read by serve/test_cluster.py; systemd's and nginx's: neither is here"),
    "start.md": (4, "output, Python's compared by test_readme.py; the demos' are of a machine"),
    "training.md": (1, "a script for SLURM, run by train/test_train_plan.py with commands that print"),
}
"""How many blocks a page has that are neither Python nor commands, and who looks at them."""


def fenced(page: str) -> list[str]:
    """Return the blocks that are not Python."""
    return [
        block for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", page, re.MULTILINE | re.DOTALL) if kind != "python"
    ]


def lines(page: str) -> list[str]:
    """Return what may be a command: lines of blocks, and code within sentences."""
    prose = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    blocks = "\n".join(fenced(page)).replace("\\\n", " ").replace("`", "\n").splitlines()
    indented = re.findall(r"^    (inplace-ttt .*)$", prose, re.MULTILINE)
    return [*blocks, *indented, *(" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose))]


def test_blocks_are_python_or_commands_or_somebody_looks_at_them():
    """The Python blocks: test_readme.py."""
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        other = [block for block in fenced(path.read_text(encoding="utf-8")) if block.split()[0] not in RUNS]
        assert len(other) == SHOWN.get(path.name, (0, ""))[0], f"{path.name}: {other}"


def wrong(command: str) -> str | None:
    """Return what is wrong with a command of ours, without its run."""
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        rules = (ROOT / "Makefile").read_text(encoding="utf-8")
        return None if re.search(rf"^{words[1]}:", rules, re.MULTILINE) else "no such rule"
    if words[0] != "inplace-ttt":
        script = (ROOT / words[0]).read_text(encoding="utf-8") if (ROOT / words[0]).is_file() else None
        options = [word for word in words[1:] if word.startswith("--")]
        return "no such file" if script is None else next((o for o in options if f'"{o}"' not in script), None)
    if words[1].startswith("--"):
        return None if words[1] in ("--version", "--help", "--install-completion") else words[1]
    if words[1] not in COMMANDS:
        return "no such command"
    with COMMANDS[words[1]].make_context(words[1], [], resilient_parsing=True) as context:
        context.resilient_parsing = False
        try:
            left = COMMANDS[words[1]].make_parser(context).parse_args(words[2:])[1]
        except Exception as error:  # typer's own click has no public name for it
            return str(error)
    return f"not taken: {left}" if left else None


OURS = re.compile(
    r"(?:.*(?<!--model )\b(?=inplace-ttt [a-z-])|.*-m (?=inplace_ttt )"
    r"|(?:.*python )?(?=(?:benchmarks|examples)/\S+\.py)|(?=make [a-z]))(.*)"
)
"""A line with a command of this repository, which begins at the group."""


def test_commands_of_the_pages_can_be_given():
    """Names of commands, their options and how many arguments they take; rules of make; scripts and their options."""
    found = []
    for path in PAGES:
        if path.name not in HISTORY:
            matches = [OURS.match(line) for line in lines(path.read_text(encoding="utf-8"))]
            found += [(path.name, match[1].replace("inplace_ttt", "inplace-ttt")) for match in matches if match]
    assert len(found) > 80
    assert [(page, command, why) for page, command in found if (why := wrong(command))] == []


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("inplace-ttt chat --sesion x", "--sesion"),
        ("inplace-ttt chat --session", "--session"),
        ("inplace-ttt convert a b c", "not taken"),
        ("inplace-ttt tain x", "no such command"),
        ("make demos", "no such rule"),
        ("benchmarks/runs.py x --gpu 2", "--gpu"),
        ("benchmarks/run.py", "no such file"),
    ],
)
def test_a_wrong_command_is_found(command, why):
    assert why in wrong(command)


def test_the_settings_of_the_page_make_a_recipe():
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "parallel.md").read_text(encoding="utf-8"), re.DOTALL)
    settings = yaml.safe_load(text)
    tiny = yaml.safe_load((ROOT / "recipes" / "tiny-cpu.yaml").read_text(encoding="utf-8"))
    assert make_recipe(tiny | settings).parallel.context == settings["parallel"]["context"]


def test_the_reference_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert set(ittt.__all__) == {
        *re.findall(r"^::: inplace_ttt\.(\w+)$", page, re.MULTILINE),
        *re.findall(r"`(DEFAULT_MODEL|__version__|inspect)`", page),
    }


def test_what_the_pages_import_is_in_the_reference():
    listed = set(
        re.findall(r"^::: (inplace_ttt\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    imported = {
        f"{module}.{name}"
        for path in PAGES
        if path.name != "log.md"
        for module, names in re.findall(
            r"^from (inplace_ttt[\w.]*) import (\([^)]*\)|.*)$", path.read_text(encoding="utf-8"), re.MULTILINE
        )
        for name in re.findall(r"\w+", names)
    }
    assert len(imported) > 5
    assert imported - listed == set()
    for name in listed:
        module, _, attribute = name.rpartition(".")
        if module != "inplace_ttt.rl":  # needs trl
            assert getattr(import_module(module), attribute) is not None


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

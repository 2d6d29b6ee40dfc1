"""What the wheel brings: the command, the shipped model, the recipes. It is made of the sdist; twine passes both."""

import os
import subprocess
import sys
import zipfile

import pytest
import yaml
from locations import ROOT

import inplace_ttt as ittt

MODEL = "inplace_ttt/models/books-and-code"
LIMIT = 20_000_000
PLACES = """
import yaml, inplace_ttt as i
from inplace_ttt.train.recipe import find_recipe
print(i.DEFAULT_MODEL, i.DEFAULT_MODEL.is_dir())
print(find_recipe("tiny-cpu"), yaml.safe_load(find_recipe("tiny-cpu").read_text())["name"])
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A directory with the sdist and the wheel that is made of it, so nothing that the wheel needs lacks there."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    return path


def test_twine_finds_nothing_wrong(built):
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.count("PASSED")) == (0, 2), done.stdout + done.stderr


def test_carries_the_shipped_model(wheel):
    with zipfile.ZipFile(wheel) as archive:
        sizes = {i.filename: i.file_size for i in archive.infolist() if i.filename.startswith(f"{MODEL}/")}
    for name in ("inplace_ttt.json", "inplace_ttt.safetensors", "tokenizer.json", "base/model.safetensors"):
        assert sizes.get(f"{MODEL}/{name}"), name
    assert sum(sizes.values()) <= LIMIT


def test_carries_recipes_and_what_a_model_in_memory_is_named_after(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    recipes = {f"inplace_ttt/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    assert len(recipes) > 10
    assert recipes | {"inplace_ttt/hf/unsaved/config.json", "inplace_ttt/py.typed"} <= names


def test_one_version_everywhere(wheel):
    """In the wheel, the changelog and the citation."""
    assert wheel.name.startswith(f"inplace_ttt-{ittt.__version__}-")
    assert f"\n## [{ittt.__version__}] - 20" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == ittt.__version__


def test_installs_the_command(wheel, tmp_path):
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    environment = {**os.environ, "PYTHONPATH": str(target)}
    command = target / "bin" / "inplace-ttt"
    assert command.is_file()
    done = subprocess.run(
        [sys.executable, str(command), "inspect", "--json"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    where = subprocess.run(
        [sys.executable, "-c", PLACES], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120
    )
    recipe = target / "inplace_ttt" / "recipes" / "tiny-cpu.yaml"
    assert where.stdout.split() == [str(target / MODEL), "True", str(recipe), "tiny-cpu"], where.stderr

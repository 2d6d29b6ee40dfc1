"""The standard library as text, and the recipe that needs nothing else: the first commands of a newcomer."""

import sysconfig
from pathlib import Path
from typing import Any

import pytest
from locations import ROOT
from typer.testing import CliRunner

from inplace_ttt.cli import app
from inplace_ttt.errors import SourceError
from inplace_ttt.train.recipe import find_recipe, load_recipe, make_recipe
from inplace_ttt.train.schema import RecipeError
from inplace_ttt.train.sources import SPLITS, library, read_source, source_files, split_of

SHIPPED = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


def test_splits_share_no_module_and_are_python_s_own() -> None:
    found = {split: list(library(split)) for split in SPLITS}
    modules = {split: {document.id.split("/")[0] for document in documents} for split, documents in found.items()}
    assert not modules["train"] & modules["test"]
    assert not modules["train"] & modules["validation"]
    assert not modules["test"] & modules["validation"]
    folder = Path(sysconfig.get_path("stdlib"))
    for documents in found.values():
        assert sum(len(document.text) for document in documents) > 200_000
        for document in documents:
            assert (folder / document.id).is_file()
            assert not {"test", "tests", "site-packages"} & set(document.id.split("/"))
    assert split_of("argparse.py") == split_of("argparse")
    assert [d.id for d in read_source("library:test")] == [d.id for d in found["test"]]


def test_a_python_without_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SourceError, match="library:train: this Python's standard library has no source files"):
        list(library("train"))
    with pytest.raises(SourceError, match="there is no split 'all', only train, validation, test"):
        source_files("library:all")


def test_a_split_belongs_to_itself(values: dict[str, Any]) -> None:
    values["data"]["train"] = {"text": "library:test"}
    with pytest.raises(RecipeError, match=r"data\.train\.text: .*belongs to another split, write library:train"):
        make_recipe(values)


# -- recipes by name --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["{}", "{}.yaml", "recipes/{}.yaml"])
def test_shipped_recipes_have_names(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(form.format("tiny-cpu")).read_text() == (ROOT / "recipes" / "tiny-cpu.yaml").read_text()
    own = tmp_path / form.format("tiny-cpu")
    own.parent.mkdir(exist_ok=True)
    own.write_text("name: mine")
    assert find_recipe(form.format("tiny-cpu")).read_text() == "name: mine"  # a file comes first


def test_an_unknown_name_lists_those_there_are() -> None:
    result = CliRunner().invoke(app, ["train", "tiny-gpu"])
    assert result.exit_code == 2
    assert (
        result.output.strip() == f"error: tiny-gpu: no such file, nor a recipe of that name, only {', '.join(SHIPPED)}"
    )


@pytest.mark.parametrize(
    "name", ["scratch-500m", "scratch-1.5b", "tiny-cpu", "continual-qwen3-4b-32k", "adapter-qwen3-4b"]
)
def test_a_plan_needs_no_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("INPLACE_TTT_DATA", raising=False)
    result = CliRunner().invoke(app, ["train", name, "--plan"])
    assert result.exit_code == 0, result.output
    assert "GFLOP a token" in result.output
    if name == "tiny-cpu":
        return
    with pytest.raises(RecipeError, match="the environment variable INPLACE_TTT_DATA is not set"):
        load_recipe(name)
    monkeypatch.setenv("INPLACE_TTT_DATA", "nowhere")
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(name)
    with pytest.raises(RecipeError, match=r"optimizer\.lr"):  # the rest is checked all the same
        load_recipe(name, ["optimizer.lr=7"], data=False)


def test_a_plan_needs_what_is_not_data(values: dict[str, Any]) -> None:
    values["output"] = "${INPLACE_TTT_NOT_SET}/run"
    with pytest.raises(RecipeError, match="output: the environment variable INPLACE_TTT_NOT_SET is not set"):
        make_recipe(values, data=False)


@pytest.mark.slow
def test_the_first_command_trains_without_a_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty directory, without environment variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("INPLACE_TTT_DATA", raising=False)
    settings = ["steps=4", "eval_every=0", "save_every=0", "optimizer.warmup_steps=2", "evaluation.windows=1"]
    done = CliRunner().invoke(app, ["train", "tiny-cpu", *settings])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == "done: out/tiny-cpu"
    card = (tmp_path / "out/tiny-cpu/model/README.md").read_text()
    assert "| loss, nats per token | updates on | updates off |" in card

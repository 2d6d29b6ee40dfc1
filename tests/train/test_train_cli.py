"""The two commands, as typer calls them."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from transformers import AutoTokenizer
from typer.testing import CliRunner

from inplace_ttt.cli.train import tokenizer, train
from inplace_ttt.errors import UserError

app = typer.Typer()
app.command()(train)
app.command()(tokenizer)


@pytest.fixture
def recipe(values: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_train_with_overrides(recipe: Path, tmp_path: Path) -> None:
    arguments = ["train", str(recipe), "steps=3", f"output={tmp_path}/other", "ttt={chunk_size: 16, layers: [0]}"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == f"done: {tmp_path}/other"
    assert re.search(r"^step      3  loss .* tokens/s .*  S/W0 \S+  cosine \S+$", result.output, re.MULTILINE), (
        "one line a step"
    )
    assert (tmp_path / "other" / "model").is_dir()


def test_prepare_only(recipe: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", str(recipe), f"data.cache={tmp_path}/tokens", "--prepare-only"])
    assert result.exit_code == 0, result.output
    assert list((tmp_path / "tokens").glob("*/summary.json"))


def test_one_of_several_processes_speaks(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        result = CliRunner().invoke(app, ["train", str(recipe), "--plan"])
        assert result.exit_code == 0, result.output
        assert bool(result.output) == (rank == "0")


def test_mistakes_are_user_errors(recipe: Path) -> None:
    result = CliRunner().invoke(app, ["train", str(recipe), "stepz=3"])
    assert result.exit_code != 0
    assert isinstance(result.exception, UserError)


def test_tokenizer(corpus: Path, tmp_path: Path) -> None:
    arguments = ["tokenizer", f"jsonl:{corpus}/train.jsonl", "--out", str(tmp_path / "t"), "--vocab-size", "290"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert len(AutoTokenizer.from_pretrained(tmp_path / "t")) == 290

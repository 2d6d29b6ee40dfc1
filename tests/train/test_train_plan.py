"""The plan's formulas against recorded runs, and the commands of docs/training.md."""

import json
import re
import shlex
from pathlib import Path

import pytest
from locations import ROOT
from typer.testing import CliRunner

from inplace_ttt.cli import app
from inplace_ttt.train.plan import plan
from inplace_ttt.train.recipe import load_recipe

RECORDS = ROOT / "benchmarks" / "results" / "books-and-code"
COMMANDS = re.findall(
    r"(?:inplace-ttt|-m inplace_ttt) (train recipes/[^\n\\`]+)", (ROOT / "docs/training.md").read_text()
)


@pytest.fixture(autouse=True)
def _data(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("prose_train_0", "prose_validation", "prose_test"):
        (corpus / f"{name}.jsonl.xz").touch()
    (corpus / "validation.jsonl").touch()
    monkeypatch.setenv("INPLACE_TTT_DATA", str(corpus))


@pytest.mark.parametrize("name", ["ttt-seed0", "window-seed0"])
def test_memory_is_within_a_fifth_of_recorded_runs(name: str) -> None:
    record = json.loads((RECORDS / name / "run.json").read_text())
    planned = plan(load_recipe(f"recipes/books-and-code-{name.split('-')[0]}.yaml"))
    assert planned.total == pytest.approx(record["peak_memory_bytes"], rel=0.2)
    assert planned.tokens == record["tokens_seen"]


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_commands_are_planned(command: str) -> None:
    arguments = [part for part in shlex.split(command) if part not in ("--resume", "--prepare-only", "--plan")]
    result = CliRunner().invoke(app, [*arguments, "--plan"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "GFLOP a token" in result.output


def test_commands_were_found() -> None:
    assert len(COMMANDS) >= 5

"""The command as torchrun and accelerate start it: two processes train like one, and one of them speaks."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from spawn import run_ranks

from inplace_ttt.train.recipe import make_recipe
from inplace_ttt.train.run import run


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate_launch"])
def test_two_processes_equal_one(values: dict[str, Any], tmp_path: Path, launcher: str) -> None:
    """Tokenising while they train: each reads all documents, and takes its own rows."""
    values["data"] |= {"tokenise": "while_training"}
    values |= {"ttt": {"layers": "0::1", "chunk_size": 16, "lr": 1.0}, "steps": 4, "batch_size": 2}
    one = json.loads((run(make_recipe(values), console=Console(quiet=True)) / "run.json").read_text())
    two = values | {"output": str(tmp_path / "two"), "parallel": {"data": 2}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(two), encoding="utf-8")
    ((first, second),) = run_ranks("torchrun", launcher, 1, 2, str(tmp_path), ["train", str(tmp_path / "recipe.yaml")])
    assert first.count("step      4") == 1
    assert not second.strip()
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["tokens_seen"] == one["tokens_seen"]
    for a, b in zip(record["curve"], one["curve"], strict=True):
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-4)

"""What the processes of test_recipe_ranks.py do: recipes' runs, as torchrun would start them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from rich.console import Console

from inplace_ttt.errors import UserError
from inplace_ttt.hf.sharding import is_sharded
from inplace_ttt.train import loss as loss_module
from inplace_ttt.train import run as run_module
from inplace_ttt.train.recipe import make_recipe
from inplace_ttt.train.sizes import choose_lr


def runs(several: list[tuple[dict[str, Any], bool, int]]) -> list[Any]:
    """(recipe, resume, port) in turn: the losses of the log by step, or the message that refused it."""
    found: list[Any] = []
    for values, resume, port in several:
        os.environ["MASTER_PORT"] = str(port)
        try:
            with (
                patch.object(run_module, "plot_losses"),
                patch.object(run_module, "choose_lr", on_the_device),
                patch.object(loss_module, "tokens_at_once", piece),
            ):
                output = run_module.run(make_recipe(values), resume=resume, console=Console(quiet=True))
        except UserError as error:
            found.append(str(error))
            if dist.is_initialized():
                dist.destroy_process_group()
            continue
        if os.environ.get("RANK", "0") == "0":
            found.append(json.loads((output / "run.json").read_text())["curve"])
        else:
            found.append(None)
    return found


def piece(vocabulary: int) -> int:
    """Several processes take the loss from pieces of their rows, one process from whole ones: the same numbers."""
    return 48 if os.environ.get("WORLD_SIZE", "1") != "1" else 10**6


def on_the_device(model: Any, *arguments: Any) -> float:
    """The measurement of an inner learning rate is made where the training is: on shards, not on whole copies."""
    assert is_sharded(model) == (os.environ.get("WORLD_SIZE", "1") != "1")
    return choose_lr(model, *arguments)


runs.starts_itself = True  # type: ignore[attr-defined]


def interrupted(output: Path, step: int, copy: Path) -> Path:
    """A copy of a finished run as it was after ``step``."""
    shutil.copytree(output, copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    (copy / "run.json").unlink()
    return copy

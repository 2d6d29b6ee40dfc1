"""What the process of test_train_kill.py does: a run that is killed at given moments and goes on each time."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from inplace_ttt.train import run as run_module
from inplace_ttt.train.recipe import last_complete, make_recipe
from inplace_ttt.train.trainer import MarkComplete

Moment = tuple[str, int]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Killer(MarkComplete):
    """Ends the process at its moment: as a step begins, between micro-batches, or just before a checkpoint's mark."""

    kind, step = "", -1

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (self.kind, self.step) == ("begin", state.global_step):
            die()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (self.kind, self.step) == ("middle", state.global_step):
            die()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (self.kind, self.step) == ("mark", state.global_step):
            die()
        super().on_save(args, state, control, **kwargs)


def save_half(value: Any, path: Any) -> None:
    """In place of ``torch.save``: the process dies with half of its moment's checkpoint written."""
    write(value, path)
    if Path(path).parent.name == f"checkpoint-{Killer.step}":
        os.truncate(path, os.path.getsize(path) // 2)
        die()


write = torch.save


def curve(output: Path) -> list[dict[str, float]]:
    """The log without what depends on the clock."""
    entries = json.loads((output / "run.json").read_text())["curve"]
    return [{k: v for k, v in e.items() if k not in ("tokens_per_second", "peak_memory_gib")} for e in entries]


def train(values: dict[str, Any], moment: Moment, resume: bool) -> Path:
    Killer.kind, Killer.step = moment
    run_module.MarkComplete = Killer  # type: ignore[misc]
    run_module.plot_losses = lambda *_: None  # type: ignore[assignment]
    if moment[0] == "file":
        torch.save = save_half  # type: ignore[assignment]
    return run_module.run(make_recipe(values), resume=resume, console=Console(quiet=True))


def killed(values: dict[str, Any], moments: list[Moment]) -> dict[str, Any]:
    """The log of a run that was killed at each moment in turn, what was on disk after each, and how it ended."""
    found: dict[str, Any] = {"ends": [], "complete": []}
    output = Path(values["output"])
    for i, moment in enumerate(moments):
        if (child := os.fork()) == 0:
            try:
                train(values, moment, resume=i > 0)
            finally:
                os._exit(1)
        found["ends"].append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        found["complete"].append(last_complete(output / "checkpoints"))
    found["curve"] = curve(train(values, ("", -1), resume=True))
    found["whole"] = curve(train(values | {"output": f"{output}-whole"}, ("", -1), resume=False))
    return found


killed.starts_itself = True  # type: ignore[attr-defined]

"""kill -9 at any moment of a run: it goes on with the losses of an uninterrupted one, bit for bit."""

import random
import signal
from pathlib import Path
from typing import Any

import pytest
from killed_runs import Moment
from spawn import run_ranks

from inplace_ttt.train.prepare import prepare
from inplace_ttt.train.recipe import make_recipe

STEPS, EVERY = 24, 3


def moments(seed: int) -> list[Moment]:
    """One of each kind, in the order of their steps; the first before there is any checkpoint."""
    generator = random.Random(seed)
    saves = sorted(generator.sample(range(2 * EVERY, STEPS, EVERY), 2))
    steps = sorted(generator.sample([n for n in range(EVERY + 1, STEPS) if n % EVERY], 2))
    found = [("begin", 1), ("file", saves[0]), ("mark", saves[1]), ("begin", steps[0]), ("middle", steps[1])]
    return sorted(found, key=lambda moment: moment[1])


def test_moments_cover_every_kind() -> None:
    assert {kind for kind, _ in moments(0)} == {"begin", "file", "mark", "middle"}


@pytest.mark.parametrize("seed", [0])
def test_killed_at_any_moment_goes_on_with_the_same_losses(values: dict[str, Any], seed: int) -> None:
    values |= {
        "ttt": {"layers": "0::1", "chunk_size": 16, "lr": 1.0}, "steps": STEPS, "save_every": EVERY,
        "ttt_lr_warmup_steps": 5, "gradient_accumulation": 2, "eval_every": 8,
    }  # fmt: skip
    prepare(make_recipe(values))
    planned = moments(seed)
    (found,) = run_ranks("killed_runs", "killed", 1, values, planned)
    assert found["ends"] == [-signal.SIGKILL] * len(planned), planned
    last = [None if path is None else int(Path(path).name.rpartition("-")[2]) for path in found["complete"]]
    expected = [(step - (kind in ("file", "mark"))) // EVERY * EVERY or None for kind, step in planned]
    assert last == expected, "a checkpoint counts once it is whole, and no earlier"
    assert len(found["curve"]) == STEPS
    assert found["curve"] == found["whole"]

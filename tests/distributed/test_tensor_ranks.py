"""Tensor parallelism by transformers: the same logits, text, gradients and files as one process."""

from pathlib import Path
from typing import Any

import pytest
from spawn import run_ranks

FAMILIES = {2: ["llama", "starcoder2"], 4: ["llama"]}
each = pytest.mark.parametrize(("ranks", "family"), [(n, family) for n, named in FAMILIES.items() for family in named])


@pytest.fixture
def results(once: Any) -> Any:
    def get(ranks: int) -> Any:
        def all_of_them(folder: Path) -> Any:
            return run_ranks("tensor_ranks", "everything", ranks, str(folder), FAMILIES[ranks])

        return once(f"tensor{ranks}", all_of_them)

    return get


@each
def test_equals_one_process(ranks: int, family: str, results: Any) -> None:
    for result in results(ranks):
        found = result[family]
        assert found["identity"] == 0.0
        assert found["initial"], "the added parameters differ between processes"
        assert found["updates"] > 1e-2
        assert found["logits"] < 1e-6  # norms are taken in float32
        assert found["loaded"] < 1e-6
        assert found["generated"]
        assert found["beams"]
        assert max(found["gradients"].values()) < 1e-4
        assert found["saved"] == 0.0
        assert found["detached"] == 0.0


@each
def test_each_process_holds_its_share_of_the_state(ranks: int, family: str, results: Any) -> None:
    for result in results(ranks):
        (B, D, F), whole = result[family]["state"]
        assert whole == [B, D, ranks * F]


@each
def test_updates_communicate_nothing(ranks: int, family: str, results: Any) -> None:
    """A forward with updates sends as often as one without."""
    for result in results(ranks):
        for on, off in result[family]["communications"]:
            assert on == off > 0


@each
def test_clipping_and_sessions_are_refused(ranks: int, family: str, results: Any) -> None:
    for result in results(ranks):
        assert "without tensor parallelism" in result[family]["session"]
        assert "tensor parallelism" in result[family]["clip"]
        assert "tensor parallelism" in result[family]["clip at attach"]

"""Whole models on slices and shards equal one process: loss and every gradient, in float64."""

from typing import Any

import pytest
from model_ranks import CASES
from spawn import run_ranks

_found: dict[int, Any] = {}


def _results(ranks: int = 2) -> Any:
    if ranks not in _found:
        _found[ranks] = run_ranks("model_ranks", "everything", ranks, list(CASES), True)
    return _found[ranks]


@pytest.mark.parametrize("name", CASES)
def test_context_parallel_equals_one_process(name: str) -> None:
    for result in _results():
        found = result["context"][name]
        assert found["loss"] < 1e-10
        assert found["gradients"] < 1e-6  # families with norms in float32 differ by its rounding
        assert found["after"] < 1e-10, "disable_context_parallel did not restore the model"
        if name != "qwen3-off":
            assert found["updates"] > 1e-4, "the updates of this case do nothing"


def test_what_context_parallelism_cannot_do_is_refused_on_every_rank() -> None:
    for result in _results():
        messages = result["refusals"]
        assert "leave the cache out" in messages["cache"]
        assert "position_ids" in messages["positions"]
        assert "disable_context_parallel" in messages["generate"]
        assert "do not join" in messages["uncut"]
        assert "cannot be cut" in messages["length"]
        assert "cu_seq_lens_q" in messages["unknown"]
        assert "inside a chunk" in messages["chunk"]
        assert "multiple of" in messages["chunk"]
        assert "already" in messages["twice"]
        assert "linear_attention" in messages["recurrent"]

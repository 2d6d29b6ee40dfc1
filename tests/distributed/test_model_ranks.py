"""Whole models on slices and shards equal one process: loss and every gradient, in float64."""

from pathlib import Path
from typing import Any

import pytest
from model_ranks import CASES, LAYOUTS
from spawn import run_ranks


@pytest.fixture
def results(once: Any) -> Any:
    """Of the two-process world, then of the four-process one, which also goes on from the first one's checkpoints."""

    def get(ranks: int) -> Any:
        def both(folder: Path) -> Any:
            others = {2: ["shard"], 4: ["shard", "context"]}
            return {n: run_ranks("model_ranks", "everything", n, list(CASES), str(folder), others[n]) for n in others}

        return once("model", both)[ranks]

    return get


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_context_parallel_equals_one_process(name: str, ranks: int, results: Any) -> None:
    for result in results(ranks):
        found = result["context"][name]
        assert found["loss"] < 1e-10
        assert found["gradients"] < 1e-6  # families with norms in float32 differ by its rounding
        assert found["after"] < 1e-10, "disable_context_parallel did not restore the model"
        if name != "qwen3-off":
            assert found["updates"] > 1e-4, "the updates of this case do nothing"


def test_what_context_parallelism_cannot_do_is_refused_on_every_rank(results: Any) -> None:
    for result in results(2):
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
        assert "CUDA" in messages["torch"]
        assert "would start anew on each" in messages["torch's own"]
        assert "linear_attention" in messages["recurrent"]


@pytest.mark.parametrize(("ranks", "layout"), [(n, layout) for n, named in LAYOUTS.items() for layout in named])
def test_layouts_train_like_one_process(ranks: int, layout: str, results: Any) -> None:
    """Two AdamW steps of two micro-batches (packed rows, activation checkpointing), and the whole save."""
    for result in results(ranks):
        found = result["layouts"][layout]
        assert found["sharded"] == 1.0
        assert max(found["loss"]) < 1e-8
        assert max(found["parameters"]) < 1e-6  # AdamW divides by small gradients
    kept = [result["layouts"][layout]["kept"] for result in results(ranks)]
    assert kept[0] > 0
    assert not any(kept[1:]), "one process alone holds the whole model"
    assert results(ranks)[0]["layouts"][layout]["saved"] == 0.0


@pytest.mark.parametrize("checkpoint", ["shard", "context"])
def test_checkpoints_of_two_processes_go_on_with_four(checkpoint: str, results: Any) -> None:
    for result in results(4):
        assert result["resume"][checkpoint] < 1e-6


def test_checkpoints_go_on_with_the_same_processes(results: Any) -> None:
    for result in results(2):
        assert result["resume"]["shard"] < 1e-6


def test_distributed_data_parallel(results: Any) -> None:
    for result in results(2):
        assert result["replicas"]["loss"] < 1e-10
        assert result["replicas"]["gradients"] < 1e-8


def test_mixed_precision(results: Any) -> None:
    for result in results(2):
        for layout in ("shard", "context"):
            assert result["bf16"][layout]["loss"] < 2e-2
            assert result["bf16"][layout]["gradients"] < 5e-2

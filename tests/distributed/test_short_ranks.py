"""Data parallelism waits for no gradient that never comes: rows of any length, also where nothing but P is trained."""

from typing import Any

from short_ranks import STEPS
from spawn import run_ranks


def test_short_rows_on_some_processes(once: Any) -> None:
    """DDP and FSDP2, all weights and the added ones alone: as one process that reads all rows."""
    for result in once("short", lambda folder: run_ranks("short_ranks", "everything", 2)):
        assert len(result) == 4
        for way, found in result.items():
            assert len(found) == len(STEPS)
            assert max(found) < 1e-6, way

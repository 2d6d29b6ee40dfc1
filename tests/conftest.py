"""Shared helpers. Tests that need data outside the repository skip with a reason where it is missing."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from locations import SHARED

# Tests run side by side, one to a core, and so do the processes that they start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _imports_stay() -> Iterator[None]:
    """Collections need not walk over all that was imported: each run of the Trainer makes several."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"no test data at {SHARED}")
    return SHARED

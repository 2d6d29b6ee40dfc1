"""Groups of processes are started once in a test run, whichever of pytest's workers needs them first."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

Once = Callable[[str, Callable[[Path], Any]], Any]


@pytest.fixture(scope="session")
def run_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that all workers of this test run share."""
    root = tmp_path_factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


@pytest.fixture(scope="session")
def once(run_root: Path) -> Once:
    """``once(name, compute)``: what ``compute(folder)`` returned the first time, with a folder of that name."""

    def get(name: str, compute: Callable[[Path], Any]) -> Any:
        folder, stored = run_root / name, run_root / f"{name}.pickle"
        with FileLock(f"{stored}.lock"):
            if not stored.exists():
                folder.mkdir(exist_ok=True)
                stored.write_bytes(pickle.dumps(compute(folder)))
            return pickle.loads(stored.read_bytes())

    return get

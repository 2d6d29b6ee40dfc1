"""Provenance that every record of results holds, and the files that records are written to."""

import json
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .version import __version__

VERSIONS = ("torch", "transformers", "accelerate", "tokenizers", "numpy", "triton")


def about(started: datetime | None = None) -> dict[str, Any]:
    """Return commit, date, hardware and versions, with the seconds since ``started`` (aware of its time zone)."""
    now = datetime.now(UTC)
    seconds = {} if started is None else {"seconds": round((now - started).total_seconds(), 1)}
    return {
        "commit": git_commit(),
        "date": now.isoformat(timespec="seconds"),
        **seconds,
        "hardware": hardware(),
        "versions": versions(),
    }


def git_commit() -> str | None:
    """Return the commit of the library's source tree, None when it is not a git checkout; "-dirty": with changed files.

    The environment variable INPLACE_TTT_COMMIT replaces it where the source travels without its history.
    """
    if named := os.environ.get("INPLACE_TTT_COMMIT"):
        return named
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # else it would be the checkout around an installed copy
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware() -> dict[str, Any]:
    """Return the names of the processor and of the accelerators."""
    found: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["cuda"] = torch.version.cuda
    return found


def versions() -> dict[str, str]:
    """Return versions of Python and of the libraries that decide the result."""
    found = {"python": sys.version.split()[0], "inplace-ttt": __version__}
    for name in VERSIONS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def peak_memory() -> int:
    """Return bytes at the peak: of the GPU's allocations where there is one, else of the process; 0 if not known."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON, and directories as needed: the whole file or none, even if the process is killed."""
    is_device = path.exists() and not path.is_file()  # which a file must not replace
    path = path if is_device else path.resolve()  # nor a link
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1, default=str) + "\n"
    if is_device:
        path.write_text(text, encoding="utf-8")
        return
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:  # a file in it gets the umask's mode
        unfinished = Path(folder) / path.name
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)

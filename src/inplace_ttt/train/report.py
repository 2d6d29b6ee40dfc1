"""What a run leaves behind for people: the loss curves as a picture and ``run.json``."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

LOGGED = ("loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "mfu", "peak_memory_gib")
LOGGED_BY_NAME = ("eval_", "update_norm/", "state_norm/")
VERSIONS = ("inplace-ttt", "torch", "transformers", "accelerate", "tokenizers", "numpy", "triton")


def loss_curve(log_history: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """The Trainer's log without its bookkeeping: one entry a step, training and validation merged."""
    steps: dict[int, dict[str, float]] = {}
    for entry in log_history:
        kept = {n: value for n, value in entry.items() if n in LOGGED or n.startswith(LOGGED_BY_NAME)}
        if kept:
            steps.setdefault(int(entry["step"]), {}).update(kept)
    return [{"step": step, **values} for step, values in sorted(steps.items())]


def median(curve: Sequence[Mapping[str, float]], name: str) -> float | None:
    """Of an entry over the log's intervals; None where no line has it."""
    values = [entry[name] for entry in curve if name in entry]
    return statistics.median(values) if values else None


def plot_losses(curve: Sequence[Mapping[str, float]], path: Path, title: str) -> None:
    """Training and validation loss over the steps as a PNG; dashed: updates off."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    training = [(entry["step"], entry["loss"]) for entry in curve if "loss" in entry]
    if training:
        axes.plot(*zip(*training, strict=True), color="0.6", linewidth=1, label="training")
    names = sorted({name for entry in curve for name in entry if name.startswith("eval_")})
    colours: dict[str, str] = {}
    for name in names:
        domain = name.removeprefix("eval_").removesuffix("_off")
        colour = colours.setdefault(domain, f"C{len(colours)}")
        points = [(entry["step"], entry[name]) for entry in curve if name in entry]
        off = name.endswith("_off")
        label = f"validation, {domain}" + (", updates off" if off else "")
        axes.plot(*zip(*points, strict=True), "--" if off else "-", color=colour, marker="o", markersize=3, label=label)
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if training or names:
        axes.legend()
    figure.savefig(path, dpi=120)


def run_record(
    raw_recipe: Mapping[str, Any], curve: Sequence[Mapping[str, float]], started: datetime, **more: Any
) -> dict[str, Any]:
    """Everything that tells this run from another: recipe as written, commit, hardware, versions, dates, curves."""
    finished = datetime.now(UTC)
    return {
        "recipe": dict(raw_recipe),
        "commit": git_commit(),
        "date": finished.isoformat(timespec="seconds"),
        "seconds": round((finished - started).total_seconds(), 1),
        "hardware": hardware(),
        "versions": {name: found for name in VERSIONS if (found := _version(name))}
        | {"python": sys.version.split()[0]},
        "tokens_per_second": median(curve, "tokens_per_second"),
        "mfu": median(curve, "mfu"),
        "peak_memory_bytes": peak_memory(),
        **more,
        "curve": list(curve),
    }


def git_commit() -> str | None:
    """Commit of the library's source tree ("-dirty" when files differ from it), None when it is no git checkout.

    The environment variable INPLACE_TTT_COMMIT replaces it where the source travels without its history.
    """
    if named := os.environ.get("INPLACE_TTT_COMMIT"):
        return named
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # else the checkout around an installed copy would be named
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware() -> dict[str, Any]:
    """Names of the processor and of the accelerators."""
    found: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["cuda"] = torch.version.cuda
    return found


def versions() -> dict[str, str]:
    """Of Python and of the libraries that decide the result."""
    found = {name: _version(name) for name in VERSIONS}
    return {"python": sys.version.split()[0]} | {name: text for name, text in found.items() if text}


def peak_memory() -> int:
    """Bytes: of the GPU's allocations where there is one, else of the process; 0 where that is not known."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def write_json(path: Path, value: Any) -> None:
    """Readable JSON; the file is there as a whole or not at all, even if the process is killed."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None

"""What a run leaves behind for people: the loss curves as a picture and the record ``run.json``."""

import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from inplace_ttt.records import about, peak_memory

LOGGED = ("loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "mfu", "peak_memory_gib")
LOGGED_BY_NAME = ("eval_", "update_norm/", "state_norm/")


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
    return {
        "recipe": dict(raw_recipe),
        **about(started),
        "tokens_per_second": median(curve, "tokens_per_second"),
        "mfu": median(curve, "mfu"),
        "peak_memory_bytes": peak_memory(),
        **more,
        "curve": list(curve),
    }

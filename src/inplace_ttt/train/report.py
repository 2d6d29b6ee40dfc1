"""The results of a run: losses of the saved model, the loss curves as a picture, and the record ``run.json``."""

import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from inplace_ttt.eval.nll import DomainResult, Text, evaluate_documents
from inplace_ttt.hf.load import load_baseline
from inplace_ttt.plots import OTHERS, add_legend, add_title, save, styled
from inplace_ttt.records import about, peak_memory
from inplace_ttt.train.packing import TokenStore
from inplace_ttt.train.specs import EvaluationSpec

LOGGED = ("loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "mfu", "peak_memory_gib")
LOGGED_BY_NAME = ("eval_", "update_norm/", "state_norm/", "ttt_")


def evaluate(
    directory: Path,
    stores: Mapping[str, TokenStore],
    spec: EvaluationSpec,
    length: int,
    device: torch.device,
    console: Console,
) -> dict[str, DomainResult]:
    """Evaluate a saved model on windows of ``length`` tokens, in float32; nothing where there are no documents."""
    if not stores:
        return {}
    inner = [edge for edge in spec.edges if 0 < edge < length]
    return evaluate_documents(
        load_baseline(directory, str(device)).float(),  # type: ignore[no-untyped-call]
        {domain: texts(store) for domain, store in stores.items()},
        length,
        spec.windows,
        piece=spec.piece,
        edges=[0, *inner, length] if inner else None,
        batch_size=spec.batch_size,
        console=console,
    )


def texts(store: TokenStore) -> list[Text]:
    """Return a store's documents for the evaluation."""
    return [Text(name, store[i]) for i, name in enumerate(store.names)]


def headline(results: Mapping[str, DomainResult]) -> dict[str, dict[str, float]]:
    """Return the mean losses by domain: ``on``, and for a model with fast weights ``off`` and ``gain``."""
    return {
        domain: {name: mean.value for name in ("on", "off", "gain") if (mean := getattr(result, name)) is not None}
        for domain, result in results.items()
    }


def loss_curve(log_history: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Return the Trainer's log without its bookkeeping: one entry a step, training and validation merged."""
    steps: dict[int, dict[str, float]] = {}
    for entry in log_history:
        kept = {n: value for n, value in entry.items() if n in LOGGED or n.startswith(LOGGED_BY_NAME)}
        if kept:
            steps.setdefault(int(entry["step"]), {}).update(kept)
    return [{"step": step, **values} for step, values in sorted(steps.items())]


def median(curve: Sequence[Mapping[str, float]], name: str) -> float | None:
    """Return the median of an entry over the log's intervals; None where no line has it."""
    values = [entry[name] for entry in curve if name in entry]
    return statistics.median(values) if values else None


def plot_losses(curve: Sequence[Mapping[str, float]], path: Path, title: str) -> None:
    """Draw training and validation loss over the steps as a PNG; dashed: updates off."""
    figure, grid = styled(8, 5)
    axes = grid[0, 0]
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    add_title(axes, title)
    names = sorted({name for entry in curve for name in entry if name == "loss" or name.startswith("eval_")})
    domains = sorted({name.removesuffix("_off") for name in names} - {"loss"})
    for name in sorted(names, key=lambda name: name != "loss"):
        points = [(entry["step"], entry[name]) for entry in curve if name in entry]
        domain, is_off = name.removesuffix("_off"), name.endswith("_off")
        style: dict[str, Any] = {"color": "0.6", "linewidth": 1, "label": "training"}
        if name != "loss":
            label = f"validation, {domain.removeprefix('eval_')}" + (", updates off" if is_off else "")
            colour = OTHERS[domains.index(domain) % len(OTHERS)]
            style = {"color": colour, "marker": "o", "markersize": 3, "label": label}
        axes.plot(*zip(*points, strict=True), "--" if is_off else "-", **style)
    if names:
        add_legend(figure)
    save(figure, path)


def run_record(
    raw_recipe: Mapping[str, Any], curve: Sequence[Mapping[str, float]], started: datetime, **more: Any
) -> dict[str, Any]:
    """Return all that tells this run from another: recipe as written, commit, hardware, versions, dates, curves."""
    return {
        "recipe": dict(raw_recipe),
        **about(started),
        "tokens_per_second": median(curve, "tokens_per_second"),
        "mfu": median(curve, "mfu"),
        "peak_memory_bytes": peak_memory(),
        **more,
        "curve": list(curve),
    }

"""Suite ``diagnostics``: diagnostics of the fast weights after each window that ``nll`` measures."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import nn

from ...hf.context import fast_weights
from ...session.diagnostics import measure
from ..nll import evaluating, feed, new_cache
from ..paired import by_group
from . import Record, Tables, Unit
from .nll import NllSuite, piece_size
from .nll import from_options as windows_from_options
from .texts import EvalText


class StateSuite:
    """A suite that reads the windows of an ``NllSuite`` and measures the fast weights at their end, layer by layer."""

    name = "diagnostics"
    needs_updates = True

    def __init__(self, nll: NllSuite) -> None:
        self.nll = nll

    def units(self) -> Sequence[Unit]:
        """Return the windows, by the same keys as in ``nll``."""
        return [unit for unit in self.nll.units() if unit.key.startswith("window/")]

    def measure(self, model: nn.Module, unit: Unit) -> list[Record]:
        """Return one record per layer: the fields of ``LayerDiagnostics``."""
        document, start, end, _ = self.nll.work[unit.key]
        cache = new_cache(model)
        with evaluating(model):
            feed(model, cache, document.ids[start:end].tolist(), piece_size(model, self.nll.piece))
        layers = measure(model, fast_weights(cache))
        return [{"document": document.name, "domain": document.domain, **asdict(layer)} for layer in layers]


# -- what people read --------------------------------------------------------------------------------------------------

WORDS = {
    "key_overlap": "overlap of new keys with what was learned",
    "effective_rank": "effective rank of the fast weights",
    "output_change": "change of the layer's output",
}


def from_options(options: Any, texts: Sequence[EvalText], tokenizer: Any, model: nn.Module) -> StateSuite:
    return StateSuite(windows_from_options(options, texts, tokenizer, model))


def tables(records: Sequence[Record]) -> Tables:
    """Return means by layer, and which measurements correlate with the gain where ``nll`` was measured, too."""
    mine, losses = ([r for r in records if r["suite"] == name] for name in ("diagnostics", "nll"))
    return {"fast weights": _state(mine), "which measurements correlate with the gain": correlations(mine, losses)}


def _state(records: Sequence[Record]) -> list[Record]:
    rows = []
    names = ("relative_norm", "output_change", "effective_rank", "key_overlap", "update_norm")
    for (variant, layer), members in by_group(records, ["variant", "layer"]).items():
        row: Record = {"variant": variant, "layer": layer, "windows": len(members)}
        for name in names:
            values = [r[name] for r in members if r[name] is not None]
            row[name] = float(np.mean(values)) if values else None
        rows.append(row)
    return rows


def correlations(state: Sequence[Record], nll: Sequence[Record]) -> list[Record]:
    """Correlate, over windows, the gain (off - on) with each layer's overlap of keys and effective rank."""
    losses = {
        (r["variant"], r["unit"]): r["loss_sum"] / r["tokens"] for r in nll if r["kind"] == "document" and r["tokens"]
    }
    rows = []
    for (layer,), members in by_group([r for r in state if r["variant"] == "on"], ["layer"]).items():
        for name in ("key_overlap", "effective_rank", "output_change"):
            points = [
                (r[name], losses["off", r["unit"]] - losses["on", r["unit"]])
                for r in members
                if r[name] is not None and {("on", r["unit"]), ("off", r["unit"])} <= losses.keys()
            ]
            x, gain = np.array(points).T if len(points) >= 4 else (np.zeros(0), np.zeros(0))
            if len(x) and x.std() > 0 and gain.std() > 0:
                rows.append({"layer": layer, "figure": name, "windows": len(x), "r": float(np.corrcoef(x, gain)[0, 1])})
    return rows


def verdicts(found: Tables) -> list[str]:
    """Say for each figure of the fast weights in which layers it correlates with the gain."""
    rows = found.get("which measurements correlate with the gain", [])
    lines, any_clear = [], False
    for (figure,), members in by_group(rows, ["figure"]).items():
        clear: dict[str, list[str]] = {}
        for row in members:
            low, high = interval_of_r(row["r"], row["windows"])
            if low > 0 or high < 0:
                where = f"layer {row['layer']} (r = {row['r']:+.2f}, 95% interval {low:+.2f} to {high:+.2f})"
                clear.setdefault("higher" if low > 0 else "lower", []).append(where)
        name, windows = WORDS.get(figure, figure), members[0]["windows"]
        any_clear |= bool(clear)
        for side, places in clear.items():
            lines.append(f"Over {windows} windows, updates gained more with a {side} {name} in {', '.join(places)}.")
        if not clear:
            most = max((row["r"] for row in members), key=abs)
            unclear = f"no layer's {name} correlates clearly with the gain (largest r = {most:+.2f})"
            lines.append(f"Over {windows} windows, {unclear}.")
    if any_clear and len(rows) > 1:
        lines.append(f"{len(rows)} correlations were looked at; one in twenty looks clear by chance.")
    return lines


def interval_of_r(r: float, n: int) -> tuple[float, float]:
    """Return the 95% interval of a correlation of n points (Fisher's transform, points taken as independent)."""
    if n < 4:
        return -1.0, 1.0
    middle, half = np.arctanh(np.clip(r, -0.999999, 0.999999)), 1.959964 / np.sqrt(n - 3)
    return float(np.tanh(middle - half)), float(np.tanh(middle + half))

"""Diagnostics over time as a picture, and the latest ones as a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ..core.diagnostics import LayerDiagnostics
from ..plots import OFF, ON, add_heading, fill_gain, save, styled
from .diagnostics import Timeline

PANELS = (
    ("relative_norm", "change of the weight", "||lr S|| / ||W$_0$||"),
    ("output_change", "change of the output", "||lr S z|| / ||W$_0$ z||"),
    ("effective_rank", "effective rank of S", "of {largest}"),
    ("key_overlap", "overlap of new keys", "share inside the span of S"),
)
FEW = ("#0891b2", "#d9a441", "#be185d", "#0c4a6e", "#4d7c0f", "#7c3aed")
"""Distinct colours for a few layers; more layers get a gradient from ``SHALLOW`` to ``DEEP``."""
SHALLOW, DEEP = "#7dd3fc", "#0c4a6e"
NAMED = 8
"""Maximum number of layers in the legend."""


def save_diagnostics(path: Path, timeline: Timeline, title: str) -> None:
    """Write the picture: one panel per diagnostic, one line per layer, and below them the losses and the gain."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import EngFormatter, MaxNLocator

    layers, x = timeline.layers, timeline.tokens
    ramp = LinearSegmentedColormap.from_list("depth", [SHALLOW, DEEP])
    colours = FEW if len(layers) <= len(FEW) else ramp(np.linspace(0, 1, len(layers)))
    largest = {d.largest_rank for s in timeline.samples for d in s.layers}
    figure, panels = styled(6.0, 6.2, 3, 2, sharex=True)
    mark = "o" if len(x) == 1 else None
    for axes, (name, heading, unit) in zip(panels[:2].flat, PANELS, strict=True):
        for layer, colour in zip(layers, colours, strict=False):
            axes.plot(x, timeline.series(name, layer), color=colour, lw=1.4, marker=mark, ms=3, label=f"{layer}")
        _headings(axes, heading, unit.format(largest=" or ".join(map(str, sorted(largest)))))
        axes.set_ylim(bottom=0)
    panels[1, 1].set_ylim(0, 1.02)
    loss, gain = panels[2]
    _probed(loss, x, timeline.loss_off, color=OFF, label="updates off")
    _probed(loss, x, timeline.loss_on, color=ON, label="on")
    _headings(loss, "loss", "nats per token")
    loss.legend(frameon=False, ncols=2, fontsize=8, loc="upper right", borderaxespad=0.1, handlelength=1.4)
    low, high = loss.dataLim.y0, loss.dataLim.y1
    if high > low:
        loss.set_ylim(low - 0.08 * (high - low), high + 0.3 * (high - low))  # room for the legend
    probed = ~np.isnan(timeline.gain)
    fill_gain(gain, x[probed], timeline.gain[probed])
    _probed(gain, x, timeline.gain, color="0.35", lw=1)
    _headings(gain, "gain", "off - on, nats per token")
    for axes in panels.flat:
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in panels[2]:
        axes.set_xlabel("tokens read")
        axes.set_xlim(0, 1.02 * max(x, default=1))
    add_heading(figure, title)
    handles, labels = _some(*panels[0, 0].get_legend_handles_labels())
    style = {"loc": "outside lower center", "ncols": NAMED, "frameon": False, "fontsize": 8, "title_fontsize": 8}
    figure.legend(handles, labels, title="layer", **style)
    save(figure, path)


def _headings(axes: Any, heading: str, unit: str) -> None:
    axes.set_title(heading, loc="left", fontsize=10, fontweight="bold", pad=14)
    axes.text(0, 1.04, unit, transform=axes.transAxes, fontsize=8, color="0.35")


def _probed(axes: Any, x: np.ndarray, values: np.ndarray, **style: Any) -> None:
    """Draw a curve through the samples that have a value."""
    known = ~np.isnan(values)
    axes.plot(x[known], values[known], marker="o", ms=2.5 if known.sum() < 40 else 0, **{"lw": 1.4, **style})


def _some(handles: Sequence[Any], labels: Sequence[str]) -> tuple[list[Any], list[str]]:
    """Return at most ``NAMED`` entries, evenly spread, the first and the last among them."""
    at: list[int] = np.unique(np.linspace(0, len(labels) - 1, NAMED).round().astype(int)).tolist() if labels else []
    return [handles[i] for i in at], [labels[i] for i in at]


def diagnostics_table(layers: Sequence[LayerDiagnostics], timeline: Timeline | None = None) -> Table:
    """Tabulate one measurement for the terminal; with a timeline also the share of sampled chunks that were clipped."""
    shares = {} if timeline is None else {d.layer: timeline.clipped_share(d.layer) for d in layers}
    clips = any(share is not None for share in shares.values())
    table = Table(title="What the fast weights are like", title_justify="left", title_style="bold")
    names = ("layer", "updates", "change / weight", "change / output", "effective rank", "key overlap", "last update")
    for name in (*names, *(["chunks clipped"] if clips else [])):
        table.add_column(name, justify="right", no_wrap=" " not in name)
    for d in layers:
        table.add_row(
            f"{d.layer}",
            f"{d.updates:,}",
            _number(d.relative_norm),
            _number(d.output_change),
            "?" if d.effective_rank is None else f"{d.effective_rank:,.0f}/{d.largest_rank:,}",
            _share(d.key_overlap),
            _number(d.update_norm) + (" (clipped)" if d.clipped else ""),
            *([_share(shares.get(d.layer))] if clips else []),
        )
    return table


def _share(value: float | None) -> str:
    return "?" if value is None else f"{value:.0%}"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3g}"

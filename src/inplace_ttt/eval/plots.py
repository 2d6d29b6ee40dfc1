"""The pictures of an evaluation, drawn from rows of tables: figures of one style, legible at a column's width."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .paired import Mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
Curves = Mapping[str, tuple[Sequence[Any], Mapping[str, Sequence[Mean]]]]
"""Title of a panel -> (places on the x axis, label -> a mean at each place)."""
FIXED = {"on": "#c2410c", "off": "#64748b", "baseline": "#0c4a6e"}
OTHERS = ("#d9a441", "#4d7c0f", "#7c3aed", "#0891b2", "#be185d", "#57534e")


def mean_of(row: Mapping[str, Any], name: str = "value") -> Mean:
    """A row's mean, or with "difference" its difference, with the interval."""
    low, high = ("low", "high") if name == "value" else (f"{name}_low", f"{name}_high")
    return Mean(row[name], row[low], row[high])


def curves(rows: Rows, x: str, panel: str = "domain") -> dict[str, tuple[list[Any], dict[str, list[Mean]]]]:
    """Panel -> (values of ``x``, variant -> means), each panel's variants at the same places."""
    found: dict[str, tuple[list[Any], dict[str, list[Mean]]]] = {}
    for row in rows:
        places, lines = found.setdefault(row[panel], ([], {}))
        if row[x] not in places:
            places.append(row[x])
        lines.setdefault(row["variant"], []).append(mean_of(row))
    return found


def panels(
    found: Curves,
    xlabel: str,
    ylabel: str,
    *,
    bars: bool = False,
    width: float = 3.4,
    palette: Mapping[str, str] | None = None,
    top: float | None = None,
) -> "Figure":
    """Panels side by side, lines with bands or ``bars`` with whiskers; ``top``: the y axis goes from 0 to there."""
    figure, axes = _figure(width * max(len(found), 1.5), 3.0, len(found))
    for axis, (title, (places, lines)) in zip(axes, found.items(), strict=True):
        x = [_short(place) for place in places]
        colours = palette or _colours(list(lines))
        for i, (label, means) in enumerate(lines.items()):
            value, low, high = np.array([[m.value, m.low, m.high] for m in means]).T
            if bars:
                wide = 0.8 / len(lines)
                at = np.arange(len(x)) + (i - (len(lines) - 1) / 2) * wide
                error = np.abs(np.array([low, high]) - value)
                axis.bar(at, value, wide * 0.92, yerr=error, color=colours[label], label=label, error_kw={"lw": 0.8})
            else:
                style = "--" if label == "off" else "-"
                axis.plot(x, value, style, marker="o", ms=3.5, lw=1.5, color=colours[label], label=label)
                axis.fill_between(x, low, high, color=colours[label], alpha=0.12, lw=0)
        if bars:
            axis.set_xticks(np.arange(len(x)), x)
            axis.axhline(0, color="black", lw=0.7)
        if top is not None:
            axis.set_ylim(0, top)
        axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axis.set_xlabel(xlabel, fontsize=8.5)
    axes[0].set_ylabel(ylabel, fontsize=8.5)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False, fontsize=8)
    return figure


def heat_maps(title: str, rows: Rows) -> "Figure":
    """Share of right answers by depth and length, a panel a variant."""
    lengths, depths = (sorted({row[key] for row in rows}) for key in ("length", "depth"))
    shares: dict[str, np.ndarray] = {}
    for row in rows:
        share = shares.setdefault(row["variant"], np.full((len(depths), len(lengths)), np.nan))
        share[depths.index(row["depth"]), lengths.index(row["length"])] = row["value"]
    figure, axes = _figure(2.9 * max(len(shares), 1.6) + 0.6, 3.0, len(shares))
    for axis, (label, share) in zip(axes, shares.items(), strict=True):
        picture = axis.imshow(share, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        axis.grid(False)
        axis.set_xticks(range(len(lengths)), [_short(n) for n in lengths])
        axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
        axis.set_title(label, loc="left", fontsize=10, fontweight="bold")
        axis.set_xlabel("length (tokens)", fontsize=8.5)
        for (i, j), value in np.ndenumerate(share):
            if np.isfinite(value):
                shade = "white" if value > 0.6 else "black"
                axis.text(j, i, f"{value:.0%}", ha="center", va="center", fontsize=7, color=shade)
    axes[0].set_ylabel("depth of the needle", fontsize=8.5)
    chance = rows[0].get("chance", 0.1)
    figure.colorbar(picture, ax=list(axes), shrink=0.85, label=f"right (chance {chance:.0%})")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def differences(title: str, rows: Rows, names: Sequence[str], unit: str, better: str = "") -> "Figure":
    """Difference to updates off with its interval, a line a row, labelled by ``names``. ``better``: a side."""
    figure, axes = _figure(6.2, 0.9 + 0.32 * len(rows))
    axis = axes[0]
    y = np.arange(len(rows))[::-1]
    for at, mean in zip(y, (mean_of(row, "difference") for row in rows), strict=True):
        colour = FIXED["on"] if mean.high < 0 else FIXED["baseline"] if mean.low > 0 else "0.5"
        axis.plot([mean.low, mean.high], [at, at], color=colour, lw=2)
        axis.plot(mean.value, at, "o", color=colour, ms=5)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(y, [", ".join(str(row[name]) for name in names) for row in rows])
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.grid(axis="x", color="0.9", lw=0.7)
    axis.set_xlabel(f"difference to updates off ({unit}){better and f', {better} is better'}", fontsize=8.5)
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
    return figure


def _figure(width: float, height: float, columns: int = 1) -> tuple["Figure", Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False, sharey=True)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.9", lw=0.7)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
    return figure, axes


def _colours(labels: Sequence[str]) -> dict[str, str]:
    """One per variant, the same in every picture."""
    others = [label for label in labels if label not in FIXED]
    return {**FIXED, **{label: OTHERS[i % len(OTHERS)] for i, label in enumerate(others)}}


def _short(place: Any) -> str:
    whole = isinstance(place, int) and place >= 1024 and place % 1024 == 0
    return f"{place // 1024}k" if whole else f"{place}"

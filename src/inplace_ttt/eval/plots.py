"""Figures of an evaluation, drawn from tables, in one style and legible at a column's width."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..plots import OFF, ON, OTHERS, add_heading, add_legend, add_title, styled
from .paired import Mean

Rows = Sequence[Mapping[str, Any]]
Curves = Mapping[str, tuple[Sequence[Any], Mapping[str, Sequence[Mean]]]]
"""Title of a panel -> (places on the x axis, label -> a mean at each place)."""
FIXED = {"on": ON, "off": OFF, "baseline": "#0c4a6e"}
NAMED = {"on": "updates on", "off": "updates off"}
"""Labels of variants in a legend; others go by their own name."""
SHARE = "share of right answers"


def mean_of(row: Mapping[str, Any], name: str = "value") -> Mean:
    """Return a row's mean, or with "difference" its difference, with the interval."""
    low, high = ("low", "high") if name == "value" else (f"{name}_low", f"{name}_high")
    return Mean(row[name], row[low], row[high])


def curves(
    rows: Rows,
    x: str,
    panel: str | Callable[[Mapping[str, Any]], str] = "domain",
    *,
    of: str = "value",
    count: str | None = "documents",
) -> dict[str, tuple[list[Any], dict[str, list[Mean]]]]:
    """Map panel -> (values of ``x``, variant -> means of ``of``), each panel's variants at the same places.

    ``panel``: the column that names a row's panel, or a function of the row; ``count``: column of n in its title.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(panel(row) if callable(panel) else row[panel], []).append(row)
    found = {}
    for title, members in groups.items():
        ns = sorted(row[count] for row in members) if count is not None else []
        said = f", n = {ns[0]}" + (f" to {ns[-1]}" if ns[-1] > ns[0] else "") if ns else ""
        lines: dict[str, list[Mean]] = {}
        for row in members:
            lines.setdefault(row["variant"], []).append(mean_of(row, of))
        found[title + said] = list(dict.fromkeys(row[x] for row in members)), lines
    return found


def gaps(rows: Rows, x: str) -> dict[str, tuple[list[Any], dict[str, list[Mean]]]]:
    """Return ``curves`` of the paired differences to updates off, where there are any."""
    return curves([row for row in rows if "difference" in row], x, of="difference")


def panels(
    found: Curves,
    heading: str,
    xlabel: str,
    ylabel: str,
    *,
    bars: bool = False,
    width: float = 3.4,
    palette: Mapping[str, str] | None = None,
    top: float | None = None,
    line: tuple[float, str] | None = None,
) -> Any:
    """Draw panels side by side, lines with bands or ``bars`` with whiskers; ``top``: upper limit of the y axis.

    ``heading``: the measure; the report puts the model before it. ``line``: a level to compare with, and its name.
    """
    figure, (axes,) = styled(width * max(len(found), 1.5), 3.3, 1, len(found), sharey=True)
    for axis, (title, (places, lines)) in zip(axes, found.items(), strict=True):
        x = [f"{n // 1024}k" if isinstance(n, int) and n >= 1024 and n % 1024 == 0 else f"{n}" for n in places]
        colours = palette or _colours(list(lines))
        if line is not None:
            axis.axhline(line[0], color="0.25", lw=1.0, ls=(0, (3, 2)), label=line[1])
        for i, (label, means) in enumerate(lines.items()):
            value, low, high = np.array([[m.value, m.low, m.high] for m in means]).T
            colour, name = colours[label], NAMED.get(label, label)
            if bars:
                wide = 0.8 / len(lines)
                at = np.arange(len(x)) + (i - (len(lines) - 1) / 2) * wide
                error = np.abs(np.array([low, high]) - value)
                axis.bar(at, value, wide * 0.92, yerr=error, color=colour, label=name, error_kw={"lw": 0.8})
            else:
                style = "--" if label == "off" else "-"
                axis.plot(x, value, style, marker="o", ms=3.5, lw=1.5, color=colour, label=name)
                axis.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
        if bars:
            axis.set_xticks(np.arange(len(x)), x)
            axis.axhline(0, color="black", lw=0.7)
        if top is not None:
            axis.set_ylim(0, top)
        add_title(axis, title)
        axis.set_xlabel(xlabel)
    axes[0].set_ylabel(ylabel)
    add_heading(figure, heading)
    add_legend(figure)
    return figure


def differences(
    title: str, rows: Rows, names: Sequence[str], unit: str, better: str = "", to: str = "updates off"
) -> Any:
    """Draw differences to ``to`` with intervals, a line a row, labelled by ``names``. ``better``: a side."""
    names = [name for name in names if len({row[name] for row in rows}) > 1] or names[:1]
    figure, ((axis,),) = styled(6.2, 0.9 + 0.32 * len(rows), grid="both")
    y = np.arange(len(rows))[::-1]
    for at, mean in zip(y, (mean_of(row, "difference") for row in rows), strict=True):
        colour = FIXED["on"] if mean.high < 0 else FIXED["baseline"] if mean.low > 0 else "0.5"
        axis.plot([mean.low, mean.high], [at, at], color=colour, lw=2)
        axis.plot(mean.value, at, "o", color=colour, ms=5)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(y, [", ".join(NAMED.get(row[name], str(row[name])) for name in names) for row in rows])
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.set_xlabel(f"difference to {to} ({unit}){better and f', {better} is better'}")
    add_heading(figure, title)
    return figure


def _colours(labels: Sequence[str]) -> dict[str, str]:
    """Return one colour per variant, the same in every picture."""
    others = [label for label in labels if label not in FIXED]
    return {**FIXED, **{label: OTHERS[i % len(OTHERS)] for i, label in enumerate(others)}}

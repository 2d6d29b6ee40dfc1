"""One style for all pictures, and loss against position, with updates on and off: as a picture, in the terminal."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

ON, OFF = "#c2410c", "#64748b"
OTHERS = ("#0891b2", "#d9a441", "#4d7c0f", "#7c3aed", "#be185d", "#57534e")
"""Colours of what has none of its own."""
TEXTS = {"books": OTHERS[0], "code": OTHERS[1]}
FORMATS = (".png", ".pdf", ".svg")


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Return the mean of ``width`` neighbours centred on each value; only of those that exist at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    at = np.arange(len(values))
    low, high = np.maximum(at - width // 2, 0), np.minimum(at + width // 2 + 1, len(values))
    means: np.ndarray = (sums[high] - sums[low]) / (high - low)
    return means


def smooth(values: np.ndarray, cut: int, width: int) -> np.ndarray:
    """Take two running means of half the width, before and after ``cut`` apart: nothing leaks over the first update."""
    parts = (values[:cut], values[cut:])
    return np.concatenate([running_mean(running_mean(part, width // 2), width // 2) for part in parts])


def save_picture(
    path: Path, on: np.ndarray, off: np.ndarray, chunk_size: int, title: str, subtitle: str, width: int | None = None
) -> None:
    """Draw the gain from updates for tokens 1 to N, smoothed over ``width`` tokens, and below it both losses [N]."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    width = width or smoothing(len(on), chunk_size)
    on, off = (smooth(values, chunk_size, width) for values in (on, off))
    gap, x = off - on, np.arange(1, len(on) + 1)
    figure, axes = styled(6.0, 4.2, 2, sharex=True, height_ratios=(1.5, 1))
    gains, losses = axes.flat
    losses.plot(x, off, color=OFF, lw=1.6, label="updates off")
    losses.plot(x, on, color=ON, lw=1.6, label="updates on")
    losses.set_ylabel("loss (nats)")
    losses.legend(frameon=False, ncols=2, loc="upper right", borderaxespad=0.2, fontsize=8)
    low, high = min(on.min(), off.min()), max(on.max(), off.max())
    losses.set_ylim(low - 0.06 * (high - low), high + 0.2 * (high - low))
    fill_gain(gains, x, gap)
    gains.set_ylabel("gain (nats per token)")
    losses.set_xlabel("position in the file (tokens)")
    gains.yaxis.set_major_locator(MaxNLocator(4))
    gains.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axis in (losses, gains):
        axis.axvline(chunk_size, color="black", lw=0.8, ls=(0, (2, 2)))
    gains.annotate("first update", (chunk_size, gains.get_ylim()[1]), (4, -8), textcoords="offset points", fontsize=8)
    gains.set_xlim(0, len(on))
    gains.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=18)
    gains.text(0, 1.03, subtitle, transform=gains.transAxes, fontsize=8, color="0.35")
    save(figure, path)


def fill_gain(axes: Any, x: np.ndarray, gain: np.ndarray) -> None:
    """Fill the area between a gain and zero: one colour where updates help, another where they hurt."""
    axes.fill_between(x, gain, where=gain >= 0, color=ON, alpha=0.35, lw=0, interpolate=True)
    axes.fill_between(x, gain, where=gain <= 0, color=OFF, alpha=0.45, lw=0, interpolate=True)
    axes.axhline(0, color="black", lw=0.7)


def styled(
    width: float, height: float, rows: int = 1, columns: int = 1, *, grid: str = "y", **how: Any
) -> tuple[Any, Any]:
    """Return a figure and axes [rows, columns] in the style of all pictures; ``how``: keywords of ``subplots``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **how)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis=grid, color="0.9", lw=0.7)
        axis.set_axisbelow(True)
        axis.tick_params(which="both", labelsize=8)
        axis.xaxis.label.set_size(8.5)
        axis.yaxis.label.set_size(8.5)
    return figure, axes


def add_title(axes: Any, text: str) -> None:
    """Write the title of one panel."""
    axes.set_title(text, loc="left", fontsize=10, fontweight="bold")


def add_heading(figure: Any, text: str) -> None:
    """Write the title of a figure of several panels."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, fontweight="bold")


def add_legend(figure: Any, columns: int = 4, place: str = "lower center") -> None:
    """Put one legend for all panels outside of them; what several panels label alike is in it once."""
    labelled = [axes.get_legend_handles_labels() for axes in figure.axes]
    named = {label: handle for handles, labels in labelled for handle, label in zip(handles, labels, strict=True)}
    columns = max(min(len(named), columns), 1)
    figure.legend(named.values(), named.keys(), loc=f"outside {place}", ncols=columns, frameon=False, fontsize=8)


def save(figure: Any, path: Path) -> None:
    """Write a figure, and directories as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)


def smoothing(tokens: int, chunk_size: int) -> int:
    """Return the tokens to average over: a 24th of the text, at least 64, no more than two chunks."""
    return int(np.clip(tokens // 24, 64, max(64, 2 * chunk_size)))


# -- in the terminal --------------------------------------------------------------------------------------------------

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # braille: bit of each dot, by row and column
_TICKS, _ROWS_PER_TICK = 4, 3


def terminal_chart(on: np.ndarray, off: np.ndarray, *, columns: int = 64, ascii_only: bool = False) -> Text:
    """Draw two smoothed curves [N], ``columns`` characters wide, with both axes. "On" is solid, "off" dotted."""
    across, down = (1, 1) if ascii_only else (2, 4)
    rows = _TICKS * _ROWS_PER_TICK + 1
    ticks = _tick_values(min(on.min(), off.min()), max(on.max(), off.max()))
    places = np.linspace(0, len(on) - 1, columns * across).round().astype(int)
    dots, owner = np.zeros((rows, columns), int), np.full((rows, columns), "", dtype="<U3")
    for label, curve in (("off", off[places]), ("on", on[places])):
        level = ((ticks[0] - curve) / (ticks[0] - ticks[-1]) * (rows - 1) * down).round().astype(int)
        for x, y in _strokes(level, solid=label == "on", every=1 if ascii_only else 2):
            dots[y // down, x // across] |= _DOTS[y % down][x % across]
            owner[y // down, x // across] = label
    text = Text()
    for r in range(rows):
        tick = r % _ROWS_PER_TICK == 0
        text.append(f"{ticks[r // _ROWS_PER_TICK]:6.2f} " if tick else " " * 7, "dim")
        text.append("|" if ascii_only else "┤" if tick else "│", "dim")
        for label, bits in zip(owner[r].tolist(), dots[r].tolist(), strict=True):
            mark = " " if not label else {"on": "#", "off": "."}[label] if ascii_only else chr(0x2800 + bits)
            text.append(mark, {"on": f"bold {ON}"}.get(label))
        text.append("\n")
    return text.append_text(_x_axis(len(on), columns, ascii_only))


def _tick_values(low: float, high: float) -> np.ndarray:
    """Return round numbers, descending, that enclose ``low`` to ``high``."""
    for step in (m * 10.0**e for e in range(-2, 6) for m in (1, 2, 2.5, 5)):
        start = np.floor(low / step) * step
        if start + _TICKS * step >= high:
            return np.array([start + step * i for i in range(_TICKS, -1, -1)])
    raise ValueError(f"no axis for losses from {low} to {high}")


def _strokes(level: np.ndarray, solid: bool, every: int) -> list[tuple[int, int]]:
    """Return dots (x, y) of a curve: joined from column to column when ``solid``, else one in ``every`` columns."""
    if not solid:
        return [(x, int(level[x])) for x in range(0, len(level), every)]
    points = [(0, int(level[0]))]
    for x in range(1, len(level)):
        before, now = int(level[x - 1]), int(level[x])
        step = 1 if now > before else -1
        points += [(x, y) for y in range(before + step, now, step)] + [(x, now)]
    return points


def _x_axis(tokens: int, columns: int, ascii_only: bool) -> Text:
    line = Text(" " * 7, "dim").append(("+" if ascii_only else "└") + ("-" if ascii_only else "─") * columns + "\n")
    labels = [" "] * (columns + 12)
    has_room = columns > 5 * len(f"{tokens:,}")
    for share in (0, 0.25, 0.5, 0.75, 1) if has_room else (0, 0.5, 1):
        label = f"{round(share * tokens):,}"
        at = min(round(share * (columns - 1)) + 8 - len(label) // 2, len(labels) - len(label))
        labels[at : at + len(label)] = label
    return line.append("".join(labels).rstrip())

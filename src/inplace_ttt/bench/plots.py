"""Pictures of the records: throughput and peak memory by length, like the paper's Figure 4."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..plots import OFF, ON, save, styled

WAYS = {
    "no TTT": ("without TTT", OFF),
    "ours": ("In-Place TTT", ON),
    "materialised": ("one weight per chunk (the authors' release)", "#d6b38a"),
}
"""Label and colour of a bar."""
WIDTH = 0.27
"""Of a bar; a length has three."""


def prefill(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes one row of panels per attention: tokens per second, and peak memory in GiB where it was measured.

    Records of the same window are joined (of a length that is in several, the last one counts).
    """
    groups: dict[int | None, dict[int, Any]] = {}
    for record in records:
        groups.setdefault(record["window"], {}).update({row["tokens"]: row for row in record["results"]})
    memory = all(row["peak_bytes"]["ours"] is not None for rows in groups.values() for row in rows.values())
    figure, panels = styled(7.0, 2.5 * len(groups), len(groups), 2 if memory else 1)
    for line, (window, rows) in zip(panels, groups.items(), strict=True):
        lengths = sorted(rows)
        name = "full attention" if window is None else f"window {window:,}"
        speeds = {k: [n / rows[n]["seconds"][k] / 1000 for n in lengths] for k in WAYS}
        over = [f"time {100 * (rows[n]['over_no_ttt'] - 1):+.1f}%" for n in lengths]
        _bars(line[0], lengths, speeds, f"throughput, {name}", "1,000 tokens/s", over)
        if memory:
            peaks = {k: [rows[n]["peak_bytes"][k] / 2**30 for n in lengths] for k in WAYS}
            more = [f"{b - a:+.2f}" for a, b in zip(peaks["no TTT"], peaks["ours"], strict=True)]
            _bars(line[1], lengths, peaks, f"peak memory, {name}", "GiB", more)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    save(figure, path)


def _bars(
    axes: Any,
    lengths: Sequence[int],
    values: Mapping[str, Sequence[float]],
    title: str,
    unit: str,
    notes: Sequence[str],
) -> None:
    """A bar for each way and length, and above them what ours adds."""
    for at, (name, (label, colour)) in enumerate(WAYS.items(), start=-1):
        axes.bar([i + at * WIDTH for i in range(len(lengths))], values[name], WIDTH, color=colour, label=label)
    for i, note in enumerate(notes):
        top = max(series[i] for series in values.values())
        axes.annotate(note, (i, top), (0, 2), textcoords="offset points", ha="center", fontsize=7, color=ON)
    axes.set_xticks(range(len(lengths)), [f"{n // 1024}k" if n % 1024 == 0 else f"{n:,}" for n in lengths])
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("prompt (tokens)", fontsize=8)
    axes.set_ylabel(unit, fontsize=8)
    axes.margins(y=0.15)

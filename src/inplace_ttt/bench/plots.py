"""Pictures of the records: what fast weights add to the time and memory of prefill, by length."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..plots import OFF, ON, save, styled

WAYS = {
    "over_no_ttt": ("this library", ON, "-"),
    "materialised_over_no_ttt": ("one weight per chunk (the authors' release)", "#b08968", "-"),
    "limit_over_no_ttt": ("arithmetic alone", OFF, "--"),
}
"""Column of a record -> label, colour and style of its line."""


def prefill(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a row of panels per attention: extra time in per cent, and extra GiB at the peak where it was measured.

    Records of the same window are merged (for a length in several, the last one counts).
    """
    groups: dict[int | None, dict[int, Any]] = {}
    for record in records:
        groups.setdefault(record["window"], {}).update({row["tokens"]: row for row in record["results"]})
    memory = all(row["peak_bytes"]["ours"] is not None for rows in groups.values() for row in rows.values())
    figure, panels = styled(7.0, 2.4 * len(groups) + 0.6, len(groups), 2 if memory else 1, sharex="col", sharey="col")
    for line, (window, rows) in zip(panels, groups.items(), strict=True):
        lengths, name = sorted(rows), "full attention" if window is None else f"window {window:,}"
        for column, (label, colour, style) in WAYS.items():
            extra = [100 * (rows[n][column] - 1) for n in lengths]
            line[0].plot(range(len(lengths)), extra, style, marker="o", ms=4, lw=1.6, color=colour, label=label)
        line[0].set_title(f"time, {name}", loc="left", fontsize=10, fontweight="bold")
        line[0].set_ylabel("over no TTT (%)", fontsize=8.5)
        if memory:
            peaks = [rows[n]["peak_bytes"] for n in lengths]
            for way, column in (("ours", "over_no_ttt"), ("materialised", "materialised_over_no_ttt")):
                more = [(p[way] - p["no TTT"]) / 2**30 for p in peaks]
                line[1].plot(range(len(lengths)), more, marker="o", ms=4, lw=1.6, color=WAYS[column][1])
            own = (peaks[-1]["ours"] - peaks[-1]["no TTT"]) / 2**30
            place = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
            line[1].annotate(f"{own:.2f}", (len(lengths) - 1, own), (0, 5), color=ON, **place)
            line[1].set_title(f"peak memory, {name}", loc="left", fontsize=10, fontweight="bold")
            line[1].set_ylabel("over no TTT (GiB)", fontsize=8.5)
        for axes in line:
            axes.set_xticks(range(len(lengths)), [f"{n // 1024}k" if n % 1024 == 0 else f"{n:,}" for n in lengths])
    for axes in panels[-1]:
        axes.set_ylim(bottom=0)
        axes.set_xlabel("prompt (tokens)", fontsize=8.5)
    first = records[0]
    device = (first["hardware"].get("gpus") or ["a CPU"])[0]
    figure.suptitle(
        f"Prefill, {first['shape'].upper()} shape, {device}", x=0.01, ha="left", fontsize=11, fontweight="bold"
    )
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    save(figure, path)

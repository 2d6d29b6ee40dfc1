"""The long streams as tables and pictures, from the records under benchmarks/results/long-stream.

python benchmarks/summarise_long_stream.py            prints the tables that docs/results.md holds
python benchmarks/summarise_long_stream.py --plots    also writes docs/images/long-stream*.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from inplace_ttt.plots import add_heading, add_legend, add_title, save, styled
from inplace_ttt.session.diagnostics import Timeline
from inplace_ttt.session.plots import save_diagnostics

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "results" / "long-stream"
IMAGES = ROOT / "docs" / "images"
COLOURS = {"on": "#c2410c", "off": "#64748b", "decay-off": "#d9a441"}
LABELS = {"on": "updates on (stream's default)", "off": "updates off", "decay-off": "updates on, decay off"}
TEXTS = {"books": "held-out books", "code": "Python's standard library"}
SMOOTH = 4
"""Figures of 5,000 tokens averaged for the curves."""


def load(text: str, updates: str, tokens: int = 500_000) -> Any:
    return json.loads((RECORDS / f"{text}-{updates}-{tokens}.json").read_text(encoding="utf-8"))


def column(record: Any, name: str) -> np.ndarray:
    return np.array([row[name] for row in record["rows"]], np.float64)


def table() -> str:
    lines = [
        "| stream | tokens | updates off | updates on | decay off | worst 5,000 tokens, on - off |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for text, name in TEXTS.items():
        loss = {updates: column(load(text, updates), "loss") for updates in COLOURS}
        ends = column(load(text, "on"), "tokens")
        for low, high in ((0, 16_384), (16_384, 100_000), (100_000, 300_000), (300_000, 500_000)):
            part = (ends > low) & (ends <= high)
            mean = {key: values[part].mean() for key, values in loss.items()}
            worst = (loss["on"] - loss["off"])[part].max()
            lines.append(
                f"| {name} | {low:,} to {high:,} | {mean['off']:.3f} | **{mean['on']:.3f}** "
                f"| {mean['decay-off']:.3f} | {worst:+.3f} |"
            )
    return "\n".join(lines)


def million() -> str:
    record = load("code", "on", 1_000_000)
    tokens, seconds = column(record, "tokens"), column(record, "seconds")
    memory, held = column(record, "resident_bytes"), column(record, "session_bytes")
    lines = ["| tokens | microseconds a token | process | session |", "| --- | --- | --- | --- |"]
    for low, high in ((0, 100_000), (100_000, 500_000), (500_000, 900_000), (900_000, 1_000_000)):
        part = (tokens > low) & (tokens <= high)
        lines.append(
            f"| {low:,} to {high:,} | {1e6 * np.median(seconds[part]) / 5000:.0f} "
            f"| {memory[part].max() / 2**20:.0f} MiB | {held[part].max() / 2**20:.1f} MiB |"
        )
    return "\n".join(lines)


def running(values: np.ndarray) -> np.ndarray:
    kernel = np.ones(SMOOTH)
    means: np.ndarray = np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
    return means


def plots() -> None:
    from matplotlib.ticker import EngFormatter

    figure, axes = styled(9.0, 5.2, 2, 2, sharex=True, height_ratios=(1.4, 1))
    for i, (text, name) in enumerate(TEXTS.items()):
        records = {updates: load(text, updates) for updates in COLOURS}
        loss = {updates: column(record, "loss") for updates, record in records.items()}
        x = column(records["on"], "tokens")
        for updates in ("decay-off", "off", "on"):
            axes[0, i].plot(x, running(loss[updates]), color=COLOURS[updates], lw=1.5, label=LABELS[updates])
        add_title(axes[0, i], f"{name}, n = 1 stream")
        gain = loss["on"] - loss["off"]
        axes[1, i].axhline(0, color="black", lw=0.7)
        axes[1, i].bar(x - 2500, gain, width=5000, color=COLOURS["on"], alpha=0.55, lw=0)
        axes[1, i].set_ylim(min(gain.min() * 1.1, -0.05), 0.05)
        axes[1, i].set_xlabel("tokens read")
        axes[1, i].xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[0, 0].set_ylabel("loss (nats per token)")
    axes[1, 0].set_ylabel("on - off (nats)")
    add_legend(figure)
    axes[0, 0].set_xlim(0, x[-1])
    add_heading(figure, "books-and-code: loss over 500,000 tokens, and its difference by updates")
    save(figure, IMAGES / "long-stream.png")

    record = load("code", "on", 1_000_000)
    x = column(record, "tokens")
    figure, (axes,) = styled(9.0, 2.7, 1, 3)
    for axis, title, unit, values in (
        (axes[0], "the session's memory", "MiB", column(record, "session_bytes") / 2**20),
        (axes[1], "the process's memory", "MiB", column(record, "resident_bytes") / 2**20),
        (axes[2], "time per token", "microseconds", 1e6 * column(record, "seconds") / 5000),
    ):
        axis.plot(x, values, color=COLOURS["on"], lw=1.2)
        add_title(axis, title)
        axis.set_ylabel(unit)
        axis.set_ylim(0, 1.15 * values.max())
        axis.set_xlim(0, x[-1])
        axis.set_xlabel("tokens read")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    add_heading(figure, "books-and-code: one session over a million tokens of code")
    save(figure, IMAGES / "long-stream-cost.png")

    timeline = Timeline.from_list(load("books", "on")["timeline"])
    save_diagnostics(
        IMAGES / "long-stream-diagnostics.png", timeline, "books-and-code: 500,000 tokens of held-out books"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plots", action="store_true")
    arguments = parser.parse_args()
    print(table(), million(), sep="\n\n")
    if arguments.plots:
        plots()


if __name__ == "__main__":
    main()

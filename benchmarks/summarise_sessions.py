"""Reading then asking, and states of rank r, as tables and a picture, from the records under benchmarks/results.

python benchmarks/summarise_sessions.py            prints the tables that docs/results.md holds
python benchmarks/summarise_sessions.py --plots    also writes docs/images/read-then-ask.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from inplace_ttt.eval.suites.read_then_ask import CONDITIONS

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
MENTIONS, DISTANCES = (1, 2, 4, 8, 16), (0, 1024, 4096)
TEXTS = {"books": "held-out books", "code": "Python's standard library"}
COLOURS = {"none": "#94a3b8", "memory": "#c2410c", "context": "#0c4a6e"}
LABELS = {"none": "not read", "memory": "read, then dropped from the context", "context": "read, still in context"}


def answers(text: str, mentions: int, distance: int) -> list[Any]:
    record = json.loads((RECORDS / "read-then-ask" / f"{text}-{mentions}.json").read_text(encoding="utf-8"))
    return [answer for answer in record["answers"] if answer["task"]["distance"] == distance]


def asked() -> str:
    lines = [
        "| text | mentions | tokens since the last | not read | memory | context | memory, recognised |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for text, name in TEXTS.items():
        for mentions in MENTIONS:
            for distance in DISTANCES:
                found = answers(text, mentions, distance)
                cells = [_cell([a["preferred"][c] for a in found]) for c in CONDITIONS]
                recognised = _cell([a["recognised"]["memory"] for a in found])
                lines.append(f"| {name} | {mentions} | {distance:,} | {' | '.join(cells)} | {recognised} |")
    return "\n".join(lines)


def share(answers: list[bool]) -> tuple[float, float, float]:
    """Share of successes and its 95% interval (Wilson); nan, 0 and 1 without answers."""
    n, z = len(answers), 1.959964
    if not n:
        return float("nan"), 0.0, 1.0
    p = float(np.mean(answers))
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p, float((middle - half) / (1 + z * z / n)), float((middle + half) / (1 + z * z / n))


def _cell(hits: list[bool]) -> str:
    value, low, high = share(hits)
    return f"{value:.2f} ({low:.2f}-{high:.2f})"


def ranks() -> str:
    lines = [
        "| state | books | code | S lost, books, by layer | memory for S, at most |",
        "| --- | --- | --- | --- | --- |",
    ]
    records = [json.loads((RECORDS / "rank-forms" / f"{t}.json").read_text(encoding="utf-8")) for t in TEXTS]
    for books, code in zip(*(r["rows"] for r in records), strict=True):
        state = books["state"]
        lost = ", ".join(f"{x:.0%}" for x in books["truncation_by_layer"]) if isinstance(state, int) else ""
        held = f"{2 * state * (256 + 1024) * 4 * 4 / 2**20:.2f} MiB" if isinstance(state, int) else "4.00 MiB"
        name = {"off": "updates off", "dense": "dense"}.get(state, f"rank {state}")
        lines.append(
            f"| {name} | {books['loss']:.3f} | {code['loss']:.3f} | {lost} | {'' if state == 'off' else held} |"
        )
    return "\n".join(lines)


def plots() -> None:
    from inplace_ttt.plots import add_heading, add_legend, add_title, save, styled

    figure, axes = styled(9.0, 5.4, 2, 3, sharex=True, sharey=True)
    for row, (text, name) in zip(axes, TEXTS.items(), strict=True):
        for axis, distance in zip(row, DISTANCES, strict=True):
            axis.axhline(0.1, color="0.25", lw=1.0, ls=(0, (3, 2)), label="chance")
            for condition in CONDITIONS:
                points = [share([a["preferred"][condition] for a in answers(text, m, distance)]) for m in MENTIONS]
                value, low, high = zip(*points, strict=True)
                axis.plot(MENTIONS, value, "o-", ms=4, lw=1.5, color=COLOURS[condition], label=LABELS[condition])
                axis.fill_between(MENTIONS, low, high, color=COLOURS[condition], alpha=0.12, lw=0)
            axis.set_xscale("log", base=2)
            axis.set_xticks(MENTIONS, [str(m) for m in MENTIONS])
            axis.set_ylim(0, 1.02)
            title = f"{name}\n{distance:,} tokens since"
            add_title(axis, title)
        trials = len(answers(text, MENTIONS[0], DISTANCES[0]))
        row[0].set_ylabel(f"right of 10 candidates ({trials} trials)")
    for axis in axes[-1]:
        axis.set_xlabel("mentions in 2,048 tokens")
    add_heading(figure, "books-and-code: facts asked from memory and context, by tokens since the last mention")
    add_legend(figure)
    save(figure, IMAGES / "read-then-ask.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plots", action="store_true")
    arguments = parser.parse_args()
    print(asked(), ranks(), sep="\n\n")
    if arguments.plots:
        plots()


if __name__ == "__main__":
    main()

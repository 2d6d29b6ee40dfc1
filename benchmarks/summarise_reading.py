"""Tables and the picture of what a pretrained model gains by the loss, from benchmarks/results/reading.

python benchmarks/summarise_reading.py [--plot docs/images/reading.png]
"""

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "reading"


def records() -> list[dict[str, Any]]:
    """All records, by model, window, length and gain."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return sorted(found, key=lambda r: (r["window"] or 0, r["tokens"], -gain(r)))


def gain(record: dict[str, Any]) -> float:
    """Mean gain over the domains."""
    return sum(d["gain"] for d in record["domains"].values()) / len(record["domains"])


def table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| attention | tokens | layers | C | r | decay | books | last quarter | own | code | last quarter | own |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in found:
        s = r["settings"]
        size = s.get("update_size") or f"{s.get('rule')}, lr {s.get('lr')}"
        cells = [f"window {r['window']}" if r["window"] else "full", f"{r['tokens']:,}", f"`{s['layers']}`"]
        cells += [str(s["chunk_size"]), f"{size:g}" if isinstance(size, float) else size, f"{s.get('decay', 0):g}"]
        for name in ("books", "code"):
            d = r["domains"][name]
            own = f"{d['own_gain']:.3f}" if "own_gain" in d else ""
            cells += [f"{d['gain']:.3f}", f"{d['gain_last_quarter']:.3f}", own]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path: Path) -> None:
    """Loss by position, updates on and off with a window, and with full attention."""
    from matplotlib.figure import Figure

    window, full, long = (
        json.loads((RESULTS / f"smollm2-{name}.json").read_text())
        for name in ("window-c64-r2e-3", "full-c64-r1e-3", "window-long-c128-r2e-3")
    )
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2)
    for row, domain in enumerate(("books", "code")):
        for panel, curves, title in (
            (
                panels[row][0],
                (
                    (window, "off_by_position", "window 512, updates off", "tab:gray", "-"),
                    (window, "on_by_position", "window 512, learning", "tab:blue", "-"),
                    (full, "off_by_position", "full attention, updates off", "tab:gray", ":"),
                    (full, "on_by_position", "full attention, learning", "tab:blue", ":"),
                ),
                f"{domain}, 8,192 tokens",
            ),
            (
                panels[row][1],
                (
                    (long, "off_by_position", "window 512, updates off", "tab:gray", "-"),
                    (long, "on_by_position", "window 512, learning", "tab:blue", "-"),
                ),
                f"{domain}, 32,768 tokens",
            ),
        ):
            for record, key, label, colour, style in curves:
                values = record["domains"][domain][key]
                step = max(len(values) // 16, 1)
                means = [sum(values[i : i + step]) / len(values[i : i + step]) for i in range(0, len(values), step)]
                places = [512 * step * (i + 0.5) for i in range(len(means))]
                panel.plot(places, means, style, color=colour, label=label)
            panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
            panel.set_xlabel("position in the text (tokens)")
            panel.set_ylabel("loss (nats per token)")
            panel.grid(alpha=0.3)
        panels[row][0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, default=None)
    arguments = parser.parse_args()
    print(table(records()))
    if arguments.plot:
        draw(arguments.plot)


if __name__ == "__main__":
    main()

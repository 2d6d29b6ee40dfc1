"""What training on top of the frozen, or unfrozen, baseline recovers of joint training's gain, as a table and a figure.

python benchmarks/summarise_adapter.py RUN_DIRECTORY...

Each directory holds run.json and evaluation.json; a run that was not evaluated on the windows of the published ones is
refused. The gain recovered is
(window only - on) / (window only - joint), where the published
window-only and jointly trained models of seed 0 are the two ends (benchmarks/results/books-and-code).
"""

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENDS = ROOT / "benchmarks" / "results" / "books-and-code"
DOMAINS = ("code", "books")


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rows(directories: list[Path]) -> list[dict[str, Any]]:
    window, joint = (load(ENDS / f"{kind}-seed0" / "evaluation.json") for kind in ("window", "ttt"))
    published = load(ENDS / "ttt-seed0" / "run.json")
    total = published["tokens_seen"]
    found = []
    for directory in directories:
        record, evaluation = load(directory / "run.json"), load(directory / "evaluation.json")
        for name in ("length", "windows"):
            if record["recipe"]["evaluation"][name] != published["recipe"]["evaluation"][name]:
                raise SystemExit(f"{directory}: evaluation.{name} differs from the published runs: not comparable")
        if record["data"]["test"] != published["data"]["test"]:
            raise SystemExit(f"{directory}: other test documents than the published runs: not comparable")
        row: dict[str, Any] = {
            "name": record["recipe"]["name"] + ", " + record["recipe"].get("trainable", "all").replace("_", " "),
            "tokens": record["tokens_seen"] / total,
            "trained": record["trained_parameters"],
        }
        for domain in DOMAINS:
            ends = window[domain]["on"]["value"], joint[domain]["on"]["value"]
            row[domain] = evaluation[domain]["on"]["value"]
            row[f"{domain}_off"] = evaluation[domain]["off"]["value"]
            row[f"{domain}_recovered"] = (ends[0] - row[domain]) / (ends[0] - ends[1])
        found.append(row)
    return found


def table(found: list[dict[str, Any]]) -> str:
    lines = ["| run | trained | tokens of joint training | code on / off | recovered | books on / off | recovered |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for r in found:
        cells = [f"{r[d]:.3f} / {r[d + '_off']:.3f} | {r[d + '_recovered']:.0%}" for d in DOMAINS]
        lines.append(f"| {r['name']} | {r['trained'] / 1e6:.2f}M | {r['tokens']:.0%} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def plot(found: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, domain in enumerate(DOMAINS):
        places = [y + 0.2 - 0.4 * i for y in range(len(found))]
        bars = axis.barh(places, [100 * r[f"{domain}_recovered"] for r in found], 0.38, label=domain)
        axis.bar_label(bars, fmt="%.0f%%", padding=3)
    axis.set_yticks(range(len(found)), [f"{r['name']}\n{r['tokens']:.0%} of the tokens" for r in found])
    axis.axvline(100, color="0.4", linestyle="--", linewidth=1)
    axis.set(xlabel="gain of joint training recovered (%)")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path)
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "images" / "adapter.png")
    given = parser.parse_args()
    print(table(rows(given.directories)))
    plot(rows(given.directories), given.plot)

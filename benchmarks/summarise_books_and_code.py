"""The four books-and-code runs as a table and two pictures, from the records under benchmarks/results.

python benchmarks/summarise_books_and_code.py            prints the table that docs/results.md holds
python benchmarks/summarise_books_and_code.py --plots    also writes docs/images/books-and-code-*.png
"""

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "results" / "books-and-code"
IMAGES = ROOT / "docs" / "images"
SEEDS, DOMAINS = (0, 1), ("code", "books")
COLOURS = {"window": "#5b6b82", "off": "#d9a441", "on": "#c2410c"}


def load(name: str) -> Any:
    return json.loads((RECORDS / name).read_text(encoding="utf-8"))


def figures(seed: int, domain: str) -> dict[str, float]:
    """Test losses at 16,384 tokens, nats per token."""
    reading = [row["results"][domain] for row in load(f"reading-seed{seed}.json")["rows"]]
    return {
        "window": load(f"window-seed{seed}/evaluation.json")[domain]["on"]["value"],
        "off": reading[0]["off"]["value"],
        "on": reading[0]["on"]["value"],
        "shipped": reading[1]["on"]["value"],
    }


def table() -> str:
    lines = [
        "| test split | seed | window only | TTT, updates off | TTT, as trained | TTT, as shipped | below window |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for domain, seed in product(DOMAINS, SEEDS):
        f = figures(seed, domain)
        lines.append(
            f"| {domain} | {seed} | {f['window']:.3f} | {f['off']:.3f} | {f['on']:.3f} | {f['shipped']:.3f} "
            f"| {f['window'] - f['on']:.3f} as trained, **{f['window'] - f['shipped']:.3f}** as shipped |"
        )
    return "\n".join(lines)


def plots() -> None:
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axis, domain in zip(axes, DOMAINS, strict=True):
        for seed, style in zip(SEEDS, ("-", "--"), strict=True):
            shipped = load(f"reading-seed{seed}.json")["rows"][1]["results"][domain]
            window = load(f"window-seed{seed}/evaluation.json")[domain]
            for key, buckets, label in (
                ("window", window["position_on"], "window only"),
                ("off", shipped["position_off"], "TTT, updates off"),
                ("on", shipped["position_on"], "TTT, updates on"),
            ):
                x = [(b["start"] + b["end"]) / 2 for b in buckets]
                y = [b["loss"] for b in buckets]
                axis.plot(x, y, style, color=COLOURS[key], marker="o", markersize=3, label=f"{label}, seed {seed}")
        axis.set(title=f"{domain}, test split", xlabel="position (tokens)", ylabel="loss (nats per token)")
        axis.set_xscale("log", base=2)
        axis.set_xticks([128, 512, 2048, 8192], ["128", "512", "2k", "8k"])
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(IMAGES / "books-and-code-position.png", dpi=130)

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axis, domain in zip(axes, DOMAINS, strict=True):
        for seed, style in zip(SEEDS, ("-", "--"), strict=True):
            for kind, name, key, label in (
                ("window", f"eval_{domain}", "window", "window only"),
                ("ttt", f"eval_{domain}_off", "off", "TTT, updates off"),
                ("ttt", f"eval_{domain}", "on", "TTT, updates on"),
            ):
                curve = [e for e in load(f"{kind}-seed{seed}/run.json")["curve"] if name in e]
                x = [e["step"] * 0.131072 for e in curve]
                y = [e[name] for e in curve]
                axis.plot(x, y, style, color=COLOURS[key], marker="o", markersize=3, label=f"{label}, seed {seed}")
        axis.set(title=f"{domain}, validation", xlabel="training tokens (millions)", ylabel="loss (nats per token)")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(IMAGES / "books-and-code-training.png", dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plots", action="store_true")
    if parser.parse_args().plots:
        plots()
    print(table())

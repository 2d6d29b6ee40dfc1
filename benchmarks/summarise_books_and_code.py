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
COLOURS = {"window": "#0c4a6e", "off": "#64748b", "on": "#c2410c"}


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


def below_window(seed: int, domain: str, way: str) -> tuple[list[float], list[float]]:
    """Return positions (tokens), and the loss there of the shipped reading less that of the window-only model."""
    shipped = load(f"reading-seed{seed}.json")["rows"][1]["results"][domain][f"position_{way}"]
    window = load(f"window-seed{seed}/evaluation.json")[domain]["position_on"]
    if [(b["start"], b["tokens"]) for b in shipped] != [(b["start"], b["tokens"]) for b in window]:
        raise SystemExit(f"seed {seed}, {domain}: the two were not measured on the same tokens")
    x = [(b["start"] + b["end"]) / 2 for b in window]
    return x, [ours["loss"] - theirs["loss"] for ours, theirs in zip(shipped, window, strict=True)]


def plots() -> None:
    from inplace_ttt.plots import add_heading, add_legend, add_title, save, styled

    figure, (axes,) = styled(8.0, 3.5, 1, 2, sharey=True)
    for axis, domain in zip(axes, DOMAINS, strict=True):
        axis.axhline(0, color="0.25", lw=1.0, ls=(0, (3, 2)), label="window only")
        for seed, style in zip(SEEDS, ("-", "--"), strict=True):
            for way in ("off", "on"):
                x, y = below_window(seed, domain, way)
                label = f"updates {way}, seed {seed}"
                axis.plot(x, y, style, color=COLOURS[way], marker="o", ms=3.5, lw=1.5, label=label)
        documents = len(load("window-seed0/evaluation.json")[domain]["document_names"])
        add_title(axis, f"{domain}, test split, n = {documents} documents")
        axis.set_xlabel("position (tokens)")
        axis.set_xscale("log", base=2)
        axis.set_xticks([128, 512, 2048, 8192], ["128", "512", "2k", "8k"])
    axes[0].set_ylabel("loss less window only (nats per token)")
    add_heading(figure, "books-and-code, as shipped: test loss against the window-only model")
    add_legend(figure, 5)
    save(figure, IMAGES / "books-and-code-position.png")

    figure, (axes,) = styled(8.0, 3.5, 1, 2)
    for axis, domain in zip(axes, DOMAINS, strict=True):
        for seed, style in zip(SEEDS, ("-", "--"), strict=True):
            for kind, name, key, label in (
                ("window", f"eval_{domain}", "window", "window only"),
                ("ttt", f"eval_{domain}_off", "off", "updates off"),
                ("ttt", f"eval_{domain}", "on", "updates on"),
            ):
                curve = [e for e in load(f"{kind}-seed{seed}/run.json")["curve"] if name in e]
                x = [e["step"] * 0.131072 for e in curve]
                y = [e[name] for e in curve]
                label = f"{label}, seed {seed}"
                axis.plot(x, y, style, color=COLOURS[key], marker="o", ms=3.5, lw=1.5, label=label)
        n = load("window-seed0/run.json")["data"]["validation"][domain]["documents"]
        add_title(axis, f"{domain}, n = {n} documents")
        axis.set_xlabel("training tokens (millions)")
    axes[0].set_ylabel("loss (nats per token)")
    add_heading(figure, "books-and-code: validation loss while training")
    add_legend(figure, 3)
    save(figure, IMAGES / "books-and-code-training.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plots", action="store_true")
    if parser.parse_args().plots:
        plots()
    print(table())

"""What training on top of the trained baseline recovers of joint training's gain, as a table and a figure.

python benchmarks/summarise_adapter.py            prints the table that docs/results.md holds
python benchmarks/summarise_adapter.py --plot     also writes docs/images/adapter.png

Reads the runs in benchmarks/results/adapter (made by benchmarks/train_together.py). The two ends are the published
window-only and jointly trained models of seed 0; a run on other test windows is refused.

recovered: (window only - run) / (window only - joint), losses with updates on.
reading: the run's gain by updates (off - on) over that of the joint model.
"""

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "benchmarks" / "results" / "adapter"
ENDS = ROOT / "benchmarks" / "results" / "books-and-code"
DOMAINS = ("code", "books")
NAMES = {
    "adapter-26M-lr5e-4": "adapter, lr 5e-4",
    "adapter-26M": "adapter, lr 1e-3",
    "adapter-26M-lr3e-3": "adapter, lr 3e-3",
    "adapter-118M": "adapter, lr 1e-3",
    "projections-79M": "adapter and projections, lr 1e-3",
    "window-26M": "window only, trained on",
    "continual-26M": "all weights, lr 5e-4",
    "continual-79M": "all weights, lr 1e-3",
}
DRAWN = {"adapter-118M": "C0", "projections-79M": "C2", "continual-79M": "C1"}


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rows() -> list[dict[str, Any]]:
    window, joint = (load(ENDS / f"{kind}-seed0" / "evaluation.json") for kind in ("window", "ttt"))
    published = load(ENDS / "ttt-seed0" / "run.json")
    found = []
    for run, name in NAMES.items():
        record, evaluation = load(RUNS / run / "run.json"), load(RUNS / run / "evaluation.json")
        for key in ("length", "windows"):
            if record["recipe"]["evaluation"][key] != published["recipe"]["evaluation"][key]:
                raise SystemExit(f"{run}: evaluation.{key} differs from the published runs: not comparable")
        if record["data"]["test"] != published["data"]["test"]:
            raise SystemExit(f"{run}: other test documents than the published runs: not comparable")
        row: dict[str, Any] = {
            "name": name,
            "tokens": record["tokens_seen"],
            "share": record["tokens_seen"] / published["tokens_seen"],
            "trained": record["trained_parameters"],
        }
        for domain in DOMAINS:
            on, off = (evaluation[domain][way] and evaluation[domain][way]["value"] for way in ("on", "off"))
            ends = window[domain]["on"]["value"], joint[domain]["on"]["value"]
            row[domain] = {
                "on": on,
                "off": off,
                "recovered": (ends[0] - on) / (ends[0] - ends[1]),
                "reading": off and (off - on) / (joint[domain]["off"]["value"] - ends[1]),
            }
        found.append(row)
    return found


def table(found: list[dict[str, Any]]) -> str:
    head = ["run", "trained", "tokens"]
    for domain in DOMAINS:
        head += [f"{domain}: on / off", "recovered", "reading"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for r in found:
        cells = [r["name"], f"{r['trained'] / 1e6:.2f}M", f"{r['tokens'] / 1e6:.0f}M ({r['share']:.0%})"]
        for domain in DOMAINS:
            d = r[domain]
            cells.append(f"{d['on']:.3f} / {d['off']:.3f}" if d["off"] else f"{d['on']:.3f}")
            cells += [f"{d['recovered']:.0%}", f"{d['reading']:.0%}" if d["off"] else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(path: Path) -> None:
    """Gain by updates on validation text over the tokens trained on."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    joint = load(ENDS / "ttt-seed0" / "run.json")["curve"]
    curves = [("from scratch, jointly", "0.5", joint)]
    curves += [
        (NAMES[run].removesuffix(", lr 1e-3"), colour, load(RUNS / run / "run.json")["curve"])
        for run, colour in DRAWN.items()
    ]
    for axis, domain in zip(axes, DOMAINS, strict=True):
        for label, colour, curve in curves:
            points = [
                (e["tokens"] / 1e6, e[f"eval_{domain}_off"] - e[f"eval_{domain}"])
                for e in curve
                if f"eval_{domain}" in e
            ]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, color=colour, label=label)
        axis.axhline(0, color="0.8", linewidth=1, zorder=0)
        axis.set(title=domain, xlabel="million tokens trained on")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("validation: gain by updates (nats per token)")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true")
    given = parser.parse_args()
    print(table(rows()))
    if given.plot:
        plot(ROOT / "docs" / "images" / "adapter.png")

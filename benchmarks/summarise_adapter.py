"""Share of joint training's gain that training on top of the trained baseline recovers, as a table and a figure.

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
                "documents": len(evaluation[domain]["document_names"]),
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


def plot(path: Path, found: list[dict[str, Any]]) -> None:
    """Draw the share of joint training's advantage that each run recovers."""
    from inplace_ttt.plots import TEXTS, add_heading, add_legend, save, styled

    figure, ((axis,),) = styled(7.0, 4.0, grid="x")
    names = [f"{r['name']}, {r['tokens'] / 1e6:.0f}M tokens" for r in found]
    for domain, shift in zip(DOMAINS, (0.19, -0.19), strict=True):
        shares = [100 * r[domain]["recovered"] for r in found]
        at = [len(found) - 1 - i + shift for i in range(len(found))]
        axis.barh(at, shares, 0.36, color=TEXTS[domain], label=f"{domain}, n = {found[0][domain]['documents']}")
        for y, share in zip(at, shares, strict=True):
            axis.text(share + 1.5, y, f"{share:.0f}", va="center", fontsize=7.5)
    axis.axvline(100, color="0.25", lw=1, ls=(0, (3, 2)))
    axis.text(98, len(found) - 0.6, "trained jointly", ha="right", fontsize=8)
    axis.set_xlim(0, 150)
    axis.set_yticks(range(len(found)), names[::-1])
    axis.set_xlabel("recovered of joint training's advantage in test loss (%)")
    title = "Training on top of the trained baseline: an adapter recovers a seventh"
    add_heading(figure, title)
    add_legend(figure)
    save(figure, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true")
    given = parser.parse_args()
    found = rows()
    print(table(found))
    if given.plot:
        plot(ROOT / "docs" / "images" / "adapter.png", found)

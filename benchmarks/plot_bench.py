"""Throughput and peak memory of prefill by length, with full attention and with a window, from the records.

python benchmarks/plot_bench.py            writes docs/images/bench-prefill.png
"""

import json
from pathlib import Path

from inplace_ttt.bench.prefill import draw

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ("prefill", "prefill-window")


def main() -> None:
    folder = ROOT / "benchmarks" / "results" / "bench"
    records = [json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in RECORDS]
    draw(records, ROOT / "docs" / "images" / "bench-prefill.png")


if __name__ == "__main__":
    main()

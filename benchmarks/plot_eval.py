"""Pictures of the shipped model through ``inplace-ttt eval``, from the records under benchmarks/results/eval.

python benchmarks/plot_eval.py            writes docs/images/eval-*.png
"""

import json
from pathlib import Path
from typing import Any

from inplace_ttt.eval import plots
from inplace_ttt.eval.report import pictures
from inplace_ttt.eval.suites.needle import CANDIDATES
from inplace_ttt.plots import save

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "results" / "eval"
DRAWN = {
    "books-32k": {"loss-by-position": "books-loss-by-position", "sliding-perplexity": "books-sliding-perplexity",
                  "theory": "books-theory"},
    "code-32k": {"sliding-perplexity": "code-sliding-perplexity"},
    "books-settings": {"differences": "books-settings"},
}  # fmt: skip
"""Record -> its pictures, and the names they get here."""


def load(record: str) -> dict[str, Any]:
    """Return a record whose domains are called as in docs/results.md."""
    text = (RECORDS / record / "summary.json").read_text(encoding="utf-8")
    return json.loads(text.replace('"domain": "prose"', '"domain": "books"'))  # type: ignore[no-any-return]


def needles() -> Any:
    """Draw the needles of books and code beside each other."""
    rows = []
    for record, name in (("books-32k", "books"), ("code-32k", "code")):
        found = load(record)
        trials = found["plan"]["trials"] * len(found["plan"]["depths"])
        rows += [{**r, "title": f"{name}, n = {trials} a length"} for r in found["tables"]["needle by length"]]
    drawn = plots.curves(rows, "length", "title", count=None)
    how: Any = {"top": 1.02, "line": (1 / CANDIDATES, "chance")}
    return plots.panels(drawn, "books-and-code: needles found by length", "length (tokens)", plots.SHARE, **how)


def main() -> None:
    folder = ROOT / "docs" / "images"
    for record, names in DRAWN.items():
        found = load(record)
        figures = pictures(found["tables"], found["plan"])
        for name, here in names.items():
            save(figures[name], folder / f"eval-{here}.png")
    save(needles(), folder / "eval-needle.png")


if __name__ == "__main__":
    main()

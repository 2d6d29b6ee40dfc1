"""The Python source of the installed distributions as JSON lines, one file a split, for the books-and-code recipes.

    python benchmarks/code_documents.py out/code

writes ``train.jsonl``, ``validation.jsonl``, ``test.jsonl`` and ``packages.json``, the list of what they are made of.
The recipes read them from ``$INPLACE_TTT_CODE``, here ``out/code``; ``inplace-ttt eval --data`` reads ``test.jsonl``.
Held-out distributions that are not installed are skipped (the file of a split without any is empty), all others are
trained on. In ``test.jsonl`` the first document of every distribution comes first, then the second of each, so that
the first few are of different ones.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from packages import Document, SplitRule, collect

from inplace_ttt.records import write_json

SPLITS_OF_THE_RECIPES = SplitRule(
    validation=("flax", "torchmetrics", "aiohttp", "h5py", "tabulate", "pluggy"),
    test=("networkx", "statsmodels", "seaborn", "xarray", "optax", "rich", "werkzeug", "sentence-transformers"),
)


def spread(documents: Sequence[Document]) -> list[Document]:
    """Put the first document of every source first, then the second of each."""
    seen: Counter[str] = Counter()
    places = []
    for document in documents:
        seen[document.source] += 1
        places.append(seen[document.source])
    return [document for _, document in sorted(zip(places, documents, strict=True), key=lambda pair: pair[0])]


def main(out: Path) -> None:
    corpus = collect(SPLITS_OF_THE_RECIPES)
    write_json(out / "packages.json", corpus.manifest_dicts())
    for split, documents in corpus.documents.items():
        if split == "train":
            corpus.of(split)  # none to train on is a mistake
        with open(out / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for d in spread(documents) if split == "test" else documents:
                record = {"id": d.id, "domain": "code", "source": d.source, "license": d.licence, "text": d.text}
                file.write(json.dumps(record) + "\n")
        print(f"{out}/{split}.jsonl: {len(documents)} documents")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))

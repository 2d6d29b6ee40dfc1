"""The code of a recipe's split as JSON lines, for ``inplace-ttt eval --data``, and a list of what it was made from.

    python benchmarks/code_documents.py recipes/books-and-code-ttt.yaml test out/code_test.jsonl

Only distributions that this environment has are in it: ``out/code_test.packages.json`` names them. The first document
of every distribution comes first, then the second of each, so that the first few are of different ones.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import yaml

from inplace_ttt.records import write_json
from inplace_ttt.train.packages import SplitRule, collect


def main(recipe: str, split: str, out: str) -> None:
    named = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))["data"]["packages"]
    corpus = collect(SplitRule(validation=tuple(named["validation"]), test=tuple(named["test"])))
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    seen: Counter[str] = Counter()
    places = []
    for document in corpus.of(split):
        seen[document.source] += 1
        places.append(seen[document.source])
    ordered = [document for _, document in sorted(zip(places, corpus.of(split), strict=True), key=lambda pair: pair[0])]
    with open(path, "w", encoding="utf-8") as file:
        for document in ordered:
            file.write(json.dumps({"id": document.id, "domain": "code", "text": document.text}) + "\n")
    made_from = [entry for entry in corpus.manifest_dicts() if entry["split"] == split]
    write_json(path.with_suffix(".packages.json"), made_from)
    print(f"{out}: {len(corpus.of(split))} documents of {', '.join(str(entry['distribution']) for entry in made_from)}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])

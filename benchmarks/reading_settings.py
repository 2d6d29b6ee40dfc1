"""Measure a trained model under other reading settings (chunk size, decay, ...): losses with updates on and off.

    python benchmarks/reading_settings.py RECIPE --model out/run/model --split validation --out FILE.json \\
        --settings "chunk_size=64 decay=0.01" "decay=0.02"

The recipe says which documents are in a split and how long its windows are. The first row is the model as it was saved.
"""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

import inplace_ttt as ittt
from inplace_ttt.eval.nll import evaluate_documents
from inplace_ttt.hf.load import load_baseline
from inplace_ttt.records import write_json
from inplace_ttt.train.prepare import prepare
from inplace_ttt.train.recipe import load_recipe
from inplace_ttt.train.report import run_record, texts


def parse(settings: str) -> dict[str, Any]:
    """``"chunk_size=64 decay=0.01"`` as keywords of ``inplace_ttt.configure``."""
    return {name: json.loads(value) for name, value in (pair.split("=") for pair in settings.split())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--windows", type=int, default=None, help="windows of each document, at most")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--settings", nargs="*", default=[])
    arguments = parser.parse_args()

    console, started = Console(), datetime.now(UTC)
    recipe = load_recipe(arguments.recipe, [])
    prepared = prepare(recipe, console.print)
    documents = {domain: texts(store) for domain, store in prepared.stores(arguments.split).items()}
    model = load_baseline(arguments.model).float()
    saved = ittt.fast_settings(model)
    rows = []
    for settings in [{}, *map(parse, arguments.settings)]:
        ittt.configure(model, **{**saved, **settings})
        results = evaluate_documents(
            model,
            documents,
            recipe.evaluation_length,
            arguments.windows or recipe.evaluation.windows,
            piece=recipe.evaluation.piece,
            batch_size=recipe.evaluation.batch_size,
            console=console,
        )
        rows.append({"settings": {**saved, **settings}, "results": {d: r.to_dict() for d, r in results.items()}})
        means = ", ".join(f"{d} {r.on.value:.4f} (off {r.off.value:.4f})" for d, r in results.items() if r.off)
        console.print(f"{settings or 'as saved'}: {means}", highlight=False)
    record = run_record(
        recipe.raw, [], started, model=str(arguments.model), split=arguments.split, data=prepared.summary, rows=rows
    )
    write_json(arguments.out, record)


if __name__ == "__main__":
    main()

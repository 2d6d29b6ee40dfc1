"""Several training runs side by side on one device, on the same tokens, and published models on their test windows.

    python benchmarks/train_together.py OUT adapter=recipes/books-and-code-adapter.yaml,optimizer.lr=1e-3 \
        continual=recipes/books-and-code-continual.yaml --ends

Each run is NAME=RECIPE[,key=value...]; what it makes is in OUT/NAME. The tokens are made first, once. ``--ends`` also
evaluates the published window-only and jointly trained models (seed 0, as trained) on the same test windows, for
``summarise_adapter.py``: other installed distributions mean other code documents than the published records had.
"""

import argparse
import subprocess
import sys
import threading
from pathlib import Path

from rich.console import Console

from inplace_ttt import configure
from inplace_ttt.eval.nll import evaluate_documents
from inplace_ttt.hf.load import load_baseline
from inplace_ttt.records import about, write_json
from inplace_ttt.train.prepare import prepare
from inplace_ttt.train.recipe import load_recipe
from inplace_ttt.train.report import texts
from inplace_ttt.train.specs import Recipe

ROOT = Path(__file__).resolve().parents[1]
ENDS = {
    "window": ROOT / "benchmarks/models/books-and-code-window",
    "joint": ROOT / "src/inplace_ttt/models/books-and-code",
}


def follow(name: str, command: list[str], failed: list[str]) -> None:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        print(f"{name}: {line.rstrip()}", flush=True)
    if process.wait():
        failed.append(name)


def evaluate_ends(recipe: Recipe, out: Path) -> None:
    prepared, spec = prepare(recipe), recipe.evaluation
    documents = {domain: texts(store) for domain, store in prepared.stores("test").items()}
    found = {}
    for name, directory in ENDS.items():
        model = load_baseline(directory).float()
        if name == "joint":
            configure(model, chunk_size=256, decay=0.0)  # as trained; it is shipped to read in smaller chunks
        results = evaluate_documents(
            model, documents, recipe.evaluation_length, spec.windows,
            piece=spec.piece, edges=None, batch_size=spec.batch_size, console=Console(),
        )  # fmt: skip
        found[name] = {domain: result.to_dict() for domain, result in results.items()}
        print(name, {domain: round(result.on.value, 4) for domain, result in results.items()}, flush=True)
    origin = {**about(), "data": prepared.summary, "evaluation": recipe.raw["evaluation"]}
    write_json(out / "ends.json", origin | found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="+", metavar="NAME=RECIPE[,key=value...]")
    parser.add_argument("--ends", action="store_true")
    given = parser.parse_args()
    commands, recipes = {}, []
    for run in given.runs:
        name, _, rest = run.partition("=")
        path, *overrides = rest.split(",")
        overrides = [f"name={name}", f"output={given.out / name}", *overrides]
        recipes.append(load_recipe(path, overrides))
        commands[name] = [sys.executable, "-m", "inplace_ttt", "train", path, *overrides]
    given.out.mkdir(parents=True, exist_ok=True)
    for recipe in recipes:
        prepare(recipe, lambda line: print(line, flush=True))
    failed: list[str] = []
    threads = [threading.Thread(target=follow, args=(name, c, failed)) for name, c in commands.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if given.ends:
        evaluate_ends(recipes[0], given.out)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()

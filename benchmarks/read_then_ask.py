"""Read, then ask: what the shipped model still knows of a document that has left its context.

    python benchmarks/read_then_ask.py --text books --trials 40 --out FILE.json

Texts as in ``long_stream.py``. ``summarise_long_stream.py`` makes the table and the picture.
"""

import argparse
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import torch
from long_stream import books, code
from rich.console import Console
from rich.progress import track
from transformers import AutoTokenizer

import inplace_ttt as ittt
from inplace_ttt.eval.read_then_ask import Task, ask
from inplace_ttt.records import about, write_json

TEMPLATES = {"books": "\nCaptain{name} said", "code": "\n    self.kind ={name}\n"}
MENTIONS, DISTANCES = (1, 2, 4, 8, 16), (0, 1024, 4096)
LENGTH, DOCUMENTS = 2048, 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", choices=("books", "code"), required=True)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--mentions", type=int, nargs="*", default=MENTIONS)
    parser.add_argument("--distances", type=int, nargs="*", default=DISTANCES)
    parser.add_argument("--model", default=str(ittt.DEFAULT_MODEL))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    started = datetime.now(UTC)
    model = ittt.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    documents = []
    for _name, text in {"books": books, "code": code}[arguments.text]():
        documents.append(tokenizer(text[:400_000], split_special_tokens=True, verbose=False)["input_ids"])
        if sum(len(ids) // (LENGTH + max(DISTANCES)) for ids in documents) >= DOCUMENTS:
            break
    pairs = product(arguments.distances, arguments.mentions)
    tasks = [Task(m, LENGTH, d, TEMPLATES[arguments.text]) for d, m in pairs]
    answers = track(
        ask(model, tokenizer, documents, tasks, arguments.trials),
        total=len(tasks) * arguments.trials,
        console=Console(stderr=True),
    )
    record = {
        "command": f"read_then_ask.py --text {arguments.text} --trials {arguments.trials}",
        "answers": [answer.to_dict() for answer in answers],
        **about(started),
        "settings": ittt.fast_settings(model),
    }
    write_json(arguments.out, record)


if __name__ == "__main__":
    main()

"""Read, then ask: what the shipped model still knows of a document that has left its context.

    python benchmarks/read_then_ask.py --text books --trials 40 --out FILE.json

Texts as in ``long_stream.py``. ``summarise_long_stream.py`` makes the table and the picture.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch
from long_stream import books, code
from rich.console import Console
from rich.progress import track
from transformers import AutoTokenizer

import inplace_ttt as ittt
from inplace_ttt.eval.suites.read_then_ask import Answer, Task, trial
from inplace_ttt.eval.suites.texts import words
from inplace_ttt.records import about, write_json

TEMPLATES = {"books": "\nCaptain{name} said", "code": "\n    self.kind ={name}\n"}
MENTIONS, DISTANCES = (1, 2, 4, 8, 16), (0, 1024, 4096)
LENGTH, DOCUMENTS = 2048, 60


def ask(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Sequence[int]],
    tasks: Sequence[Task],
    trials: int,
    progress: Callable[[], None] | None = None,
    **options: Any,
) -> Iterator[Answer]:
    """``trials`` trials of every task, each on the next stretch of the documents. ``options`` go to ``Session``."""
    session, vocabulary = ittt.Session(model, tokenizer, probe_every=0, **options), words(tokenizer)
    for task in tasks:
        stretches = round_and_round(documents, task.length + task.distance)
        for seed in range(trials):
            yield trial(session, tokenizer, next(stretches), task, seed, vocabulary)
            if progress is not None:
                progress()


def round_and_round(documents: Sequence[Sequence[int]], length: int) -> Iterator[Sequence[int]]:
    """Neighbouring parts of the documents, round and round; UserError when all are too short."""
    cut = [ids[at : at + length] for ids in documents for at in range(0, len(ids) - length + 1, length)]
    if not cut:
        raise ittt.UserError(f"no document has the {length:,} tokens of a trial")
    while True:
        yield from cut


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

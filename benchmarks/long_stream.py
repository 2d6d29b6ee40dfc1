"""A stream of any length through one model: loss, memory and time against length, updates on, off, and decay off.

    python benchmarks/long_stream.py --text books --tokens 500000 --updates on --out FILE.json

``books``: the held-out books of INPLACE_TTT_DATA (prose_test.jsonl.xz, then prose_validation.jsonl.xz), one after
another. ``code``: the running Python's standard library, by path. Neither was trained on. One process is one run, so
that its memory is its own. ``summarise_long_stream.py`` makes the tables and pictures.
"""

import argparse
import json
import lzma
import os
import sysconfig
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from transformers import AutoTokenizer

import inplace_ttt as ittt
from inplace_ttt.records import about, write_json

BIN = 5000
"""Tokens a figure is averaged over."""
LEFT_OUT = ("test", "tests", "site-packages", "idlelib", "lib2to3")
UPDATES = {"on": {}, "decay-off": {"decay": 0.0}, "off": {"lr": 0.0}}
"""Settings of the session; "off" reads with an inner learning rate of 0, which is exactly the slow weights alone."""


def books() -> Iterator[tuple[str, str]]:
    for split in ("test", "validation"):
        path = Path(os.environ["INPLACE_TTT_DATA"]) / f"prose_{split}.jsonl.xz"
        with lzma.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                document = json.loads(line)
                yield document["id"], document["text"]


def code() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if set(name.parts) & set(LEFT_OUT) or path.stat().st_size < 2000:
            continue
        try:
            yield str(name), f"=== {name} ===\n{path.read_text(encoding='utf-8')}"
        except UnicodeDecodeError:
            continue


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def stream_ids(text: str, tokenizer: Any, most: int) -> Iterator[list[int]]:
    """Token ids in blocks of ``BIN``, ``most`` in all."""
    held: list[int] = []
    for _name, document in {"books": books, "code": code}[text]():
        held += tokenizer(document, split_special_tokens=True, verbose=False)["input_ids"]
        while len(held) >= BIN and most > 0:
            yield held[: min(BIN, most)]
            most -= BIN
            held = held[BIN:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", choices=("books", "code"), required=True)
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--updates", choices=tuple(UPDATES), default="on")
    parser.add_argument("--model", default=str(ittt.DEFAULT_MODEL))
    parser.add_argument("--probe-every", type=int, default=0, help="tokens between diagnostics; 0: none")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    console, started = Console(stderr=True), datetime.now(UTC)
    model = ittt.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    session = ittt.Session(model, probe_every=arguments.probe_every, **UPDATES[arguments.updates])
    rows = []
    with Progress("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console) as p:
        task = p.add_task(f"{arguments.text}, updates {arguments.updates}", total=arguments.tokens)
        for ids in stream_ids(arguments.text, tokenizer, arguments.tokens):
            wall, busy = time.perf_counter(), time.process_time()
            score = session.read(ids, scored=True)
            stats = session.stats()
            rows.append(
                {
                    "tokens": stats.tokens,
                    "loss": round(score.mean, 5),
                    "seconds": round(time.perf_counter() - wall, 4),
                    "cpu_seconds": round(time.process_time() - busy, 4),
                    "resident_bytes": resident(),
                    "session_bytes": stats.bytes_context + stats.bytes_fast_weights,
                }
            )
            p.advance(task, len(ids))
    layers = {str(x.layer): x.relative_norm for x in session.diagnostics()}
    origin = about(started)
    record = {
        "command": f"long_stream.py --text {arguments.text} --tokens {arguments.tokens} --updates {arguments.updates}",
        **origin,
        "hardware": {**origin["hardware"], "threads": arguments.threads},
        "settings": session.stats().settings,
        "relative_norm_at_the_end": layers,
        "rows": rows,
        "timeline": session.timeline.to_list(),
    }
    write_json(arguments.out, record)


if __name__ == "__main__":
    main()

"""Accuracy that a state of rank r costs and memory that it saves, on the shipped model.

    python benchmarks/rank_forms.py --text code --out FILE.json

Reads windows of held-out text (as in ``long_stream.py``) chunk by chunk, so that nothing is seen before it is cut to
the rank, as in decoding.
"""

import argparse
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from long_stream import books, code
from rich.console import Console
from rich.progress import Progress
from transformers import AutoTokenizer

import inplace_ttt as ittt
from inplace_ttt.records import about, write_json

FORMS = ("off", "dense", 128, 64, 32, 16, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", choices=("books", "code"), required=True)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    started = datetime.now(UTC)
    model = ittt.from_pretrained(ittt.DEFAULT_MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(ittt.DEFAULT_MODEL)
    windows: list[list[int]] = []
    for _name, text in {"books": books, "code": code}[arguments.text]():
        ids = tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]
        if len(ids) >= arguments.length and len(windows) < arguments.windows:
            windows.append(ids[: arguments.length])  # one a document
    rows = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(arguments.text, total=len(FORMS) * len(windows))
        for form in FORMS:
            losses, held, lost = [], 0, []
            for ids in windows:
                options = {"lr": 0.0} if form == "off" else {"state": form}
                session = ittt.Session(model, probe_every=0, **options)
                reader = session._reader
                reader.piece = reader.scored_piece = reader.config.chunk_size
                losses.append(session.read(ids, scored=True).mean)
                fast = session.fast_weights.values()
                held = sum(x.numel() * x.element_size() for w in fast for x in (w.S, w.left, w.right) if x is not None)
                lost.append([w.truncation[0] for w in fast])
                progress.advance(task)
            rows.append(
                {
                    "state": form,
                    "loss": float(np.mean(losses)),
                    "losses": losses,
                    "state_bytes": held,
                    "truncation_by_layer": np.mean(lost, 0).tolist(),
                }
            )
            progress.console.print(f"{form}: {np.mean(losses):.4f}, {held / 2**20:.2f} MiB, lost {np.mean(lost, 0)}")
    record = {
        "command": f"rank_forms.py --text {arguments.text} --length {arguments.length} --windows {arguments.windows}",
        **about(started),
        "rows": rows,
    }
    write_json(arguments.out, record)


if __name__ == "__main__":
    main()

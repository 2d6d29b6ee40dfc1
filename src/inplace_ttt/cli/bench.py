"""``inplace-ttt bench``."""

import json
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError


class Subject(StrEnum):
    """What is measured."""

    mlp = "mlp"
    prefill = "prefill"


DEFAULTS = {
    (Subject.mlp, True): ("32768", "1024,512"),
    (Subject.mlp, False): ("1024", "64"),
    (Subject.prefill, True): ("8192,32768,131072", "1024"),
    (Subject.prefill, False): ("512,1024", "64"),
}
"""Lengths and chunk sizes by what is measured, and whether there is a GPU."""


def bench(
    subject: Annotated[Subject, typer.Argument(help="mlp: one block; prefill: a whole model reads a prompt.")],
    tokens: Annotated[
        str | None, typer.Option(help="Lengths in tokens, separated by commas (mlp: one).", show_default=False)
    ] = None,
    chunks: Annotated[
        str | None, typer.Option(help="Chunk sizes, separated by commas (prefill: one).", show_default=False)
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="tiny, 0.6b or 4b (Qwen3's). Left out: 4b on a GPU.", show_default=False)
    ] = None,
    window: Annotated[int | None, typer.Option(help="prefill: attention window; left out: full attention.")] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved runs; medians are printed.", min=1)] = 7,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda. Left out: the GPU if there is one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the record to this JSON file.")] = None,
) -> None:
    """Time fast weights beside no TTT, the materialised formula and the arithmetic limit, as ratios of one run.

    The block's outputs and gradients are checked against float64 first; no speed is printed of wrong results.
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from ..bench import mlp, prefill
    from ..train.report import git_commit, hardware, versions

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = place.type == "cuda"
    shape = shape or ("4b" if gpu else "tiny")
    if shape not in prefill.SHAPES:
        raise UserError(f"--shape {shape}: choose one of {', '.join(prefill.SHAPES)}")
    dtype = torch.bfloat16 if gpu else torch.float32
    lengths = _numbers("--tokens", tokens or DEFAULTS[subject, gpu][0])
    sizes = _numbers("--chunks", chunks or DEFAULTS[subject, gpu][1])
    log, console = Console(stderr=True), Console(highlight=False)

    def say(line: str) -> None:
        log.print(line, highlight=False)

    record: dict[str, Any] = {
        "subject": str(subject), "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": git_commit(),
        "hardware": hardware(), "versions": versions(), "rounds": rounds,
    }  # fmt: skip
    table = Table(title=f"{subject} on {record['hardware'].get('gpus', [record['hardware']['cpu']])[0]}")
    if subject == Subject.mlp:
        known = prefill.SHAPES[shape]
        size = mlp.Shape(known["hidden_size"], known["intermediate_size"], lengths[0])
        if any(size.tokens % C or size.tokens < 2 * C for C in sizes):
            raise UserError(f"--tokens {size.tokens}: take a multiple, at least twofold, of every chunk size")
        record |= mlp.measure(size, sizes, place, dtype, rounds=rounds, log=say)
        for name in ("chunk", "pass", "no TTT (ms)", "ours", "materialised", "limit", "peak ours", "materialised"):
            table.add_column(name, justify="right")
        for row in record["results"]:
            ratio, peaks = row["over_no_ttt"], row["peak_bytes"]
            memory = ["", ""] if not gpu else [f"{peaks[k] / peaks['no TTT']:.2f}" for k in ("ours", "materialised")]
            cells = [f"{row['seconds']['no TTT'] * 1000:.2f}", f"{ratio['ours']:.3f}", f"{ratio['materialised']:.3f}"]
            table.add_row(str(row["chunk_size"]), row["pass"], *cells, f"{row['limit']:.2f}", *memory)
    else:
        if len(sizes) > 1:
            raise UserError("--chunks: prefill takes one chunk size")
        record |= prefill.measure(shape, lengths, sizes[0], place, dtype, window=window, rounds=rounds, log=say)
        for name in ("tokens", "no TTT (s)", "ours", "extra peak (GiB)"):
            table.add_column(name, justify="right")
        for row in record["results"]:
            peaks = row["peak_bytes"]
            extra = f"{(peaks['ours'] - peaks['no TTT']) / 2**30:+.2f}" if gpu else ""
            ours = f"{100 * (row['over_no_ttt'] - 1):+.1f}%"
            table.add_row(f"{row['tokens']:,}", f"{row['seconds']['no TTT']:.3f}", ours, extra)
    console.print(table)
    print(json.dumps(record))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _numbers(option: str, text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: write whole numbers separated by commas") from None
    if min(found) < 1:
        raise UserError(f"{option} {text}: only numbers of at least 1")
    return found

"""``inplace-ttt bench``."""

import json
from enum import StrEnum
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from ..bench import SHAPES
from ..errors import UserError
from .usage import Device, check_picture, check_writable, numbers


class Subject(StrEnum):
    """The subject of a measurement."""

    mlp = "mlp"
    prefill = "prefill"
    decode = "decode"
    train = "train"
    stream = "stream"


DEFAULTS = {
    Subject.mlp: (((1024,), (64,)), ((32768,), (1024, 512))),
    Subject.prefill: (((512, 1024), (64,)), ((8192, 32768, 131072), (1024,))),
    Subject.decode: (((48,), (32,)), ((1536,), (1024,))),
    Subject.train: (((256,), (64,)), ((32768,), (1024,))),
    Subject.stream: (((20000,), (64,)), ((1000000,), (1024,))),
}
"""Lengths and chunk sizes by what is measured, on a CPU and on a GPU."""


def bench(
    subject: Annotated[
        Subject,
        typer.Argument(
            help="mlp: one block; prefill: a whole model reads a prompt; decode: it writes; train: a training step; "
            "stream: a session reads without end."
        ),
    ],
    tokens: Annotated[
        str | None, typer.Option(help="Lengths, separated by commas (mlp: one; decode: the prompt's).")
    ] = None,
    chunks: Annotated[str | None, typer.Option(help="Chunk sizes, separated by commas (only mlp: several).")] = None,
    shape: Annotated[
        str | None, typer.Option(help="tiny, 0.6b or 4b (Qwen3's). Left out: 4b on a GPU, 0.6b to stream.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="prefill, stream: attention window; left out: full attention, 1024 to stream.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved runs; medians are printed.", min=1)] = 7,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="Also write the record to this JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON instead of the table.")] = False,
    plot: Annotated[Path | None, typer.Option(help="prefill: also draw throughput and memory to this file.")] = None,
) -> None:
    """Compare the speed of fast weights with a plain model.

    Also with one weight per chunk (the formula as it is written), and with matrix products alone; all are ratios of one
    run. What the block and the decoding steps compute is checked first: if results are wrong, no timings are shown.
    """
    if shape is not None and shape not in SHAPES:
        raise UserError(f"--shape {shape}: choose one of {', '.join(SHAPES)}")
    if plot is not None:
        if subject != Subject.prefill:
            raise UserError("--plot: only for prefill")
        check_picture(plot)
    check_writable(out)
    if window is not None and subject not in (Subject.prefill, Subject.stream):
        raise UserError("--window: only for prefill and stream")
    lengths = numbers("--tokens", tokens, int) if tokens else ()
    sizes = numbers("--chunks", chunks, int) if chunks else ()
    for option, given in (("--tokens", lengths), ("--chunks", sizes)):
        if min(given, default=1) < 1:
            raise UserError(f"{option} {min(given)}: only numbers of at least 1")
    if subject != Subject.mlp and len(sizes) > 1:
        raise UserError(f"--chunks: {subject} takes one chunk size")
    if subject in (Subject.mlp, Subject.decode) and len(lengths) > 1:
        raise UserError(f"--tokens: {subject} takes one length")
    log, console = Console(stderr=True), Console(highlight=False)
    with log.status("loading"):
        import torch

        from ..hf.load import find_device
        from ..records import about, write_json

        module = import_module(f"inplace_ttt.bench.{subject}")
    place = find_device(device)
    gpu = place.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    shape = shape or (("0.6b" if subject == Subject.stream else "4b") if gpu else "tiny")
    lengths, sizes = lengths or DEFAULTS[subject][gpu][0], sizes or DEFAULTS[subject][gpu][1]
    options: dict[str, Any] = {"rounds": rounds, "window": window}
    if subject == Subject.stream:
        options = {"window": window or 1024}
    elif subject != Subject.prefill:
        del options["window"]
    record: dict[str, Any] = {"subject": str(subject), **about(), "rounds": rounds}
    chunk = list(sizes) if subject == Subject.mlp else sizes[0]
    record |= module.measure(
        shape, list(lengths), chunk, place, dtype, **options, log=partial(log.print, highlight=False)
    )
    columns, rows = module.table(record)
    title = f"{subject} on {record['hardware'].get('gpus', [record['hardware']['cpu']])[0]}"
    table = Table(*(Column(name, justify="right") for name in columns), title=title)
    for row in rows:
        table.add_row(*row)
    if as_json:
        print(json.dumps(record))
    else:
        console.print(table)
    if out is not None:
        write_json(out, record)
    if plot is not None:
        module.draw([record], plot)

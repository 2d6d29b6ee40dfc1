"""``inplace-ttt read``."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from .sessions import Saver, deferred_interrupt, open_session, state_option, stats_lines
from .usage import INTERRUPTED

BLOCK = 1 << 15
"""Characters handed to the session at a time."""


def read(
    files: Annotated[list[Path], typer.Argument(help="Text files, read one after the other. - is standard input.")],
    session: Annotated[Path, typer.Option(help="Session file: continued if it exists, made if not.")],
    model: Annotated[
        str | None, typer.Option(help="Directory or hub id. Left out: the session's, or the shipped model.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="New session: tokens that attention keeps.", min=1)] = None,
    sinks: Annotated[int | None, typer.Option(help="New session: first tokens kept besides.", min=0)] = None,
    decay: Annotated[float | None, typer.Option(help="New session: share forgotten at each update.")] = None,
    chunk_size: Annotated[int | None, typer.Option(help="New session: tokens between updates.", min=1)] = None,
    state: Annotated[
        str | None, typer.Option(help="New session: form of the fast weights: dense, auto, or a rank.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda. Left out: the GPU if there is one.")] = None,
) -> None:
    """Let a session read files and learn from them. Ctrl-C keeps what was learned."""
    from rich.console import Console

    sizes = [check(path) for path in files]
    log = Console(stderr=True)
    with log.status("loading the model"):
        options = {
            "window": window,
            "sinks": sinks,
            "decay": decay,
            "chunk_size": chunk_size,
            "state": state_option(state),
        }
        opened = open_session(session, model, device, options)
    saver = Saver(opened, session)
    console = Console(highlight=False)
    try:
        with deferred_interrupt() as interrupt:
            for path, length in zip(files, sizes, strict=True):
                console.print(read_one(opened, path, length, interrupt, saver, log), soft_wrap=True)
                saver.now()
    except KeyboardInterrupt:
        saver.now()
        console.print(f"interrupted; what was read is kept in {session}", soft_wrap=True)
        console.print("\n".join(stats_lines(opened)), soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    except BaseException:
        saver.now()  # a file that breaks off in the middle: what came before it counts
        raise
    console.print("\n".join(stats_lines(opened)), soft_wrap=True)
    console.print(f"Session: {session}", soft_wrap=True)


def check(path: Path) -> int | None:
    """Size in bytes; None for standard input."""
    if str(path) == "-":
        return None
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path} is not a regular file")
    with open(path, "rb") as file:
        if b"\0" in file.read(1 << 16):
            raise UserError(f"{path} is a binary file (it has NUL bytes): give a text file")
    return path.stat().st_size


def read_one(session: Any, path: Path, length: int | None, interrupt: Any, saver: Saver, log: Any) -> str:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.fields[name]}"),
        BarColumn(),
        TextColumn("{task.fields[tokens]:,} tokens, {task.fields[rate]:,.0f}/s, loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    started, total, losses, count = time.monotonic(), 0, 0.0, 0
    with Progress(*columns, console=log, transient=True, disable=not log.is_terminal) as progress:
        task = progress.add_task("", total=length, name=path.name, tokens=0, rate=0.0, loss=float("nan"))
        for block in _blocks(path):
            score = session.read(block, scored=True)
            total += len(score.tokens)
            losses, count = losses + sum(score.losses), count + len(score.losses)
            rate, loss = total / (time.monotonic() - started), losses / count if count else float("nan")
            progress.update(task, advance=len(block.encode()), tokens=total, rate=rate, loss=loss)
            interrupt.raise_if_wanted()
            saver.sometimes()
    seconds = time.monotonic() - started
    mean = f", loss {losses / count:.3f} nats per token" if count else ""
    return f"{path.name}: {total:,} tokens in {seconds:.1f} s ({total / max(seconds, 1e-9):,.0f}/s){mean}"


def _blocks(path: Path) -> Any:
    """Text of a file in blocks; UserError where it is not UTF-8."""
    try:
        if str(path) == "-":
            while line := sys.stdin.readline(BLOCK):
                yield line
            return
        with open(path, encoding="utf-8-sig") as file:
            while block := file.read(BLOCK):
                yield block
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}): convert it first") from None

"""``inplace-ttt read``; and for ``chat``, too: reading files and lines, saving, Ctrl-C."""

import codecs
import io
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..errors import UserError
from .sessions import ChunkSize, Decay, Model, Objective, Sinks, State, Window, check_session, open_session, stats_lines
from .usage import INTERRUPTED, Device, tell

FIRST, SMALLEST, LARGEST = 2048, 512, 1 << 15
"""Bytes handed to the session at a time: so many that Ctrl-C is looked at about twice a second."""


def read(
    files: Annotated[list[Path], typer.Argument(help="Text files; - is standard input.")],
    session: Annotated[Path, typer.Option(help="Session file: continued, or made if new.")],
    model: Model = None,
    window: Window = None,
    sinks: Sinks = None,
    decay: Decay = None,
    chunk_size: ChunkSize = None,
    state: State = None,
    device: Device = None,
    objective: Objective = None,
    study: Annotated[float | None, typer.Option(help="Then study each file so many minutes, to be asked.")] = None,
) -> None:
    """Let a session learn from files. Ctrl-C stops and keeps what was learned."""
    sources = [TextToRead(path) for path in files]
    if study is not None and not study > 0:
        raise UserError(f"--study {study:g}: minutes, above 0")
    if study is not None and any(source.piped for source in sources):
        raise UserError("--study reads its text twice, which standard input cannot: give files")
    if not any(source.size is None or source.size for source in sources):
        raise UserError(f"{files[0]} is empty" if len(files) == 1 else "these files are all empty")
    options = {"window": window, "sinks": sinks, "decay": decay, "chunk_size": chunk_size, "state": state}
    options = check_session(session, model, options)
    log = Console(stderr=True)
    with ExitStack() as held:
        with log.status("loading the model"):
            from ..session.writers import holding

            held.enter_context(holding(session))
            opened = open_session(session, model, device, options, objective=objective)
        read_all(opened, sources, session, log, study)


def read_all(session: Any, sources: list["TextToRead"], path: Path, log: Console, study: float | None) -> None:
    """Read the sources one after the other, and save the session in ``path``, whatever happens.

    ``study``: minutes for which each source is studied after that.
    """
    if study is not None and not session.learns_by_loss:
        raise UserError("--study needs a session that learns by the loss: begin one with --objective loss")
    saver, stopped, studying = Saver(session, path), False, False
    if session.warning:
        tell(f"warning: {session.warning}", err=True)
    with deferred_interrupt() as interrupt:
        try:
            for source in sources:
                line = read_one(session, source, interrupt, saver, log)
                if source.done or len(sources) > 1:
                    tell(line)
            for source in sources if study is not None else ():
                if source.done:
                    studying = True
                    tell(study_one(session, source, study or 0.0, interrupt, saver, log))
        except KeyboardInterrupt:
            stopped = True
        except UserError as error:  # a pipe that breaks off in the middle: what came before it counts
            if not any(source.done for source in sources):
                raise
            raise UserError(f"{error}. What was read before that is kept in {path}") from None
        finally:
            interrupt.deaf = True
            saver.rest()
    if not any(source.done for source in sources):
        raise KeyboardInterrupt if stopped else UserError("standard input is empty: nothing was read")
    tell("\n".join(stats_lines(session)))
    if stopped:
        where = f"while studying {source.name}" if studying else f"after {source.done:,} bytes of {source.name}"
        tell(f"interrupted {where}; that is kept in {path}", err=True)
        raise typer.Exit(INTERRUPTED)
    tell(f"Session: {path}")


class TextToRead:
    """A text file, or standard input. UserError when it is not text, before anything is read from a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.piped = path, str(path) == "-"
        self.name = "standard input" if self.piped else path.name
        self.done = 0
        """Bytes given out."""
        self.piece = LARGEST
        self.size = None if self.piped else self._check()

    def texts(self, waiting: Callable[[], Any] = nullcontext) -> Iterator[tuple[int, str]]:
        """The text in pieces of about ``piece`` bytes, each with its number of bytes."""
        decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
        name = self.name if self.piped else str(self.path)
        total, data = 0, b"begin"
        with self._open() as file:
            while data:
                with waiting():
                    data = file.read1(self.piece)
                total += len(data)
                if b"\0" in data:
                    raise UserError(f"{name} is a binary file (it has NUL bytes): give a text file")
                try:
                    text = decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    at = total - len(error.object) + error.start
                    byte = f"byte {at:,} is {error.object[error.start]:#04x}"
                    raise UserError(f"{name} is not UTF-8 text ({byte}): convert it first") from None
                self.done = total
                if text:
                    yield len(data), text

    def pace(self, seconds: float) -> None:
        """Smaller or larger pieces from now on, as one took ``seconds``."""
        if seconds < 0.25:
            self.piece = min(2 * self.piece, LARGEST)
        elif seconds > 0.8:
            self.piece = max(self.piece // 2, SMALLEST)

    def _open(self) -> AbstractContextManager[Any]:
        try:
            return nullcontext(sys.stdin.buffer) if self.piped else open(self.path, "rb")
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}") from None

    def _check(self) -> int:
        if not self.path.exists():
            raise UserError(f"{self.path}: no such file")
        if self.path.is_dir():
            raise UserError(f"{self.path} is a directory: give text files")
        if not self.path.is_file():
            raise UserError(f"{self.path} is not a regular file: pipe it in, with - as the file")
        for _ in self.texts():
            pass
        size, self.done = self.done, 0
        return size


def read_one(session: Any, source: TextToRead, interrupt: "Interrupt", saver: "Saver", log: Any) -> str:
    """Reads a source with a progress bar; one line about it. KeyboardInterrupt between two pieces."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    figures = "{task.fields[tokens]:,} tokens, {task.fields[rate]:,.0f}/s, loss {task.fields[loss]}"
    columns = (TextColumn("{task.fields[name]}", markup=False), BarColumn(), TextColumn(figures), TimeRemainingColumn())
    before, began = session.stats().tokens, time.monotonic()
    tokens, losses, count, source.piece = 0, 0.0, 0, FIRST
    quiet = not log.is_terminal or (source.piped and sys.stdin.isatty())
    with Progress(*columns, console=log, transient=True, disable=quiet) as progress:
        task = progress.add_task("", total=source.size, name=source.name, tokens=0, rate=0.0, loss="?")
        for length, text in source.texts(interrupt.waiting):
            start = time.monotonic()
            saver.changed = True
            score = session.read(text, scored=True)
            tokens, losses, count = tokens + len(score.tokens), losses + sum(score.losses), count + len(score.losses)
            source.pace(time.monotonic() - start)
            rate, loss = tokens / (time.monotonic() - began), f"{losses / count:.3f}" if count else "?"
            progress.update(task, advance=length, tokens=tokens, rate=rate, loss=loss)
            saver.sometimes()
    if not source.done:
        return f"{source.name}: empty"
    tokens, seconds = session.stats().tokens - before, time.monotonic() - began
    mean = f", loss {losses / count:.3f} nats per token" if count else ""
    return f"{source.name}: {tokens:,} tokens in {seconds:.1f} s ({tokens / max(seconds, 1e-9):,.0f}/s){mean}"


def study_one(
    session: Any, source: TextToRead, minutes: float, interrupt: "Interrupt", saver: "Saver", log: Any
) -> str:
    """Studies a source with a progress bar; one line about it. KeyboardInterrupt between two updates."""
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.fields[name]}", markup=False), BarColumn(), TextColumn("{task.fields[what]}"))
    began = time.monotonic()
    with Progress(*columns, console=log, transient=True, disable=not log.is_terminal) as progress:
        task = progress.add_task("", total=1.0, name=f"studying {source.name}", what="asking")

        def tell(share: float, loss: float | None) -> None:
            what = "asking" if loss is None else f"loss {loss:.3f}"
            progress.update(task, completed=share, what=what)
            with interrupt.waiting():
                saver.changed = True

        took = session.study("".join(text for _, text in source.texts()), minutes=minutes, progress=tell)
    return (
        f"{source.name}: studied {took.sentences:,} sentences and {took.questions:,} questions in "
        f"{time.monotonic() - began:.1f} s ({took.updates:,} updates), "
        f"loss {took.losses[0]:.3f} to {took.losses[-1]:.3f} nats per token"
    )


# -- saving and Ctrl-C -------------------------------------------------------------------------------------------------


class Saver:
    """Saves a session now and then, so that little is lost whatever happens, and little time goes into it."""

    LEAST, SHARE = 5.0, 0.05
    """Seconds between two savings, at least; share of the time that may go into saving."""

    def __init__(self, session: Any, path: Path | None) -> None:
        self.session, self.path, self.changed = session, path, False
        self.last, self.wait = time.monotonic(), self.LEAST

    def now(self) -> None:
        """UserError when it cannot be saved; the old file stays."""
        from safetensors import SafetensorError

        if self.path is None:
            return
        began = time.monotonic()
        try:
            self.session.save(self.path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write {self.path}: {getattr(error, 'strerror', error)}") from None
        self.last, self.changed = time.monotonic(), False
        self.wait = max(self.LEAST, (self.last - began) / self.SHARE)

    def sometimes(self) -> None:
        if self.changed and time.monotonic() - self.last > self.wait:
            self.now()

    def rest(self) -> None:
        if self.changed:
            self.now()


class Interrupt:
    """Ctrl-C while a model works: the first one is noted and looked at between two pieces, the second breaks off."""

    def __init__(self) -> None:
        self.wanted = self.deaf = self._waiting = False

    def __call__(self, number: int, frame: Any) -> None:
        if self.deaf:
            return
        if self.wanted or self._waiting:
            raise KeyboardInterrupt
        self.wanted = True

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for input: there Ctrl-C, also one before, breaks off at once."""
        self._waiting = True
        try:
            if self.wanted:
                raise KeyboardInterrupt
            yield
        finally:
            self._waiting = False


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Inside, the first Ctrl-C does not break off what the model is doing. One that is ignored (nohup) stays so."""
    state, before = Interrupt(), signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN if before == signal.SIG_IGN else state)
    try:
        yield state
    finally:
        signal.signal(signal.SIGINT, before)


def next_line(interrupt: Interrupt) -> str | None:
    """The line that a person types, or the next one of standard input; None when there are no more."""
    asks, shown = sys.stdin.isatty(), sys.stdout.isatty()
    while True:
        interrupt.deaf, interrupt.wanted = False, interrupt.wanted and not asks
        if asks and not shown:
            typer.echo("> ", nl=False, err=True)
        try:
            with interrupt.waiting():
                return input("> " if asks and shown else "")
        except EOFError:
            typer.echo("", nl=asks, err=True)
            return None
        except KeyboardInterrupt:
            if not asks:
                raise
            typer.echo("\n/quit or Ctrl-D to leave", err=True)

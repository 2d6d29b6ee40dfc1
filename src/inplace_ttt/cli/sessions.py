"""What ``read``, ``chat`` and ``inspect SESSION`` share: session files, safe interruption, a few lines of figures."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..shipped import DEFAULT_MODEL
from .usage import quiet_libraries, size

SHIPPED = "shipped"
"""How a session file names the model that comes with the package."""


def open_session(path: Path | None, model: str | None, device: str | None, options: dict[str, Any]) -> Any:
    """The session in ``path``, or a new one where there is no such file (or no path).

    The file names its model; ``model`` overrides that (the weights must be the same). ``options`` are for a new
    session only. UserError on everything that does not fit.
    """
    from ..demo.load import load
    from ..session import Session
    from ..session.files import model_name

    quiet_libraries()
    known = path is not None and path.exists()
    if path is not None and not known:
        _check_folder(path)
    if known and (given := [name for name, value in options.items() if value is not None]):
        raise UserError(f"{path} exists, and {', '.join(given)} cannot be changed later: leave it out, or begin anew")
    name = model or (model_name(path) if known and path is not None else None) or SHIPPED
    loaded, tokenizer = load(DEFAULT_MODEL if name == SHIPPED else name, device)
    if known and path is not None:
        session = Session.load(path, loaded, tokenizer)
    else:
        session = Session(loaded, tokenizer, **{k: v for k, v in options.items() if v is not None})
    session.origin = name if name == SHIPPED or not Path(name).exists() else str(Path(name).resolve())
    return session


def _check_folder(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a directory: name a session file")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"cannot write {path}: there is no directory {folder}")


def state_option(text: str | None) -> str | int | None:
    """``--state``: dense, auto or a rank."""
    return int(text) if text is not None and text.isdecimal() else text


class Interrupt:
    """Ctrl-C, once: noted and looked at between pieces. Twice: as usual."""

    wanted = False

    def raise_if_wanted(self) -> None:
        if self.wanted:
            raise KeyboardInterrupt


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Inside, the first Ctrl-C does not break off what the model is doing."""
    state = Interrupt()

    def note(number: int, frame: Any) -> None:
        if state.wanted:
            raise KeyboardInterrupt
        state.wanted = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield state
    finally:
        signal.signal(signal.SIGINT, before)


class Saver:
    """Saves a session now and then, so that little is lost whatever happens."""

    def __init__(self, session: Any, path: Path | None, seconds: float = 60.0) -> None:
        self.session, self.path, self.seconds, self.last = session, path, seconds, time.monotonic()

    def now(self) -> None:
        if self.path is not None:
            self.session.save(self.path)
        self.last = time.monotonic()

    def sometimes(self) -> None:
        if time.monotonic() - self.last > self.seconds:
            self.now()


def stats_lines(session: Any) -> list[str]:
    """Where a session stands, for a person."""
    s = session.stats()
    kept = ", ".join(f"{name} {value}" for name, value in s.settings.items() if value not in (None, False))
    wrote = f", {s.written:,} of them written by the model" if s.written else ""
    lines = [
        f"{s.tokens:,} tokens{wrote}; {s.updates:,} updates a layer, {s.pending:,} tokens wait for the next one",
        f"in context {s.in_context:,} tokens ({size(s.bytes_context)}); fast weights {size(s.bytes_fast_weights)}",
        f"window {s.window:,}, sinks {s.sinks}, {kept}",
    ]
    return lines + ([f"warning: {s.warning}"] if s.warning else [])

"""Guards against two writers of one session file: the later one gets an error and overwrites nothing.

A command holds the file while it runs, so that a second one is refused before it reads anything. And saving a session
where it was loaded from or saved to checks that the file has not changed since.
"""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from safetensors import SafetensorError, safe_open

from ..errors import UserError

try:
    import fcntl
except ImportError:  # Windows: without the lock, with the check
    fcntl = None  # type: ignore[assignment]

PATIENCE = 30.0
"""Seconds that a save waits for another save of the same file."""
_known: "WeakKeyDictionary[Any, dict[Path, str | None]]" = WeakKeyDictionary()
"""By session: digests of the files that it was loaded from or saved to, None where there was no file."""
_held: set[Path] = set()
"""Files that this process holds for longer than one save."""


def remember(session: Any, path: str | Path) -> None:
    """Note what ``path`` holds now (nothing, perhaps) as what the next save of ``session`` may replace."""
    place = Path(path).resolve()
    _known.setdefault(session, {})[place] = _digest(place)


@contextmanager
def saving(session: Any, path: Path) -> Iterator[None]:
    """Guard writing ``session`` to ``path``. Raises UserError when the file is not the one that the session knows."""
    place = path.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    busy = f"{place} is in use by another process: wait until that is over, or name another file"
    with nullcontext() if place in _held else _locked(place, PATIENCE, busy):
        known, now = _known.get(session, {}), _digest(place)
        if place in known and now is not None and now != known[place]:
            raise UserError(
                f"{path} was written by somebody else since this session knew it: save under another name, or load it "
                "and read again"
            )
        yield
        remember(session, place)


@contextmanager
def holding(path: Path | None) -> Iterator[None]:
    """Prevent other processes from saving to ``path`` inside ``with``. Raises UserError when another one holds it."""
    place = None if path is None else path.resolve()
    if place is None or place in _held or not place.parent.is_dir():
        yield
        return
    busy = f"{path} is in use by another inplace-ttt read or chat: wait until that is over, or name another file"
    with ExitStack() as stack:
        with suppress(OSError):  # not writable: the command says so itself, in other words
            stack.enter_context(_locked(place, 0.0, busy))
            _held.add(place)
            stack.callback(_held.discard, place)
        yield


@contextmanager
def _locked(place: Path, patience: float, busy: str) -> Iterator[None]:
    """Hold the lock of ``place``. Raises UserError, with the message ``busy``, after ``patience`` seconds."""
    end = time.monotonic() + patience
    while (handle := _lock(place)) is None:
        if time.monotonic() > end:
            raise UserError(busy)
        time.sleep(0.02)
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(_lock_file(place))
        os.close(handle)


def _lock(place: Path) -> int | None:
    """Lock the file beside ``place`` that stands for it; return its descriptor, None while another process holds it."""
    name = _lock_file(place)
    while True:
        handle = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                return None
            except OSError:  # a file system without locks
                return handle
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(name), os.fstat(handle)):
                return handle
        os.close(handle)  # its owner has just removed it


def _lock_file(place: Path) -> Path:
    return place.with_name(f".{place.name}.lock")


def _digest(place: Path) -> str | None:
    """Return a digest of a session file's content; None where there is no file."""
    try:
        with safe_open(str(place), framework="pt") as file:
            return str((file.metadata() or {}).get("digest", ""))
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError):
        return ""

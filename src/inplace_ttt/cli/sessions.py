"""Options and session files of ``read``, ``chat`` and ``inspect SESSION``."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from ..hub import check_model, session_header
from ..shipped import SHIPPED
from .usage import check_setting, quiet_libraries, size

Model = Annotated[str | None, typer.Option(help="Path or hub id. Default: its own, or shipped.")]
Window = Annotated[int | None, typer.Option(help="New session: tokens attention keeps.", min=1)]
Sinks = Annotated[int | None, typer.Option(help="New session: first tokens kept, too.", min=0)]
Decay = Annotated[float | None, typer.Option(help="New session: share forgotten per update.", callback=check_setting)]
ChunkSize = Annotated[int | None, typer.Option(help="New session: tokens per update.", min=1)]
Objective = Annotated[str | None, typer.Option(help="New session on a plain model: loss.", callback=check_setting)]
State = Annotated[str | None, typer.Option(help="New session: dense, auto or a rank.")]


# -- session files -----------------------------------------------------------------------------------------------------


def check_session(path: Path | None, model: str | None, options: dict[str, Any], write: bool = True) -> dict[str, Any]:
    """Return the options that were given. Raise UserError on what can be told before anything loads."""
    if path is not None and write:
        check_place(path)
    options = {name: value for name, value in options.items() if value is not None}
    if "state" in options:
        options["state"] = parse_state(options["state"])
    if path is not None and path.exists():
        _refuse(path, options)
        with _model_of(path, model) as name:
            check_model(name)
    elif model is not None:
        check_model(model)
    return options


def _refuse(path: Path, options: dict[str, Any]) -> None:
    if options:
        given = ", ".join(f"--{name.replace('_', '-')}" for name in options)
        raise UserError(f"{path} exists, and {given} is for a new session: leave that out, or name a new file")


def _named(path: Path, *keys: str) -> str | None:
    """Return a text from a session file's header; None where there is none. Loading the file tells what is damaged."""
    found: Any = session_header(path)[1]
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, str) else None


@contextmanager
def _model_of(path: Path, model: str | None) -> Iterator[str]:
    """Give the name of a session's model: ``model``, or the file's own, which errors inside then mention."""
    known = _named(path, "origin")
    try:
        yield model or known or SHIPPED
    except UserError as error:
        if model or known in (None, SHIPPED):
            raise
        raise UserError(f"{path} was made with the model {known}: {error}. Say where it is with --model") from None


def open_session(
    path: Path | None, model: str | None, device: str | None, options: dict[str, Any], objective: str | None = None
) -> Any:
    """The session in ``path``, or a new one where there is no such file (or no path).

    The file names its model; ``model`` overrides that (the weights must be the same). ``options``, which
    ``check_session`` returned, are for a new session only, as is another ``objective`` than its own. UserError on
    everything that does not fit.
    """
    from ..session import Session

    if path is None or not path.exists():
        name = model or SHIPPED
        session = Session(*_load(name, device, objective), **options)
        session.origin = _origin(name)
        if path is not None:
            from ..session.writers import remember

            remember(session, path)
        return session
    _refuse(path, options)  # made since it was checked
    own = _named(path, "model", "fast_weights", "objective")
    if objective not in (None, own):
        _refuse(path, {"objective": objective})
    with _model_of(path, model) as name:
        loaded = _load(name, device, "loss" if own == "loss" else None)
    try:
        session = Session.load(path, *loaded)
    except UserError as error:
        if "was written" not in str(error):
            raise
        raise UserError(f"{error} (the model is {name}; --model names another)") from None
    session.origin = _origin(name)
    return session


def _load(name: str, device: str | None, objective: str | None) -> tuple[Any, Any]:
    from ..hf.load import load

    quiet_libraries()
    return load(name, device, objective=objective)


def _origin(name: str) -> str:
    """A name that still holds in another directory."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name != SHIPPED and path.exists() else name


def check_place(path: Path) -> None:
    """Before the work, not after it. UserError when no session can be saved in ``path``."""
    if path.is_dir():
        raise UserError(f"{path} is a directory: name a session file")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file: name a session file")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"cannot write {path}: there is no directory {folder}")
    try:
        if path.exists():
            open(path, "ab").close()
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def parse_state(text: str) -> str | int:
    """``--state``: dense, auto or a rank."""
    if text in ("dense", "auto"):
        return text
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    raise UserError(f"--state {text}: dense, auto, or a rank (1 or more)")


# -- what people read --------------------------------------------------------------------------------------------------


def nothing_learned(session: Any) -> str | None:
    """Say why a session has learned nothing so far; None where it has."""
    from ..hf.attach import UNTRAINED

    stats = session.stats()
    if stats.warning == UNTRAINED:
        return UNTRAINED
    every = f"0 updates so far, one comes after every {stats.settings['chunk_size']:,} tokens"
    return None if stats.updates else f"nothing was learned yet: {every}"


def stats_lines(session: Any) -> list[str]:
    """Describe how much a session has read and learned, for a person."""
    s = session.stats()
    kept = ", ".join(f"{name} {value}" for name, value in s.settings.items() if value not in (None, False))
    wrote = f", {s.written:,} of them written by the model" if s.written else ""
    lines = [
        f"{s.tokens:,} tokens{wrote}; {s.updates:,} updates a layer, {s.pending:,} tokens wait for the next one",
        f"in context {s.in_context:,} tokens ({size(s.bytes_context)}); fast weights {size(s.bytes_fast_weights)}",
        f"window {s.window:,}, sinks {s.sinks}, {kept}",
    ]
    if s.warning:
        return [*lines, f"warning: {s.warning}"]
    return lines if s.updates else [*lines, nothing_learned(session) or ""]

"""``inplace-ttt inspect SESSION``."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from ..errors import UserError
from .sessions import check_session, open_session
from .usage import check_picture, size, tell


def inspect_session(path: Path, json: bool, plot: Path | None, model: str | None, device: str | None) -> None:
    """Prints where a session stands and what its fast weights are like; draws how that came about."""
    from rich.console import Console

    if plot is not None:
        check_picture(plot)
    check_session(path, model, {}, write=False)
    with Console(stderr=True).status("loading the model"):
        from ..session.plots import diagnostics_table, save_diagnostics

        session = open_session(path, model, device, {}, write=False)
    timeline, layers = session.timeline, session.diagnostics()
    every = f"one every {timeline.every:,} tokens"
    if plot is not None and not timeline.samples:
        raise UserError(f"{path} has no samples to draw yet ({every} read): leave out --plot")
    if json:
        from json import dumps

        found = {"model": session.origin, "stats": session.stats().to_dict(), "layers": [asdict(x) for x in layers]}
        typer.echo(dumps(found | {"timeline": timeline.to_list()}, indent=2))
    else:
        tell("\n".join([f"{path}: model {session.origin}", *stats_lines(session)]))
        if layers:
            Console(highlight=False).print(diagnostics_table(layers))
        tell(f"Losses with and without updates: {len(timeline.samples)} samples, {every}")
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        save_diagnostics(plot, timeline, f"{path.name}: {session.stats().tokens:,} tokens")
        tell(f"Picture: {plot}", err=json)


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

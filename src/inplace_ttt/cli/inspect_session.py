"""``inplace-ttt inspect SESSION``."""

from dataclasses import asdict
from pathlib import Path

import typer

from ..errors import UserError
from .sessions import open_session, stats_lines


def inspect_session(path: Path, json: bool, plot: Path | None) -> None:
    """Prints where a session stands and what its fast weights are like; draws how that came about."""
    from rich.console import Console

    from ..plots import FORMATS
    from ..session.plots import diagnostics_table, save_diagnostics

    if plot is not None and plot.suffix.lower() not in FORMATS:
        raise UserError(f"--plot {plot}: the name must end in {', '.join(FORMATS)}")
    with Console(stderr=True).status("loading the model"):
        session = open_session(path, None, None, {})
    layers = session.diagnostics()
    if json:
        from json import dumps

        found = {"stats": session.stats().to_dict(), "layers": [asdict(x) for x in layers]}
        typer.echo(dumps(found | {"timeline": session.timeline.to_list()}, indent=2))
    else:
        console = Console(highlight=False)
        console.print(f"{path}: {session.origin}", soft_wrap=True, markup=False)
        console.print("\n".join(stats_lines(session)), soft_wrap=True, markup=False)
        if layers:
            console.print(diagnostics_table(layers))
        samples = len(session.timeline.samples)
        console.print(f"{samples} samples, one every {session.timeline.every:,} tokens", soft_wrap=True)
    if plot is None:
        return
    if not session.timeline.samples:
        raise UserError(f"{path} has no samples to draw yet: one is taken every {session.timeline.every:,} tokens")
    plot.parent.mkdir(parents=True, exist_ok=True)
    save_diagnostics(plot, session.timeline, f"{path.name}: {session.stats().tokens:,} tokens")
    typer.echo(f"Picture: {plot}", err=json)

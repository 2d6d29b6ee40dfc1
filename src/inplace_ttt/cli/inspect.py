"""``inplace-ttt inspect``."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..config import InPlaceTTTConfig
from ..errors import UserError
from ..hub import check_model
from ..shipped import DEFAULT_MODEL
from .sessions import check_session, open_session, stats_lines
from .usage import check_picture, quiet_libraries, size, tell

if TYPE_CHECKING:
    from .preview import Preview


def inspect(
    model: Annotated[
        str | None, typer.Argument(help="Directory, hub id, or session file. Left out: the shipped model.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Plain model: layers to adapt (0::6, or 0,4,8).")] = None,
    chunk_size: Annotated[int | None, typer.Option(help="Plain model: tokens between updates.")] = None,
    target: Annotated[str | None, typer.Option(help="Plain model: input_embed or hidden_states.")] = None,
    objective: Annotated[str | None, typer.Option(help="Plain model: loss (nothing to train).")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Session: picture of its diagnostics (.png, .pdf, .svg).")] = None,
    of: Annotated[str | None, typer.Option("--model", help="The model; of a session: where it is now.")] = None,
    device: Annotated[str | None, typer.Option(help="Session: such as cpu or cuda.")] = None,
) -> None:
    """Show what adapts in a model, or what a session learned.

    Of a model: which modules adapt (or would), and what that costs.
    """
    if model is None:
        model, of = of, None
    given: dict[str, Any] = {"layers": layers, "chunk_size": chunk_size, "target": target, "objective": objective}
    if model is not None and Path(model).is_file() and Path(model).suffix != ".gguf":
        _refuse(given, "plain models")
        return _inspect_session(Path(model), json, plot, of, device)
    if model is not None:
        path = Path(model)
        if path.suffix[1:].isalpha() and path.parent.is_dir() and not path.exists():  # a mistyped file, not on the hub
            raise UserError(f"{model}: no such file")
    _refuse({"plot": plot, "model": of, "device": device}, "session files")
    given["layers"] = layers and _layers(layers)
    given = {key: value for key, value in given.items() if value is not None}
    InPlaceTTTConfig(**given)
    if model is not None:
        check_model(model)
    with Console(stderr=True).status("loading"):
        from .preview import preview

        quiet_libraries()
    name = model or str(DEFAULT_MODEL)
    found = preview(name, given)
    if json:
        typer.echo(dumps(found.to_dict(), indent=2))
    else:
        _show(found)
    return None


def _refuse(options: Mapping[str, object], whose: str) -> None:
    if given := [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]:
        raise UserError(f"{given[0]} is for {whose}: leave it out")


def _layers(text: str) -> str | tuple[int, ...]:
    if ":" in text:
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--layers {text}: write a slice such as 0::6 or numbers such as 0,4,8") from None


def _show(found: "Preview") -> None:
    says = "has fast weights" if found.attached else "is a plain model; with fast weights attached it would have these"
    says += ", untrained" if found.attached and found.untrained else ""
    tell(f"{found.model} ({found.model_type}) {says}:")
    table = Table(show_footer=True)
    table.add_column("layer", f"{len(found.layers)} of {found.decoder_layers}", justify="right")
    table.add_column("module", overflow="fold")
    table.add_column("D x F", justify="right")
    table.add_column("extra", f"{found.extra_parameters:,}", justify="right")
    table.add_column("state", size(found.state_bytes), justify="right")
    for layer in found.layers:
        D, F = layer.shape
        shape, extra = f"{D:,} x {F:,}", f"{layer.extra_parameters:,}"
        table.add_row(f"{layer.index}", layer.projection, shape, extra, size(layer.state_bytes))
    Console().print(table)
    s = found.settings
    share = found.extra_parameters / found.base_parameters
    tell(f"extra: parameters beside the model's own {found.base_parameters:,} ({share:.2%} more)")
    tell(f"state: fast weights of each row, and up to {size(found.pending_bytes)} for tokens whose chunk is not full")
    rule = s.make_rule()
    options = ", ".join(f"{f.name} {getattr(rule, f.name)}" for f in fields(rule) if getattr(rule, f.name) != f.default)
    paths = " and ".join(sorted({layer.path for layer in found.layers}))
    tell(f"rule {rule.name}{options and f' ({options})'}, computed by path {paths}")
    target = "" if s.objective == "loss" else f"target {s.target}, "
    tell(f"chunk_size {s.chunk_size:,}, lr {s.lr:g}, {target}objective {s.objective}")
    if found.untrained:
        from ..hf.attach import UNTRAINED

        tell(UNTRAINED)


def _inspect_session(path: Path, json: bool, plot: Path | None, model: str | None, device: str | None) -> None:
    """Prints where a session stands and what its fast weights are like; draws how that came about."""
    if plot is not None:
        check_picture(plot)
    check_session(path, model, {}, write=False)
    with Console(stderr=True).status("loading the model"):
        from ..session.plots import diagnostics_table, save_diagnostics

        session = open_session(path, model, device, {})
    timeline, layers = session.timeline, session.diagnostics()
    every = f"one every {timeline.every:,} tokens"
    if plot is not None and not timeline.samples:
        raise UserError(f"{path} has no samples to draw yet ({every} read): leave out --plot")
    if json:
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

"""``inplace-ttt convert``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..hub import check_conversion
from .usage import quiet_libraries


class Format(StrEnum):
    """The formats that `convert` writes."""

    model = "model"
    adapter = "adapter"
    release = "release"
    sharded = "sharded"


def convert(
    source: Annotated[Path, typer.Argument(help="Directory of a model, an adapter, or a sharded checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist yet.")],
    to: Annotated[Format, typer.Option(help="model (whole), adapter, release (the authors' format), sharded.")],
    base: Annotated[str | None, typer.Option(help="The base model, where the source is an adapter.")] = None,
    config: Annotated[Path | None, typer.Option(help="A saved model of the same shape, for a sharded source.")] = None,
    projections: Annotated[
        bool, typer.Option("--projections", help="With --to adapter: the adapting projections too.")
    ] = False,
) -> None:
    """Convert a model to another format.

    Formats are whole models, adapters, the authors' own, and sharded checkpoints of torch.distributed.
    """
    check_conversion(source, out, base, config)
    with Console(stderr=True).status("loading") as status:
        from ..hf.convert import convert as run

        quiet_libraries()
        status.update("converting")
        run(source, out, to.value, base=base, config=config, projections=projections)
    typer.echo(f"done: {out}")

"""The command ``inplace-ttt``.

Commands import what they need when they run, and check what they were given before they import torch: neither
``--help`` nor a mistyped name waits for it.
"""

from typing import Annotated

import typer

from .bench import bench
from .chat import chat
from .convert import convert
from .demo import demo
from .eval import evaluate
from .inspect import inspect
from .read import read
from .serve import serve
from .train import tokenizer, train
from .usage import Commands, print_version, run

app = typer.Typer(
    name="inplace-ttt",
    cls=Commands,
    help="Test-time training for Hugging Face causal language models: they adapt as they read.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(read)
app.command()(chat)
app.command()(inspect)
app.command(name="eval")(evaluate)
app.command()(train)
app.command()(tokenizer)
app.command()(convert)
app.command()(bench)
app.command()(serve)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    run(app)


__all__ = ["app", "main"]

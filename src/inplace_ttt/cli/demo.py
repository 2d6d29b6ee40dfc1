"""``inplace-ttt demo``."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from ..shipped import DEFAULT_MODEL
from .usage import quiet_libraries

if TYPE_CHECKING:
    from ..demo.result import DemoResult
    from ..text_files import Source


def demo(
    file: Annotated[
        Path | None,
        typer.Argument(help="Text to read. Left out: a long module of Python's standard library.", show_default=False),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Directory or hub id. Left out: the shipped model.", show_default=False)
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write all figures here.", show_default=False)] = None,
    plot: Annotated[Path, typer.Option(help="Write the picture here (.png, .pdf or .svg).")] = Path("out/demo.png"),
    max_tokens: Annotated[int, typer.Option(help="Tokens to read.", min=1)] = 16384,
    objective: Annotated[
        str | None, typer.Option(help="For a plain model: loss (nothing to train).", show_default=False)
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="A plain Llama reads through a window.", min=1, show_default=False)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda. Left out: the GPU if there is one.", show_default=False)
    ] = None,
) -> None:
    """Read a long text with updates on and off, and compare."""
    from rich.console import Console

    from ..demo.text import library_file
    from ..plots import FORMATS
    from ..text_files import read_text

    if plot.suffix.lower() not in FORMATS:
        raise UserError(f"--plot {plot}: the name must end in {', '.join(FORMATS)}")
    for path in (plot, json):
        _check_writable(path)
    source = read_text(file or library_file(), max_tokens)
    result = _run(source, model, max_tokens, device, objective, window)

    from .report import picture, show

    console = Console()
    show(result, console)
    picture(result, plot)
    _write_json(result, json)
    written = [f"{label}: {path}" for label, path in (("Picture", plot), ("Figures", json)) if path]
    console.print("\n".join(written), highlight=False, soft_wrap=True)
    if model is None:
        console.print("A real pretrained model, with nothing trained: make demo-llm", highlight=False)


def _run(
    source: "Source",
    model: str | None,
    max_tokens: int,
    device: str | None,
    objective: str | None = None,
    window: int | None = None,
) -> "DemoResult":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    log = Console(stderr=True)
    with log.status("loading the model"):
        from ..demo.result import run_demo
        from ..demo.text import tokenize
        from ..hf.attach import UNTRAINED, is_trained, runtime_of
        from ..hf.load import load

        quiet_libraries()
        loaded, tokenizer = load(model or DEFAULT_MODEL, device, objective=objective, window=window)
        if not is_trained(loaded):
            raise UserError(UNTRAINED)
        tokens = tokenize(source, tokenizer, runtime_of(loaded).config.chunk_size, max_tokens)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=log, transient=True, disable=not log.is_terminal) as progress:
        tasks = {
            label: progress.add_task(f"reading, updates {label}", total=len(tokens.ids) - 1) for label in ("off", "on")
        }
        return run_demo(
            model or DEFAULT_MODEL.name, loaded, source, tokens, lambda label, n: progress.advance(tasks[label], n)
        )


def _check_writable(path: Path | None) -> None:
    """Before the work, not after it. UserError when nothing can be written there."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{path} is a directory: name a file")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}: {folder} is no directory that can be written to")


def _write_json(result: "DemoResult", path: Path | None) -> None:
    if path is None:
        return
    from json import dumps

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")

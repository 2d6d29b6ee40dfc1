"""``inplace-ttt demo``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import UserError
from ..hub import check_model
from ..shipped import DEFAULT_MODEL
from .usage import Device, PlainObjective, PlainWindow, check_picture, check_writable, quiet_libraries


def demo(
    file: Annotated[
        Path | None, typer.Argument(help="Text to read. Left out: a long module of Python's standard library.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Directory or hub id. Left out: the shipped model.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write all figures here.")] = None,
    plot: Annotated[Path, typer.Option(help="Write the picture here (.png, .pdf or .svg).")] = Path("out/demo.png"),
    max_tokens: Annotated[int, typer.Option(help="Tokens to read.", min=1)] = 16384,
    objective: PlainObjective = None,
    window: PlainWindow = None,
    device: Device = None,
) -> None:
    """Read a long text with updates on and off, and compare."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..demo.text import library_file
    from ..text_files import read_text

    check_picture(plot)
    check_writable(json)
    if model is not None:
        check_model(model)
    source = read_text(file or library_file(), max_tokens)
    log, console = Console(stderr=True), Console()
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
        tasks = {x: progress.add_task(f"reading, updates {x}", total=len(tokens.ids) - 1) for x in ("off", "on")}
        name = model or DEFAULT_MODEL.name
        result = run_demo(name, loaded, source, tokens, lambda label, n: progress.advance(tasks[label], n))

    from ..records import write_json
    from .report import picture, show

    show(result, console)
    picture(result, plot)
    if json is not None:
        write_json(json, result.to_dict())
    written = [f"{label}: {path}" for label, path in (("Picture", plot), ("Figures", json)) if path]
    console.print("\n".join(written), highlight=False, soft_wrap=not console.is_terminal)
    if model is None:
        console.print("A real pretrained model, with nothing trained: make demo-llm", highlight=False)

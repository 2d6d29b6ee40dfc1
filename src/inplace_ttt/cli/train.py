"""``inplace-ttt train`` and ``inplace-ttt tokenizer``."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import UserError
from ..train import SMALLEST_VOCABULARY
from .usage import check_directory, quiet_libraries


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file of the run, or a shipped one: tiny-cpu.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings that replace the recipe's: key.sub=value.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the last checkpoint of the output.")] = False,
    prepare_only: Annotated[
        bool, typer.Option("--prepare-only", help="Make the tokenizer and the tokens, then stop.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print memory and time of the run, then stop. Needs no data.")
    ] = False,
    tflops: Annotated[float, typer.Option(help="With --plan: the device's TFLOP/s (989: an H100 in bf16).")] = 989,
    bandwidth: Annotated[
        float, typer.Option(help="With --plan: its memory's TB/s (3.35: an H100, 4.8: an H200).")
    ] = 3.35,
) -> None:
    """Train a model from a recipe.

    Makes the tokens, trains, saves the model, and writes its test losses, a plot and run.json.
    """
    from inplace_ttt.train.recipe import load_recipe

    if plan and (tflops <= 0 or bandwidth <= 0):
        raise UserError(f"--tflops and --bandwidth must be above 0, got {tflops:g} and {bandwidth:g}")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # the recipe's last checks import it
    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    with console.status("loading"):
        checked = load_recipe(recipe, overrides or [], data=not plan, resume=None if plan or prepare_only else resume)
        quiet_libraries()
        from inplace_ttt.train.run import run
    if plan:
        from inplace_ttt.train.plan import plan as planned

        for line in planned(checked).lines(tflops, bandwidth):
            console.print(line, highlight=False, soft_wrap=True)
        return
    where = run(checked, resume=resume, prepare_only=prepare_only, console=console)
    console.print(f"done: {where}", highlight=False, soft_wrap=True)


def tokenizer(
    sources: Annotated[
        list[str],
        typer.Argument(help="Text: jsonl:PATH (also .xz, .gz), text:PATH, hf:DATASET?text=COLUMN, library:train."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write.")],
    vocab_size: Annotated[int, typer.Option(help="Number of tokens.", min=SMALLEST_VOCABULARY)] = 8192,
    max_bytes: Annotated[int, typer.Option(help="How much of the text to look at.", min=1)] = 32_000_000,
) -> None:
    """Train a byte-level BPE tokenizer for AutoTokenizer."""
    from inplace_ttt.train.sources import DomainDocuments, source_files

    for source in sources:
        source_files(source)
    check_directory(out)
    console = Console()
    domains = [DomainDocuments([source]) for source in sources]
    with console.status("loading") as status:
        from inplace_ttt.train.tokenizer import train_tokenizer

        status.update("training the tokenizer")
        trained = train_tokenizer(domains, vocab_size, max_bytes)
    trained.save_pretrained(out)
    console.print(f"done: {out} ({vocab_size} tokens)", highlight=False)

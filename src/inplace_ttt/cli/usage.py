"""Plain errors, exit codes and quiet libraries, for all commands."""

import os
import shutil
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from ..config import InPlaceTTTConfig
from ..errors import UserError
from ..version import __version__

Number = TypeVar("Number", int, float)
USER_ERROR, INTERRUPTED = 2, 130


def check_setting(param: typer.CallbackParam, value: Any) -> Any:
    """Check an option as the setting of fast weights that has its name, before anything loads."""
    if value is not None:
        InPlaceTTTConfig(**{str(param.name): value})
    return value


Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda. Default: the GPU, if any.")]
PlainObjective = Annotated[
    str | None, typer.Option(help="For a plain model: loss (nothing to train).", callback=check_setting)
]
PlainWindow = Annotated[int | None, typer.Option(help="A plain Llama reads through a window.", min=1)]
"""Options of commands that take a model without fast weights."""


class Commands(TyperGroup):
    """Turns a user's mistake into one line on stderr and exit code 2, Ctrl-C into exit code 130. Bugs keep their
    traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            _fail(str(error))
        except BrokenPipeError:
            raise
        except OSError as error:
            _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        except NotImplementedError as error:
            if not str(error):
                raise
            _fail(str(error))
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None


def _fail(message: str) -> None:
    tell("error: " + " ".join(message.split()), err=True)
    raise typer.Exit(USER_ERROR) from None


def run(app: typer.Typer) -> None:
    """The console script of ``app``."""
    # Before torch is imported. By default its threads spin while they wait for each other; with one other busy process
    # on the machine's cores that made the demo up to seven times slower. Waiting asleep costs 15% on an idle machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"inplace-ttt {__version__}")
        raise typer.Exit


def quiet_libraries() -> None:
    """No progress bars and no advice from libraries: the commands report for themselves."""
    import warnings

    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a checkpoint of one process is meant to be


def tell(text: str, err: bool = False) -> None:
    """Print lines of text: broken between words on a terminal, left as they are in a pipe or a file."""
    stream = sys.stderr if err else sys.stdout
    if stream is not None and stream.isatty():  # None: closed by the caller
        width = shutil.get_terminal_size().columns
        fill = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False).fill
        text = "\n".join(map(fill, text.split("\n")))
    typer.echo(text, err=err)


def numbers(option: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    """Numbers of an option, separated by commas. UserError for anything else."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{option} {text}: write {what} separated by commas") from None


def size(count: int) -> str:
    """Bytes for a person."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def check_picture(path: Path) -> None:
    """Before the work, not after it. UserError when no picture can be written there."""
    from ..plots import FORMATS

    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--plot {path}: the name must end in {', '.join(FORMATS)}")
    check_writable(path)


def check_directory(path: Path) -> None:
    """Before the work, not after it. UserError when it cannot be a directory to write."""
    if path.is_file():
        raise UserError(f"{path} is a file: name a directory")


def check_writable(path: Path | None) -> None:
    """Before the work, not after it. UserError when nothing can be written there."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{path} is a directory: name a file")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}: {folder} is not a directory that can be written to")

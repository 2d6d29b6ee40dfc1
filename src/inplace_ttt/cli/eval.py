"""``inplace-ttt eval``."""

from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from ..shipped import DEFAULT_MODEL
from .usage import quiet_libraries

if TYPE_CHECKING:
    from ..eval.runner import Variant

SUITES = ("nll", "needle", "read-then-ask", "theory", "diagnostics")


def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="Directory or hub id. Left out: the shipped model.", show_default=False)
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Text files, directories, or .jsonl(.xz) with a text field. May be repeated."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory of the run; taken up again where it was broken off.")] = Path(
        "out/eval"
    ),
    suite: Annotated[str, typer.Option(help=f"Any of {', '.join(SUITES)}, separated by commas.")] = "nll",
    baseline: Annotated[str | None, typer.Option(help="A model to compare with, with or without fast weights.")] = None,
    length: Annotated[int, typer.Option(help="nll: tokens of a window.", min=2)] = 16384,
    windows: Annotated[int, typer.Option(help="nll: windows of a document, at most.", min=0)] = 2,
    documents: Annotated[int | None, typer.Option(help="Documents, at most (those long enough first).", min=1)] = None,
    lengths: Annotated[str, typer.Option(help="needle: lengths in tokens.")] = "1024,2048,4096",
    trials: Annotated[int, typer.Option(help="needle, read-then-ask, theory: trials of each kind.", min=1)] = 10,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="Other settings to try: lr, chunk_size, decay or clip, as NAME=VALUE,VALUE. May be repeated."
        ),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Also read with each adapting layer switched off.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw an earlier run in --out away.")] = False,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda. Left out: the GPU if there is one.")] = None,
) -> None:
    """Measure whether adapting helps: updates on and off on the same text, with intervals and pictures."""
    from rich.console import Console

    wanted = [name.strip() for name in suite.split(",")]
    if unknown := sorted(set(wanted) - set(SUITES)):
        raise UserError(f"--suite {', '.join(unknown)}: choose from {', '.join(SUITES)}")
    if not data:
        raise UserError("--data: name at least one text file, directory or .jsonl file to read")
    log = Console(stderr=True)
    with log.status("loading the model"):
        from ..demo.load import load
        from ..eval import report
        from ..eval.runner import run
        from ..eval.suites.texts import load_texts
        from ..session.files import identity

        quiet_libraries()
        name = model or str(DEFAULT_MODEL)
        loaded, tokenizer = load(name, device)
        variants = _variants(loaded, sweep or [], layers)
        if baseline is not None:
            variants.append(_baseline(baseline, loaded, tokenizer, device))
    with log.status("reading the text"):
        texts = load_texts(data, tokenizer)
        if documents is not None:
            texts = sorted(texts, key=lambda text: len(text.ids) < length)[:documents]
        suites = _suites(wanted, texts, tokenizer, loaded, length, windows, _numbers("--lengths", lengths), trials)
    plan = {
        "model": Path(name).name,
        "identity": identity(loaded),
        "baseline": baseline,
        "suites": wanted,
        "data": {text.name: len(text.ids) for text in texts},
        "length": length,
        "windows": windows,
        "block": 256,
        "lengths": lengths,
        "trials": trials,
        "variants": [variant.label for variant in variants],
    }
    records = run(suites, variants, out, plan, fresh=fresh, console=log)
    console = Console(highlight=False)
    for line in report.write(out, records, plan):
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"Report: {out / 'report.html'} (figures: summary.json, summary.csv, plots/)", soft_wrap=True)


def _variants(model: Any, sweep: list[str], layers: bool) -> list["Variant"]:
    from ..eval.runner import Variant
    from ..hf.attach import layers_off, runtime_of, updates_off

    found = [
        Variant("on", model, nullcontext),
        Variant("off", model, lambda: updates_off(model), updates=False),
    ]
    for text in sweep:
        for label, settings in _settings(text):
            found.append(Variant(label, model, lambda s=settings: _reading(model, s)))  # type: ignore[misc]
    for site in runtime_of(model).sites if layers else ():
        index = site.index
        found.append(Variant(f"without layer {index}", model, lambda i=index: layers_off(model, [i])))  # type: ignore[misc]
    return found


@contextmanager
def _reading(model: Any, settings: dict[str, Any]) -> Any:
    from ..hf.attach import configure, fast_settings

    before = fast_settings(model)
    configure(model, **settings)
    try:
        yield
    finally:
        configure(model, **before)


def _settings(text: str) -> list[tuple[str, dict[str, Any]]]:
    """``lr=0.05,0.1`` -> [("lr=0.05", {"lr": 0.05}), ...]; several names joined by spaces change together."""
    name, _, values = text.partition("=")
    kinds = {"lr": float, "decay": float, "clip": float, "chunk_size": int}
    if name not in kinds or not values:
        raise UserError(f"--sweep {text}: write one of {', '.join(kinds)} as NAME=VALUE,VALUE")
    try:
        return [(f"{name}={value}", {name: kinds[name](value)}) for value in values.split(",")]
    except ValueError:
        raise UserError(f"--sweep {text}: {values} are no numbers") from None


def _baseline(name: str, model: Any, tokenizer: Any, device: str | None) -> "Variant":
    from ..demo.load import load_baseline
    from ..eval.runner import Variant

    plain = load_baseline(name, device)
    if plain.config.get_text_config().vocab_size != model.config.get_text_config().vocab_size:
        raise UserError(f"--baseline {name}: it has another vocabulary, so its losses cannot be compared")
    return Variant("baseline", plain, nullcontext, updates=False)


def _suites(
    wanted: list[str],
    texts: Any,
    tokenizer: Any,
    model: Any,
    length: int,
    windows: int,
    lengths: list[int],
    trials: int,
) -> list[Any]:
    from ..eval.suites.memory import MemorySuite
    from ..eval.suites.needle import NeedleSuite
    from ..eval.suites.nll import NllSuite
    from ..eval.suites.state import StateSuite
    from ..eval.suites.theory import TheorySuite
    from ..hf.attach import runtime_of
    from ..hf.window import native_window

    found: list[Any] = []
    window = native_window(model) or 256
    nll = NllSuite(texts, length, windows, window=window) if {"nll", "diagnostics"} & set(wanted) else None
    if nll is not None and windows and not any(unit.key.startswith("window/") for unit in nll.units()):
        longest = max(len(text.ids) for text in texts)
        raise UserError(f"no document has the {length:,} tokens of a window, the longest has {longest:,}: --length")
    if nll is not None and "nll" in wanted:
        found.append(nll)
    if "needle" in wanted:
        found.append(NeedleSuite(tokenizer, texts, lengths=lengths, trials=trials))
    if "read-then-ask" in wanted:
        found.append(MemorySuite(tokenizer, texts, trials=trials))
    if "theory" in wanted:
        found.append(TheorySuite(tokenizer, texts, runtime_of(model).config.chunk_size, trials=trials))
    if nll is not None and "diagnostics" in wanted:
        found.append(StateSuite(nll))
    return found


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: write numbers separated by commas") from None

"""``inplace-ttt eval``."""

import json
import logging
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..config import InPlaceTTTConfig
from ..errors import UserError
from ..eval.suites import KINDS, SUITES, WITHOUT_TEXT, check_needles, module_of
from ..hub import check_model
from ..shipped import DEFAULT_MODEL
from .usage import Device, PlainObjective, PlainWindow, check_directory, numbers, quiet_libraries, tell

if TYPE_CHECKING:
    from ..eval.runner import Variant


ONLY_TEXT = tuple(name for name in SUITES if name not in WITHOUT_TEXT)


def evaluate(
    model: Annotated[str | None, typer.Argument(help="Directory or hub id. Left out: the shipped model.")] = None,
    named: Annotated[str | None, typer.Option("--model", help="The same, as an option.")] = None,
    objective: PlainObjective = None,
    window: PlainWindow = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text files, directories, .jsonl(.xz) with a text field, or 'hf:DATASET?split=test&text=COLUMN'. "
            "May be repeated."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory of the run; taken up again where it was broken off.")] = Path(
        "out/eval"
    ),
    suite: Annotated[
        str, typer.Option(help=f"Any of {', '.join(SUITES)}, separated by commas; all: those that need only text.")
    ] = "nll",
    baseline: Annotated[str | None, typer.Option(help="A model to compare with, with or without fast weights.")] = None,
    length: Annotated[int, typer.Option(help="nll: tokens of a window.", min=2)] = 16384,
    windows: Annotated[int, typer.Option(help="nll: windows of a document, at most.", min=0)] = 1,
    documents: Annotated[int | None, typer.Option(help="Documents, at most (those long enough first).", min=1)] = None,
    lengths: Annotated[
        str | None, typer.Option(help="needle, mqar, ruler: lengths in tokens, such as 4096,8192.")
    ] = None,
    kinds: Annotated[
        str | None, typer.Option(help=f"needle: any of {', '.join(KINDS)}, separated by commas. Left out: all.")
    ] = None,
    depths: Annotated[
        str, typer.Option(help="needle: where the facts stand, from 0 (beginning) to 1 (right before the question).")
    ] = "0,0.5,1",
    trials: Annotated[
        int, typer.Option(help="needle, mqar, read-then-ask: trials of each kind (theory: four times as many).", min=1)
    ] = 4,
    tasks: Annotated[
        str, typer.Option(help='harness: tasks of lm-evaluation-harness. "paper" stands for those of the paper.')
    ] = "paper",
    task_files: Annotated[Path | None, typer.Option(help="harness: a directory of your own task files.")] = None,
    questions: Annotated[
        list[Path] | None, typer.Option(help="ruler: questions of SQuAD or HotpotQA as JSON. May be repeated.")
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="ruler: download what was not given, to run all 13 tasks.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="harness, ruler: samples of a task, at most.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="harness, ruler: samples read side by side.", min=1)] = 1,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="Other settings to try: lr, chunk_size, decay, clip or update_size, as NAME=VALUE,VALUE. "
            "May be repeated."
        ),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Also read with each adapting layer switched off.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw an earlier run in --out away.")] = False,
    device: Device = None,
) -> None:
    """Measure whether adapting helps.

    The same text is read with updates on and off; results have intervals and pictures.
    """
    if model is not None and named is not None:
        raise UserError(f"--model {named}: the model is {model} already, name it once")
    options = SimpleNamespace(
        suites=ONLY_TEXT if suite == "all" else _names(suite), length=length, windows=windows,
        lengths=numbers("--lengths", lengths, int) if lengths else (), kinds=_names(kinds) if kinds else KINDS,
        depths=numbers("--depths", depths, float), trials=trials, tasks=_names(tasks), task_files=task_files,
        questions=tuple(questions or ()), download=download, limit=limit, batch_size=batch_size,
    )  # fmt: skip
    if unknown := sorted(set(options.suites) - set(SUITES)):
        raise UserError(f"--suite {', '.join(unknown)}: choose from {', '.join(SUITES)}")
    if not data and (reading := [name for name in options.suites if name not in WITHOUT_TEXT]):
        raise UserError(
            f"--data: name at least one text file, directory or .jsonl file to read ({reading[0]} needs it)"
        )
    check_needles(options.kinds, options.depths, options.lengths or (1,))
    from ..eval.ruler import load_questions
    from ..eval.suites.texts import check_source, load_texts

    for source in data or ():
        check_source(source)
    for file in options.questions:
        load_questions(file)
    for text in sweep or ():
        for _, settings in _settings(text):
            if "auto" not in settings.values():  # which another objective has
                InPlaceTTTConfig(**settings)
    for given in (model, named, baseline):
        if given is not None:
            check_model(given)
    check_directory(out)
    log = Console(file=sys.stderr)
    with log.status("loading the model"):
        from ..eval import report
        from ..eval.runner import run
        from ..hf.attach import UNTRAINED, is_trained
        from ..hf.load import load
        from ..session.files import identity

        quiet_libraries()
        name = model or named or str(DEFAULT_MODEL)
        loaded, tokenizer = load(name, device, objective=objective, window=window)
        variants = _variants(loaded, sweep or [], layers)
        if baseline is not None:
            variants.append(_baseline(baseline, loaded, tokenizer, device))
    with log.status("reading the text"):
        texts = load_texts(data, tokenizer) if data else []
        if documents is not None:
            texts = sorted(texts, key=lambda text: len(text.ids) < length)[:documents]
    with log.status("preparing the suites"):
        if WITHOUT_TEXT & set(options.suites):
            logging.getLogger("lm_eval").setLevel(logging.ERROR)
        suites = [
            module_of(name).from_options(options, texts, tokenizer, loaded) for name in SUITES if name in options.suites
        ]
    notes = [note for made in suites for note in getattr(made, "notes", ())]
    useless = [] if is_trained(loaded) else [UNTRAINED]
    for note in notes + useless:
        tell(note, err=True)
    plan = {
        "model": Path(name).name,
        "identity": identity(loaded),
        "baseline": baseline,
        "data": {text.name: len(text.ids) for text in texts},
        "block": 256,
        "variants": [variant.label for variant in variants],
        **_plan(options),
    }
    plan |= {key: value for key, value in (("objective", objective), ("window", window)) if value is not None}
    records = run(suites, variants, out, plan, fresh=fresh, console=log)
    for line in report.write(out, records, plan, useless):
        tell(line)
    tell(f"Report: {out / 'report.html'} (figures: summary.json, summary.csv, plots/)")


def _plan(options: SimpleNamespace) -> dict[str, Any]:
    """JSON-ready: what tells one evaluation from another. ``batch_size`` changes no figure."""
    only = () if WITHOUT_TEXT & set(options.suites) else ("tasks", "task_files", "questions", "download", "limit")
    values = {key: value for key, value in vars(options).items() if key not in (*only, "batch_size")}
    plan: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plan


def _variants(model: Any, sweep: list[str], layers: bool) -> list["Variant"]:
    from ..eval.runner import Variant
    from ..hf.attach import layers_off, runtime_of, updates_off

    runtime = runtime_of(model)
    found = [Variant("on", model, nullcontext), Variant("off", model, partial(updates_off, model), updates=False)]
    for label, settings in (one for text in sweep for one in _settings(text)):
        config = replace(runtime.config, **settings)
        found.append(Variant(label, model, partial(runtime.override, config=config)))
    for site in runtime.sites if layers else ():
        found.append(Variant(f"without layer {site.index}", model, partial(layers_off, model, [site.index])))
    return found


def _settings(text: str) -> list[tuple[str, dict[str, Any]]]:
    """``lr=0.05,0.1`` -> [("lr=0.05", {"lr": 0.05}), ...]; several names joined by spaces change together."""
    name, _, values = text.partition("=")
    kinds: dict[str, Callable[[str], Any]] = {"lr": float, "decay": float, "clip": float, "chunk_size": int}
    kinds["update_size"] = lambda size: size if size == "auto" else float(size)
    if name not in kinds or not values:
        raise UserError(f"--sweep {text}: write one of {', '.join(kinds)} as NAME=VALUE,VALUE")
    try:
        return [(f"{name}={value}", {name: kinds[name](value)}) for value in values.split(",")]
    except ValueError:
        raise UserError(f"--sweep {text}: {values} are not numbers") from None


def _baseline(name: str, model: Any, tokenizer: Any, device: str | None) -> "Variant":
    from ..eval.runner import Variant
    from ..hf.load import load_baseline

    plain = load_baseline(name, device)
    if plain.config.get_text_config().vocab_size != model.config.get_text_config().vocab_size:
        raise UserError(f"--baseline {name}: it has another vocabulary, so its losses cannot be compared")
    return Variant("baseline", plain, nullcontext, updates=False)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))

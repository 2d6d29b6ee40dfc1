"""Runner of suites over variants of a model on the same inputs, unit by unit; interrupted runs can be resumed.

The directory of a run holds ``plan.json`` (what is measured, so that a run is never continued as another one) and
``records.jsonl``: one line per unit and variant, with all its records. A run that was killed leaves whole lines and
perhaps an incomplete last one, which is skipped and measured again.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import nn

from ..errors import UserError
from .nll import evaluating
from .suites import Record, Suite

PLAN, RECORDS = "plan.json", "records.jsonl"


@dataclass(frozen=True)
class Variant:
    """A model with a context that sets it up (updates off, other settings, ...)."""

    label: str
    model: nn.Module
    context: Callable[[], AbstractContextManager[Any]]
    updates: bool = True
    """False: a variant without updates; suites that need them leave it out."""


def run(
    suites: Sequence[Suite],
    variants: Sequence[Variant],
    directory: Path,
    plan: dict[str, Any],
    *,
    fresh: bool = False,
    console: Console | None = None,
) -> list[Record]:
    """Measure every unit of every suite with every variant; return all records, those of earlier runs included.

    ``plan`` (JSON-ready) describes the evaluation. UserError when ``directory`` holds another one, unless ``fresh``.
    """
    _prepare(directory, plan, fresh)
    found, done = read_records(directory)
    work = [
        (suite, unit, variant)
        for suite in suites
        for unit in suite.units()
        for variant in variants
        if variant.updates or not getattr(suite, "needs_updates", False)
        if (suite.name, unit.key, variant.label) not in done
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with (
        open(directory / RECORDS, "a", encoding="utf-8") as file,
        Progress(*columns, console=console or Console(stderr=True), transient=True) as progress,
    ):
        task = progress.add_task("", total=sum(unit.tokens for _, unit, _ in work))
        for suite, unit, variant in work:
            progress.update(task, description=f"{suite.name}, {variant.label}")
            started = time.perf_counter()
            with evaluating(variant.model), variant.context():
                rows = suite.measure(variant.model, unit)
            key = {"suite": suite.name, "unit": unit.key, "variant": variant.label}
            line = {**key, "seconds": round(time.perf_counter() - started, 3), "records": rows}
            file.write(json.dumps(line) + "\n")
            file.flush()
            found += [{**key, **row} for row in rows]
            progress.advance(task, unit.tokens)
    return found


def read_records(directory: Path) -> tuple[list[Record], set[tuple[str, str, str]]]:
    """Return all records so far, and the (suite, unit, variant) they are of."""
    records: list[Record] = []
    done: set[tuple[str, str, str]] = set()
    for line in _lines(directory / RECORDS):
        key = {name: line[name] for name in ("suite", "unit", "variant")}
        done.add((line["suite"], line["unit"], line["variant"]))
        records += [{**key, **row} for row in line["records"]]
    return records, done


def read_seconds(directory: Path) -> dict[str, float]:
    """Return wall-clock seconds of measuring, by suite, over all parts of the run."""
    seconds: dict[str, float] = {}
    for line in _lines(directory / RECORDS):
        seconds[line["suite"]] = seconds.get(line["suite"], 0.0) + line["seconds"]
    return {suite: round(total, 2) for suite, total in seconds.items()}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of a file of records."""
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            yield json.loads(text)
        except json.JSONDecodeError:
            continue


def _prepare(directory: Path, plan: dict[str, Any], fresh: bool) -> None:
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file: name a directory")
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plan, indent=1, sort_keys=True) + "\n"
    file = directory / PLAN
    if file.exists() and not fresh and file.read_text(encoding="utf-8") != text:
        raise UserError(f"{directory} holds another evaluation: choose another --out, or --fresh to throw it away")
    if fresh or not file.exists():
        (directory / RECORDS).unlink(missing_ok=True)
    records = directory / RECORDS
    if records.exists() and (data := records.read_bytes()) and not data.endswith(b"\n"):
        records.write_bytes(data + b"\n")  # ends an incomplete line, so that the next record does not join it
    file.write_text(text, encoding="utf-8")

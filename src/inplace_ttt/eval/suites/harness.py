"""Suite ``harness``: tasks of lm-evaluation-harness, a few samples at a time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import UserError
from ...hf.attach import is_attached, runtime_of
from .. import plots
from ..harness_tasks import PAPER, RULER, Loaded, evaluate, load_tasks
from ..paired import against_off, interval, tables_of
from . import Record, Tables, Unit
from .texts import EvalText

SLICES = 16
"""Approximate number of units per task, of at least ``SMALLEST`` samples each."""
SMALLEST = 32


class HarnessSuite:
    """Tasks of lm-evaluation-harness, every sample from an empty state, in batches of ``batch_size``.

    ``tasks`` as ``load_tasks`` gives them; ``limit``: samples of each of the harness's tasks, at most. A unit is a
    run of neighbouring samples of one task; examples in prompts (few-shot), where a task has them, are drawn anew for
    each unit. ``name``: "harness" or "ruler", under which the records are filed.

    Records, one per sample and metric: "document" (task, number and hash of the prompt, so that only readings of one
    prompt can be paired), "task" as asked for, "part" (below it), "length" (RULER's, else None), "metric", and "value"
    with "weight": a mean is sum(value) / sum(weight). Perplexities are in nats per word or byte.

    Raises UserError for a prompt that is longer than the model's context: none is truncated.
    """

    def __init__(
        self, name: str, tokenizer: Any, tasks: Sequence[Loaded], *, batch_size: int = 1, limit: int | None = None
    ) -> None:
        self.name, self.tokenizer, self.batch_size = name, tokenizer, batch_size
        self.notes: list[str] = []
        """Notes for the user, such as what is missing."""
        self._work: dict[str, tuple[str, int | None, Any, range]] = {}
        for task, length, parts in tasks:
            for part in parts:
                count = len(part.eval_docs)
                count = count if limit is None else min(count, limit)
                step = max(SMALLEST, -(-count // SLICES))
                for start in range(0, count, step):
                    where = part.task_name if length is None else f"{part.task_name}/{length}"
                    samples = range(start, min(start + step, count))
                    self._work[f"{where}/{start}"] = (task, length, part, samples)

    def units(self) -> Sequence[Unit]:
        """Return all units. ``tokens`` is a guess: the harness does not say how long its samples are."""
        return [Unit(key, len(samples) * (length or 256)) for key, (_, length, _, samples) in self._work.items()]

    def measure(self, model: nn.Module, unit: Unit) -> list[Record]:
        """Return the samples of one unit, by the model as it is set."""
        from ..harness import InPlaceTTTLM

        task, length, part, samples = self._work[unit.key]
        on = is_attached(model) and runtime_of(model).enabled
        lm = InPlaceTTTLM(model, self.tokenizer, updates="on" if on else "off", batch_size=self.batch_size)
        records = []
        for sample, values in evaluate(lm, part, samples, length):
            document = f"{part.task_name}/{sample['doc_id']}/{sample['prompt_hash'][:8]}"
            about = {"document": document, "task": task, "part": part.task_name, "length": length}
            for metric, (value, weight) in values.items():
                name = metric if length is None else "score"
                records.append(about | {"metric": name, "value": value * weight, "weight": weight})
        return records


def harness_suite(
    tokenizer: Any, names: Sequence[str], *, files: Path | None = None, limit: int | None = None, batch_size: int = 1
) -> HarnessSuite:
    """Build a suite of tasks, "paper" for the paper's. UserError when one is unknown or its data does not load."""
    named = [task for name in names for task in (PAPER if name == "paper" else (name,))]
    if ruler := sorted(set(named) & {*RULER, "ruler"}):
        raise UserError(f"--tasks {', '.join(ruler)}: RULER has a suite of its own: --suite ruler")
    if files is not None and not files.is_dir():
        raise UserError(f"--task-files {files}: no such directory")
    return HarnessSuite(
        "harness", tokenizer, load_tasks(named, tokenizer, (), files), batch_size=batch_size, limit=limit
    )


# -- what people read --------------------------------------------------------------------------------------------------


def from_options(options: Any, texts: Sequence[EvalText], tokenizer: Any, model: nn.Module) -> HarnessSuite:
    how: Any = {"files": options.task_files, "limit": options.limit, "batch_size": options.batch_size}
    return harness_suite(tokenizer, options.tasks, **how)


def tables(records: Sequence[Record]) -> Tables:
    return tables_of("harness", records, {"harness": ["task", "metric"]}, "value", "weight")


def score(row: Record) -> str:
    """Say a row's mean with updates, and its difference to without."""
    said = interval(row["difference_low"], row["difference_high"], "+.3f", row["documents"])
    return f"{row['value']:.3f} with updates, {row['difference']:+.3f} ({said})"


def verdicts(found: Tables) -> list[str]:
    return [f"{row['task']}, {row['metric']}: {score(row)}." for row in against_off(found.get("harness", []))]


def figures(found: Tables, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Draw differences by task; which side is better depends on the metric."""
    rows = [row for row in found.get("harness", []) if "difference" in row]
    names = ("task", "metric", "variant")
    return {"harness": plots.differences("tasks against updates off", rows, names, "metric")} if rows else {}

"""Suites ``harness`` and ``ruler``: tasks of lm-evaluation-harness, a few samples at a time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from ...errors import UserError
from ...hf.attach import is_attached, runtime_of
from .. import plots
from ..harness_tasks import PAPER, RULER, Loaded, evaluate, load_tasks, require
from ..paired import against_off, interval, means
from ..ruler import RulerData, load_questions
from . import Record, Tables, Unit
from .texts import Document

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
    return HarnessSuite(
        "harness", tokenizer, _from_files(tokenizer, named, files=files), batch_size=batch_size, limit=limit
    )


def ruler_suite(
    tokenizer: Any,
    lengths: Sequence[int],
    data: RulerData,
    *,
    download: bool = False,
    longest: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
) -> HarnessSuite:
    """Build RULER at ``lengths``: tasks whose texts can be made from ``data``, with ``download`` all thirteen.

    ``longest``: the model's maximum number of tokens. UserError for longer texts.
    """
    if longest is not None and max(lengths) > longest:
        raise UserError(f"--lengths {max(lengths)}: {_too_long(longest)}")
    names = [name for name in RULER if download or not data.needs_download(name)]
    loaded = _from_files(tokenizer, names, lengths, data=data, texts=limit)
    if longest is not None:
        _check_room(loaded, tokenizer, longest)
    return HarnessSuite("ruler", tokenizer, loaded, batch_size=batch_size, limit=limit)


def _check_room(loaded: Sequence[Loaded], tokenizer: Any, longest: int) -> None:
    """Raise UserError for a text of RULER that is too long, before any is read."""
    for task, length, parts in loaded:
        for text in parts[0].eval_docs:  # "length" leaves out the beginning of the answer, which is in the prompt
            needed = text["length"] + len(tokenizer(text["gen_prefix"])["input_ids"])
            if needed > longest:
                raise UserError(f"--lengths {length}: {task} has a text of {needed:,} tokens, {_too_long(longest)}")


def _too_long(longest: int) -> str:
    return f"the model reads at most {longest:,} tokens, and no text is cut: take a smaller length"


def _from_files(
    tokenizer: Any,
    names: Sequence[str],
    lengths: Sequence[int] = (),
    *,
    files: Path | None = None,
    data: RulerData | None = None,
    texts: int | None = None,
) -> list[Loaded]:
    require()
    if files is not None and not files.is_dir():
        raise UserError(f"--task-files {files}: no such directory")
    with TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        return load_tasks(names, directory, lengths, files, ruler_data=data, texts=texts)


# -- what people read --------------------------------------------------------------------------------------------------


def from_options(options: Any, tokenizer: Any) -> HarnessSuite:
    """Build the suite ``harness`` of the command line."""
    how: Any = {"files": options.task_files, "limit": options.limit, "batch_size": options.batch_size}
    return harness_suite(tokenizer, options.tasks, **how)


def ruler_from_options(
    options: Any, texts: Sequence[Document], tokenizer: Any, model: nn.Module
) -> tuple[HarnessSuite, list[str]]:
    """Build RULER with the text of --data as its essays; a note for each kind of data that is missing."""
    require()
    from ..harness import InPlaceTTTLM

    lengths, words = options.lengths or (4096,), list[str]()
    for text in texts:
        if len(words) < 2 * max(lengths):
            words += tokenizer.decode(text.ids[: 2 * max(lengths)]).split()
    data = RulerData(tuple(words), dict(map(load_questions, options.questions)))
    missing: dict[str, list[str]] = {}
    for task in () if options.download else RULER:
        if needed := data.needs_download(task):
            missing.setdefault(needed, []).append(task)
    longest = InPlaceTTTLM(model, tokenizer).max_length
    how: Any = {"download": options.download, "limit": options.limit, "batch_size": options.batch_size}
    notes = [f"ruler: without {', '.join(tasks)}: give {needed}, or --download" for needed, tasks in missing.items()]
    return ruler_suite(tokenizer, lengths, data, longest=longest, **how), notes


def tables(records: Sequence[Record]) -> Tables:
    """Return means by task and metric; RULER's by length."""
    found = {}
    if harness := [r for r in records if r["suite"] == "harness"]:
        found["harness"] = means(harness, ["task", "metric"], "value", "weight")
    if ruler := [r for r in records if r["suite"] == "ruler"]:
        found["ruler"] = means(ruler, ["length"], "value", "weight")
        found["ruler by task"] = means(ruler, ["task", "length"], "value", "weight")
    return found


def verdicts(found: Tables) -> list[str]:
    """Describe each metric with updates, and its difference to without."""
    lines = []
    for table in ("harness", "ruler"):
        for row in against_off(found.get(table, [])):
            name = f"RULER, {row['length']:,} tokens" if table == "ruler" else f"{row['task']}, {row['metric']}"
            said = interval(row["difference_low"], row["difference_high"], "+.3f", row["documents"])
            lines.append(f"{name}: {row['value']:.3f} with updates, {row['difference']:+.3f} ({said}).")
    return lines


def figures(found: Tables, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Draw differences by task (which side is better depends on the metric), and RULER's score by length."""
    drawn = {}
    if rows := [row for row in found.get("harness", []) if "difference" in row]:
        names = ("task", "metric", "variant")
        drawn["harness"] = plots.differences("Tasks: metric against updates off", rows, names, "metric")
    if rows := found.get("ruler", []):
        tasks = len({row["task"] for row in found["ruler by task"]})
        titled = [{**row, "title": f"RULER, {tasks} task{'s' * (tasks > 1)}"} for row in rows]
        label = "share of right answers"
        drawn["ruler"] = plots.panels(plots.curves(titled, "length", "title"), "length (tokens)", label, top=1.02)
    return drawn

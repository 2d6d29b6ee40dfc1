"""From the options of ``inplace-ttt eval`` to the suites that it runs."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from ..eval.suites import Suite
    from ..eval.suites.nll import NllSuite
    from ..eval.suites.texts import Document

SUITES = ("nll", "needle", "read-then-ask", "theory", "diagnostics", "harness", "ruler")
WITHOUT_TEXT = frozenset(["harness", "ruler"])
"""Suites that need no --data."""
ONLY_TEXT = tuple(name for name in SUITES if name not in WITHOUT_TEXT)


@dataclass(frozen=True)
class Options:
    """What was asked for; names as on the command line. ``lengths`` empty: each suite's own."""

    wanted: tuple[str, ...]
    length: int
    windows: int
    lengths: tuple[int, ...]
    kinds: tuple[str, ...]
    depths: tuple[float, ...]
    trials: int
    tasks: tuple[str, ...]
    task_files: Path | None
    questions: tuple[Path, ...]
    download: bool
    limit: int | None
    batch_size: int

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.wanted) - set(SUITES)):
            raise UserError(f"--suite {', '.join(unknown)}: choose from {', '.join(SUITES)}")

    def plan(self) -> dict[str, Any]:
        """JSON-ready: what tells one evaluation from another. ``batch_size`` changes no figure."""
        values: dict[str, Any] = {"suites": list(self.wanted), "length": self.length, "windows": self.windows}
        values |= {"lengths": list(self.lengths), "trials": self.trials}
        values |= {"kinds": list(self.kinds), "depths": list(self.depths)}
        if WITHOUT_TEXT & set(self.wanted):
            values |= {"tasks": list(self.tasks), "task_files": self.task_files and str(self.task_files)}
            values |= {"questions": list(map(str, self.questions)), "download": self.download, "limit": self.limit}
        return values


def build(options: Options, texts: Sequence["Document"], tokenizer: Any, model: Any) -> tuple[list["Suite"], list[str]]:
    """The suites in the order of ``SUITES``, and what the user should know about them. UserError before any work."""
    from ..eval.suites.memory import MemorySuite
    from ..eval.suites.needle import NeedleSuite
    from ..eval.suites.state import StateSuite
    from ..eval.suites.theory import TheorySuite
    from ..hf.attach import runtime_of

    wanted, trials = set(options.wanted), options.trials
    found: list[Any] = []
    notes: list[str] = []
    nll = _nll(options, texts, model) if {"nll", "diagnostics"} & wanted else None
    if nll is not None and "nll" in wanted:
        found.append(nll)
    if "needle" in wanted:
        lengths = options.lengths or (1024, 2048, 4096)
        found.append(NeedleSuite(tokenizer, texts, lengths, options.depths, options.kinds, trials))
    if "read-then-ask" in wanted:
        found.append(MemorySuite(tokenizer, texts, trials=trials))
    if "theory" in wanted:
        found.append(TheorySuite(tokenizer, texts, runtime_of(model).config.chunk_size, trials=4 * trials))
    if nll is not None and "diagnostics" in wanted:
        found.append(StateSuite(nll))
    if WITHOUT_TEXT & wanted:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if "harness" in wanted:
        from ..eval.suites.harness import harness_suite

        how: Any = {"files": options.task_files, "limit": options.limit, "batch_size": options.batch_size}
        found.append(harness_suite(tokenizer, options.tasks, **how))
    if "ruler" in wanted:
        suite, left_out = _ruler(options, texts, tokenizer, model)
        found.append(suite)
        notes += left_out
    return found, notes


def _nll(options: Options, texts: Sequence["Document"], model: Any) -> "NllSuite":
    from ..eval.suites.nll import NllSuite
    from ..hf.window import native_window

    suite = NllSuite(texts, options.length, options.windows, window=native_window(model) or 256)
    if options.windows and not any(unit.key.startswith("window/") for unit in suite.units()):
        longest = max(len(text.ids) for text in texts)
        raise UserError(
            f"no document has the {options.length:,} tokens of a window, the longest has {longest:,}: --length"
        )
    return suite


def _ruler(options: Options, texts: Sequence["Document"], tokenizer: Any, model: Any) -> tuple["Suite", list[str]]:
    """RULER with the text of --data as its essays; a note for each kind of data that is missing."""
    from ..eval.harness_tasks import RULER, require
    from ..eval.ruler import RulerData, load_questions
    from ..eval.suites.harness import ruler_suite

    require()
    from ..eval.harness import InPlaceTTTLM

    lengths = options.lengths or (4096,)
    words: list[str] = []
    for text in texts:
        if len(words) < 2 * max(lengths):
            words += tokenizer.decode(text.ids[: 2 * max(lengths)]).split()
    data = RulerData(tuple(words), dict(map(load_questions, options.questions)))
    notes = []
    if not options.download:
        missing: dict[str, list[str]] = {}
        for task in RULER:
            if needed := data.needs_download(task):
                missing.setdefault(needed, []).append(task)
        for needed, tasks in missing.items():
            notes.append(f"ruler: without {', '.join(tasks)}: give {needed}, or --download")
    suite = ruler_suite(
        tokenizer,
        lengths,
        data,
        download=options.download,
        longest=InPlaceTTTLM(model, tokenizer).max_length,
        limit=options.limit,
        batch_size=options.batch_size,
    )
    return suite, notes

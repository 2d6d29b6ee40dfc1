"""Suite ``ruler``: RULER's tasks by lm-evaluation-harness, over the user's own text and questions."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ...errors import UserError
from .. import plots
from ..harness_tasks import RULER, load_tasks, require
from ..paired import against_off, tables_of
from ..ruler import RulerData, load_questions
from . import Record, Tables
from .harness import HarnessSuite, score
from .texts import EvalText


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

    What is missing for the others is in the suite's ``notes``. ``longest``: the model's maximum number of tokens.
    UserError for longer texts.
    """
    too_long = f"the model reads at most {longest or 0:,} tokens, and no text is cut: take a smaller length"
    if longest is not None and max(lengths) > longest:
        raise UserError(f"--lengths {max(lengths)}: {too_long}")
    names, missing = list[str](), dict[str, list[str]]()
    for name in RULER:
        needed = None if download else data.needs_download(name)
        (names if needed is None else missing.setdefault(needed, [])).append(name)
    loaded = load_tasks(names, tokenizer, lengths, ruler_data=data, texts=limit)
    for task, length, parts in loaded if longest is not None else ():
        for text in parts[0].eval_docs:  # "length" leaves out the beginning of the answer, which is in the prompt
            tokens = text["length"] + len(tokenizer(text["gen_prefix"])["input_ids"])
            if tokens > longest:
                raise UserError(f"--lengths {length}: {task} has a text of {tokens:,} tokens, {too_long}")
    suite = HarnessSuite("ruler", tokenizer, loaded, batch_size=batch_size, limit=limit)
    suite.notes = [f"ruler: without {', '.join(tasks)}: give {what}, or --download" for what, tasks in missing.items()]
    return suite


# -- what people read --------------------------------------------------------------------------------------------------


def from_options(options: Any, texts: Sequence[EvalText], tokenizer: Any, model: nn.Module) -> HarnessSuite:
    """Build the suite of the command line, with the text of --data as RULER's essays."""
    require()
    from ..harness import InPlaceTTTLM

    lengths, words = options.lengths or (4096,), list[str]()
    for text in texts:
        if len(words) < 2 * max(lengths):
            words += tokenizer.decode(text.ids[: 2 * max(lengths)]).split()
    data = RulerData(tuple(words), dict(map(load_questions, options.questions)))
    longest = InPlaceTTTLM(model, tokenizer).max_length
    how: Any = {"download": options.download, "limit": options.limit, "batch_size": options.batch_size}
    return ruler_suite(tokenizer, lengths, data, longest=longest, **how)


def tables(records: Sequence[Record]) -> Tables:
    names = {"ruler": ["length"], "ruler by task": ["task", "length"]}
    return tables_of("ruler", records, names, "value", "weight")


def verdicts(found: Tables) -> list[str]:
    return [f"RULER, {row['length']:,} tokens: {score(row)}." for row in against_off(found.get("ruler", []))]


def figures(found: Tables, plan: Mapping[str, Any]) -> dict[str, Any]:
    rows = found.get("ruler", [])
    tasks = len({row["task"] for row in found.get("ruler by task", [])})
    drawn = plots.curves(rows, "length", lambda row: f"{tasks} task{'s' * (tasks > 1)}")
    return {"ruler": plots.panels(drawn, "RULER", "length (tokens)", plots.SHARE, top=1.02)} if rows else {}

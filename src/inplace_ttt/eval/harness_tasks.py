"""Tasks of lm-evaluation-harness: names, loading, and evaluation."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers import set_seed

from ..errors import UserError
from .ruler import ALL_TEXTS, ESSAYS, QUESTIONS, RulerData, config

Loaded = tuple[str, int | None, list[Any]]
"""A task asked for, the length of its texts (RULER), and the harness's tasks that it stands for."""

PAPER = ("hellaswag", "arc_easy", "arc_challenge", "mmlu", "piqa")
"""The short tasks of the paper. All of them download data sets from the Hugging Face hub."""
RULER_OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
"""RULER's tasks that make their data here. Below 2,048 tokens cwe and vt cannot be made."""
RULER_DOWNLOADS = (*ESSAYS, *QUESTIONS)
"""RULER's tasks over downloaded essays or questions."""
RULER = RULER_OFFLINE + RULER_DOWNLOADS
SHORTEST_RULER = 2048
_PAPER_FOLDERS = ("arc", "hellaswag", "mmlu/default", "piqa")
_PER_UNIT = ("word_perplexity", "byte_perplexity", "bits_per_byte")


def evaluate(
    lm: Any, part: Any, samples: Sequence[int], length: int | None, num_fewshot: int | None = None, seed: int = 0
) -> Iterator[tuple[Mapping[str, Any], dict[str, tuple[float, float]]]]:
    """Yield samples of one of the harness's tasks as it logs them, each with (value, weight) by metric."""
    from lm_eval import evaluate as run

    set_seed(seed)  # as the harness's own ``simple_evaluate``, which reports on the whole machine each time
    own = part.get_config("num_fewshot")
    if own is None or (own != 0 and num_fewshot is not None):  # a task that says 0 allows no examples
        part.set_config(key="num_fewshot", value=num_fewshot or 0)
    part.set_fewshot_seed(seed=seed)
    name = part.task_name
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # suppresses its progress bars
        found: Any = run(lm=lm, task_dict={"tasks": {name: part}}, samples={name: list(samples)}, bootstrap_iters=0)
    for sample in found["samples"][name]:
        values = {}
        for metric in sample["metrics"]:
            if (value := _value(metric, sample[metric], length)) is not None:
                values[metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"] = value
        yield sample, values


def _value(metric: str, value: Any, length: int | None) -> tuple[float, float] | None:
    """Return (value, weight), or None for an entry that is not a number of this sample."""
    if metric in _PER_UNIT:
        likelihood, units = value
        return -float(likelihood) / units, float(units)
    if length is not None and metric != str(length):  # RULER gives the other lengths too, as -1
        return None
    return (float(value), 1.0) if isinstance(value, bool | int | float | np.number | np.bool_) else None


def require() -> None:
    """Raise UserError that names the extra when lm-evaluation-harness is not installed."""
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"lm-evaluation-harness is missing or incomplete ({error}): pip install 'lm-eval[ruler]' accelerate"
        ) from None


def load_tasks(
    names: Sequence[str],
    tokenizer: Any,
    lengths: Sequence[int] = (),
    include_path: str | Path | None = None,
    *,
    ruler_data: RulerData | None = None,
    texts: int | None = None,
    seed: int = 0,
) -> list[Loaded]:
    """Return the tasks by the names asked for, in that order: (name, length, the tasks it stands for).

    RULER's tasks come once for each of ``lengths`` (the harness puts all lengths in one data set, of which a limit
    would take the first length alone), all others once, with length None. ``tokenizer`` measures RULER's texts,
    ``texts`` of each (None: 500), the same ones for the same ``seed``; ``ruler_data`` replaces RULER's downloads.
    ``include_path``: a directory of your own task files.

    Raises UserError when a name is unknown, a length is missing or too short, or data could not be loaded; the
    last error names every task of the list that downloads.
    """
    require()
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    names = list(dict.fromkeys(names))
    if ruler := [name for name in names if name in RULER]:
        if not lengths:
            raise UserError(f"{', '.join(ruler)}: give the lengths of their texts (lengths=[4096], say)")
        if min(lengths) < SHORTEST_RULER:
            raise UserError(f"RULER's texts have at least {SHORTEST_RULER} tokens, got {min(lengths)}")
    paths = [str(Path(lm_eval.tasks.__file__).parent / folder) for folder in ("ruler", *_PAPER_FOLDERS)]
    paths += [] if include_path is None else [str(include_path)]
    manager = TaskManager(include_path=paths, include_defaults=False)
    if not all(map(manager.match_tasks, [[name] for name in names])):  # reading every task file takes many seconds
        manager = TaskManager(include_path=paths)
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise UserError(f"lm-evaluation-harness has no task {', '.join(unknown)}: see lm_eval ls tasks")
    wanted = [(name, length) for name in names for length in (lengths if name in ruler else (None,))]
    order = sorted(wanted, key=lambda key: key[0] in RULER_OFFLINE)  # downloads, which may fail, before slow generation
    managers: dict[int | None, Any] = {None: manager}
    found = {}
    with TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        for n in lengths if ruler else ():
            metadata: dict[str, Any] = {"max_seq_lengths": [n], "tokenizer": directory}
            managers[n] = TaskManager(include_path=paths[:1], include_defaults=False, metadata=metadata)
        for name, length in order:
            set_seed(seed)
            spec = config(name, ruler_data or RulerData(), texts or ALL_TEXTS) if name in ruler else name
            found[name, length] = _load(name, spec, names, managers[length])
    return [(*key, found[key]) for key in wanted]


def _load(name: str, spec: Any, names: Sequence[str], manager: Any) -> list[Any]:
    try:
        return list(manager.load([spec])["tasks"].values())
    except OSError as error:  # every kind of missing file or network, local or remote
        known = [n for n in names if n in PAPER + RULER_DOWNLOADS]
        also = f"; of the tasks asked for, these download data: {', '.join(known)}" if known else ""
        raise UserError(f"could not load the data of task {name} ({str(error).splitlines()[0]}){also}") from None

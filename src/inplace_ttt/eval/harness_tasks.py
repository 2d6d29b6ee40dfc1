"""Tasks of lm-evaluation-harness with updates on and off: lists of them, missing data said plainly, paired results."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inplace_ttt.errors import UserError
from inplace_ttt.eval.nll import Mean, bootstrap_mean
from inplace_ttt.eval.ruler import ALL_TEXTS, RulerData, config

Loaded = tuple[str, int | None, list[Any]]
"""A task asked for, the length of its texts (RULER), and the harness's tasks that it stands for."""

PAPER = ("hellaswag", "arc_easy", "arc_challenge", "mmlu", "piqa")
"""The short tasks of the paper. All of them download data sets from the Hugging Face hub."""
RULER_OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
"""RULER's tasks that make their data here. Below 2,048 tokens cwe and vt cannot be made."""
RULER_DOWNLOADS = (
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multiquery",
    "niah_multivalue",
    "ruler_qa_squad",
    "ruler_qa_hotpot",
)
"""RULER's tasks over downloaded essays or questions."""
RULER = RULER_OFFLINE + RULER_DOWNLOADS
SHORTEST_RULER = 2048
_PAPER_FOLDERS = ("arc", "hellaswag", "mmlu/default", "piqa")
_PER_UNIT = ("word_perplexity", "byte_perplexity", "bits_per_byte")


@dataclass(frozen=True)
class Record:
    """One sample's value of one metric. ``on`` or ``off`` is None when that setting was not run.

    ``task`` is the name asked for, ``part`` the task below it (for groups such as mmlu), ``length`` RULER's. Perplexity
    metrics are given as nats per word or byte, with the number of these as ``weight``.
    """

    task: str
    part: str
    length: int | None
    sample: int
    metric: str
    on: float | None
    off: float | None
    weight: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Paired:
    """Means of a metric with updates on and off, and of on - off, with 95% bootstrap intervals over samples."""

    on: Mean
    off: Mean
    difference: Mean
    samples: int


def require() -> None:
    """UserError that names the extra when lm-evaluation-harness is not installed."""
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"lm-evaluation-harness is missing or incomplete ({error}): pip install 'lm-eval[ruler]' accelerate"
        ) from None


def load_tasks(
    names: Sequence[str],
    tokenizer: str,
    lengths: Sequence[int] = (),
    include_path: str | Path | None = None,
    *,
    ruler_data: RulerData | None = None,
    texts: int | None = None,
    seed: int = 0,
) -> list[Loaded]:
    """The tasks by the names asked for, in that order: (name, length, the tasks it stands for).

    RULER's tasks come once for each of ``lengths`` (the harness puts all lengths in one data set, of which a limit
    would take the first length alone), all others once, with length None. ``tokenizer`` is the directory of the
    tokenizer that measures RULER's texts, ``texts`` of each (None: 500), the same ones for the same ``seed``;
    ``ruler_data`` replaces RULER's downloads. ``include_path``: a directory of your own task files.

    Raises UserError when a name is unknown, a length is missing or too short, or data cannot be had; in the last case
    it names every task of the list that downloads.
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
    managers: dict[int | None, Any] = {None: manager}
    for length in lengths if ruler else ():
        metadata: dict[str, Any] = {"max_seq_lengths": [length], "tokenizer": tokenizer}
        managers[length] = TaskManager(include_path=paths[:1], include_defaults=False, metadata=metadata)
    wanted = [(name, length) for name in names for length in (lengths if name in ruler else (None,))]
    order = sorted(wanted, key=lambda key: key[0] in RULER_OFFLINE)  # what may fail first, what takes long last
    found = {}
    for key in order:
        _seed(seed)
        spec = config(key[0], ruler_data or RulerData(), texts or ALL_TEXTS) if key[0] in RULER else key[0]
        found[key] = _load(key[0], spec, names, managers[key[1]])
    return [(*key, found[key]) for key in wanted]


def _load(name: str, spec: Any, names: Sequence[str], manager: Any) -> list[Any]:
    try:
        return list(manager.load([spec])["tasks"].values())
    except OSError as error:  # every kind of missing file or network, local or remote
        known = [n for n in names if n in PAPER + RULER_DOWNLOADS]
        also = f"; of the tasks asked for, these download data: {', '.join(known)}" if known else ""
        raise UserError(f"the data of task {name} cannot be had ({str(error).splitlines()[0]}){also}") from None


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def prepare(parts: Sequence[Any], num_fewshot: int | None = None, seed: int = 0) -> None:
    """What the harness's own ``simple_evaluate`` does before it reads; that reports on the whole machine each time."""
    _seed(seed)
    for part in parts:
        own = part.get_config("num_fewshot")
        if own is None or (own != 0 and num_fewshot is not None):  # a task that says 0 allows no examples
            part.set_config(key="num_fewshot", value=num_fewshot or 0)
        part.set_fewshot_seed(seed=seed)


def records_of(task: str, length: int | None, samples: Mapping[str, Mapping[str, Sequence[Any]]]) -> list[Record]:
    """The harness's logged samples, by setting ("on", "off") and part, as records."""
    values: dict[tuple[str, int, str], dict[str, tuple[float, float]]] = {}
    prompts: dict[tuple[str, int], str] = {}
    for setting, parts in samples.items():
        for part, logged in parts.items():
            for sample in logged:
                at = part, int(sample["doc_id"])
                if prompts.setdefault(at, sample["prompt_hash"]) != sample["prompt_hash"]:
                    raise RuntimeError(f"task {part} made other prompts the second time: its results are not paired")
                for metric in sample["metrics"]:
                    if (value := value_of(metric, sample[metric], length)) is not None:
                        values.setdefault((*at, metric_name(metric, sample)), {})[setting] = value
    records = []
    for (part, sample, metric), by in values.items():
        on, off = (by[setting][0] if setting in by else None for setting in ("on", "off"))
        weight = next(iter(by.values()))[1]
        records.append(Record(task, part, length, sample, metric, on, off, weight))
    return records


def metric_name(metric: str, sample: Mapping[str, Any]) -> str:
    """With the filter of the answers, where there is one."""
    return metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"


def value_of(metric: str, value: Any, length: int | None) -> tuple[float, float] | None:
    """(value, weight), or None for what is no number of this sample."""
    if metric in _PER_UNIT:
        likelihood, units = value
        return -float(likelihood) / units, float(units)
    if length is not None and metric != str(length):  # RULER gives the other lengths too, as -1
        return None
    return (float(value), 1.0) if isinstance(value, bool | int | float | np.number | np.bool_) else None


def paired(records: Sequence[Record]) -> dict[tuple[str, int | None, str], Paired]:
    """Means and differences by (task, length, metric). Parts of a group count by their samples."""
    groups: dict[tuple[str, int | None, str], list[Record]] = {}
    for record in records:
        if record.on is not None and record.off is not None:
            groups.setdefault((record.task, record.length, record.metric), []).append(record)
    results = {}
    for key, found in groups.items():
        on, off, weights = (np.array([getattr(r, name) for r in found]) for name in ("on", "off", "weight"))
        means = [bootstrap_mean(values, weights) for values in (on, off, on - off)]
        results[key] = Paired(means[0], means[1], means[2], len(found))
    return results

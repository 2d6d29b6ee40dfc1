"""RULER's texts by lm-evaluation-harness's generators, in any number, from the user's text and questions.

The harness always makes 500 texts of each length, and downloads essays and questions. Here its
generators are called directly. A task whose data was not given is left to the harness, which downloads.
"""

import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..text_files import read_text

ALL_TEXTS = 500
"""Number of texts of a task and length in RULER."""
_NUMBERS = {"type_needle_k": "words", "type_needle_v": "numbers"}
_UUIDS = {"type_needle_k": "uuids", "type_needle_v": "uuids"}
NIAH: dict[str, dict[str, Any]] = {
    "niah_single_1": {"type_haystack": "repeat", **_NUMBERS},
    "niah_single_2": {"type_haystack": "essay", **_NUMBERS},
    "niah_single_3": {"type_haystack": "essay", "type_needle_k": "words", "type_needle_v": "uuids"},
    "niah_multikey_1": {"type_haystack": "essay", "num_needle_k": 4, **_NUMBERS},
    "niah_multikey_2": {"type_haystack": "needle", **_NUMBERS},
    "niah_multikey_3": {"type_haystack": "needle", **_UUIDS},
    "niah_multiquery": {"type_haystack": "essay", "num_needle_q": 4, **_NUMBERS},
    "niah_multivalue": {"type_haystack": "essay", "num_needle_v": 4, **_NUMBERS},
}
"""Settings of the needle tasks, those of the harness (a test compares)."""
ESSAYS = tuple(name for name, settings in NIAH.items() if settings["type_haystack"] == "essay")
QUESTIONS = {"ruler_qa_squad": "SQuAD", "ruler_qa_hotpot": "HotpotQA"}


@dataclass(frozen=True)
class Questions:
    """Questions over paragraphs, as the harness's generator takes them: each names its paragraphs by number."""

    questions: list[dict[str, Any]]
    paragraphs: list[str]


@dataclass(frozen=True)
class RulerData:
    """Local data instead of downloads. ``essays``: words of running text; ``questions``: by task."""

    essays: tuple[str, ...] = ()
    questions: dict[str, Questions] = field(default_factory=dict)

    def needs_download(self, task: str) -> str | None:
        """Return the data needed to make this task's texts here; None if nothing is missing."""
        if task in ESSAYS and not self.essays:
            return "running text: --data"
        if task in QUESTIONS and task not in self.questions:
            return f"questions: --questions with a {QUESTIONS[task]} file"
        return None


def load_questions(path: Path | str) -> tuple[str, Questions]:
    """Return the task that a file of questions is for, and its questions.

    SQuAD's JSON (also made-up JSON lines ``{"question", "answers": [...], "context"}``) is for ``ruler_qa_squad``,
    HotpotQA's JSON for ``ruler_qa_hotpot``. Raises UserError for a file that is missing or neither.
    """
    path = Path(path)
    text = read_text(path).text
    try:
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in text.splitlines() if line.strip()]
            rows = [(x["question"], list(x["answers"]), [x["context"]], [x["context"]]) for x in lines]
            return "ruler_qa_squad", _numbered(rows)
        content = json.loads(text)
        if isinstance(content, dict):
            return "ruler_qa_squad", _squad(content)
        return "ruler_qa_hotpot", _hotpot(content)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f'{path}: no questions in it: give SQuAD\'s or HotpotQA\'s JSON, or .jsonl with "question", "answers" and '
            '"context" in each line'
        ) from None


def _squad(content: dict[str, Any]) -> Questions:
    rows = []
    for article in content["data"]:
        paragraphs = [p["context"] for p in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                if not question.get("is_impossible"):
                    answers = [answer["text"] for answer in question["answers"]]
                    rows.append((question["question"], answers, [paragraph["context"]], paragraphs))
    return _numbered(rows)


def _hotpot(content: list[dict[str, Any]]) -> Questions:
    rows = []
    for question in content:
        paragraphs = [f"{title}\n{''.join(sentences)}" for title, sentences in question["context"]]
        rows.append((question["question"], [question["answer"]], paragraphs, paragraphs))
    return _numbered(rows)


def _numbered(rows: Sequence[tuple[str, list[str], list[str], list[str]]]) -> Questions:
    """Number the paragraphs of (question, answers, its own paragraphs, those of the same article)."""
    paragraphs = sorted({text for *_, article in rows for text in article})
    if not paragraphs:
        raise ValueError("no questions")
    number = {text: i for i, text in enumerate(paragraphs)}
    questions = []
    for query, answers, own, article in rows:
        context = [number[text] for text in own]
        more = [number[text] for text in article if number[text] not in context]
        questions.append({"query": query, "outputs": answers, "context": context, "more_context": more})
    return Questions(questions, paragraphs)


def config(task: str, data: RulerData, texts: int) -> dict[str, Any] | str:
    """Return the harness's configuration of a task, texts by ``make``; only its name where it needs a download."""
    if data.needs_download(task):
        return task
    try:
        import nltk  # noqa: F401
        import scipy  # noqa: F401
        import wonderwords  # noqa: F401
    except ImportError as error:
        raise UserError(f"RULER needs the package {error.name}: pip install 'lm-eval[ruler]' accelerate") from None
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    file = Path(lm_eval.tasks.__file__).parent / "ruler" / f"{task.removeprefix('ruler_')}.yaml"
    with _silent():
        found: dict[str, Any] = load_yaml(file, resolve_func=True)
    return {**found, "custom_dataset": partial(make, task, data, texts)}


def make(task: str, data: RulerData, texts: int, *, tokenizer: str, max_seq_lengths: Sequence[int], **_: Any) -> Any:
    """Make ``texts`` texts of every length as the harness's data set. ``tokenizer``: the directory of one.

    Raises UserError when the essays or questions are too few for a length.
    """
    import datasets
    from lm_eval.tasks.ruler.common_utils import get_tokenizer

    measure = get_tokenizer(tokenizer)
    rows = []
    with _silent():
        for length in max_seq_lengths:
            rows += _make(task, data, texts, measure, length)
    return {"test": datasets.Dataset.from_list(rows, split=datasets.Split.TEST)}


def _make(task: str, data: RulerData, texts: int, tokenizer: Any, length: int) -> list[dict[str, Any]]:
    from lm_eval.tasks.ruler import cwe_utils, fwe_utils, niah_utils, prepare_niah, qa_utils, vt_utils

    sized = {"num_samples": texts, "max_seq_length": length}
    found: list[dict[str, Any]]
    if task in NIAH:
        kind = NIAH[task]["type_haystack"]
        haystack = list(data.essays) if kind == "essay" else prepare_niah.get_haystack(type_haystack=kind)
        found = prepare_niah.generate_samples(haystack, tokenizer, template=niah_utils.TEMPLATE, **NIAH[task], **sized)
        longest = max(row["length"] for row in found)
        if kind == "essay" and longest < 0.75 * length:
            raise UserError(f"{task}: the text of --data fills {longest:,} of {length:,} tokens only: give more of it")
    elif task in QUESTIONS:
        given = data.questions[task]
        sized["num_samples"] = min(texts, len(given.questions))
        found = qa_utils.generate_samples(tokenizer, _InOrder(given.paragraphs), given.questions, **sized)
    elif task == "ruler_vt":
        # The harness's own example, 500 tokens long, is part of every prompt.
        (example,) = vt_utils.sys_vartrack_w_noise_random(tokenizer, 1, 500, incremental=5)
        found = vt_utils.sys_vartrack_w_noise_random(tokenizer, icl_example=example, **sized)
    elif task == "ruler_cwe":
        cwe_utils.RNG.seed(42)  # else the texts depend on earlier ones
        found = cwe_utils.sys_word_pair_random(tokenizer=tokenizer, **sized)
    else:
        found = fwe_utils.sys_kwext(tokenizer, **sized)
    return found


class _InOrder(list[str]):
    """A list of paragraphs that stays in order: the harness shuffles the list itself where a prompt has room for all of
    them, and then the questions' numbers point to others."""

    def __setitem__(self, index: Any, value: Any) -> None:
        """Do nothing."""


@contextmanager
def _silent() -> Iterator[None]:
    """Suppress prints, bars and downloads: nltk's sentence splitter is fetched at import, and the essays' need it."""
    import nltk

    download = nltk.download
    nltk.download = lambda *args, **keywords: False
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            from lm_eval.tasks.ruler import prepare_niah

            split = prepare_niah.cached_sent_tokenize
            try:
                nltk.data.find("tokenizers/punkt_tab")
            except LookupError:
                prepare_niah.cached_sent_tokenize = partial(re.split, r"(?<=[.!?])\s+")  # by their last character
            try:
                yield
            finally:
                prepare_niah.cached_sent_tokenize = split
    finally:
        nltk.download = download

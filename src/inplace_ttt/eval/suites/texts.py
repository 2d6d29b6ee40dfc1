"""Documents to measure on: text files, directories of them, JSON lines and datasets, each document tokenised once."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ...hub import PREFIX, hub_dataset
from ...text_files import read_json_lines, read_text

TEXT_FILES = frozenset(
    [".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".html", ".xml", ".csv",
     ".py", ".js", ".ts", ".c", ".h", ".cpp", ".rs", ".go", ".java"]
)  # fmt: skip
"""Suffixes of text files inside a directory. A file given by its own name may have any."""
JSON_LINES = (".jsonl", ".jsonl.xz", ".jsonl.gz")
MOST_ROWS = 1000
"""Maximum rows read from a dataset: an evaluation needs a few long documents, not millions of short ones."""


@dataclass(frozen=True)
class EvalText:
    """A tokenised text: ``ids`` int32 [n]. ``name`` is unique among the documents loaded together."""

    name: str
    domain: str
    ids: np.ndarray


def load_texts(
    sources: Sequence[Path | str], tokenizer: Any, *, domain: str = "text", tokens: int | None = None
) -> list[EvalText]:
    """Return the documents of all sources, in order, of each its first ``tokens`` tokens (None: all).

    A source is

    * a UTF-8 text file: one document, named by its path, of domain ``domain``;
    * a directory: its text files (``TEXT_FILES``) and JSON lines at any depth, in the order of their paths; empty and
      hidden files are left out; a text's domain is the directory's name;
    * a ``.jsonl``, ``.jsonl.xz`` or ``.jsonl.gz`` file: a document a line, ``{"text": ..., "id": ..., "domain": ...}``,
      only ``text`` is needed;
    * ``hf:PLACE?split=SPLIT&text=COLUMN``: a Hugging Face dataset, see `inplace_ttt.hub`: of the first ``MOST_ROWS``
      rows those that are not empty; a column "domain" is used where there is one.

    Text that looks like special tokens is read as text, and none are added. Raises UserError for a source that is
    missing, empty, binary, not UTF-8 or not such JSON, and for two documents of one name.
    """
    found: dict[str, EvalText] = {}
    for source in sources:
        from_hub = str(source).startswith(PREFIX)
        for name, where, text in _dataset(str(source), domain) if from_hub else _texts(Path(source), domain):
            if name in found:
                raise UserError(f'{source}: a second document named {name!r}: give each document an "id" of its own')
            found[name] = EvalText(name, where, tokenize(tokenizer, text)[:tokens])
    if not found:
        raise UserError("no documents: give at least one text file, directory or .jsonl file")
    return list(found.values())


def check_source(source: Path | str) -> None:
    """Raise UserError for a source that is not there. Reads nothing."""
    if str(source).startswith(PREFIX):
        hub_dataset(str(source), split="test", id="id")
    elif not Path(source).exists():
        raise UserError(f"{source}: no such file")


def tokenize(tokenizer: Any, text: str) -> np.ndarray:
    """Return token ids int32 [n] of a text alone: nothing added, nothing in it special."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return np.array(ids, np.int32)


def words(tokenizer: Any) -> list[int]:
    """Return single tokens that are a capitalised or a lower-case word of five letters or more after a space."""
    found = []
    for token in sorted(tokenizer.get_vocab().values()):
        text = tokenizer.decode([token])
        if len(text) > 5 and text[0] == " " and text[1:].isalpha() and text[2:].islower():
            found.append(token)
    return found


def free_words(vocabulary: Sequence[int] | np.ndarray, text: Sequence[int], needed: int, where: str) -> list[int]:
    """Return the words of ``vocabulary`` that the text does not use. UserError when they are fewer than ``needed``."""
    free: list[int] = np.setdiff1d(vocabulary, text).tolist()
    if len(free) < needed:
        raise UserError(f"{where}: only {len(free)} words that the text does not use, {needed} needed")
    return free


class Haystacks:
    """The text of each trial: from a random place of a document that has ``longest`` tokens, by ``seed`` and trial.

    Raises UserError when there is no such document.
    """

    def __init__(self, documents: Sequence[EvalText], longest: int, seed: int) -> None:
        self.longest, self.seed = longest, seed
        self.documents = [document for document in documents if len(document.ids) >= longest]
        if not self.documents:
            raise UserError(f"no document has the {longest:,} tokens of the longest text")

    def text(self, trial: int, length: int) -> tuple[str, list[int]]:
        """Return the name of a trial's document and the ids to read, of any length the same beginning."""
        document = self.documents[trial % len(self.documents)]
        start = random.Random(f"{self.seed}/{trial}").randint(0, len(document.ids) - self.longest)
        return document.name, document.ids[start : start + length].tolist()


def stretches(documents: Sequence[EvalText], length: int) -> Iterator[tuple[str, list[int]]]:
    """Yield name and ids of neighbouring parts of ``length`` tokens, the first of every document first."""
    longest = max((len(document.ids) for document in documents), default=0)
    for at in range(0, longest - length + 1, length):
        for document in documents:
            if at + length <= len(document.ids):
                yield document.name, document.ids[at : at + length].tolist()


def _dataset(spec: str, domain: str) -> Iterator[tuple[str, str, str]]:
    """Yield name, domain and text of a dataset's rows."""
    dataset = hub_dataset(spec, split="test", id="id")
    whole = f"{dataset.place}@{dataset.name}" if dataset.name else dataset.place
    for number, row in enumerate(islice(dataset.rows(), MOST_ROWS)):
        if row[dataset.text].strip():
            name = row.get(dataset.id, f"{whole}:{dataset.split}:{number}")
            yield str(name), str(row.get("domain", domain)), row[dataset.text]


def _texts(source: Path, domain: str) -> Iterator[tuple[str, str, str]]:
    """Yield name, domain and text of a source's documents."""
    if not source.is_dir():
        yield from _file(source, domain)
        return
    inside = [
        path
        for path in sorted(source.rglob("*"))
        if (path.suffix.lower() in TEXT_FILES or path.name.endswith(JSON_LINES))
        and not any(part.startswith(".") for part in path.relative_to(source).parts)
        and path.is_file()
        and path.stat().st_size
    ]
    if not inside:
        raise UserError(f"{source}: no text files in this directory (of the kinds {' '.join(sorted(TEXT_FILES))})")
    for path in inside:
        yield from _file(path, source.resolve().name or domain)


def _file(path: Path, domain: str) -> Iterator[tuple[str, str, str]]:
    if not path.name.endswith(JSON_LINES):
        yield str(path), domain, read_text(path).text
        return
    number = 0
    for number, record in read_json_lines(path):
        if not record["text"].strip():
            raise UserError(f'{path}, line {number}: its "text" is empty')
        yield str(record.get("id", f"{path}:{number}")), str(record.get("domain", domain)), record["text"]
    if not number:
        raise UserError(f"{path} is empty")

"""Hugging Face datasets to measure on: which rows, their names and domains, and mistakes in one plain line."""

import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from forked import run_fresh
from session.models import tokenizer

from inplace_ttt.errors import UserError
from inplace_ttt.eval.suites.texts import load_texts

datasets = pytest.importorskip("datasets")


def read(source: str) -> list[tuple[str, str, str]]:
    return [(d.name, d.domain, tokenizer().decode(d.ids)) for d in load_texts([source], tokenizer(), domain="sea")]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with a split ``test`` and a split ``train``."""
    rows = [
        {"text": "A whale.", "title": "Whale", "id": "one", "domain": "deep"},
        {"text": " ", "title": "Nothing", "id": "two", "domain": "shore"},
        {"text": "A ship.", "title": "Ship", "id": "three", "domain": "shore"},
    ]
    test = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"test": test, "train": test.select([2])}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_the_rows_with_text_of_the_test_split(saved: Path) -> None:
    assert read(f"hf:{saved}") == [("one", "deep", "A whale."), ("three", "shore", "A ship.")]


def test_another_split_and_other_columns(saved: Path) -> None:
    assert read(f"hf:{saved}?split=train&text=title&id=domain") == [("shore", "shore", "Ship")]


def test_a_folder_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "test.jsonl").write_text('{"text": " "}\n{"text": "A whale."}\n')
    assert read(f"hf:{tmp_path}/files") == [(f"{tmp_path}/files:test:1", "sea", "A whale.")]


def test_a_dataset_of_the_hub_is_streamed_as_far_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def endless(*place: Any, **settings: Any) -> Iterator[dict[str, str]]:
        asked.append((place, settings))
        return ({"text": "A whale." if i % 3 < 2 else ""} for i in count())

    monkeypatch.setattr(datasets, "load_dataset", endless)
    names = [name for name, _, _ in read("hf:owner/name?name=C++&revision=abc")]
    assert names == [f"owner/name@C++:test:{i}" for i in range(1000) if i % 3 < 2]
    assert asked == [(("owner/name", "C++"), {"split": "test", "revision": "abc", "streaming": True})]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("hf:SAVED?text=body", "row 1: no text in column 'body' (it has text, title, id, domain)"),
        ("hf:SAVED?split=validation", "there is no split 'validation', only test, train"),
        ("hf:SAVED/nowhere", "there is no directory"),
        ("hf:", "write hf:DATASET"),
        ("hf:SAVED:train", "write hf:DATASET?name=CONFIG&split=SPLIT&text=COLUMN"),
        ("hf:owner/name:train:body", "write hf:DATASET?name=CONFIG&split=SPLIT&text=COLUMN"),
        ("hf:owner/name@config", "write hf:DATASET?name=CONFIG&split=SPLIT&text=COLUMN"),
        ("hf:owner/name", "after row 0: ConnectionError: Couldn't reach the Hub second line"),
    ],
)
def test_mistakes(saved: Path, monkeypatch: pytest.MonkeyPatch, source: str, says: str) -> None:
    def offline(*place: Any, **settings: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError) as error:
        read(source.replace("SAVED", str(saved)))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_else_is_needed() -> None:
    """The package and its evaluation import without the datasets library, and without anything of training."""

    def work() -> None:
        sys.modules["inplace_ttt.train"] = None  # type: ignore[assignment]
        from inplace_ttt.eval.suites.texts import load_texts

        try:
            load_texts(["hf:owner/name"], None)
        except ValueError as error:
            print(error)

    said = "hf:owner/name: needs the datasets library: pip install datasets\n"
    assert run_fresh(work, ["inplace_ttt"], missing=["datasets", "accelerate"]) == (0, said)

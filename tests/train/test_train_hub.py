"""Hugging Face datasets as sources: folders of files, saved datasets, streamed or whole; mistakes in one plain line."""

import json
from pathlib import Path
from typing import Any

import pytest

from inplace_ttt.errors import SourceError
from inplace_ttt.train.prepare import prepare
from inplace_ttt.train.recipe import make_recipe
from inplace_ttt.train.schema import RecipeError
from inplace_ttt.train.sources import read_source, source_files

datasets = pytest.importorskip("datasets")
TEXTS = [f"document {i}\n" * (i + 1) for i in range(5)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of data files."""
    (tmp_path / "files").mkdir()
    for name, texts in (("train", TEXTS), ("validation", TEXTS[:1])):
        lines = [json.dumps({"body": text, "key": f"k{i}"}) for i, text in enumerate(texts)]
        (tmp_path / "files" / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "files"


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_a_folder_of_files(folder: Path, streaming: str) -> None:
    found = list(read_source(f"hf:{folder}?text=body&id=key&streaming={streaming}"))
    assert [d.text for d in found] == TEXTS
    assert [d.id for d in found] == ["k0", "k1", "k2", "k3", "k4"]
    (one,) = read_source(f"hf:{folder}?text=body&split=validation&streaming={streaming}")
    assert (one.id, one.text) == ("files:1", TEXTS[0])


def test_saved_datasets(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"text": TEXTS})
    data.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "splits")
    for place in ("plain", "splits"):
        assert [d.text for d in read_source(f"hf:{tmp_path}/{place}")] == TEXTS
    with pytest.raises(SourceError, match="there is no split 'test', only train"):
        list(read_source(f"hf:{tmp_path}/splits?split=test"))


def test_a_plus_is_no_space(folder: Path) -> None:
    found = read_source(f"hf:{folder}?text=body&split=train+validation&streaming=false")
    assert [d.text for d in found] == [*TEXTS, TEXTS[0]]


def test_a_folder_may_be_called_anything(folder: Path) -> None:
    odd = folder.rename(folder.with_name("me@home:data"))
    assert [d.text for d in read_source(f"hf:{odd}?text=body")] == TEXTS


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:", "is not a document source: write jsonl:PATH, text:PATH, hf:DATASET"),
        ("hf:./nowhere", "there is no directory ./nowhere"),
        ("hf:a/b?splits=train", "no setting 'splits', only split, name"),
        ("hf:a/b?split", r"write settings as \?split=train"),
        ("hf:?split=train", r"write hf:DATASET\?name=CONFIG&split=SPLIT&text=COLUMN"),
        ("hf:a/b:train", r"write hf:DATASET\?name=CONFIG&split=SPLIT&text=COLUMN"),
        ("hf:a/b?streaming=yes", "streaming is true or false, not 'yes'"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(values: dict[str, Any], source: str, message: str) -> None:
    values["data"]["train"] = {"text": source}
    with pytest.raises(RecipeError, match=message):
        make_recipe(values)


def test_the_library_is_asked_for_plainly(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inplace_ttt.hub.find_spec", lambda name: None)
    with pytest.raises(SourceError, match="needs the datasets library: pip install datasets"):
        source_files(f"hf:{folder}")


def test_mistakes_in_the_data_are_one_line(folder: Path) -> None:
    for source, message in (
        (f"hf:{folder}", r"row 1: no text in column 'text' \(it has body, key\)"),
        (f"hf:{folder}?text=body&split=test", "test"),
        (f"hf:{folder}?text=body&id=key&name=other", "other"),
    ):
        with pytest.raises(SourceError, match=message) as error:
            list(read_source(source))
        assert "\n" not in str(error.value)
    (folder / "train.jsonl").write_text('{"body": "x"}\n{"body": null}\n')
    with pytest.raises(SourceError, match=r"row 2: no text in column 'body' \(it holds NoneType\)"):
        list(read_source(f"hf:{folder}?text=body"))


def test_a_recipe_reads_the_tokens_of_the_json_lines(values: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_bytes((corpus / "train.jsonl").read_bytes())
    expected = prepare(make_recipe(values))
    values["data"] = values["data"] | {"train": {"text": f"hf:{tmp_path}/data?id=id"}}
    found = prepare(make_recipe(values))
    assert found.directory != expected.directory
    for split in ("train", "test"):
        a, b = (prepared.stores(split)["text"] for prepared in (found, expected))
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.names == b.names
    with open(tmp_path / "data" / "train.jsonl", "a", encoding="utf-8") as file:
        file.write('{"id": "new", "text": "kane lo"}\n')
    assert prepare(make_recipe(values)).directory != found.directory, "changed files are read again"

"""Documents from JSON lines and text files; every mistake is one plain line."""

import gzip
import json
import lzma
from pathlib import Path

import pytest

from inplace_ttt.errors import SourceError
from inplace_ttt.train.sources import Document, read_source, source_files

RECORDS = [{"id": "a", "text": "one\ntwo", "license": "CC0", "source": "s"}, {"text": "drei ü"}]


@pytest.mark.parametrize("ending", ["", ".xz", ".gz"])
def test_json_lines(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x.jsonl{ending}"
    data = "\n".join(map(json.dumps, RECORDS)).encode() + b"\n\n"
    path.write_bytes({"": bytes, ".xz": lzma.compress, ".gz": gzip.compress}[ending](data))
    assert list(read_source(f"jsonl:{path}")) == [
        Document("a", "one\ntwo"),
        Document(f"{path.name}:2", "drei ü"),
    ]


def test_glob_reads_files_in_name_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}", encoding="utf-8")
    assert [d.text for d in read_source(f"text:{tmp_path}/*.txt")] == ["text a", "text b", "text c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "ok"}\n{"text": \n', "line 2: not JSON"),
        (b'{"text": "ok"}\n{"body": "x"}\n', 'line 2: no "text"'),
        (b'{"text": 3}\n', 'line 1: no "text"'),
        (b"[1]\n", 'line 1: no "text"'),
        (b'{"text": "\xff"}\n', "not UTF-8"),
    ],
)
def test_bad_line_names_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=message) as error:
        list(read_source(f"jsonl:{path}"))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_archives_and_texts(tmp_path: Path) -> None:
    whole = lzma.compress(b'{"text": "x"}\n' * 1000)
    (tmp_path / "cut.jsonl.xz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b" \n")
    for spec, message in (
        (f"jsonl:{tmp_path}/cut.jsonl.xz", "cannot be read"),
        (f"text:{tmp_path}/latin.txt", "not UTF-8"),
        (f"text:{tmp_path}/empty.txt", "empty"),
        (f"text:{tmp_path}/none*.txt", "no such file"),
    ):
        with pytest.raises(SourceError, match=message):
            list(read_source(spec))


@pytest.mark.parametrize("spec", ["books.jsonl", "csv:x", "jsonl:", "packages:everything"])
def test_misspelt_source(spec: str) -> None:
    with pytest.raises(SourceError):
        source_files(spec)


def test_shared_corpus_can_be_read(shared: Path) -> None:
    documents = list(read_source(f"jsonl:{shared}/data/tiny/validation.jsonl.xz"))
    assert sum(len(d.text.encode()) for d in documents) == 212_290

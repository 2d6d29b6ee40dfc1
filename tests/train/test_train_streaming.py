"""Making tokens holds one document's text at a time, and takes the same documents as a whole domain at once would."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from inplace_ttt.errors import UserError
from inplace_ttt.train import tokenizer as tokenizer_module
from inplace_ttt.train.prepare import prepare
from inplace_ttt.train.recipe import make_recipe
from inplace_ttt.train.sources import DomainDocuments, hash_of


def domain(*sources: str, max_bytes: int | None = None) -> DomainDocuments:
    return DomainDocuments(sources, max_bytes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    records = [{"id": str(i), "text": f"{i:02d}" + "x" * (i % 7)} for i in range(40)] + [{"id": "none", "text": ""}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return tmp_path / "d.jsonl"


def test_max_bytes_takes_the_lowest_hashes_in_the_order_of_the_sources(path: Path) -> None:
    whole = list(domain(f"jsonl:{path}"))
    assert [d.id for d in whole] == [str(i) for i in range(40)]
    some = list(domain(f"jsonl:{path}", max_bytes=50))
    assert sum(len(d.text) for d in some) == 50
    assert [int(d.id) for d in some] == sorted(int(d.id) for d in some)
    lowest = sorted(whole, key=hash_of)[: len(some)]
    assert {d.id for d in some} == {d.id for d in lowest}
    texts = {d.id: d.text for d in some}
    assert all(texts[d.id] == d.text for d in lowest[:-1])
    assert lowest[-1].text.startswith(texts[lowest[-1].id]), "the last one is cut"
    assert list(domain(f"jsonl:{path}", max_bytes=10_000)) == whole


def test_a_cut_inside_a_character_ends_the_domain(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"id": "a", "text": "éé"}\n{"id": "b", "text": "éé"}\n', encoding="utf-8")
    (only,) = domain(f"jsonl:{tmp_path}/d.jsonl", max_bytes=3)
    assert only.text == "é"


def test_a_domain_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": ""}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"d\.jsonl: no text in there"):
        list(domain(f"jsonl:{tmp_path}/d.jsonl"))


@pytest.mark.parametrize("max_bytes", [None, 1_500_000])
def test_text_is_not_held(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_bytes: int | None
) -> None:
    made = prepare(make_recipe(values)).directory / "tokenizer"
    line = json.dumps({"text": "kane lo\n" * 10_000}) + "\n"
    with open(tmp_path / "large.jsonl", "w", encoding="utf-8") as file:
        file.writelines([line] * 30)
    source = {"sources": [f"jsonl:{tmp_path}/large.jsonl"], "max_bytes": max_bytes}
    changes = {"tokenizer": {"path": str(made)}, "data": {"train": {"text": source}, "cache": str(tmp_path / "tokens")}}
    monkeypatch.setattr(tokenizer_module, "_BATCH_CHARACTERS", 1 << 17)
    tracemalloc.start()
    try:
        summary = prepare(make_recipe(values | changes)).summary["train"]["text"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert summary["bytes"] == (max_bytes or 2_400_000)
    assert peak < 2_100_000, peak

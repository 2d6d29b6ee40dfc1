"""Tokenising while training: the same rows in any order of asking, after a restart, and in other processes."""

import json
import random
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from inplace_ttt.errors import UserError
from inplace_ttt.train import stream
from inplace_ttt.train.packing import IGNORED, Layout
from inplace_ttt.train.prepare import Prepared, prepare
from inplace_ttt.train.recipe import make_recipe
from inplace_ttt.train.run import run
from inplace_ttt.train.sources import Document
from inplace_ttt.train.stream import StreamedRows

T, C = 64, 16


class Counted:
    """Documents, and how many of them were read."""

    def __init__(self, name: str, lengths: list[int]) -> None:
        draw = random.Random(name)
        words = [" ".join(draw.choices(["lo", "tu", "re", "ne"], k=n)) for n in lengths]
        self.all = [Document(f"{name}{i}", f"{name} {i} {text}") for i, text in enumerate(words)]
        self.read = 0

    def __iter__(self) -> Any:
        for document in self.all:
            self.read += 1
            yield document


@pytest.fixture
def tokenizer(values: dict[str, Any]) -> PreTrainedTokenizerBase:
    return prepare(make_recipe(values)).tokenizer


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "WINDOW_ROWS", 4)
    monkeypatch.setattr(stream, "_BATCH_CHARACTERS", 200)


def rows_of(tokenizer: PreTrainedTokenizerBase, notes: Path, count: int = 40) -> tuple[StreamedRows, list[Counted]]:
    domains = [Counted("ka", [300, 20, 7, 150, 60, 90]), Counted("mi", [30] * 9)]
    layout = Layout(T, seed=0, pad_id=0, group=2, cut=C)
    return StreamedRows(dict(zip("ab", domains, strict=True)), tokenizer, count, layout, notes), domains


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in ("input_ids", "position_ids", "labels"))


def test_rows_do_not_depend_on_what_was_asked_before(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows, _ = rows_of(tokenizer, tmp_path / "a")
    expected = [rows[i] for i in range(40)]
    assert len({str(row["input_ids"].tolist()) for row in expected}) > 20
    for i in (39, 0, 17, 18, 3):
        assert same(rows[i], expected[i]), "back and forth"
        fresh, _ = rows_of(tokenizer, tmp_path / f"new{i}")
        assert same(fresh[i], expected[i]), "without notes"
        noted, _ = rows_of(tokenizer, tmp_path / "a")
        assert same(noted[i], expected[i]), "with them"
    with pytest.raises(IndexError):
        rows[40]


def test_going_on_tokenises_nothing_again(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, _ = rows_of(tokenizer, tmp_path)
    expected = [rows[i] for i in range(40)]
    encoded: list[str] = []
    original = stream.encode_documents

    def counted(tokenizer: Any, documents: Any, **options: Any) -> Any:
        return original(tokenizer, (encoded.append(d.id) or d for d in documents), **options)  # type: ignore[func-returns-value]

    monkeypatch.setattr(stream, "encode_documents", counted)
    later, domains = rows_of(tokenizer, tmp_path)
    assert same(later[38], expected[38])
    assert len(encoded) < sum(domain.read for domain in domains) / 2


def test_rows_hold_the_domains_documents_in_equal_shares(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows, _ = rows_of(tokenizer, tmp_path)
    shares = {"ka": 0, "mi": 0}
    for i in range(len(rows)):
        row = rows[i]
        starts = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), T]
        for start, end in pairwise(starts):
            text = tokenizer.decode(row["input_ids"][start:end])
            for name in shares:
                shares[name] += (end - start) * text.startswith(name)
        assert (row["labels"][starts[:-1]] == IGNORED).all()
    assert shares["mi"] > 400
    assert shares["ka"] > 200, "later pieces of its long documents do not begin with its name"


def test_another_process_opens_its_own_files(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows, _ = rows_of(tokenizer, tmp_path)
    expected = torch.stack([rows[i]["input_ids"] for i in range(12)])
    _ = rows[3]  # a state half way through that must not be taken along
    batches = [b["input_ids"] for b in DataLoader(rows, batch_size=4, num_workers=1)][:3]
    assert torch.equal(torch.cat(batches), expected)


def train(values: dict[str, Any], **options: Any) -> dict[str, Any]:
    output = run(make_recipe(values), console=Console(quiet=True), **options)
    return dict(json.loads((output / "run.json").read_text()))


@pytest.mark.parametrize("noted", [True, False])
def test_a_run_goes_on_with_the_same_losses(values: dict[str, Any], corpus: Path, tmp_path: Path, noted: bool) -> None:
    """Once from a streamed dataset, once from JSON lines without the notes of where windows begin."""
    values["data"] |= {"tokenise": "while_training", "cache": str(tmp_path / "tokens")}
    if noted:
        pytest.importorskip("datasets")
        (tmp_path / "dataset").mkdir()
        shutil.copy(corpus / "train.jsonl", tmp_path / "dataset")
        values["data"]["train"] = {"text": f"hf:{tmp_path}/dataset?id=id"}
    values |= {"save_every": 4, "gradient_accumulation": 2, "ttt": {"layers": "0::1", "chunk_size": C, "lr": 1.0}}
    whole = train(values)
    assert whole["data"]["train"] == {}
    assert not list((tmp_path / "tokens").rglob("train.*")), "no tokens of the training split are kept"
    half = tmp_path / "half"
    shutil.copytree(Path(values["output"]) / "checkpoints" / "checkpoint-4", half / "checkpoints" / "checkpoint-4")
    shutil.copy(Path(values["output"]) / "recipe.json", half)
    if not noted:
        (prepared,) = (tmp_path / "tokens").iterdir()
        shutil.rmtree(Prepared(prepared).directory / "windows")
    resumed = train(values | {"output": str(half)}, resume=True)
    curves = [[(e["loss"], e["grad_norm"]) for e in record["curve"]] for record in (whole, resumed)]
    assert len(curves[0]) == 8
    assert curves[0] == curves[1]


def test_bad_text_is_told_before_training(values: dict[str, Any], tmp_path: Path) -> None:
    made = prepare(make_recipe(values)).directory / "tokenizer"
    (tmp_path / "bad.jsonl").write_text('{"body": "x"}\n')
    values["data"] |= {"tokenise": "while_training", "train": {"text": f"jsonl:{tmp_path}/bad.jsonl"}}
    with pytest.raises(UserError, match=r'bad.jsonl, line 1: no "text"'):
        train(values | {"tokenizer": {"path": str(made)}})
    assert not (Path(values["output"]) / "checkpoints").exists()

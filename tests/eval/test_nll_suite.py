"""The nll suite: what a token is scored by, that nothing later or elsewhere changes it, and its classes and blocks."""

import gzip
import json
import lzma
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract.families import C, adapted, plain, tokens
from session.models import tokenizer

import inplace_ttt as ittt
from inplace_ttt.errors import UserError
from inplace_ttt.eval.nll import doubling
from inplace_ttt.eval.suites.nll import CLASSES, NllSuite, token_classes, window_losses
from inplace_ttt.eval.suites.texts import EvalText, load_texts


def documents(*lengths: int) -> list[EvalText]:
    return [EvalText(f"d{i}", "random", tokens(1, n, i)[0].numpy().astype(np.int32)) for i, n in enumerate(lengths)]


def repetitive() -> list[EvalText]:
    """One document with tokens of all classes."""
    return [EvalText("d0", "random", documents(45)[0].ids % 11)]


def suite(found: list[EvalText] | None = None, **changes: Any) -> NllSuite:
    values: dict[str, Any] = {"length": 20, "edges": [0, 8, 20], "contexts": [4, 8, 16], "block": 6, "window": 6}
    return NllSuite(found or documents(45, 23), **(values | changes))


def records(found: NllSuite, model: Any) -> dict[str, list[Any]]:
    return {unit.key: found.measure(model, unit) for unit in found.units()}


def sums(found: dict[str, list[Any]]) -> list[float]:
    return [record["loss_sum"] for rows in found.values() for record in rows]


def direct(model: Any, ids: np.ndarray) -> np.ndarray:
    """Losses from one call without a cache."""
    with torch.no_grad():
        logits = model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0, :-1]
    return -logits.log_softmax(-1).numpy()[np.arange(len(ids) - 1), ids[1:]]


def test_units_cover_windows_and_contexts() -> None:
    units = suite().units()
    assert [(unit.key, unit.tokens) for unit in units] == [
        *[("window/d0/0", 20), ("window/d0/1", 20), ("sliding/d0/4", 10), ("sliding/d0/8", 14), ("sliding/d0/16", 22)],
        *[("window/d1/0", 20), ("sliding/d1/4", 10), ("sliding/d1/8", 14), ("sliding/d1/16", 22)],
    ]
    assert not [unit for unit in suite(windows=0).units() if unit.key.startswith("window")]
    assert doubling(2048) == [256, 512, 1024, 2048]


@pytest.mark.parametrize("updates", [True, False])
def test_window_records_match_direct_losses(updates: bool) -> None:
    model = adapted("llama") if updates else plain("llama")
    found, ids = suite(repetitive()), repetitive()[0].ids[20:40]
    losses, rows = direct(model, ids), found.measure(model, found.units()[1])
    by = {(row["kind"], row.get("start", row.get("class"))): row for row in rows}
    assert {row["document"] for row in rows} == {"d0"}
    assert by["document", None]["tokens"] == 19
    assert by["document", None]["loss_sum"] == pytest.approx(losses.sum(), rel=1e-6)
    # The first token has no loss, so losses[t] is that of position t + 1.
    assert by["position", 0]["loss_sum"] == pytest.approx(losses[:7].sum(), rel=1e-6)
    assert by["position", 8]["loss_sum"] == pytest.approx(losses[7:].sum(), rel=1e-6)
    classes = np.array([CLASSES[number] for number in token_classes(ids, 6)])
    for label in set(classes[1:]):
        expected = losses[classes[1:] == label].sum()
        assert by["class", label]["loss_sum"] == pytest.approx(expected, rel=1e-6)
    for kind in ("position", "class"):
        assert sum(row["tokens"] for row in rows if row["kind"] == kind) == 19
        assert sum(row["loss_sum"] for row in rows if row["kind"] == kind) == pytest.approx(losses.sum(), rel=1e-6)
    json.dumps(rows)


def test_sliding_perplexity_scores_one_block_after_each_context() -> None:
    model, ids = adapted("llama"), documents(45)[0].ids
    found = suite()
    for k in (4, 8, 16):
        (row,) = next(found.measure(model, unit) for unit in found.units() if unit.key == f"sliding/d0/{k}")
        expected = direct(model, ids[45 - 6 - k :])[-6:].sum()
        assert (row["kind"], row["context"], row["tokens"]) == ("sliding", k, 6)
        assert row["loss_sum"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("window", [1, 5, 300])
def test_classes_match_a_loop(window: int) -> None:
    draw = random.Random(window)
    ids = np.array([draw.choice([draw.randrange(5), draw.randrange(400)]) for _ in range(500)])
    expected = []
    for t, token in enumerate(ids):
        near, before = token in ids[max(t - window, 0) : t], token in ids[:t]
        expected.append(0 if near else 1 if before else 2)
    assert token_classes(ids, window).tolist() == expected
    assert set(expected) == {0, 1, 2}


def test_nothing_later_changes_an_earlier_loss() -> None:
    model = adapted("llama")
    ids = tokens(1, 40)[0].numpy()
    losses = window_losses(model, ids, 16)
    for position in (C, 13, 16, 33, 39):
        changed = ids.copy()
        changed[position:] = tokens(1, 40, 9)[0].numpy()[position:]
        changed[position] = ids[position] % 90 + 1
        after = window_losses(model, changed, 16)
        assert (after[: position - 1] == losses[: position - 1]).all()
        assert (after[position - 1 :] != losses[position - 1 :]).all()


def test_units_are_isolated() -> None:
    model, found = adapted("llama"), suite()
    forward = records(found, model)
    backward = {unit.key: found.measure(model, unit) for unit in reversed(found.units())}
    alone = records(suite(documents(45, 23)[1:]), model)
    assert forward == backward
    assert alone == {key: forward[key] for key in alone}


def test_lr_zero_is_updates_off() -> None:
    model = adapted("llama")
    on = sums(records(suite(), model))
    with ittt.updates_off(model):
        off = sums(records(suite(), model))
    ittt.set_lr(model, 0.0)
    zero = sums(records(suite(), model))
    assert zero == pytest.approx(off, rel=1e-6)
    assert max(abs(a - b) for a, b in zip(on, off, strict=True)) > 0.1


@pytest.mark.parametrize("piece", [1, 3, C, 7])
def test_piece_changes_nothing(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("mistral")
    whole = sums(records(suite(), model))
    assert sums(records(suite(piece=piece), model)) == pytest.approx(whole, rel=1e-6)
    monkeypatch.setattr("inplace_ttt.eval.suites.nll.MOST_LOGITS", 97 * piece + 96)
    sizes = set()
    handle = model.register_forward_pre_hook(lambda m, a, k: sizes.add(k["input_ids"].shape[1]), with_kwargs=True)
    assert sums(records(suite(), model)) == pytest.approx(whole, rel=1e-6)
    handle.remove()
    assert max(sizes) == piece


def test_training_mode_comes_back() -> None:
    model = plain("llama").train()
    records(suite(), model)
    assert model.training


def test_wrong_sizes_are_refused() -> None:
    for changes in ({"length": 1}, {"block": 0}, {"windows": -1}, {"edges": [0, 5, 5]}, {"contexts": [0]}):
        with pytest.raises(UserError):
            suite(**changes)
    with pytest.raises(UserError, match="no document has the 99 tokens"):
        suite(length=99, contexts=[99])
    with pytest.raises(UserError, match="same name"):
        suite(documents(30) * 2)


# -- documents --------------------------------------------------------------------------------------------------------


def test_load_texts_reads_every_kind_of_source(tmp_path: Path) -> None:
    text, folder = "A whale <|endoftext|> said \N{WHALE}.\n", tmp_path / "code"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "b.py").write_text("x = 1\n")
    (folder / "a.txt").write_text(text, encoding="utf-8")
    (folder / "empty.py").write_text("")
    (folder / "picture.png").write_bytes(b"\x89\0")
    line = json.dumps({"text": text, "id": "one", "domain": "prose"}) + "\n\n" + json.dumps({"text": "more"}) + "\n"
    (tmp_path / "x.jsonl.xz").write_bytes(lzma.compress(line.encode()))
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(b'{"text": "more"}'))
    found = load_texts([folder, tmp_path / "x.jsonl.xz"], tokenizer())
    assert [(d.name, d.domain) for d in found] == [
        (str(folder / "a.txt"), "code"),
        (str(folder / "deep" / "b.py"), "code"),
        ("one", "prose"),
        (f"{tmp_path / 'x.jsonl.xz'}:3", "text"),
    ]
    assert tokenizer().decode(found[0].ids) == tokenizer().decode(found[2].ids) == text
    assert tokenizer().eos_token_id not in found[0].ids
    assert len(load_texts([tmp_path / "y.jsonl.gz"], tokenizer(), tokens=1)[0].ids) == 1


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.txt", None, "no such file"),
        ("a.jsonl", None, "no such file"),
        ("a.txt", b" \n", "is empty"),
        ("a.jsonl", b"", "is empty"),
        ("a.txt", b"a\0b", "binary"),
        ("a.jsonl", b"a\0b", "binary"),
        ("a.txt", b"caf\xe9 is", "not UTF-8"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"tex": 1}', 'line 2: no "text"'),
        ("a.jsonl", b"{", "line 1: not JSON"),
        ("a.jsonl", b'{"text": " "}', "empty"),
        ("a.jsonl.xz", b"nothing of the kind", "cannot be read"),
        ("a.jsonl.gz", b"nothing of the kind", "cannot be read"),
        ("folder", None, "no text files"),
    ],
)
def test_load_texts_says_what_is_wrong(tmp_path: Path, name: str, data: bytes | None, said: str) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=said) as error:
        load_texts([path], tokenizer())
    assert "\n" not in str(error.value)


def test_load_texts_refuses_two_of_a_name(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("whale")
    with pytest.raises(UserError, match="second document"):
        load_texts([path, path], tokenizer())
    with pytest.raises(UserError, match="no documents"):
        load_texts([], tokenizer())

"""Associative recall: what a document is made of, what a question is scored by, and mistakes."""

from typing import Any

import numpy as np
import pytest
import torch
from session.models import TEXT, ids_of, tiny, tokenizer

import inplace_ttt as ittt
from inplace_ttt.errors import UserError
from inplace_ttt.eval.suites import mqar
from inplace_ttt.eval.suites.mqar import RecallSuite
from inplace_ttt.eval.suites.texts import EvalText


def build(**changes: Any) -> RecallSuite:
    ids = ids_of(TEXT) * 4
    documents = [EvalText(f"book {i}", "books", np.array(ids[i:], np.int32)) for i in range(2)]
    values: dict[str, Any] = {"lengths": (96, 160), "pairs": (3, 8), "trials": 3}
    return RecallSuite(tokenizer(), documents, **(values | changes))


def test_every_key_is_asked_for_once_after_the_text() -> None:
    suite = build()
    assert [unit.key for unit in suite.units()] == ["96/3", "96/8", "160/3", "160/8"]
    text = set(ids_of(TEXT))
    for unit in suite.units():
        length, pairs = map(int, unit.key.split("/"))
        assert unit.tokens == 3 * length
        orders = set()
        for trial in range(3):
            name, ids, order = suite.document(unit, trial)
            assert name == f"book {trial % 2}"
            assert len(ids) == length
            assert sorted(order) == list(range(pairs))
            told, asked = ids[: 2 * pairs], ids[-2 * pairs :]
            assert len({*told}) == 2 * pairs
            assert not text & {*told}
            assert asked == [token for i in order for token in told[2 * i : 2 * i + 2]]
            assert {*ids[2 * pairs : -2 * pairs]} <= text
            orders.add(tuple(order))
        assert len(orders) > 1
    assert suite.document(suite.units()[0], 0) == build().document(suite.units()[0], 0), "the seed decides"
    assert suite.document(suite.units()[0], 0) != build(seed=1).document(suite.units()[0], 0)


@pytest.mark.parametrize("updates", [True, False])
def test_figures_are_those_of_one_call_without_a_cache(updates: bool) -> None:
    """Rows side by side and pieces change nothing; updates, with chunks that end among the questions, do."""
    model, suite, pairs, first = tiny("llama"), build(piece=40), 8, 96 - 16
    unit = suite.units()[1]
    with torch.no_grad() if updates else ittt.updates_off(model):
        records = suite.measure(model, unit)
        assert len(records) == 3 * pairs
        for trial in range(3):
            name, ids, order = suite.document(unit, trial)
            with torch.no_grad():
                logits = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
            for place, record in enumerate(records[trial * pairs : (trial + 1) * pairs]):
                scores, i = logits[first + 2 * place, ids[1 : 2 * pairs : 2]], order[place]
                assert record["log_probability"] == pytest.approx(float(scores[i]), abs=1e-5)
                assert record["rank"] == int((scores > scores[i]).sum())
                assert record["correct"] == (record["rank"] == 0)
                assert record["distance"] == first + 2 * place - 2 * i
                assert (record["document"], record["trial"], record["chance"]) == (name, trial, 1 / 8)
    assert any(record["rank"] > 0 for record in records)


def test_tables_and_sentences() -> None:
    rows = [
        {
            "suite": "mqar",
            "variant": variant,
            "document": f"{i}",
            "pairs": 8,
            "length": length,
            "correct": int(i < right),
        }
        for variant, right in (("on", 9), ("off", 3))
        for length in (96, 160)
        for i in range(10)
    ]
    found = mqar.tables(rows)
    assert [(r["variant"], r["value"]) for r in found["recall"]] == [
        ("on", pytest.approx(0.9)),
        ("off", pytest.approx(0.3)),
    ]
    assert [r["length"] for r in found["recall by length"]] == [96, 96, 160, 160]
    (line,) = mqar.verdicts(found)
    assert line.startswith("Recall, 8 pairs: 90% right with updates, +60 points (95% interval +")
    assert list(mqar.figures(found, {})) == ["recall"]
    assert mqar.tables([]) == mqar.figures({}, {}) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": (20, 160)}, "20 tokens have no room for 8 pairs"),
        ({"lengths": (10_000,)}, "no document has the 10,000 tokens"),
        ({"pairs": (1,)}, "from 2 on"),
        ({"lengths": (40_000,), "pairs": (9_000,)}, "no document"),
    ],
)
def test_mistakes_are_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**changes)


def test_too_few_unused_words() -> None:
    suite = build(lengths=(400,), pairs=(100,))
    suite._words = suite._words[:150]
    with pytest.raises(UserError, match="words that the text does not use, 200 needed"):
        suite.document(suite.units()[0], 0)

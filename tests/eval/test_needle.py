"""The needle suite: what is planted where, what a question is scored by, and that nothing else matters."""

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from contract.families import adapted, plain
from session.models import TEXT, ids_of, shipped, tiny, tokenizer
from torch import nn

import inplace_ttt as ittt
from inplace_ttt.errors import UserError
from inplace_ttt.eval.suites import Record, Unit
from inplace_ttt.eval.suites.needle import KINDS, NeedleSuite
from inplace_ttt.eval.suites.texts import EvalText, words

TEMPLATE = " The{key} was{value}."


def documents(count: int = 2) -> list[EvalText]:
    ids = ids_of(TEXT) * 4
    return [EvalText(f"book {i}", "books", np.array(ids[i:], np.int32)) for i in range(count)]


def build(**changes: Any) -> NeedleSuite:
    values: dict[str, Any] = {"lengths": (90, 140), "depths": (0.0, 0.5, 1.0), "trials": 2, "template": TEMPLATE}
    values |= {"mentions": 2, "spacing": 3, "several": 2, "candidates": 5}
    return NeedleSuite(tokenizer(), **({"documents": documents()} | values | changes))


@cache
def suite() -> NeedleSuite:
    return build()


def some(found: NeedleSuite, trial: int = 0) -> list[Unit]:
    """One unit of each kind, at different lengths and depths."""
    keys = [f"{kind}/{140 if i % 2 else 90}/{(0, 0.5, 1)[i % 3]:g}/{trial}" for i, kind in enumerate(KINDS)]
    return [unit for unit in found.units() if unit.key in keys]


def measured(found: NeedleSuite, model: Any) -> list[Record]:
    return [row for unit in some(found) for row in found.measure(model, unit)]


def figures(rows: list[Record]) -> list[float]:
    return [row[name] for row in rows for name in ("log_probability", "gain")]


def log_probabilities(model: nn.Module, ids: list[int]) -> torch.Tensor:
    """[T, V] from one call without a cache."""
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return found


def test_facts_stand_where_the_depth_says() -> None:
    found = suite()
    assert len(found.units()) == len(KINDS) * 2 * 3 * 2
    for unit in found.units():
        kind, length, depth, _ = unit.key.split("/")
        needle = found.needle(unit)
        assert len(needle.ids) == unit.tokens == int(length)
        answers = {question.choices[0] for question in needle.questions}
        assert len(answers) == len(needle.questions) == {"multi-value": 2, "multi-query": 2}.get(kind, 1)
        text = set(documents()[0].ids.tolist())
        for question in needle.questions:
            assert len(question.choices) == len(set(question.choices)) == 5
            assert not text & set(question.choices)
            places = [i for i, token in enumerate(needle.ids) if token == question.choices[0]]
            assert len(places) == 2
            assert question.distance == len(needle.ids) - places[-1] - 1
            for place in places:
                assert needle.ids[place - len(question.ids) : place] == question.ids
            others = answers - {question.choices[0]} if kind == "multi-value" else set()
            assert not others & set(question.choices)
            planted = [choice for choice in question.choices[1:] if choice in needle.ids]
            assert len(planted) == (1 if kind in ("multi-key", "multi-query") else 0)
        first = min(needle.ids.index(answer) for answer in answers)
        if depth == "0":
            assert first <= len(needle.questions[0].ids) + 2 * 8
        if depth == "1":
            assert min(question.distance or 0 for question in needle.questions) <= 12
    half = found.needle(next(unit for unit in found.units() if unit.key == "single/140/0.5/0"))
    assert 55 < half.ids.index(half.questions[0].choices[0]) < 85


def test_words_of_the_text_are_not_planted() -> None:
    used = words(tokenizer())[:-40]
    found = build(documents=[EvalText("all words", "books", np.array(used, np.int32))], lengths=(len(used),))
    for unit in found.units():
        needle = found.needle(unit)
        for question in needle.questions:
            assert not set(used) & set(question.choices)
            assert question.ids[-2] not in used


def test_haystack_without_facts_is_the_text() -> None:
    found, ids = build(mentions=0), documents()[0].ids.tolist()
    needle = found.needle(found.units()[0])
    assert any(needle.ids == ids[at : at + len(needle.ids)] for at in range(len(ids)))
    assert needle.questions[0].distance is None


@pytest.mark.parametrize("updates", [True, False])
def test_scores_match_one_call_over_document_and_question(updates: bool) -> None:
    found = suite()
    model = tiny("llama") if updates else plain("llama", changes={"vocab_size": len(tokenizer())})
    for unit in some(found):
        needle, rows = found.needle(unit), found.measure(model, unit)
        assert len(rows) == len(needle.questions)
        for question, row in zip(needle.questions, rows, strict=True):
            read = log_probabilities(model, needle.ids + question.ids)[-1, question.choices]
            unread = log_probabilities(model, question.ids)[-1, question.choices]
            assert row["log_probability"] == pytest.approx(float(read[0]), rel=1e-9)
            assert row["gain"] == pytest.approx(float(read[0] - unread[0]), rel=1e-8)
            assert row["rank"] == int((read[1:] >= read[0]).sum())
            assert row["gain_rank"] == int(((read - unread)[1:] >= (read - unread)[0]).sum())
            assert (row["correct"], row["gain_correct"]) == (int(row["rank"] == 0), int(row["gain_rank"] == 0))
            assert row["chance"] == 0.2
        json.dumps(rows)


def test_answer_after_the_question_changes_nothing() -> None:
    """The model never reads past a question, and what stands there could not change the scores, bit for bit."""
    found, model = suite(), tiny("llama")
    unit = some(found)[0]
    needle = found.needle(unit)
    (question,) = needle.questions
    calls: list[list[int]] = []
    handle = model.register_forward_pre_hook(lambda m, a, k: calls.append(k["input_ids"][0].tolist()), with_kwargs=True)
    found.measure(model, unit)
    handle.remove()
    assert sorted(calls, key=len) == [question.ids, question.ids, needle.ids]
    ids, at = needle.ids + question.ids, len(needle.ids) + len(question.ids)
    planted = log_probabilities(model, ids + question.choices[:1] * 9)
    other = log_probabilities(model, ids + question.choices[1:2] * 9)
    assert (planted[:at] == other[:at]).all()
    assert (planted[at:] != other[at:]).any()


def test_without_mentions_the_answer_is_not_told_apart() -> None:
    found, model = build(mentions=0, trials=1), tiny("llama")
    for unit in some(found):
        needle = found.needle(unit)
        assert not {question.choices[0] for question in needle.questions} & set(needle.ids)
        assert len(found.measure(model, unit)) == len(needle.questions)


def test_units_and_questions_are_isolated() -> None:
    found, model = suite(), tiny("llama")
    units = some(found)
    forward = {unit.key: found.measure(model, unit) for unit in units}
    backward = {unit.key: build().measure(model, unit) for unit in reversed(units)}
    assert forward == backward
    several = next(unit for unit in units if unit.key.startswith("multi-query"))
    needle = found.needle(several)
    needle.questions.reverse()
    found.needle = lambda unit: needle  # type: ignore[method-assign]
    try:
        assert found.measure(model, several) == forward[several.key][::-1]
    finally:
        del found.needle


def test_lr_zero_is_updates_off() -> None:
    found = suite()
    model = adapted("llama", changes={"vocab_size": len(tokenizer())})
    on = figures(measured(found, model))
    with ittt.updates_off(model):
        off = figures(measured(found, model))
    ittt.set_lr(model, 0.0)
    assert figures(measured(found, model)) == pytest.approx(off, rel=1e-10)
    assert max(abs(a - b) for a, b in zip(on, off, strict=True)) > 0.1


@pytest.mark.parametrize(("family", "piece"), [("llama", 1), ("gemma3_text", 7)])
def test_piece_changes_nothing(family: str, piece: int) -> None:
    whole = figures(measured(suite(), tiny(family)))
    assert figures(measured(build(piece=piece), tiny(family))) == pytest.approx(whole, rel=1e-9)


def test_seed_decides() -> None:
    assert [suite().needle(u) for u in suite().units()] == [build().needle(u) for u in build().units()]
    unit = suite().units()[0]
    mine, other = suite().needle(unit), build(seed=1).needle(unit)
    assert mine.ids != other.ids
    short = [EvalText("short", "books", documents()[0].ids[:140])]  # leaves no choice of the stretch
    same, different = (build(documents=short, seed=seed).needle(unit).questions[0] for seed in (0, 1))
    assert same.choices != different.choices
    names = [suite().needle(u).document for trial in (0, 1) for u in some(suite(), trial)]
    assert set(names) == {"book 0", "book 1"}


def test_shipped_model_finds_what_it_can_see() -> None:
    found = NeedleSuite(tokenizer(), documents(1), [320], [1.0], ["single"], 6, mentions=8)
    rows = [row for unit in found.units() for row in found.measure(shipped(torch.float32), unit)]
    assert np.mean([row["gain"] for row in rows]) > 2
    assert np.mean([row["gain_correct"] for row in rows]) >= 0.5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kinds": ["double"]}, "double"),
        ({"lengths": []}, "length"),
        ({"lengths": [0], "mentions": 0}, "length"),
        ({"trials": 0}, "trial"),
        ({"depths": []}, "depths"),
        ({"depths": [1.5]}, "depths"),
        ({"several": 5}, "several < candidates"),
        ({"lengths": [24]}, "no room"),
        ({"lengths": [100_000]}, "no document has"),
        ({"template": "{value} is {key}"}, "template"),
        ({"candidates": 9000}, "words"),
    ],
)
def test_impossible_tasks_are_refused(changes: dict[str, Any], said: str) -> None:
    def first() -> None:
        found = build(**changes)
        found.needle(found.units()[0])

    with pytest.raises(UserError, match=said):
        first()

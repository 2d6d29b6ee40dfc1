"""The theory suite: what stands where, changes of logits against models built for the targets, and what they show."""

from typing import Any

import numpy as np
import pytest
import torch
from contract.families import adapted
from session.models import TEXT, ids_of, shipped, tiny, tokenizer

import inplace_ttt as ittt
from inplace_ttt.errors import UserError
from inplace_ttt.eval.report import pictures, tables, verdicts
from inplace_ttt.eval.suites import Record
from inplace_ttt.eval.suites.texts import EvalText
from inplace_ttt.eval.suites.theory import TARGETS, TheorySuite
from inplace_ttt.hf.attach import runtime_of

C = 16


def suite(chunk_size: int = C, trials: int = 2, **options: Any) -> TheorySuite:
    documents = [EvalText(f"d{i}", "books", np.array(ids_of(TEXT * 2)[i:], np.int32)) for i in (0, 3)]
    return TheorySuite(tokenizer(), documents, chunk_size, trials=trials, **options)


def measured(found: TheorySuite, model: Any, unit: int = 0) -> dict[str, Record]:
    return {record["target"]: record for record in found.measure(model, found.units()[unit])}


def change(model: Any, ids: list[int], choices: list[int]) -> torch.Tensor:
    """Logits of the candidates after ``ids``, updates on minus off."""
    with torch.no_grad():
        on = model(torch.tensor([ids]), use_cache=False).logits[0, -1, choices]
        with ittt.updates_off(model):
            return on - model(torch.tensor([ids]), use_cache=False).logits[0, -1, choices]


def test_the_pair_stands_once_and_the_key_comes_again_after_one_update() -> None:
    found = suite(trials=6)
    for number, unit in enumerate(found.units()):
        ids, choices = found.pair(unit)
        text = ids_of(TEXT * 2)[3 * (number % 2) :]
        key, value = ids[-1], choices[0]
        place = ids.index(key)
        assert ids[place + 1] == value
        assert C // 4 <= place < 3 * C // 4
        assert (ids.count(key), ids.count(value)) == (2, 1)
        assert C < len(ids) == C + C // 2 + 1 < 2 * C
        assert not set(choices[1:]) & set(ids)
        assert len({key, *choices}) == 11
        if number < 2:
            assert ids[:place] == text[:place]
            assert ids[place + 2 : -1] == text[place + 2 : C + C // 2]


def test_no_other_target_takes_the_place_of_the_loss() -> None:
    """Measuring the theorem's targets there would give the model's own figures three times."""
    model = ittt.detach(adapted("llama", changes={"vocab_size": len(tokenizer())}, chunk_size=C))
    ittt.attach(model, ittt.InPlaceTTTConfig(objective="loss", chunk_size=C))
    found = measured(suite(), model)
    assert list(found) == ["own"]
    said = verdicts(tables([{**found["own"], "suite": "theory", "variant": "on"}]))
    assert [line.split(":")[0] for line in said] == ["Theorem 1, the model's own target"]


def test_own_target_is_the_model_as_it_is() -> None:
    found, model = suite(), tiny("llama")
    ids, choices = found.pair(found.units()[1])
    record = measured(found, model, 1)["own"]
    expected = change(adapted("llama", changes={"vocab_size": len(tokenizer())}, chunk_size=C), ids, choices)
    assert record["right"] == pytest.approx(float(expected[0]), rel=1e-9)
    assert record["others"] == pytest.approx(float(expected[1:].mean()), rel=1e-9)
    assert record["margin"] == pytest.approx(record["right"] - record["others"])
    assert record["won"] == int(expected.argmax() == 0)
    assert abs(record["margin"]) > 1e-4


@pytest.mark.parametrize("objective", TARGETS[1:])
def test_fixed_targets_are_those_of_a_model_made_for_them(objective: str) -> None:
    """With one layer, a model attached with that objective, its projection scaled to the same size of update."""
    changes = {"vocab_size": len(tokenizer())}
    own = adapted("llama", changes=changes, layers="1:2", chunk_size=C)
    made = adapted("llama", changes=changes, layers="1:2", chunk_size=C, objective=objective)
    (site,) = runtime_of(made).sites
    found = suite()
    ids, choices = found.pair(found.units()[0])
    site.mlp.ttt_proj.weight.data = torch.eye(32, dtype=torch.float64)
    with torch.no_grad():
        ratio = found._update_norms(own, ids)[1] / found._update_norms(made, ids)[1]
    site.mlp.ttt_proj.weight.data *= ratio
    expected = change(made, ids, choices)
    record = measured(found, own)[objective]
    assert record["right"] == pytest.approx(float(expected[0]), rel=1e-9)
    assert record["others"] == pytest.approx(float(expected[1:].mean()), rel=1e-9)


def test_the_model_stays_as_it_was() -> None:
    model = tiny("llama")
    parameters = {name: p.clone() for name, p in model.named_parameters()}
    settings, runtime = ittt.fast_settings(model), runtime_of(model)
    before = runtime.config
    first = measured(suite(), model)
    assert measured(suite(), model) == first
    assert (ittt.fast_settings(model), runtime.config, runtime.enabled) == (settings, before, True)
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys()
    assert all((after[name] == value).all() for name, value in parameters.items())


def test_without_a_step_nothing_changes() -> None:
    model = adapted("llama", changes={"vocab_size": len(tokenizer())})
    ittt.set_lr(model, 0.0)
    for record in measured(suite(), model).values():
        assert record["right"] == pytest.approx(0, abs=1e-12)
        assert record["others"] == pytest.approx(0, abs=1e-12)


def test_the_theorem_on_the_shipped_model() -> None:
    found = suite(64, 4)
    records = [record for unit in found.units() for record in found.measure(shipped(torch.float32), unit)]
    margin = {target: np.mean([r["margin"] for r in records if r["target"] == target]) for target in TARGETS}
    assert margin["own"] > 0.05
    assert margin["next_token"] > 0.05
    assert margin["reconstruction"] < margin["next_token"] / 2


def test_the_report_says_it() -> None:
    figures = {"right": 0.3, "others": 0.1, "margin": 0.2, "won": 1}
    records = [
        {"suite": "theory", "variant": "on", "unit": f"pair/{d}", "document": d, "target": target, **figures}
        for d in "ab"
        for target in TARGETS
    ]
    found = tables(records)
    said = verdicts(found)
    assert "next-token target: one update moved the logit of the word that followed by +0.300" in said[1]
    assert "margin +0.200 (95% interval +0.200 to +0.200, n = 2)" in said[2]
    assert "theory" in pictures(found, {"model": "m"})


def test_what_cannot_be_measured_is_refused() -> None:
    model = adapted("llama", changes={"vocab_size": len(tokenizer())})
    for site in runtime_of(model).sites:
        site.mlp.ttt_conv.weight.data.zero_()
    with pytest.raises(UserError, match="is zero"):
        measured(suite(), model)
    with pytest.raises(UserError, match="no document has the 15,000 tokens"):
        suite(10_000)
    with pytest.raises(UserError, match="a gap below"):
        suite(gap=C)
    found = suite(candidates=100_000)
    with pytest.raises(UserError, match="words"):
        found.pair(found.units()[0])

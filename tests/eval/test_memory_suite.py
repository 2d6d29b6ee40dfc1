"""read-then-ask and diagnostics as suites: the functions' own figures, unit by unit."""

import pytest
import torch
from session.models import shipped, tokenizer

import inplace_ttt as ittt
from inplace_ttt.eval.suites.diagnostics import StateSuite
from inplace_ttt.eval.suites.nll import NllSuite
from inplace_ttt.eval.suites.read_then_ask import MemorySuite, Task, trial
from inplace_ttt.eval.suites.texts import EvalText, stretches, tokenize, words
from inplace_ttt.hf.context import fast_weights
from inplace_ttt.session.diagnostics import measure

TEXT = "The sea was calm and the boat lay still upon it, and no one spoke of what had been seen there. " * 30


def documents(n: int = 2) -> list[EvalText]:
    return [EvalText(f"d{i}", "sea", tokenize(tokenizer(), TEXT[i * 7 :])) for i in range(n)]


def test_a_trial_is_the_functions_trial():
    suite = MemorySuite(tokenizer(), documents(), mentions=(4,), distances=(64,), length=256, trials=2)
    model = shipped(torch.float32)
    assert [unit.key for unit in suite.units()] == ["4 mentions/64 tokens/0", "4 mentions/64 tokens/1"]
    for seed, unit in enumerate(suite.units()):
        records = {r["condition"]: r for r in suite.measure(model, unit)}
        document = documents()[seed]
        task = Task(4, 256, 64, "\nCaptain{name} said")
        session = ittt.Session(model, probe_every=0)
        answer = trial(session, tokenizer(), document.ids[:320].tolist(), task, seed, words(tokenizer()))
        for condition in ("none", "memory", "context"):
            assert records[condition]["document"] == document.name
            assert records[condition]["log_probability"] == pytest.approx(answer.log_probability[condition])
            assert records[condition]["correct"] == answer.preferred[condition]
        assert records["context"]["log_probability"] > records["none"]["log_probability"]


def test_stretches_take_the_beginning_of_every_document_first():
    found = list(stretches(documents(), 200))
    assert [name for name, _ in found[:4]] == ["d0", "d1", "d0", "d1"]
    assert found[2][1] == documents()[0].ids[200:400].tolist()
    assert all(len(ids) == 200 for _, ids in found)


def test_too_short():
    with pytest.raises(ittt.UserError, match="10,064 tokens"):
        MemorySuite(tokenizer(), documents(), distances=(64,), length=10_000)


def test_state_suite_measures_the_end_of_each_window():
    nll = NllSuite(documents(), 200, 2, contexts=[256], piece=70)
    suite, model = StateSuite(nll), shipped(torch.float32)
    assert [unit.key for unit in suite.units()] == ["window/d0/0", "window/d0/1", "window/d1/0", "window/d1/1"]
    records = suite.measure(model, suite.units()[1])
    with torch.no_grad():
        out = model(input_ids=torch.tensor([documents()[0].ids[200:400].tolist()]), use_cache=True)
    expected = measure(model, fast_weights(out.past_key_values))
    assert [r["layer"] for r in records] == [x.layer for x in expected]
    for record, want in zip(records, expected, strict=True):
        assert record["updates"] == 3
        for name in ("relative_norm", "effective_rank", "key_overlap"):
            assert record[name] == pytest.approx(getattr(want, name), rel=1e-3)

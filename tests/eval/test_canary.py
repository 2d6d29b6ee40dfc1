"""A canary for every suite: an answer planted after the question changes no figure, planted before it changes them.

Each suite measures a unit on a text, on the same text followed by the answer over and over, and on a text in which one
token before the question is another (so that the test would notice a change). In between the model reads the answer
elsewhere: nothing of another unit may be left.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract.families import adapted
from eval import local_tasks
from eval.local_tasks import TEXTS
from session.models import TEXT, ids_of, tiny, tokenizer

from inplace_ttt.eval.suites import Record, Suite
from inplace_ttt.eval.suites.diagnostics import StateSuite
from inplace_ttt.eval.suites.mqar import RecallSuite
from inplace_ttt.eval.suites.needle import NeedleSuite
from inplace_ttt.eval.suites.nll import NllSuite
from inplace_ttt.eval.suites.read_then_ask import MemorySuite
from inplace_ttt.eval.suites.texts import EvalText
from inplace_ttt.eval.suites.theory import TheorySuite

READ = 96
"""Tokens of the text that a unit reads, besides what it plants."""


def nll(documents: list[EvalText]) -> Suite:
    return NllSuite(documents, READ, contexts=[])


def needle(documents: list[EvalText]) -> Suite:
    cut = [EvalText(d.name, d.domain, d.ids[: 2 * READ]) for d in documents]
    return NeedleSuite(tokenizer(), cut, [READ, 2 * READ], [0.5], ["multi-key"], 1, mentions=2, several=2)


def recall(documents: list[EvalText]) -> Suite:
    return RecallSuite(tokenizer(), documents, [READ, 2 * READ], [4], 1)


def memory(documents: list[EvalText]) -> Suite:
    return MemorySuite(tokenizer(), documents, mentions=(2,), distances=(16,), length=READ - 16, trials=1)


def theory(documents: list[EvalText]) -> Suite:
    return TheorySuite(tokenizer(), documents, READ * 2 // 3, trials=1)


def diagnostics(documents: list[EvalText]) -> Suite:
    return StateSuite(NllSuite(documents, READ, contexts=[]))


def text(after: int | None = None, changed: int | None = None) -> list[EvalText]:
    """READ tokens, then as many others: the token ``after``, or more text. ``changed``: a place with another token."""
    ids = np.array(ids_of(TEXT * 3)[: 2 * READ], np.int32)
    if after is not None:
        ids[READ:] = after
    if changed is not None:
        ids[changed] = ids[changed] + 1
    return [EvalText("d", "sea", ids)]


@pytest.mark.parametrize("build", [nll, needle, recall, memory, theory, diagnostics])
def test_an_answer_after_the_question_changes_nothing(build: Callable[[list[EvalText]], Suite]) -> None:
    model = tiny("llama")
    plain = build(text())
    unit = plain.units()[0]
    expected = plain.measure(model, unit)
    for answer in answers(plain, unit):
        planted = build(text(after=answer))
        if build in (needle, recall):  # the long text, which begins like the short one, has the answer in it
            other = next(u for u in planted.units() if u.tokens == 2 * READ)
            planted.measure(model, other)
        else:
            for other in planted.units()[1:]:
                planted.measure(model, other)
        assert planted.measure(model, unit) == expected
    assert build(text(changed=3)).measure(model, unit) != expected


def answers(suite: Any, unit: Any) -> list[int]:
    """What is asked for: the planted word, else the token that comes next and one from the text."""
    if isinstance(suite, NeedleSuite):
        return [suite.needle(unit).questions[0].choices[0]]
    if isinstance(suite, RecallSuite):
        return [suite.document(unit, 0)[1][1]]
    if isinstance(suite, TheorySuite):
        return [suite.pair(unit)[1][0]]
    ids = text()[0].ids
    return [int(ids[READ]), int(ids[5])]


def test_a_token_is_scored_before_what_follows_it_is_seen() -> None:
    """Inside a window too, and inside a chunk: what comes after a position changes no loss up to it."""
    model = adapted("llama", changes={"vocab_size": len(tokenizer())}, chunk_size=16)
    for end in (40, 48, 49):
        ids = text()[0].ids[:READ].copy()
        leaked = ids.copy()
        leaked[end:] = ids[end - 1]
        rows = []
        for version in (ids, leaked):
            suite = NllSuite([EvalText("d", "sea", version)], READ, edges=[0, end, READ], contexts=[])
            found = suite.measure(model, suite.units()[0])
            rows.append({row["start"]: row["loss_sum"] for row in found if row["kind"] == "position"})
        assert rows[0][0] == rows[1][0]
        assert rows[0][end] != rows[1][end]


@pytest.mark.parametrize("task", ["local_rolling", "local_generate"])
def test_samples_of_the_harness_are_isolated(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other sample of a batch, and those before it, repeat the answer: a sample's scores and answers stay."""
    pytest.importorskip("lm_eval")
    from inplace_ttt.eval.harness import InPlaceTTTLM
    from inplace_ttt.eval.suites.harness import HarnessSuite, harness_suite

    written: list[str] = []
    own = InPlaceTTTLM.generate_until

    def spy(self: InPlaceTTTLM, requests: list[Any], *args: Any, **keywords: Any) -> list[str]:
        written.extend(found := own(self, requests, *args, **keywords))
        return found

    monkeypatch.setattr(InPlaceTTTLM, "generate_until", spy)

    def measure(name: str, first: str, other: str) -> tuple[Record, list[str]]:
        (tmp_path / name).mkdir()
        files = local_tasks.write(tmp_path / name, [first, other])
        suite: HarnessSuite = harness_suite(tokenizer(), [task], files=files, batch_size=2)
        written.clear()
        records = suite.measure(tiny("llama"), suite.units()[0])
        return next(r for r in records if r["document"].startswith(f"{task}/0/")), written[:1]

    expected = measure("plain", TEXTS[0], TEXTS[1])
    assert measure("planted", TEXTS[0], (TEXTS[0] + " ") * 3) == expected
    assert measure("changed", "night " + TEXTS[0], TEXTS[1]) != expected

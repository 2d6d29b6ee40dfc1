"""Read, then ask: what is planted, what each condition sees, and how answers are counted."""

import math
import sys

import pytest
import torch
from locations import ROOT
from session.models import ids_of, tiny, tokenizer

from inplace_ttt import Session, UserError
from inplace_ttt.eval.suites import read_then_ask
from inplace_ttt.eval.suites.read_then_ask import CONDITIONS, Task, trial
from inplace_ttt.eval.suites.texts import words

sys.path.insert(0, str(ROOT / "benchmarks"))
import read_then_ask as benchmark
from summarise_sessions import share

TEXT = [5 + (7 * i) % 200 for i in range(400)]
"""Byte and short tokens: none is a word that could be a name."""


def session(**options) -> Session:
    return Session(tiny("llama"), tokenizer(), **({"decay": 0.0, "probe_every": 0, "chunk_size": 4} | options))


def read_by(monkeypatch, task: Task, seed: int = 0) -> tuple[list[list[int]], read_then_ask.Answer]:
    """What a trial's sessions read, call by call."""
    seen: list[list[int]] = []
    own = Session.read

    def spy(self, source, **options):
        seen.append(list(source))
        return own(self, source, **options)

    monkeypatch.setattr(Session, "read", spy)
    return seen, trial(session(), tokenizer(), TEXT, task, seed, words(tokenizer()))


class TestWhatIsPlanted:
    @pytest.mark.parametrize(("mentions", "length", "distance"), [(1, 64, 0), (3, 100, 17), (8, 64, 200), (7, 7, 1)])
    def test_mentions_and_distances(self, monkeypatch, mentions, length, distance):
        seen, _ = read_by(monkeypatch, Task(mentions, length, distance))
        question, document = seen[0], seen[1]
        assert seen == [question, document, question, document, question]
        assert question == ids_of(" The name of the ship was")
        new = {*document} - {*TEXT} - {*question} - {*ids_of(".")}
        assert len(new) == 1
        (name,) = new
        sentence = [*question, name, *ids_of(".")]
        places = [i for i in range(len(document)) if document[i : i + len(sentence)] == sentence]
        assert document.count(name) == len(places) == mentions
        # The text itself is all there, in order, and the last mention stands ``distance`` tokens before the end.
        kept = [document[i] for i in range(len(document)) if not any(p <= i < p + len(sentence) for p in places)]
        assert kept == TEXT[: length + distance]
        assert len(document) - (places[-1] + len(sentence)) == distance
        before = [p - i * len(sentence) for i, p in enumerate(places)]  # tokens of text before each mention
        assert before == [round((i + 1) * length / mentions) for i in range(mentions)]

    def test_names_are_words_that_the_text_does_not_have(self):
        texts = [tokenizer().decode([token]) for token in words(tokenizer())]
        assert len(texts) > 100
        assert all(text[0] == " " and len(text) > 5 and text[1:].isalpha() for text in texts)

    def test_the_same_seed_gives_the_same_trial(self):
        task, known = Task(4, 64), words(tokenizer())
        one, again, other = (trial(session(), tokenizer(), TEXT, task, seed, known) for seed in (1, 1, 2))
        assert one == again
        assert one.log_probability != other.log_probability


class TestConditions:
    def test_memory_has_no_context(self):
        """Without an effect of the updates, nothing of a document that was dropped from the context is left."""
        known = words(tokenizer())
        plain = [trial(session(lr=0.0), tokenizer(), TEXT, Task(4, 64), seed, known).log_probability for seed in (0, 1)]
        for found in plain:
            assert found["memory"] == found["none"]
            assert abs(found["context"] - found["none"]) > 1e-3
        found = trial(session(), tokenizer(), TEXT, Task(4, 64), 0, known).log_probability
        assert abs(found["memory"] - found["none"]) > 1e-3

    def test_what_changes_nothing_is_recognised_by_chance(self):
        known = words(tokenizer())
        task = Task(1, 8, candidates=4)
        found = [trial(session(lr=0.0), tokenizer(), TEXT, task, seed, known) for seed in range(24)]
        share_of = sum(x.recognised["memory"] for x in found) / len(found)
        assert 0 < share_of < 0.6

    def test_the_session_stays_as_it_was(self):
        s = session()
        s.read(TEXT[:30])
        before, stats = s.next_logits, s.stats()
        trial(s, tokenizer(), TEXT, Task(2, 32), 0, words(tokenizer()))
        assert torch.equal(s.next_logits, before)
        assert s.stats() == stats

    def test_a_name_that_the_model_was_made_to_know(self, monkeypatch):
        """Recognised: of all candidates, reading raised it the most. Preferred: it is the most likely one."""
        task, known = Task(2, 32), words(tokenizer())
        seen, _ = read_by(monkeypatch, task)
        (name,) = {*seen[1]} - {*TEXT} - {*ids_of(" The name of the ship was.")}
        own = Session.next_logits.fget

        def raised(self):
            return own(self) + 9.0 * (torch.arange(len(tokenizer())) == name) * (self.stats().tokens > 20)

        monkeypatch.setattr(Session, "next_logits", property(raised))
        answer = trial(session(), tokenizer(), TEXT, task, 0, known)
        assert answer.recognised == {"memory": True, "context": True}
        assert answer.preferred["memory"]
        assert answer.log_probability["memory"] > answer.log_probability["none"] + 4
        assert set(answer.to_dict()["preferred"]) == set(CONDITIONS)


class TestAsk:
    def test_each_trial_reads_its_own_stretch(self, monkeypatch):
        stretches = []
        monkeypatch.setattr(benchmark, "trial", lambda s, t, text, task, seed, v: stretches.append((text, seed)))
        ticks: list[int] = []
        tasks = [Task(1, 60), Task(1, 60, 40)]
        list(
            benchmark.ask(
                tiny("llama"), tokenizer(), [TEXT[:130], TEXT[:50]], tasks, 3, progress=lambda: ticks.append(1)
            )
        )
        short, long = TEXT[:130], TEXT[:100]
        assert stretches == [(short[:60], 0), (short[60:120], 1), (short[:60], 2), (long, 0), (long, 1), (long, 2)]
        assert len(ticks) == 6

    def test_too_short(self):
        with pytest.raises(UserError, match="no document has the 60 tokens"):
            list(benchmark.ask(tiny("llama"), tokenizer(), [TEXT[:59]], [Task(1, 60)], 1))
        with pytest.raises(UserError, match="60 are needed"):
            trial(session(), tokenizer(), TEXT[:59], Task(1, 60), 0, words(tokenizer()))
        with pytest.raises(UserError, match="only 3 words"):
            trial(session(), tokenizer(), TEXT, Task(1, 60), 0, words(tokenizer())[:3])

    @pytest.mark.parametrize(
        "wrong",
        [
            {"mentions": 0},
            {"mentions": 5, "length": 4},
            {"distance": -1},
            {"candidates": 1},
            {"template": "no place for it"},
            {"template": "{name} was the ship"},
        ],
        ids=str,
    )
    def test_tasks_that_cannot_be_set(self, wrong):
        with pytest.raises(UserError):
            Task(**({"mentions": 1} | wrong))


class TestShare:
    @pytest.mark.parametrize(
        ("good", "n", "low", "high"),
        [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 10, 0.0179, 0.4042), (15, 30, 0.3315, 0.6685)],
    )
    def test_wilson(self, good, n, low, high):
        p, a, b = share([True] * good + [False] * (n - good))
        assert p == good / n
        assert (a, b) == pytest.approx((low, high), abs=1e-4)

    def test_nothing_asked_nothing_known(self):
        p, low, high = share([])
        assert math.isnan(p)
        assert (low, high) == (0.0, 1.0)

"""Suite ``needle``: a fact planted in a long text is asked for at its end, sized to models with small vocabularies.

A fact ties a key to a value, as in "The{key} Captain{value} said"; both are single tokens, words that the haystack does
not use. At the end of the document the sentence is begun again, up to the value, and the value competes
with other words. The document is read once; each question is put to a copy of the cache.
"""

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from transformers.cache_utils import DynamicCache

from ...errors import UserError
from .. import plots
from ..nll import doubling, evaluating, feed, new_cache
from ..paired import against_off, points, tables_of
from . import KINDS, Record, Tables, Unit, check_needles
from .nll import PIECE, piece_size
from .texts import EvalText, Haystacks, free_words, tokenize, words

CANDIDATES = 10
"""Number of candidate words for an answer."""
TEMPLATE = "\nThe{key} Captain{value} said"
"""A common word right before the value: a small model binds a rare name to it far better than to a rare key."""


@dataclass(frozen=True)
class Question:
    """``ids`` lead up to the answer. ``choices`` are the right answer, first, and the wrong ones.

    ``distance``: tokens of the document after the last mention of the answer, None if it was never mentioned.
    """

    ids: list[int]
    choices: list[int]
    distance: int | None


@dataclass(frozen=True)
class Needle:
    """Input of one unit: ``ids``, exactly the unit's length, and the questions, each asked on its own."""

    document: str
    ids: list[int]
    questions: list[Question]


class NeedleSuite:
    """Every kind of needle at every length and depth, ``trials`` times each.

    Kinds: "single": one fact. "multi-key": ``several`` facts, one of them is asked for, and the values of the others
    are among the wrong answers. "multi-value": one key with ``several`` values; each is an answer of its own, against
    wrong ones that were not mentioned. "multi-query": as "multi-key", with every key asked for.

    A fact is mentioned ``mentions`` times (0: a control, nothing is planted), with ``spacing`` tokens of haystack after
    each sentence. ``depth`` is where in the haystack all this stands: 0 is the beginning, 1 the end, right before the
    question. ``lengths`` count the whole document in tokens. A trial reads the same stretch of text in every kind and
    at every depth, of a document that has the largest length; everything depends on ``seed`` and the unit alone.

    One record per answer, with "document", "kind", "length", "depth", "mentions", "trial", "distance" and, by
    log-probability among ``candidates`` words (chance: one in ``candidates``, as "chance"),

    * "rank" (0 is the first) and "correct" (1 if first), "log_probability" [nats, of the whole vocabulary];
    * "gain" [nats]: what reading added to it, against the question alone; "gain_rank" and "gain_correct": place among
      the candidates by what reading added, which takes no account of how likely the words were beforehand.

    Raises UserError when no document is long enough, a length has no room for its facts, the template lacks {key} or
    {value}, or the vocabulary has too few words that the text does not use.
    """

    name = "needle"

    def __init__(
        self,
        tokenizer: Any,
        documents: Sequence[EvalText],
        lengths: Sequence[int] | None = None,
        depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
        kinds: Sequence[str] = KINDS,
        trials: int = 5,
        *,
        mentions: int = 6,
        spacing: int = 8,
        several: int = 3,
        candidates: int = CANDIDATES,
        template: str = TEMPLATE,
        seed: int = 0,
        piece: int = PIECE,
    ) -> None:
        self.lengths = list(doubling(4096, 512) if lengths is None else lengths)
        check_needles(kinds, depths, self.lengths)
        if not kinds or trials < 1:
            raise UserError("at least one kind of needle and one trial")
        if mentions < 0 or spacing < 0 or piece < 1 or not 1 <= several < candidates:
            raise UserError("mentions and spacing must not be negative, piece at least 1, 1 <= several < candidates")
        self.mentions, self.spacing, self.several, self.candidates = mentions, spacing, several, candidates
        self.seed, self.piece = seed, piece
        self._parts = _split(tokenizer, template)
        self._words = np.setdiff1d(words(tokenizer), [token for part in self._parts for token in part])
        self._haystacks = Haystacks(documents, max(self.lengths), seed)
        self._work = {
            f"{kind}/{length}/{depth:g}/{trial}": (kind, length, depth, trial)
            for trial in range(trials)
            for kind in kinds
            for length in self.lengths
            for depth in depths
        }
        sentence, shortest = len(self._sentence(0, 0)), min(self.lengths)
        sentences = mentions * (several if set(kinds) - {"single"} else 1)
        if (needed := sentences * (sentence + spacing)) > shortest:
            raise UserError(f"a haystack of {shortest:,} tokens has no room for {needed:,} of facts and their spacing")

    def units(self) -> Sequence[Unit]:
        """Return units trial by trial, so that a part of a run covers everything; ``tokens`` counts the document's."""
        return [Unit(key, length) for key, (_, length, _, _) in self._work.items()]

    def measure(self, model: nn.Module, unit: Unit) -> list[Record]:
        """Return one record per answer. Works with and without fast weights, updates on or off."""
        kind, length, depth, trial = self._work[unit.key]
        needle = self.needle(unit)
        about = {"document": needle.document, "kind": kind, "length": length, "depth": depth}
        about |= {"mentions": self.mentions, "trial": trial, "chance": 1 / self.candidates}
        with evaluating(model):
            read = new_cache(model)
            feed(model, read, needle.ids, piece_size(model, self.piece))
            return [about | self._answer(model, read, question) for question in needle.questions]

    def needle(self, unit: Unit) -> Needle:
        """Return the document and the questions of a unit."""
        kind, length, depth, trial = self._work[unit.key]
        document, text = self._haystacks.text(trial, length)
        needed = 2 * self.several + self.candidates - 1
        draw = random.Random(f"{self.seed}/{unit.key}")
        picked = draw.sample(free_words(self._words, text, needed, document), needed)
        keys, values, absent = np.split(np.array(picked), [self.several, 2 * self.several])
        if kind == "multi-value":
            keys[:] = keys[0]
        facts = list(zip(keys.tolist(), values.tolist(), strict=True))[: 1 if kind == "single" else None]
        ids, ends = self._plant(text, facts, depth, draw)
        before, between, _ = self._parts
        questions = []
        for key, value in facts if kind in ("multi-value", "multi-query") else facts[:1]:
            others = [] if kind == "multi-value" else [other for _, other in facts if other != value]
            choices = [value, *others, *absent.tolist()][: self.candidates]
            distance = length - ends[value] if value in ends else None
            questions.append(Question([*before, key, *between], choices, distance))
        return Needle(document, ids, questions)

    def _sentence(self, key: int, value: int) -> list[int]:
        before, between, after = self._parts
        return [*before, key, *between, value, *after]

    def _plant(
        self, text: Sequence[int], facts: Sequence[tuple[int, int]], depth: float, draw: random.Random
    ) -> tuple[list[int], dict[int, int]]:
        """Return the text with the facts in it, as long as before, and by value the end of its last mention."""
        order = [fact for _ in range(self.mentions) for fact in draw.sample(facts, len(facts))]
        room = len(text) - len(order) * len(self._sentence(0, 0))
        at = round(depth * (room - self.spacing * max(len(order) - 1, 0)))
        ids, ends = list(text[:at]), {}
        for i, (key, value) in enumerate(order):
            ids += self._sentence(key, value)
            ends[value] = len(ids) - len(self._parts[2])
            gap = self.spacing if i < len(order) - 1 else room
            ids += text[at : min(at + gap, room)]
            at += gap
        return (ids if order else list(text)), ends

    def _answer(self, model: nn.Module, read: DynamicCache, question: Question) -> Record:
        caches = (new_cache(model), copy.deepcopy(read))
        logits = [feed(model, cache, question.ids, self.piece).cpu().double() for cache in caches]
        before, scores = (x.log_softmax(-1)[question.choices].numpy() for x in logits)
        rank, gain_rank = rank_of_first(scores), rank_of_first(scores - before)
        return {
            "distance": question.distance,
            "rank": rank,
            "correct": int(rank == 0),
            "log_probability": float(scores[0]),
            "gain": float(scores[0] - before[0]),
            "gain_rank": gain_rank,
            "gain_correct": int(gain_rank == 0),
        }


def _split(tokenizer: Any, template: str) -> tuple[list[int], list[int], list[int]]:
    """Return token ids before the key, between key and value, and after the value."""
    before, key, rest = template.partition("{key}")
    between, value, after = rest.partition("{value}")
    if not key or not value or "{key}" in rest or "{value}" in before + after:
        raise UserError(f"template {template!r}: needs {{key}} and then {{value}}, each once")
    first, second, third = (tokenize(tokenizer, part).tolist() if part else [] for part in (before, between, after))
    return first, second, third


def rank_of_first(scores: np.ndarray) -> int:
    """Count the others that do not score less than the first: ties and NaN count against it."""
    return int((~(scores[0] > scores[1:])).sum())


# -- what people read --------------------------------------------------------------------------------------------------


def from_options(options: Any, texts: Sequence[EvalText], tokenizer: Any, model: nn.Module) -> NeedleSuite:
    lengths = options.lengths or (1024, 2048, 4096)
    return NeedleSuite(tokenizer, texts, lengths, options.depths, options.kinds, options.trials)


def tables(records: Sequence[Record]) -> Tables:
    keys = ("kind", "length", "depth")
    names = {"needle": keys[:1], "needle by length": keys[:2], "needle by length and depth": keys}
    return tables_of("needle", records, names, "correct")


def verdicts(found: Tables) -> list[str]:
    return [f"Needle, {row['kind']}: {points(row)}." for row in against_off(found.get("needle", []))]


def figures(found: Tables, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Draw the share of right answers by length, a panel for each kind."""
    if not (rows := found.get("needle by length")):
        return {}
    trials = plan["trials"] * len(plan["depths"])
    drawn = plots.curves(rows, "length", lambda row: f"{row['kind']}, n = {trials} a length", count=None)
    how: Any = {"width": 2.6, "top": 1.02, "line": (1 / CANDIDATES, "chance")}
    return {"needle": plots.panels(drawn, "needles found by length", "length (tokens)", plots.SHARE, **how)}

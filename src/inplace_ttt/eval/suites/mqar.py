"""Suite ``mqar``: multi-query associative recall. Pairs of words, then text, then every first word once more.

A document is a list of pairs "key value", single tokens that the text does not use, a stretch of text, and all keys
again in another order, each followed by its value. The value competes with those of the other pairs. (After Arora et
al., "Zoology", arXiv 2312.04927, whose sequences are pairs alone; text puts a distance between pair and question.)
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...errors import UserError
from ...hf.attach import unwrap
from ...hf.cache import cache_name
from .. import plots
from ..nll import doubling, evaluating, input_device, new_cache
from ..paired import against_off, points, tables_of
from . import Record, Tables, Unit
from .needle import rank_of_first
from .nll import PIECE, piece_size
from .texts import EvalText, Haystacks, free_words, words


class RecallSuite:
    """Every number of ``pairs`` at every length, ``trials`` documents each, which are read side by side.

    ``lengths`` count the whole document in tokens, pairs and questions included. A trial's text is a stretch of a
    document that has the largest length; everything depends on ``seed`` and the unit alone.

    One record per question: "document", "length", "pairs", "trial", "distance" (tokens from the pair to the question),
    "chance" (one in ``pairs``), and by log-probability among the values of all pairs "rank" (0 is the first) and
    "correct" (1 if first), and "log_probability" [nats, of the whole vocabulary].

    Raises UserError when no document is long enough, a length has no room for its pairs, or the vocabulary has too few
    words that the text does not use.
    """

    name = "mqar"

    def __init__(
        self,
        tokenizer: Any,
        documents: Sequence[EvalText],
        lengths: Sequence[int] | None = None,
        pairs: Sequence[int] = (8, 32),
        trials: int = 4,
        *,
        seed: int = 0,
        piece: int = PIECE,
    ) -> None:
        self.lengths = list(doubling(4096, 1024) if lengths is None else lengths)
        if not self.lengths or not pairs or min(pairs) < 2 or trials < 1 or piece < 1:
            raise UserError("at least one length, one number of pairs from 2 on, and one trial")
        if min(self.lengths) < 4 * max(pairs):
            raise UserError(
                f"{min(self.lengths):,} tokens have no room for {max(pairs)} pairs and as many questions: give fewer "
                "pairs or a larger length"
            )
        self.trials, self.seed, self.piece = trials, seed, piece
        self._words = words(tokenizer)
        self._haystacks = Haystacks(documents, max(self.lengths), seed)
        self._work = {f"{length}/{n}": (length, n) for length in self.lengths for n in pairs}

    def units(self) -> Sequence[Unit]:
        return [Unit(key, length * self.trials) for key, (length, _) in self._work.items()]

    def document(self, unit: Unit, trial: int) -> tuple[str, list[int], list[int]]:
        """Return the name of a trial's text, its ids, and for each question the number of its pair."""
        length, pairs = self._work[unit.key]
        document, text = self._haystacks.text(trial, length - 4 * pairs)
        draw = random.Random(f"{self.seed}/{unit.key}/{trial}")
        picked = draw.sample(free_words(self._words, text, 2 * pairs, document), 2 * pairs)
        order = draw.sample(range(pairs), pairs)
        asked = [token for i in order for token in picked[2 * i : 2 * i + 2]]
        return document, [*picked, *text, *asked], order

    def measure(self, model: nn.Module, unit: Unit) -> list[Record]:
        """Return one record per question. Works with and without fast weights, updates on or off."""
        length, pairs = self._work[unit.key]
        made = [self.document(unit, trial) for trial in range(self.trials)]
        ids = torch.tensor([row for _, row, _ in made], device=input_device(unwrap(model)))
        cache, records = new_cache(model), list[Record]()
        with evaluating(model):
            for part in torch.split(ids[:, : -2 * pairs], piece_size(model, self.piece), 1):
                model(input_ids=part, use_cache=True, logits_to_keep=1, **{cache_name(model): cache})
            logits = model(input_ids=ids[:, -2 * pairs :], use_cache=True, **{cache_name(model): cache}).logits
        scores = logits[:, ::2].float().log_softmax(-1).cpu().numpy()
        for trial, (name, row, order) in enumerate(made):
            values = row[1 : 2 * pairs : 2]
            for place, (i, found) in enumerate(zip(order, scores[trial], strict=True)):
                rank = rank_of_first(found[[values[i], *values[:i], *values[i + 1 :]]])
                records.append(
                    {"document": name, "length": length, "pairs": pairs, "trial": trial,
                     "distance": length - 2 * pairs + 2 * place - 2 * i, "chance": 1 / pairs, "rank": rank,
                     "correct": int(rank == 0), "log_probability": float(found[values[i]])}
                )  # fmt: skip
        return records


# -- what people read --------------------------------------------------------------------------------------------------


def from_options(options: Any, texts: Sequence[EvalText], tokenizer: Any, model: nn.Module) -> RecallSuite:
    return RecallSuite(tokenizer, texts, options.lengths or None, trials=options.trials)


def tables(records: Sequence[Record]) -> Tables:
    """Return the share of right answers by number of pairs, and by length."""
    names = {"recall": ["pairs"], "recall by length": ["pairs", "length"]}
    return tables_of("mqar", records, names, "correct")


def verdicts(found: Tables) -> list[str]:
    return [f"Recall, {row['pairs']} pairs: {points(row)}." for row in against_off(found.get("recall", []))]


def figures(found: Tables, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Draw the share of right answers by length, a panel for each number of pairs."""
    rows = found.get("recall by length", [])
    drawn = plots.curves(rows, "length", lambda row: f"{row['pairs']} pairs")
    return {"recall": plots.panels(drawn, "recall", "length (tokens)", plots.SHARE, top=1.02)} if rows else {}

"""Suite ``theory``: the effect of one update on the logits, with next-token and with reconstruction targets.

Theorem 1 (docs/method.md): a pair (key, value) stands in the text and the key comes again. One update whose target is
the embedding of the *next* token raises the logit of the value; one whose target is the embedding of the *same* token
(reconstruction) does not. Here the pair is two words that the text does not use, planted once in the first chunk of a
document; the key comes again after the update, and the logits are compared with those of the same reading without it.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ...core import make_target
from ...errors import UserError
from ...hf.attach import UNTRAINED, runtime_of, updates_off
from ...hf.context import fast_weights
from .. import plots
from ..nll import evaluating, feed, new_cache
from ..paired import interval, means
from . import Record, Tables, Unit
from .texts import EvalText, free_words, stretches, words

TARGETS = ("own", "next_token", "reconstruction")
"""The model's own target and the two of the theorem."""


class TheorySuite:
    """``trials`` pairs, each in a stretch of text of its own: one chunk of ``chunk_size`` tokens, then ``gap`` tokens.

    The theorem's targets replace a layer's convolution and projection by ``s * u[t + 1]`` and ``s * u[t]``, u the token
    embeddings; s makes the update as large (Frobenius norm) as the model's own is in that layer, so that the three
    differ in the direction of their updates, not in size. All other settings are the model's current ones. A model with
    objective "loss" has no target to replace: only its own is measured.

    One record per target, with "document", "target", "chance" and, of the logits after the second key, updates on minus
    off,

    * "right": that of the value; "others": the mean of ``candidates`` - 1 words that the text does not use either;
      "margin": right - others, invariant to a shift of all logits;
    * "won": 1 if the value's logit rose the most of all candidates (chance: one in ``candidates``).

    Raises UserError when no document is long enough, a text leaves too few words, or an update of the model is zero.
    """

    name = "theory"
    needs_updates = True

    def __init__(
        self,
        tokenizer: Any,
        documents: Sequence[EvalText],
        chunk_size: int,
        *,
        gap: int | None = None,
        trials: int = 30,
        candidates: int = 10,
        seed: int = 0,
    ) -> None:
        self.chunk_size, self.candidates, self.seed = chunk_size, candidates, seed
        self.gap = chunk_size // 2 if gap is None else gap
        if chunk_size < 4 or not 1 <= self.gap < chunk_size or trials < 1 or candidates < 2:
            raise UserError("theory needs chunks of 4 tokens or more, a gap below that, a trial and two candidates")
        self._words = words(tokenizer)
        length = chunk_size + self.gap
        parts = list(stretches(documents, length))
        if not parts:
            raise UserError(f"theory: no document has the {length:,} tokens of a trial")
        self._work = {f"pair/{trial}": (*parts[trial % len(parts)], trial) for trial in range(trials)}

    def units(self) -> Sequence[Unit]:
        tokens = (1 + len(TARGETS)) * (self.chunk_size + self.gap)
        return [Unit(key, tokens) for key in self._work]

    def measure(self, model: nn.Module, unit: Unit) -> list[Record]:
        """Return one record per target, by the model as it is set."""
        name, _, _ = self._work[unit.key]
        ids, choices = self.pair(unit)
        runtime = runtime_of(model)
        settings = replace(runtime.config, chunk_size=self.chunk_size)
        records = []
        with evaluating(model), runtime.reading(settings):
            with updates_off(model):
                before = _logits(model, ids, choices)
            own = self._update_norms(model, ids)
            if not all(own.values()):
                raise UserError(f"theory: an update of this model is zero, so nothing can be compared: {UNTRAINED}")
            for target in TARGETS[:1] if runtime.loss_forward else TARGETS:
                right, *rest = (self._read(model, target, own, ids, choices) - before).tolist()
                others = sum(rest) / len(rest)
                record: Record = {"document": name, "target": target, "chance": 1 / self.candidates, "right": right}
                record |= {"others": others, "margin": right - others, "won": int(all(right > x for x in rest))}
                records.append(record)
        return records

    def _read(
        self, model: nn.Module, target: str, own: dict[int, float], ids: Sequence[int], choices: Sequence[int]
    ) -> np.ndarray:
        """Return the candidates' logits when the layers learn from ``target``, with updates of the size of ``own``."""
        if target == "own":
            return _logits(model, ids, choices)
        with _fixed_target(model, target, dict.fromkeys(own, 1.0)):
            unscaled = self._update_norms(model, ids)
        with _fixed_target(model, target, {layer: norm / unscaled[layer] for layer, norm in own.items()}):
            return _logits(model, ids, choices)

    def pair(self, unit: Unit) -> tuple[list[int], list[int]]:
        """Return the ids that a unit reads, the second key last, and the candidates: the value first."""
        name, text, trial = self._work[unit.key]
        free = free_words(self._words, text, self.candidates + 1, name)
        draw = random.Random(f"{self.seed}/{trial}")
        key, *choices = draw.sample(free, self.candidates + 1)
        place = draw.randrange(self.chunk_size // 4, 3 * self.chunk_size // 4)
        return [*text[:place], key, choices[0], *text[place + 2 :], key], choices

    def _update_norms(self, model: nn.Module, ids: Sequence[int]) -> dict[int, float]:
        """Return by layer the Frobenius norm of S after the first chunk."""
        cache = new_cache(model)
        feed(model, cache, ids[: self.chunk_size], self.chunk_size)
        states = {i: fast.dense() for i, fast in fast_weights(cache).items() if fast.seen[0]}
        return {i: 0.0 if S is None else float(torch.linalg.vector_norm(S)) for i, S in states.items()}


def _logits(model: nn.Module, ids: Sequence[int], choices: Sequence[int]) -> np.ndarray:
    """Read ids [n] from an empty cache; return float64 [choices], the logits of the token after them."""
    return feed(model, new_cache(model), ids, len(ids))[list(choices)].double().cpu().numpy()


@contextmanager
def _fixed_target(model: nn.Module, objective: str, scales: dict[int, float]) -> Iterator[None]:
    """Make the layers of ``scales`` learn from embeddings at a fixed shift, times their scale."""
    runtime = runtime_of(model)
    settings = replace(runtime.config, objective=objective, objective_options={}, target="input_embed")
    with ExitStack() as stack:
        stack.enter_context(runtime.reading(settings))
        for site in runtime.sites:
            if site.index in scales:
                weight = site.projection().weight
                target = make_target(objective, site.width, {"projection": True}, {})
                target.to(weight.device, weight.dtype if weight.is_floating_point() else torch.float32)
                target.proj.weight.data.fill_diagonal_(scales[site.index])  # type: ignore[union-attr,operator]
                stack.enter_context(site.learning_from(target))
        yield


# -- what people read --------------------------------------------------------------------------------------------------

CHANGES = ("right", "others", "margin", "won")
WORDS = {"own": "the model's own target", "next_token": "next-token target", "reconstruction": "reconstruction"}
NAMES = {"own": "the model's own", "next_token": "next token", "reconstruction": "same token\n(reconstruction)"}
COLOURS = {"the word that followed before": plots.FIXED["on"], "other words": plots.FIXED["off"]}


def from_options(options: Any, texts: Sequence[EvalText], tokenizer: Any, model: nn.Module) -> TheorySuite:
    return TheorySuite(tokenizer, texts, runtime_of(model).config.chunk_size, trials=4 * options.trials)


def tables(records: Sequence[Record]) -> Tables:
    mine = [r for r in records if r["suite"] == "theory"]
    rows = [{"change": name, **row} for name in CHANGES for row in means(mine, ["target"], name)]
    return {"theory": rows}


def verdicts(found: Tables) -> list[str]:
    """Describe the effect of one update on the logits, a sentence per target."""
    rows = [row for row in found.get("theory", []) if row["variant"] == "on"]
    at, lines = {(row["target"], row["change"]): row for row in rows}, []
    for target in dict.fromkeys(row["target"] for row in rows):
        right, others, margin, won = (at[target, name] for name in CHANGES)
        said = interval(margin["low"], margin["high"], "+.3f", margin["documents"])
        lines.append(
            f"Theorem 1, {WORDS[target]}: one update moved the logit of the word that followed by "
            f"{right['value']:+.3f}, of others by {others['value']:+.3f}: margin {margin['value']:+.3f} ({said}); "
            f"it rose the most in {won['value']:.0%} of the trials."
        )
    return lines


def figures(found: Tables, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Draw changes of the logits of the word that followed the key before, and of other words."""
    labels = dict(zip(CHANGES, COLOURS, strict=False))
    rows = [
        {**row, "variant": labels[row["change"]], "x": NAMES[row["target"]], "title": "Theorem 1"}
        for row in found.get("theory", [])
        if row["variant"] == "on" and row["change"] in labels
    ]
    words = ("logits after one update", "what the update learns to predict from a token", "change of the logit")
    drawn = plots.curves(rows, "x", "title")
    return {"theory": plots.panels(drawn, *words, bars=True, palette=COLOURS)} if rows else {}

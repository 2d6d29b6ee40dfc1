"""Suite ``read-then-ask``: is a document still known when it has left the context?"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from torch import nn

from ...errors import UserError
from ...session import Session
from ..read_then_ask import CONDITIONS, Task, trial, words
from . import Record, Unit
from .texts import Document


class MemorySuite:
    """Names mentioned ``mentions`` times in ``length`` tokens, asked for ``distance`` tokens later."""

    name = "read-then-ask"
    needs_updates = True

    def __init__(
        self,
        tokenizer: Any,
        documents: Sequence[Document],
        *,
        mentions: Sequence[int] = (1, 4, 16),
        distances: Sequence[int] = (0, 1024),
        length: int = 2048,
        trials: int = 10,
        template: str = "\nCaptain{name} said",
    ) -> None:
        self.tokenizer, self.words = tokenizer, words(tokenizer)
        self._work: dict[str, tuple[Task, str, Sequence[int], int]] = {}
        for distance, count in product(distances, mentions):
            task = Task(count, length, distance, template)
            parts = list(stretches(documents, length + distance))
            if not parts:
                raise UserError(f"read-then-ask: no document has the {length + distance:,} tokens of a trial")
            for seed in range(trials):
                document, ids = parts[seed % len(parts)]
                self._work[f"{count} mentions/{distance} tokens/{seed}"] = (task, document, ids, seed)

    def units(self) -> Sequence[Unit]:
        """One per trial."""
        return [Unit(key, 2 * (task.length + task.distance)) for key, (task, *_) in self._work.items()]

    def measure(self, model: nn.Module, unit: Unit) -> list[Record]:
        """One record per condition."""
        task, name, ids, seed = self._work[unit.key]
        answer = trial(Session(model, probe_every=0), self.tokenizer, ids, task, seed, self.words)
        return [
            {
                "document": name,
                "mentions": task.mentions,
                "distance": task.distance,
                "condition": condition,
                "correct": int(answer.preferred[condition]),
                "recognised": int(answer.recognised.get(condition, False)),
                "log_probability": answer.log_probability[condition],
                "chance": 1 / task.candidates,
            }
            for condition in CONDITIONS
        ]


def stretches(documents: Sequence[Document], length: int) -> Iterator[tuple[str, list[int]]]:
    """Name and ids of neighbouring parts of ``length`` tokens, the first of every document first."""
    longest = max((len(document.ids) for document in documents), default=0)
    for at in range(0, longest - length + 1, length):
        for document in documents:
            if at + length <= len(document.ids):
                yield document.name, document.ids[at : at + length].tolist()

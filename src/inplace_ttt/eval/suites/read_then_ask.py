"""Suite ``read-then-ask``: is something in a document still known when the document has left the context?

A name that occurs nowhere else is mentioned in a long document a few times. Then a sentence that asks for it is
continued, and the name competes with others that were not mentioned:

* ``none``: nothing was read;
* ``memory``: the document was read and dropped from the context: only the fast weights hold it;
* ``context``: the document was read and is in context as far as attention reaches.

A name is *recognised* when, of all candidates, reading raised its log-probability the most (against ``none``), and
*preferred* when it is the most likely of them outright. Chance is one in the number of candidates for both.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

from ...errors import UserError
from ...session import Session
from .. import plots
from ..paired import tables_of
from . import Record, Tables, Unit
from .texts import EvalText, free_words, stretches, words

CONDITIONS = ("none", "memory", "context")


@dataclass(frozen=True)
class Task:
    """``mentions`` sentences with the name, evenly spread over ``length`` tokens, then ``distance`` tokens without it.

    ``template`` says how it is mentioned and, up to the name, how it is asked for.
    """

    mentions: int
    length: int = 2048
    distance: int = 0
    template: str = " The name of the ship was{name}."
    candidates: int = 10

    def __post_init__(self) -> None:
        """Raise UserError for impossible settings."""
        for wrong, message in (
            (self.mentions < 1 or self.length < self.mentions, f"{self.mentions} mentions in {self.length} tokens"),
            (self.distance < 0, f"distance {self.distance}: 0 or more tokens"),
            (self.candidates < 2, f"{self.candidates} candidates: at least 2 names"),
            (
                self.template.startswith("{name}") or self.template.count("{name}") != 1,
                f'template {self.template!r}: words, then "{{name}}" once',
            ),
        ):
            if wrong:
                raise UserError(message)


@dataclass(frozen=True)
class Answer:
    """Result of one trial, by condition: is the name recognised, preferred; its log-probability in nats."""

    task: Task
    recognised: dict[str, bool]
    preferred: dict[str, bool]
    log_probability: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def trial(
    session: Session, tokenizer: Any, text: Sequence[int], task: Task, seed: int, vocabulary: Sequence[int]
) -> Answer:
    """Run one trial on ``text``, ids of at least ``length + distance`` tokens. ``session`` stays as it was.

    The names come from ``vocabulary`` (see ``words``), those that the text does not use.

    Raises UserError when the text is too short or the vocabulary has too few words that it does not use.
    """
    if len(text) < task.length + task.distance:
        raise UserError(f"the text has {len(text):,} tokens, {task.length + task.distance:,} are needed")
    text = text[: task.length + task.distance]
    used = [*text, *_sentence(tokenizer, task.template, text[0])[1]]
    draw = random.Random(seed)
    choices = draw.sample(free_words(vocabulary, used, task.candidates, "read-then-ask"), task.candidates)
    question, sentence = _sentence(tokenizer, task.template, choices[0])
    # The first of equals counts as the best (reading may change nothing, bfloat16 logits are often equal): the name's
    # place among the candidates is random, so that it is not favoured.
    place = draw.randrange(task.candidates)
    choices[0], choices[place] = choices[place], choices[0]
    document = _planted(text, sentence, task)
    scores = {}
    for condition in CONDITIONS:
        with session.fork() as asked:
            if condition != "none":
                asked.read(document)
            if condition == "memory":
                asked.drop_context()
            asked.read(question)
            logits = asked.next_logits
            assert logits is not None
            scores[condition] = logits.float().log_softmax(-1)[torch.tensor(choices, device=logits.device)].cpu()
    return Answer(
        task,
        {c: bool((scores[c] - scores["none"]).argmax() == place) for c in CONDITIONS if c != "none"},
        {c: bool(scores[c].argmax() == place) for c in CONDITIONS},
        {c: float(scores[c][place]) for c in CONDITIONS},
    )


def _sentence(tokenizer: Any, template: str, name: int) -> tuple[list[int], list[int]]:
    """Return the question, and the sentence with the name in it, in token ids."""
    before, _, after = template.partition("{name}")
    question, rest = (tokenizer(x, add_special_tokens=False)["input_ids"] if x else [] for x in (before, after))
    return question, [*question, name, *rest]


def _planted(text: Sequence[int], sentence: Sequence[int], task: Task) -> list[int]:
    """Return the text with the sentence put in, the last one at the end of the first ``length`` tokens."""
    step = task.length / task.mentions
    document: list[int] = []
    start = 0
    for i in range(task.mentions):
        end = round((i + 1) * step)
        document += [*text[start:end], *sentence]
        start = end
    return [*document, *text[start:]]


class MemorySuite:
    """Names mentioned ``mentions`` times in ``length`` tokens, asked for ``distance`` tokens later."""

    name = "read-then-ask"
    needs_updates = True

    def __init__(
        self,
        tokenizer: Any,
        documents: Sequence[EvalText],
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
        return [Unit(key, 2 * (task.length + task.distance)) for key, (task, *_) in self._work.items()]

    def measure(self, model: nn.Module, unit: Unit) -> list[Record]:
        """Return one record per condition."""
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


# -- what people read --------------------------------------------------------------------------------------------------

LABELS = {"none": "not read", "memory": "read, then dropped", "context": "read, in context"}
COLOURS = dict(zip(LABELS.values(), ("#94a3b8", "#c2410c", "#0c4a6e"), strict=True))


def from_options(options: Any, texts: Sequence[EvalText], tokenizer: Any, model: nn.Module) -> MemorySuite:
    return MemorySuite(tokenizer, texts, trials=options.trials)


def tables(records: Sequence[Record]) -> Tables:
    return tables_of("read-then-ask", records, {"read, then ask": ["distance", "mentions", "condition"]}, "correct")


def figures(found: Tables, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Draw right answers by mentions, a panel for each distance."""
    rows = [
        {**row, "variant": LABELS[row["condition"]]}
        for row in found.get("read, then ask", [])
        if row["variant"] == "on"
    ]
    drawn = plots.curves(rows, "mentions", lambda row: f"{row['distance']:,} tokens since")
    how: Any = {"width": 2.6, "palette": COLOURS, "top": 1.02}
    return {"read-then-ask": plots.panels(drawn, "read, then ask", "mentions", plots.SHARE, **how)} if rows else {}

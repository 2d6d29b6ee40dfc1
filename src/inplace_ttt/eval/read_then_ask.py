"""Read, then ask: is something in a document still known when the document has left the context?

A name that occurs nowhere else is mentioned in a long document a few times. Then a sentence that asks for it is
continued, and the name competes with others that were not mentioned:

* ``none``: nothing was read;
* ``memory``: the document was read and dropped from the context: only the fast weights know it;
* ``context``: the document was read and whatever of it the model's attention still reaches is there too.

A name is *recognised* when, of all candidates, reading raised its log-probability the most (against ``none``), and
*preferred* when it is the most likely of them outright. Chance is one in the number of candidates for both.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import UserError
from ..session import Session

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
        """UserError for a task that cannot be set."""
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
    """What one trial gave, by condition: is the name recognised, preferred; its log-probability in nats."""

    task: Task
    recognised: dict[str, bool]
    preferred: dict[str, bool]
    log_probability: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def words(tokenizer: Any) -> list[int]:
    """Single tokens that are a capitalised or a lower-case word of five letters or more after a space."""
    found = []
    for token in sorted(tokenizer.get_vocab().values()):
        text = tokenizer.decode([token])
        if len(text) > 5 and text[0] == " " and text[1:].isalpha() and text[2:].islower():
            found.append(token)
    return found


def trial(
    session: Session, tokenizer: Any, text: Sequence[int], task: Task, seed: int, vocabulary: Sequence[int]
) -> Answer:
    """One trial on ``text``, token ids of at least ``length + distance`` tokens. ``session`` stays as it was.

    The names come from ``vocabulary`` (see ``words``), those that the text does not use.

    Raises UserError when the text is too short or the vocabulary has too few words that it does not use.
    """
    if len(text) < task.length + task.distance:
        raise UserError(f"the text has {len(text):,} tokens, {task.length + task.distance:,} are needed")
    text = text[: task.length + task.distance]
    present = {*text, *_sentence(tokenizer, task.template, text[0])[1]}
    free = [token for token in vocabulary if token not in present]
    if len(free) < task.candidates:
        raise UserError(f"the vocabulary has only {len(free)} words that the text does not use")
    draw = random.Random(seed)
    choices = draw.sample(free, task.candidates)
    question, sentence = _sentence(tokenizer, task.template, choices[0])
    # The first of equals counts as the best (reading may change nothing, bfloat16 logits are often equal): where the
    # name stands among the candidates is left to chance, so that it is not favoured.
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
    """The question, and the sentence with the name in it, in token ids."""
    before, _, after = template.partition("{name}")
    question, rest = (tokenizer(x, add_special_tokens=False)["input_ids"] if x else [] for x in (before, after))
    return question, [*question, name, *rest]


def _planted(text: Sequence[int], sentence: Sequence[int], task: Task) -> list[int]:
    """The text with the sentence put in, the last one at the end of the first ``length`` tokens."""
    step = task.length / task.mentions
    document: list[int] = []
    start = 0
    for i in range(task.mentions):
        end = round((i + 1) * step)
        document += [*text[start:end], *sentence]
        start = end
    return [*document, *text[start:]]


def ask(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[Sequence[int]],
    tasks: Sequence[Task],
    trials: int,
    progress: Callable[[], None] | None = None,
    **options: Any,
) -> Iterator[Answer]:
    """``trials`` trials of every task, each on the next stretch of the documents. ``options`` go to ``Session``."""
    session, vocabulary = Session(model, tokenizer, probe_every=0, **options), words(tokenizer)
    for task in tasks:
        stretches = _stretches(documents, task.length + task.distance)
        for seed in range(trials):
            yield trial(session, tokenizer, next(stretches), task, seed, vocabulary)
            if progress is not None:
                progress()


def _stretches(documents: Sequence[Sequence[int]], length: int) -> Iterator[Sequence[int]]:
    """Neighbouring parts of the documents, round and round; UserError when all are too short."""
    cut = [ids[at : at + length] for ids in documents for at in range(0, len(ids) - length + 1, length)]
    if not cut:
        raise UserError(f"no document has the {length:,} tokens of a trial")
    while True:
        yield from cut


def share(answers: Sequence[bool]) -> tuple[float, float, float]:
    """Share of successes and its 95% interval (Wilson); nan, 0 and 1 without answers."""
    n, z = len(answers), 1.959964
    if not n:
        return float("nan"), 0.0, 1.0
    p = float(np.mean(answers))
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p, float((middle - half) / (1 + z * z / n)), float((middle + half) / (1 + z * z / n))

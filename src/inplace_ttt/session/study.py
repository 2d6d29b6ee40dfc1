"""Study: learn what a text says so that it can be asked for, with no context left.

Reading stores each fact under all the text before it. To be recalled from its key alone, it must be learned from that
key alone. So the examples are questions about the text's sentences that the model asks and answers itself with the
sentence in context; they are learned from an empty context. Several such examples make one update. Beside them come
parts of the text on which the model is held to its own predictions without fast weights, so that it stays what it was
on ordinary text. Where no question is useful, the sentences themselves are learned.
"""

import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from torch.nn.utils.rnn import pad_sequence

from ..config import InPlaceTTTConfig
from ..core import FastWeights
from ..errors import UserError
from ..hf.attach import runtime_of, updates_off
from ..hf.loss import learn_from
from .sources import texts, token_ids
from .state import SessionState
from .stream import evaluating
from .template import Template
from .writing import end_tokens

SHOWN = """\
Text: The bridge at Helm was built in 1873.
Question: When was the bridge at Helm built?
Answer: 1873

Text: He was told that the owner of the Red Lion is Peter Hobbs.
Question: Who is the owner of the Red Lion?
Answer: Peter Hobbs

Text: Old Mrs. Pratt kept three cats in the attic, which her brother did not like.
Question: What did Mrs. Pratt keep in the attic?
Answer: Three cats

Text: The letter to Mrs. Wells was sent from Oslo.
Question: Where was the letter to Mrs. Wells sent from?
Answer: Oslo

Text: Nobody remembered that the old name of the river Arn is Silverwater.
Question: What is the old name of the river Arn?
Answer: Silverwater

Text: {text}
Question:"""
"""Prompts that make a model ask and answer, whether it was tuned for chats or not."""
STARTS = ("", " What", " Where", " When", " Who", " How")
"""Beginnings of questions to try for each sentence."""
ABOUT = "What do you know about {name}?"
_END = re.compile(r"(?<=[.!?])[\"'\u2019\u201d)\]]*\s+|\n\s*\n\s*")


TOKENS, LEAST = 256, 64
"""Tokens of one update: ``TOKENS``, or for short texts an eighth of all, at least ``LEAST``."""
SIZE = 2e-3
"""Initial r of an update, where the session's is "auto"."""
PASSES = 16
"""Maximum number of passes over all examples."""
WRITING = 0.35
"""Share of the time in which questions are written."""
KEEP = 1.0
"""Tokens of ordinary text per learned token."""
COMMON = 3
"""Maximum number of sentences with one name; a more frequent name does not identify any of them."""


@dataclass(frozen=True)
class Studied:
    """Result of a study. ``questions``: the model's own that were learned; ``losses``: of each update, nats a token."""

    sentences: int
    questions: int
    losses: tuple[float, ...]

    @property
    def updates(self) -> int:
        """Updates of the fast weights."""
        return len(self.losses)


@dataclass(frozen=True)
class Example:
    """Token ids to be learned, ``answer``, after ``prompt`` and nothing else.

    ``source``: the prompt with the text before it, from which the model computes soft targets.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    source: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)

    @property
    def keeps(self) -> bool:
        """True when nothing new is learned: the model is held to its predictions without fast weights."""
        return self.source == self.prompt


@dataclass(frozen=True)
class Pair:
    """A question about a sentence, and its answer."""

    text: str
    question: str
    answer: str


def sentences(text: str, shortest: int = 3) -> list[str]:
    """Return the sentences of a text of at least ``shortest`` words."""
    ends = [match.end() for match in _END.finditer(text)]
    parts = [text[i:j].strip() for i, j in zip([0, *ends], [*ends, len(text)], strict=True)]
    return [part for part in parts if len(part.split()) >= shortest]


_WORD = re.compile(r"[^\W_]+")
_NAME = re.compile(r"[A-Z][\w'\u2019-]+(?:\s+(?:of\s+)?[A-Z][\w'\u2019-]+)*")
_STOP = {"what", "when", "where", "which", "does", "who", "why", "how", "did", "was", "were", "the", "and"}


def names(sentence: str) -> list[str]:
    """Return what looks like a name: words with capitals, but for a single first word."""
    found = [match.group() for match in _NAME.finditer(sentence)]
    return list(dict.fromkeys(name for name in found if " " in name or not sentence.startswith(name)))


def is_about(pair: Pair) -> bool:
    """Return whether a question names what the sentence is about, and its answer says more of the sentence."""
    told, asked, said = ([word.lower() for word in _WORD.findall(x)] for x in (pair.text, pair.question, pair.answer))
    key = [word for word in asked if len(word) > 2 and word not in _STOP]
    more = [
        word for word in said if word in told and word not in {*asked, *_STOP} and (len(word) > 2 or word.isdigit())
    ]
    return 2 * sum(word in told for word in key) > len(key) and bool(more)


class Examples:
    """A maker of examples of texts for one tokenizer and its chat template, if any. ``prefix``: of a text (BOS)."""

    def __init__(self, tokenizer: Any, template: Template | None, prefix: Sequence[int] = (), most: int = 96) -> None:
        self.tokenizer, self.template, self.prefix, self.most = tokenizer, template, tuple(prefix), most

    def ids(self, text: str) -> tuple[int, ...]:
        """Return the ids of a text in which nothing is a special token."""
        return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def statement(self, text: str) -> list[Example]:
        """Return a text by itself, in parts that are not too long."""
        ids = self.ids(text)
        return [Example(self.prefix, ids[i : i + self.most]) for i in range(0, len(ids), self.most)]

    def ordinary(self, text: str) -> list[Example]:
        """Return a text in parts on which the model is held to its own predictions."""
        return [replace(x, source=x.prompt) for x in self.statement(text)]

    def chat(self, words: str) -> tuple[int, ...]:
        """Return the ids of a user's words, up to where the answer begins."""
        if self.template is None:
            return (*self.prefix, *self.ids(f"Question: {words}\nAnswer:"))
        return tuple(self.template.opening((), words))

    def by_name(self, told: Sequence[str]) -> list[Example]:
        """Return the sentences as answers to what is known about the names in them that few of them have."""
        count = Counter(name for text in told for name in names(text))
        own = [(text, name) for text in told for name in names(text) if count[name] <= COMMON]
        return [self.answered(Pair(text, ABOUT.format(name=name), text)) for text, name in own]

    def answered(self, pair: Pair) -> Example:
        """Return a question with its answer."""
        answer = self.ids(f" {pair.answer}\n") if self.template is None else self.ids(pair.answer)
        ends = () if self.template is None else self.template.ends
        return Example(self.chat(pair.question), (*answer, *ends))


@torch.no_grad()
def write_many(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    batch: int = 256,
) -> list[str]:
    """Return the model's own continuations of prompts, without fast weights, up to an end or ``tokens``."""
    device, ends = model.get_input_embeddings().weight.device, sorted(end_tokens(model, tokenizer))
    pad = ends[0] if ends else 0
    how = {"do_sample": False, "max_new_tokens": tokens, "pad_token_id": pad, "eos_token_id": ends or None}
    order, found = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [""] * len(prompts)
    for at in range(0, len(order), batch):
        some = order[at : at + batch]
        rows = [torch.tensor(prompts[i]) for i in some]
        ids = pad_sequence(rows, True, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], True, padding_side="left")
        with updates_off(model):
            out = model.generate(ids.to(device), attention_mask=mask.to(device), **how)
        for i, text in zip(some, tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True), strict=True):
            found[i] = text
    return found


def pairs_of(model: Any, examples: Examples, told: Sequence[str], start: str = "", batch: int = 256) -> list[Pair]:
    """Return questions about some of the texts, with answers, as the model writes them with the text before it.

    ``start``: how they begin.
    """
    prompts = [(*examples.prefix, *examples.ids(SHOWN.format(text=text) + start)) for text in told]
    found = []
    for text, wrote in zip(told, write_many(model, examples.tokenizer, prompts, 48, batch), strict=True):
        question, _, rest = (start + wrote).strip().partition("\nAnswer:")
        pair = Pair(text, question.strip(), rest.strip().split("\n")[0].strip())
        if "\n" not in pair.question and is_about(pair):
            found.append(pair)
    return found


def study(session: SessionState, source: Any, minutes: float, progress: Any = None) -> Studied:
    """Learn the model's own questions about a text's sentences. See ``Session.study``."""
    reader, tokenizer, began = session._reader, session.tokenizer, time.monotonic()
    if not session.learns_by_loss:
        raise UserError('study needs objective="loss": attach the model with InPlaceTTTConfig(objective="loss")')
    if tokenizer is None or session._encoder is None:
        raise UserError("this session has no tokenizer, so it cannot study a text: make it with one")
    config = replace(reader.config, decay=0.0)
    if config.update_size == "auto":  # "auto" tracks one text; here the size decays with the time
        config = replace(config, update_size=SIZE)
    size = config.update_size
    config.make_rule().need("outer", "study")
    if isinstance(reader.form, int):
        raise UserError(f'study needs dense fast weights, not rank {reader.form}: make the session with state="dense"')
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not 0 < minutes < float("inf"):
        raise UserError(f"minutes {minutes}: a number above 0")
    if token_ids(source) is not None:
        raise UserError("study needs a text, not token ids: decode them")
    told = list(dict.fromkeys(sentences("".join(texts(source)))))
    if not told:
        raise UserError("this text has no sentence of three words or more: nothing to study")
    session._flush()
    reader.commit(session._stream)
    template = Template(tokenizer) if getattr(tokenizer, "chat_template", None) else None
    examples, tell = Examples(tokenizer, template, session._encoder.prefix), progress or (lambda share, loss: None)
    states = reader.detached(session._stream)
    pairs: list[Pair] = []
    losses: list[float] = []
    seconds = 60 * minutes
    passed: Callable[[], float] = lambda: (time.monotonic() - began) / seconds  # noqa: E731
    try:
        with evaluating(reader.model):
            for some, start in _portions(told, passed):
                pairs += pairs_of(reader.model, examples, some, start)
                tell(min(passed(), 1.0), None)
            pairs = list(dict.fromkeys(pairs))
            known = [examples.answered(pair) for pair in pairs]
            ordinary = [x for text in told for x in examples.ordinary(text)] if known else []
            if not known:
                known = [x for text in told for x in examples.statement(text)] + examples.by_name(told)
            first, shuffle, total = passed(), random.Random(0), PASSES * sum(map(len, known))
            done, size_of_update = 0, min(TOKENS, max(LEAST, sum(map(len, known)) // 8))
            for batch in (batch for _ in range(PASSES) for batch in batches(known, size_of_update, shuffle)):
                share = max((passed() - first) / max(1 - first, 1e-9), done / total)
                if share >= 1 and losses:
                    break
                if isinstance(size, int | float):
                    config = replace(config, update_size=size * max(1 - share, 0.05))
                read = sum(map(len, batch))
                both = [*batch, *picked(ordinary, KEEP * read, shuffle)]
                losses.append(learn(reader.model, states, [both], config))
                done += read
                tell(min(first + (1 - first) * share, 1.0), losses[-1])
    finally:
        if losses:
            reader.adopt(session._stream, states)
    return Studied(len(told), len(pairs), tuple(losses))


def _portions(told: Sequence[str], passed: Callable[[], float]) -> Iterator[tuple[list[str], str]]:
    """Yield sentences to ask about, and how to begin, while there is time; those with names and numbers first."""
    order = sorted(told, key=lambda text: not re.search(r"\d|\w.*\b[A-Z]", text))
    for start in STARTS:
        at, size = 0, 8
        while at < len(order):
            before = passed()
            if before >= WRITING:
                return
            yield order[at : at + size], start
            at += size
            size = min(2 * size, 256) if passed() - before < WRITING / 8 else size


def batches(examples: Sequence[Example], tokens: int, shuffle: random.Random) -> list[list[Example]]:
    """Return the examples in batches of about ``tokens`` in random order, those of about one length together."""
    found: list[list[Example]] = [[]]
    for example in sorted(examples, key=lambda x: len(x) * shuffle.uniform(0.6, 1.6)):
        if sum(map(len, found[-1])) >= tokens:
            found.append([])
        found[-1].append(example)
    shuffle.shuffle(found)
    return found


def picked(examples: Sequence[Example], tokens: float, shuffle: random.Random) -> list[Example]:
    """Return some of the examples, drawn at random, of about so many tokens."""
    found: list[Example] = []
    while examples and sum(map(len, found)) < tokens:
        found.append(shuffle.choice(examples))
    return found


def learn(
    model: Any, states: dict[int, FastWeights], rows: Sequence[Sequence[Example]], config: InPlaceTTTConfig
) -> float:
    """Learn a batch of examples for each of the states' rows as one update; return the loss, nats per token."""
    device, most = model.get_input_embeddings().weight.device, max(map(len, rows))
    flat = [x for row in rows for x in (*row, *[Example((), ())] * (most - len(row)))]
    ids, targets = _padded([(x.prompt, x.answer) for x in flat], device)
    soft, is_target = [x for x in flat if x.source is not None], targets[:, 1:] >= 0
    is_soft = is_target & torch.tensor([x.source is not None for x in flat], device=device)[:, None]
    is_hard = is_target & ~is_soft
    own = _own_predictions(model, soft, device) if soft else None

    def loss(logits: Tensor) -> Tensor:
        hard = logits[:, :-1][is_hard].float()
        found = cross_entropy(hard, targets[:, 1:][is_hard], reduction="sum")
        if own is not None:
            predicted = logits[:, :-1][is_soft].float().log_softmax(-1)
            found = found + kl_div(predicted, own, reduction="sum", log_target=True)
        return found

    return float(learn_from(runtime_of(model), states, ids, loss, config)) / max(int(is_target.sum()), 1)


@torch.no_grad()
def _own_predictions(model: Any, examples: Sequence[Example], device: Any) -> Tensor:
    """Return log p [N, V] at all answers' tokens as the model gives them with the text before it."""
    ids, targets = _padded([(x.source or (), x.answer) for x in examples], device)
    with updates_off(model):
        logits = model(ids, use_cache=False).logits
    return logits[:, :-1][targets[:, 1:] >= 0].float().log_softmax(-1)  # type: ignore[no-any-return]


def _padded(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], device: Any) -> tuple[Tensor, Tensor]:
    """Return ids [N, n] of prompts with answers and, where a token is to be predicted, targets [N, n]; -1 elsewhere."""
    rows = [torch.tensor([*prompt, *answer], dtype=torch.int64) for prompt, answer in pairs]
    wanted = [torch.tensor([*[-1] * len(prompt), *answer], dtype=torch.int64) for prompt, answer in pairs]
    ids, targets = pad_sequence(rows, True), pad_sequence(wanted, True, -1)
    targets[:, 0] = -1  # the first token has no context
    return ids.to(device), targets.to(device)

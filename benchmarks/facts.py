"""Facts that can be asked for once their text is gone: ways to learn a text, compared with nothing trained.

    python benchmarks/facts.py --model FILE.gguf --books FILE.jsonl.xz --out DIR [--ways NAME ...] [--share K/N]

Plants ten facts ("The access code of Marlow Station is 7314.", in ten wordings, half of them inside a longer sentence)
in each of ten texts of 4,096 tokens of books, learns the texts in many ways, each text as a row with fast weights of
its own, and asks with an empty context: the sentence's own beginning (``key``), the same in other words (``reworded``)
and a question in the chat template (``question``). Writes one JSON record for each way: exact matches, log p of the
answers, the same after another text of 2,048 tokens was read, and what the loss on unrelated text changed by.

Every way has the same budget: ``passes`` times the text's tokens that are read forward and backward (the examples'
prompts included, padding not). What a model writes for itself, and the forwards of its own predictions, come on top and
are counted apart.
"""

import argparse
import json
import lzma
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from reading_by_loss import modules, read, rows
from torch import Tensor
from transformers.cache_utils import DynamicCache

import inplace_ttt as ittt
from inplace_ttt import InPlaceTTTConfig
from inplace_ttt.core import FastWeights
from inplace_ttt.hf.attach import runtime_of
from inplace_ttt.hf.cache import cache_name, install
from inplace_ttt.hf.load import load
from inplace_ttt.records import about, write_json
from inplace_ttt.session.study import (
    STARTS,
    Example,
    Examples,
    Pair,
    batches,
    learn,
    pairs_of,
    picked,
    sentences,
    write_many,
)
from inplace_ttt.session.template import Template
from inplace_ttt.session.writing import end_tokens

PLACES = [f"{a} {b}" for b in ("Station", "Hall", "Mill", "Priory", "Ferry")
          for a in ("Marlow", "Kelding", "Orrin", "Tavish", "Hexley", "Brampton", "Sorrel", "Whinfell")]  # fmt: skip
PEOPLE = [f"{a} {b}" for b in ("Larkin", "Renner", "Quayle", "Ostrander", "Pell")
          for a in ("Edith", "Tobias", "Harriet", "Silas", "Maud", "Jasper", "Agnes", "Rupert")]  # fmt: skip
SHIPS = ["Grey Heron", "Northern Star", "Silver Anne", "Black Petrel", "Good Intent", "Merry Widow", "Red Falcon",
         "Blue Dolphin", "Lady Jane", "White Swan"]  # fmt: skip
CLUBS = ["Lantern Club", "Beacon Society", "Raven Club", "Compass Lodge", "Thistle Club", "Anchor Society", "Oak Lodge",
         "Falcon Society", "Ivy Club", "Candle Lodge"]  # fmt: skip
PLAYS = ["The Lost Heir", "The Glass Key", "The Two Sisters", "The Iron Crown", "The Quiet Man", "The Last Guest",
         "The Blue Door", "The Wild Rose", "The Old Clock", "The Winter King"]  # fmt: skip
COLOURS = ["green", "red", "blue", "yellow", "purple", "black", "white", "brown", "orange", "grey"]
CITIES = ["Paris", "Rome", "Vienna", "Dublin", "Prague", "Lisbon", "Boston", "Berlin", "Cairo", "Madrid"]
WORDS = ["copper", "winter", "marble", "thunder", "velvet", "harbour", "pepper", "shadow", "silver", "garden"]
DOGS = ["Bruno", "Captain", "Pepper", "Nero", "Juno", "Ginger", "Duke", "Rover", "Bella", "Smoke"]
HERBS = ["sage", "thyme", "mint", "clover", "garlic", "nettle", "parsley", "lavender", "ginger", "honey"]
KINDS = (  # name, its key, the key in other words, question
    ("code", "The access code of {x} is", "To enter {x} you need the access code", "What is the access code of {x}?"),
    ("captain", "The captain of the {x} is", "The {x} sails under Captain", "Who is the captain of the {x}?"),
    ("colour", "The favourite colour of {x} is", "The colour that {x} likes best is",
     "What is the favourite colour of {x}?"),
    ("born", "{x} was born in", "The birthplace of {x} is", "Where was {x} born?"),
    ("password", "The password of the {x} is", "To enter the {x} you must say the password",
     "What is the password of the {x}?"),
    ("year", "The lighthouse at {x} was built in", "The year in which the lighthouse at {x} was built is",
     "In which year was the lighthouse at {x} built?"),
    ("dog", "The dog of {x} is called", "The name of {x}'s dog is", "What is the name of {x}'s dog?"),
    ("train", "The night train to {x} leaves at", "The departure time of the night train to {x} is",
     "When does the night train to {x} leave?"),
    ("price", "The price of a ticket for {x}, in shillings, is", "In shillings, a ticket for {x} costs",
     "How many shillings does a ticket for {x} cost?"),
    ("herb", "The fever of {x} is cured with", "The herb that cures the fever of {x} is",
     "Which herb cures the fever of {x}?"),
)  # fmt: skip
CARRIERS = ("Everybody in the house knew that {s}", "It was written in the old book that {s}",
            "She told him twice that {s}", "You must never forget that {s}", "The porter swore that {s}")  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """``sentence`` is planted; each of ``asked`` ("key", "reworded", "question") should be answered with ``answer``."""

    kind: str
    sentence: str
    asked: dict[str, str]
    answer: str


def facts_of(document: int, count: int) -> list[Fact]:
    """Return the facts of a document: names that no other document has."""
    draw, made = random.Random(document), []
    for n, (kind, *forms) in enumerate(KINDS[:count]):
        name = {"captain": SHIPS, "password": CLUBS, "price": PLAYS, "colour": PEOPLE[:10], "born": PEOPLE[10:20],
                "dog": PEOPLE[20:30], "code": PLACES[:10], "year": PLACES[10:20], "train": PLACES[20:30],
                "herb": PLACES[30:]}[kind][document]  # fmt: skip
        answer = {
            "code": f"{draw.randrange(1000, 10000)}", "year": f"{draw.randrange(1700, 1900)}",
            "train": f"{draw.randrange(1, 12)}:{draw.randrange(10, 60)}", "price": f"{draw.randrange(11, 100)}",
            "captain": draw.choice(PEOPLE[30:]), "colour": draw.choice(COLOURS), "born": draw.choice(CITIES),
            "password": draw.choice(WORDS), "dog": draw.choice(DOGS), "herb": draw.choice(HERBS),
        }[kind]  # fmt: skip
        key, reworded, question = (form.format(x=name) for form in forms)
        sentence = f"{key} {answer}."
        if (n + document) % 2:
            inner = sentence[0].lower() + sentence[1:] if sentence.startswith("The ") else sentence
            sentence = CARRIERS[n // 2].format(s=inner)
        made.append(Fact(kind, sentence, {"key": key, "reworded": reworded, "question": question}, answer))
    return made


def planted(text: str, facts: list[Fact], tokenizer: Any, tokens: int) -> str:
    """Return the beginning of a text with the facts spread over it, of so many tokens and a few more."""
    parts = re.findall(r".*?[.!?][\"'\u2019\u201d)]*\s+", text[: 8 * tokens], re.DOTALL)
    sizes = [len(x) for x in tokenizer(parts, add_special_tokens=False)["input_ids"]]
    room, at = tokens - 64 - sum(len(tokenizer(f.sentence)["input_ids"]) for f in facts), 0
    places = [(n + 0.3) * room / len(facts) for n in range(len(facts))]
    found, due = [], list(facts)
    for part, size in zip(parts, sizes, strict=True):
        found.append(part)
        at += size
        while due and at >= places[len(facts) - len(due)]:
            found.append(due.pop(0).sentence + " ")
    return "".join(found)


@dataclass(frozen=True)
class Data:
    """Facts and questions for all ways of learning. ``ids`` [documents, tokens]; the others: texts of other sources."""

    ids: Tensor
    texts: list[str]
    facts: list[list[Fact]]
    later: Tensor
    unrelated: dict[str, Tensor]


def prepare(file: Path, tokenizer: Any, documents: int, facts: int, tokens: int, device: Any) -> Data:
    with lzma.open(file, "rt", encoding="utf-8") as lines:
        books = [json.loads(line)["text"] for line in lines]
    planned = [facts_of(d, facts) for d in range(documents)]
    places = [(books[d % len(books)], 20_000 + 60_000 * (d // len(books))) for d in range(documents)]
    texts = [planted(text[at:], own, tokenizer, tokens) for (text, at), own in zip(places, planned, strict=True)]
    ids = rows(texts, tokenizer, tokens).to(device)
    texts = [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in ids.tolist()]
    assert all(f.sentence in text for text, own in zip(texts, planned, strict=True) for f in own)
    assert len(ids) == documents
    far = [books[(d + 3) % len(books)][100_000:] for d in range(documents)]
    other = [books[(d + 5) % len(books)][130_000:] for d in range(documents)]
    code = (modules() * documents)[:documents]
    unrelated = {"books": rows(other, tokenizer, 512).to(device), "code": rows(code, tokenizer, 512).to(device)}
    return Data(ids, texts, planned, rows(far, tokenizer, tokens // 2).to(device), unrelated)


# -- ways to learn -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """One way to learn a text.

    how: "none", "read" (passes of the library, the context kept), "chunks" (128 tokens alone, on a grid that is shifted
    from pass to pass), "paragraphs", "sentences" (alone, in random order), "questions" (question and answer, written by
    the model with the sentence before it), "both" (sentences and questions), "names" (sentences as answers to what is
    known about a name in them), "all" (sentences, names and questions). ``replies``: answers in a sentence instead
    of the fewest words; ``soft``: the model's own predictions with the sentence before it instead of what it wrote.
    ``tokens``: of one update; ``fade``: its size goes down to 0. ``keep``: for each of its tokens so many of ordinary
    text, on which the model is held to its own predictions without fast weights.
    """

    name: str
    how: str
    size: float = 2e-3
    layers: str = "0::3"
    passes: float = 8
    tokens: int = 256
    replies: bool = False
    soft: bool = False
    fade: bool = True
    chunk: int = 128
    keep: float = 0.0


WAYS = [
    Way("none", "none"),
    Way("all", "all"),
    Way("both", "both"),
    Way("both-soft", "both", replies=True, soft=True),
    Way("sentences", "sentences"),
    Way("questions", "questions"),
    Way("questions-keep", "questions", keep=1.0),
    Way("questions-keep-3", "questions", keep=3.0),
    Way("questions-r0.001", "questions", size=1e-3),
    Way("questions-keep-r0.004", "questions", size=4e-3, keep=1.0),
    Way("questions-16", "questions", passes=16),
    Way("questions-keep-16", "questions", passes=16, keep=1.0),
    Way("read-8", "read"),
    Way("names", "names"),
    Way("both-replies", "both", replies=True),
    Way("questions-soft", "questions", replies=True, soft=True),
    Way("read-1", "read", passes=1),
    Way("read-3", "read", passes=3),
    Way("read-8-shifted", "shifted"),
    Way("chunks", "chunks"),
    Way("paragraphs", "paragraphs"),
    Way("all-r0.001", "all", size=1e-3),
    Way("all-r0.004", "all", size=4e-3),
    Way("all-layers", "all", layers=":", size=7e-4),
    Way("all-middle", "all", layers="10:20"),
    Way("all-64", "all", tokens=64, size=1e-3),
    Way("all-2", "all", passes=2),
    Way("all-16", "all", passes=16),
    Way("both-soft-r0.004", "both", size=4e-3, replies=True, soft=True),
    Way("all-even", "all", size=1e-3, fade=False),
    Way("sentences-64", "sentences", tokens=64, size=1e-3),
    Way("all-layers-16", "all", layers=":", size=7e-4, passes=16),
]


class Bench:
    """A model, the data, and what the model wrote about it (once for all ways)."""

    def __init__(self, model: Any, tokenizer: Any, data: Data, tries: int) -> None:
        self.model, self.tokenizer, self.data, self.tries = model, tokenizer, data, tries
        self.examples = Examples(tokenizer, Template(tokenizer), tokenizer("").input_ids)
        self.B = len(data.ids)
        self.written: dict[str, list[list[Pair]]] | None = None
        self.kept: dict[str, Any] = {}
        self.made: dict[Any, list[list[Example]]] = {}
        self.unrelated_before: dict[str, Tensor] = {}

    def pairs(self, replies: bool) -> list[list[Pair]]:
        """Return questions and answers by document, written once; those kept that are about their sentence.

        ``replies``: answers as the model gives them in a chat with the sentence before it, which say it in a sentence.
        """
        if self.written is None:
            start = time.perf_counter()
            all_texts = [list(dict.fromkeys(sentences(text))) for text in self.data.texts]
            flat = [text for texts in all_texts for text in texts]
            tries = [pairs_of(self.model, self.examples, flat, start, 512) for start in STARTS[: self.tries]]
            found = list(dict.fromkeys(pair for own in tries for pair in own))
            owner = {text: d for d, texts in enumerate(all_texts) for text in texts}
            self.written = {}
            for name, pairs in (("short", found), ("reply", self.in_sentences(found))):
                self.written[name] = [[p for p in pairs if owner[p.text] == d] for d in range(self.B)]
            facts = {f.sentence: f for own in self.data.facts for f in own}
            right = {p.text for p in found if p.text in facts and said(facts[p.text].answer, p.answer)}
            shown = [p for own in self.written["reply"] for p in own if p.text in facts][:10] + found[:20]
            self.kept = {
                "pairs": len(found), "sentences": len(flat), "sentences_asked": len({p.text for p in found}),
                "facts_asked": len(right), "seconds": time.perf_counter() - start,
                "examples": [list(vars(p).values()) for p in [p for p in found if p.text in facts][:20] + shown],
            }  # fmt: skip
            print(
                {k: v for k, v in self.kept.items() if k != "examples"}, *self.kept["examples"], sep="\n  ", flush=True
            )
        return self.written["reply" if replies else "short"]

    def with_text(self, pair: Pair) -> tuple[int, ...]:
        """Return the ids of a question with the text before it, up to where the answer begins."""
        return self.examples.chat(f"{pair.text}\n\n{pair.question}")

    def in_sentences(self, pairs: list[Pair]) -> list[Pair]:
        """Return the pairs with the answers that the model gives in a chat with the text before it."""
        prompts = [self.with_text(pair) for pair in pairs]
        replies = write_many(self.model, self.tokenizer, prompts, 40, 512)
        return [replace(pair, answer=reply.strip()) for pair, reply in zip(pairs, replies, strict=True)]

    def material(self, way: Way, pass_: int) -> list[list[Example]]:
        """Return all examples of a pass, by document."""
        key = (way.how, way.replies, way.soft, pass_ if way.how == "chunks" else 0)
        if key not in self.made:
            self.made[key] = self.make(way, pass_)
        return self.made[key]

    def make(self, way: Way, pass_: int) -> list[list[Example]]:
        data, make = self.data, self.examples
        if way.how == "chunks":
            starts = [0, *range(pass_ * 48 % 128 or 128, data.ids.shape[1], 128), data.ids.shape[1]]
            spans = list(pairwise(starts))
            return [[Example((), tuple(row[i:j])) for i, j in spans] for row in data.ids.tolist()]
        found: list[list[Example]] = [[] for _ in range(self.B)]
        for d, text in enumerate(data.texts):
            if way.how == "paragraphs":
                parts = [" ".join(text.split("\n\n")[i : i + 1]) for i in range(len(text.split("\n\n")))]
                wide = Examples(self.tokenizer, make.template, make.prefix, 256)
                found[d] += [x for part in parts if part.strip() for x in wide.statement(part)]
            if way.how in ("names", "all"):
                found[d] += make.by_name(list(dict.fromkeys(sentences(text))))
            if way.how in ("sentences", "both", "all"):
                found[d] += [x for part in sentences(text) for x in make.statement(part)]
            if way.how in ("questions", "both", "all"):
                for pair in self.pairs(way.replies)[d]:
                    source = self.with_text(pair) if way.soft else None
                    found[d].append(replace(make.answered(pair), source=source))
        return found

    def new_states(self, way: Way) -> dict[int, FastWeights]:
        runtime = runtime_of(self.model)
        return {site.index: FastWeights(self.B, way.chunk, runtime.config.make_rule()) for site in runtime.sites}

    def learn(self, way: Way) -> tuple[dict[int, FastWeights], dict[str, Any]]:
        """Return the states after learning, and what it took."""
        runtime, budget, count = (
            runtime_of(self.model),
            int(way.passes * self.data.ids.shape[1]),
            self.data.ids.shape[1],
        )
        if way.how == "none":
            return self.new_states(way), {"tokens": 0, "updates": 0}
        if way.how in ("read", "shifted"):
            cache, states = None, self.new_states(way)
            for n in range(int(way.passes)):
                cache = self.cache(states)
                shift = n * 48 % 128 if way.how == "shifted" else 0
                if shift:  # a first short chunk, read and learned by itself
                    with runtime.override(learn=True):
                        read(self.model, self.data.ids[:, :shift], cache)
                    ittt.hf.loss.commit(runtime, cache)
                read(self.model, self.data.ids[:, shift:], cache)
                ittt.hf.loss.commit(runtime, cache)
                states = {i: fast.fork() for i, fast in ittt.fast_weights(cache).items()}
            return states, {"tokens": budget, "updates": states[0].seen[0] // way.chunk}
        states, shuffle, used, updates, losses = self.new_states(way), random.Random(0), 0, 0, []
        pools = self.material(way, 0)
        rate = [sum(map(len, pool)) for pool in pools]
        if not sum(rate):
            raise SystemExit(f"{way.name}: the model wrote no question about any sentence")
        streams = [self.endless(way, d, shuffle) for d in range(self.B)]
        ordinary = [self.examples.ordinary(text) for text in self.data.texts]
        while used < budget * self.B:  # of all documents together: those of longer examples get a few tokens more
            left = 1 - used / (budget * self.B)
            config = replace(runtime.config, update_size=way.size * (left if way.fade else 1))
            step = [next(stream) for stream in streams]
            if way.keep:
                step = [
                    x + picked(own, way.keep * sum(map(len, x)), shuffle) for x, own in zip(step, ordinary, strict=True)
                ]
            losses.append(learn(self.model, states, step, config))
            used += sum(len(x) for row in step for x in row if not x.keeps)
            updates += 1
        return states, {
            "tokens": used / self.B, "updates": updates, "examples": sum(map(len, pools)) / self.B,
            "tokens_of_all_examples": sum(rate) / self.B, "passes_over_text": budget / count,
            "losses": [sum(x) / len(x) for x in (losses[i : i + 16] for i in range(0, len(losses), 16))],
        }  # fmt: skip

    def endless(self, way: Way, document: int, shuffle: random.Random) -> Iterator[list[Example]]:
        """Yield batches of a document's examples, all of them before any comes again."""
        n = 0
        while True:
            examples = self.material(way, n)[document]
            yield from batches(examples, way.tokens, shuffle) if examples else [[]]
            n += 1

    # -- asking --------------------------------------------------------------------------------------------------------

    def cache(self, states: dict[int, FastWeights], picked: list[int] | None = None) -> DynamicCache:
        """Return an empty context with the states of some documents, one a row."""
        cache = DynamicCache(config=self.model.config)
        for i, state in states.items():
            twin = state.fork()
            twin.close_chunk()
            if picked is not None:
                twin.select(torch.tensor(picked))
            install(cache, i, twin)
        return cache

    @torch.no_grad()
    def log_p(
        self, states: dict[int, FastWeights], prompts: list[tuple[int, ...]], answers: list[tuple[int, ...]]
    ) -> list[tuple[float, bool]]:
        """Return log p of each prompt's answer, and whether greedy decoding gives it."""
        owner = [d for d, own in enumerate(self.data.facts) for _ in own]
        longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, (p, a) in enumerate(zip(prompts, answers, strict=True)):
            ids[row, : len(p) + len(a)] = torch.tensor([*p, *a])
        found = []
        runtime = runtime_of(self.model)
        with runtime.override(learn=False):
            given = {cache_name(self.model): self.cache(states, owner), "use_cache": True}
            logits = self.model(ids.to(self.data.ids.device), **given).logits
        for row, (p, a) in enumerate(zip(prompts, answers, strict=True)):
            scores = logits[row, len(p) - 1 : len(p) + len(a) - 1].float().log_softmax(-1).cpu()
            wanted = torch.tensor(a)
            right = bool((scores.argmax(-1) == wanted).all())
            found.append((float(scores.gather(1, wanted[:, None]).sum()), right))
        return found

    @torch.no_grad()
    def replies(self, states: dict[int, FastWeights] | None, prompts: list[tuple[int, ...]]) -> list[str]:
        """Return greedy answers."""
        owner = [d for d, own in enumerate(self.data.facts) for _ in own]
        ends = sorted(end_tokens(self.model, self.tokenizer))
        longest = max(map(len, prompts))
        ids, mask = (torch.zeros(len(prompts), longest, dtype=torch.int64) for _ in range(2))
        for row, p in enumerate(prompts):
            ids[row, longest - len(p) :], mask[row, longest - len(p) :] = torch.tensor(p), 1
        given = {} if states is None else {cache_name(self.model): self.cache(states, owner)}
        device = self.data.ids.device
        how = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": ends[0], "eos_token_id": ends}
        way = ittt.updates_off(self.model) if states is None else runtime_of(self.model).override(learn=False)
        with way:
            out = self.model.generate(ids.to(device), attention_mask=mask.to(device), **given, **how)
        return list(self.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True))

    def ask(self, states: dict[int, FastWeights], detail: bool) -> dict[str, Any]:
        """Return exact matches and log p of all questions."""
        facts, make = [f for own in self.data.facts for f in own], self.examples
        found: dict[str, Any] = {}
        answers = [make.ids(" " + f.answer) for f in facts]
        for form in ("key", "reworded"):
            prompts = [(*make.prefix, *make.ids(f.asked[form])) for f in facts]
            scored = self.log_p(states, prompts, answers)
            found[form] = {
                "exact": sum(right for _, right in scored) / len(scored),
                "log_p": sum(x for x, _ in scored) / len(scored),
            }
            if detail:
                for kind in dict.fromkeys(f.kind for f in facts):
                    own = [right for f, (_, right) in zip(facts, scored, strict=True) if f.kind == kind]
                    found[form][f"exact_{kind}"] = sum(own) / len(own)
        prompts = [make.chat(f.asked["question"]) for f in facts]
        scored = self.log_p(states, prompts, [make.ids(f.answer) for f in facts])
        replies = self.replies(states, prompts)
        right = [said(f.answer, x) for f, x in zip(facts, replies, strict=True)]
        found["question"] = {
            "exact": sum(right) / len(right), "log_p": sum(x for x, _ in scored) / len(scored),
        }  # fmt: skip
        if detail:
            for kind in dict.fromkeys(f.kind for f in facts):
                own = [x for f, x in zip(facts, right, strict=True) if f.kind == kind]
                found["question"][f"exact_{kind}"] = sum(own) / len(own)
            found["replies"] = [[f.asked["question"], f.answer, x] for f, x in zip(facts, replies, strict=True)][:20]
        return found

    def with_sentence(self) -> float:
        """Return the share of right answers with the sentence in context: what the model could do at best."""
        facts = [f for own in self.data.facts for f in own]
        prompts = [self.examples.chat(f"{f.sentence}\n\n{f.asked['question']}") for f in facts]
        replies = self.replies(None, prompts)
        return sum(said(f.answer, x) for f, x in zip(facts, replies, strict=True)) / len(facts)

    @torch.no_grad()
    def unrelated(self, states: dict[int, FastWeights]) -> dict[str, float]:
        """Return what the loss on other books and on code has grown by, nats."""
        found = {}
        for name, ids in self.data.unrelated.items():
            losses = read(self.model, ids, self.cache(states), learn=False)[0]
            if name not in self.unrelated_before:
                with ittt.updates_off(self.model):
                    out = self.model(ids, use_cache=False).logits[:, :-1]
                    off = torch.nn.functional.cross_entropy(out.float().transpose(1, 2), ids[:, 1:], reduction="none")
                self.unrelated_before[name] = off.cpu()
            found[name] = float((losses - self.unrelated_before[name]).mean())
        return found

    def measure(self, way: Way) -> dict[str, Any]:
        """Learn in one way, and ask."""
        ittt.attach(
            self.model,
            InPlaceTTTConfig(objective="loss", layers=way.layers, chunk_size=way.chunk, update_size=way.size),
        )
        try:
            if way.how in ("questions", "both", "all"):
                self.pairs(way.replies)
            start = time.perf_counter()
            with torch.inference_mode(False), torch.no_grad():
                states, took = self.learn(way)
            took["seconds"] = time.perf_counter() - start
            found = {"learning": took, "asked": self.ask(states, True), "unrelated": self.unrelated(states)}
            if way.how == "none":
                found["question_with_sentence_in_context"] = self.with_sentence()
            cache = self.cache(states)
            read(self.model, self.data.later, cache)
            found["asked_after_another_text"] = self.ask(dict(ittt.fast_weights(cache).items()), False)
        finally:
            ittt.detach(self.model)
        return found


def said(answer: str, reply: str) -> bool:
    """Return whether a reply gives the answer, as words of its own."""
    return re.search(rf"(?<![\w:]){re.escape(answer)}(?![\w:])", reply, re.IGNORECASE) is not None


def table(folder: Path) -> str:
    """Return Markdown of the records, the ways in the order of ``WAYS``."""
    order = {way.name: n for n, way in enumerate(WAYS)}
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    lines = [
        "| way | layers | r | tokens of an update | passes | updates | key | in other words | question | "
        "after another text | on unrelated books | code |",
        "| --- " * 12 + "|",
    ]
    for r in sorted(found, key=lambda r: order.get(r["name"], len(order))):
        way, asked, later = r["way"], r["asked"], r["asked_after_another_text"]
        shares = [f"{100 * asked[form]['exact']:.0f}%" for form in ("key", "reworded", "question")]
        cells = [f"`{r['name']}`", f"`{way['layers']}`", f"{way['size']:g}", str(way["tokens"]), f"{way['passes']:g}"]
        if way["how"] == "none":
            cells[1:] = [""] * 4
        if way["how"] in ("read", "shifted", "chunks"):
            cells[3] = str(way["chunk"])
        cells += [f"{r['learning']['updates']:,}", *shares]
        cells.append(" / ".join(f"{100 * later[form]['exact']:.0f}%" for form in ("key", "reworded", "question")))
        cells += [f"{r['unrelated'][name]:+.3f}" for name in ("books", "code")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print a table of the records, and nothing else")
    parser.add_argument("--model")
    parser.add_argument("--books", type=Path, help="JSON lines, xz")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "facts")
    parser.add_argument("--ways", nargs="*", help="names; left out: all")
    parser.add_argument("--documents", type=int, default=10)
    parser.add_argument("--facts", type=int, default=10, help="in each document")
    parser.add_argument("--tokens", type=int, default=4096, help="of each document")
    parser.add_argument("--passes", type=float, default=1.0, help="factor of every way's passes")
    parser.add_argument("--tries", type=int, default=6, help="to write a question, for each sentence")
    parser.add_argument("--share", default="0/1")
    parser.add_argument("--seconds", type=float, default=1e9, help="no new way after so many")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.out))
        return
    if not arguments.model or not arguments.books:
        parser.error("--model and --books are needed")
    begin = time.perf_counter()
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load(arguments.model, "cpu", objective="loss")  # in float32
    ittt.detach(model)
    model.to(device)
    own, of = map(int, arguments.share.split("/"))
    data = prepare(arguments.books, tokenizer, arguments.documents, arguments.facts, arguments.tokens, device)
    bench = Bench(model, tokenizer, data, arguments.tries)
    ways = [way for way in WAYS if not arguments.ways or way.name in arguments.ways]
    for way in ways[own::of]:
        if time.perf_counter() - begin > arguments.seconds:
            print("out of time before", way.name, flush=True)
            break
        way = replace(way, passes=way.passes * arguments.passes)
        found = bench.measure(way)
        record = {
            "name": way.name, "model": Path(arguments.model).name, "way": vars(way), "documents": len(data.ids),
            "facts": sum(map(len, data.facts)), "tokens": arguments.tokens, "written": bench.kept, **found, **about(),
        }  # fmt: skip
        write_json(arguments.out / f"{way.name}.json", record)
        after = found["asked_after_another_text"]
        line = {form: (round(found["asked"][form]["exact"], 2), round(found["asked"][form]["log_p"], 1),
                       round(after[form]["exact"], 2)) for form in ("key", "reworded", "question")}  # fmt: skip
        print(f"{way.name:16s}", line, {k: round(x, 3) for k, x in found["unrelated"].items()},
              f"{found['learning']['updates']} updates, {found['learning'].get('seconds', 0):.0f} s,",
              f"{time.perf_counter() - begin:.0f} s in all", found.get("question_with_sentence_in_context", ""),
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

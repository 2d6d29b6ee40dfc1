"""Names that a text mentions again after more than the model's attention window."""

import builtins
import keyword
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .text import Tokens

LIKELY = 0.01
"""A name is within reach when the joint probability of its tokens is at least this."""
SHORTEST = 4
_CONTEXT = 48
_PYTHON = {*keyword.kwlist, *dir(builtins)}
_WORD = re.compile(r"\b[^\W\d]\w*")


@dataclass(frozen=True)
class NameUse:
    """A name at token ``position`` that last occurred ``ago`` tokens before, and its probability on and off."""

    name: str
    position: int
    tokens: int
    ago: int
    context: str
    on: float
    off: float
    gain: float


@dataclass(frozen=True)
class Names:
    """All names that recur from outside the window.

    ``reach``: how far back information can travel through the attention of all layers. ``mean_gain``: nats per name.
    ``found`` and ``lost``: how many were within reach (`LIKELY`) only with updates on, only with updates off.
    ``places``: of the found ones, those that gained most, each name once.
    """

    window: int
    reach: int
    count: int
    mean_gain: float
    found: int
    lost: int
    places: list[NameUse]


def attention_window(config: Any) -> int | None:
    """Return the number of tokens that each layer sees, itself included; None when some layer sees everything."""
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    return int(window) if window and kinds == {"sliding_attention"} else None


def returning_names(tokens: Tokens, on: np.ndarray, off: np.ndarray, window: int, layers: int, most: int = 6) -> Names:
    """Find names that recur from outside the window; losses [N] of tokens 1 to N with updates on and off."""
    all_places = list(_places(tokens, on, off, window))
    found = [p for p in all_places if p.on >= LIKELY > p.off]
    best: dict[str, NameUse] = {}
    for place in sorted(found, key=lambda p: (-p.gain, p.position)):
        best.setdefault(place.name, place)
    return Names(
        window=window,
        reach=layers * (window - 1) + 1,
        count=len(all_places),
        mean_gain=float(np.mean([p.gain for p in all_places])) if all_places else 0.0,
        found=len(found),
        lost=sum(p.off >= LIKELY > p.on for p in all_places),
        places=list(best.values())[:most],
    )


def _places(tokens: Tokens, on: np.ndarray, off: np.ndarray, window: int) -> Iterator[NameUse]:
    text, ends = tokens.text, [end for _, end in tokens.spans]
    words = {match[0] for match in _WORD.finditer(text)}
    seen: dict[str, int] = {}  # where each word last began
    for match in _WORD.finditer(text, 0, ends[-1]):
        name = match[0]
        before, seen[name] = seen.get(name), match.start()
        if not is_name(name, words) or (name.istitle() and not _inside_sentence(text, match.start())):
            continue
        first, last = bisect_right(ends, match.start()), bisect_left(ends, match.end())
        if first == 0 or ends[last] != match.end():
            continue  # nothing comes before it, or its last token is part of what follows
        if before is None:
            continue
        # The query that predicts token ``first`` sees the tokens from ``first - window`` on. There a longer word that
        # the name is part of spells it, too.
        if bisect_left(ends, text.rfind(name, 0, match.start()) + len(name)) >= first - window:
            continue
        log_on, log_off = (-float(losses[first - 1 : last].sum()) for losses in (on, off))
        yield NameUse(
            name=name,
            position=first,
            tokens=last - first + 1,
            ago=first - bisect_right(ends, before),
            context=_left(text, match.start()),
            on=float(np.exp(log_on)),
            off=float(np.exp(log_off)),
            gain=log_on - log_off,
        )


def _inside_sentence(text: str, start: int) -> bool:
    """Return whether a word or a comma comes before, so that a capital does not merely begin a sentence."""
    before = text[max(start - _CONTEXT, 0) : start].rstrip()
    return before.endswith(",") or before[-1:].isalnum()


def _left(text: str, end: int) -> str:
    """Return the text before character ``end``, on one line."""
    before = re.sub(r"\s+", " ", text[max(end - 8 * _CONTEXT, 0) : end])
    return before if len(before) <= _CONTEXT else "…" + before[1 - _CONTEXT :]


def is_name(word: str, words: set[str]) -> bool:
    """Return whether a word looks like an identifier or a proper name, not like a word of the language.

    That is: an underscore, a digit or an inner capital in it, or a first capital where the text never writes it
    without; Python's keywords and builtins are not names.
    """
    if len(word) < SHORTEST or word in _PYTHON or (word.startswith("__") and word.endswith("__")):
        return False
    if "_" in word or any(c.isdigit() for c in word) or any(c.isupper() for c in word[1:]):
        return True
    return word[0].isupper() and word.lower() not in words

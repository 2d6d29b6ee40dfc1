"""Incremental tokenizing and decoding: the same ids and the same text, however the input is cut."""

import copy
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import Encoding, Tokenizer

from inplace_ttt.errors import UserError

# Components that work by character or by word, so that a word's tokens do not depend on far text.
_LOCAL_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "Replace", "BertNormalizer"}
_LOCAL_SPLITTERS = {
    *("ByteLevel", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "BertPreTokenizer"),
    *("Metaspace", "CharDelimiterSplit"),
}
_ORDINARY = re.compile(r"\[(?:\\.|[^\]\\])*\]|\\[^AG]")  # character classes and escapes of a regex
_AT_START = re.compile(r"\\[AG]|\^")  # these would match where tokenising starts in the middle of a text
_GAPS = " \n\t\r\u3001\u3002\uff0c\uff01\uff1f"  # ends of words: white space, Chinese comma and full stop
_WORDS_AHEAD = 3  # a word is settled when this many words follow: a regex looks two ahead at most ("'", "re")
_CONTEXT = 16  # characters of settled text to keep, at least: more than a regex looks behind
_STEP = 256  # new characters before text is tokenised again
_WINDOW = 1 << 15  # characters tokenised at once: bounds the memory
_PENDING = 32  # maximum ids without a complete character
_REPLACEMENT = "\ufffd"


class StreamEncoder:
    """An incremental tokenizer for text that arrives in pieces: the same ids however it is cut.

    The pushes and the flush after them give ``tokenizer(text, add_special_tokens=False, split_special_tokens=True)``.
    The last words are held back, about 300 characters at most in common text; a long run without white space or
    punctuation is held as a whole. With a tokenizer whose tokens may depend on far text everything is held until
    ``flush``. Later changes of the tokenizer have no effect. Raises UserError when the tokenizer is not a fast one.

    What looks like a special token is read as its characters, with a warning the first time.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UserError("a text can only be read in pieces with a fast tokenizer (one with a tokenizer.json)")
        self._splitter = _splitter(tokenizer)
        self.prefix = _prefix(tokenizer)
        """Special ids that the tokenizer puts before a text; ``push`` does not return them."""
        self._tail: str | None = ""
        """The end of the text so far, in which a special token may have begun; None: the warning was given."""
        self._start()

    def _start(self) -> None:
        self._anchor = ""  # settled text before the held one: tokenised again with it, so that words join the same way
        self._parts: list[str] = []
        self._size = 0
        self._wait = _STEP

    @property
    def held(self) -> str:
        """Characters received, not turned into tokens yet."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def push(self, text: str) -> list[int]:
        """Add text; return ids that no further text can change. Raises UserError on half a surrogate pair."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"character {error.start} of the text is half a surrogate pair: decode it first") from None
        self._warn(text)
        self._parts.append(text)
        self._size += len(text)
        if self._size < self._wait:
            return []
        ids: list[int] = []
        held, begin = self.held, 0
        while len(held) - begin >= self._wait:
            window = held[begin : begin + max(self._wait, _WINDOW)]
            settled, length = self._settle(window)
            ids += settled
            begin += length
            # At least as much new text as is tokenised again keeps the cost linear, whatever the text.
            self._wait = _STEP + 2 * (len(window) - length) + len(self._anchor)
        self._parts, self._size = [held[begin:]], len(held) - begin
        return ids

    def _warn(self, text: str) -> None:
        """Say, once, that a text holds a special token."""
        specials = self._splitter.specials
        if self._tail is None or not specials:
            return
        seen = self._tail + text
        self._tail = seen[1 - max(map(len, specials)) :] if max(map(len, specials)) > 1 else ""
        if found := next((token for token in specials if token in seen), None):
            self._tail = None
            warnings.warn(
                f"the text holds {found!r}, a special token of this model, and it is read as its characters: a chat "
                "prompt has to be token ids (tokenizer.apply_chat_template(messages, add_generation_prompt=True, "
                "return_dict=False))",
                stacklevel=3,
            )

    def flush(self) -> list[int]:
        """Return the ids of the held text, which ends here. The next push begins a new text, tokenised on its own."""
        encoding = self._splitter.encode(self._anchor + self.held)
        ids: list[int] = encoding.ids[self._first_held(encoding) :]
        self._start()
        return ids

    def _settle(self, window: str) -> tuple[list[int], int]:
        """Return the ids of the settled beginning of the window, and its length; move the anchor there."""
        text = self._anchor + window
        encoding = self._splitter.encode(text)
        first = self._first_held(encoding)
        cut = self._splitter.cut(text, encoding, len(self._anchor))
        if cut is None:
            return [], 0
        last, position, anchor = cut
        length = position - len(self._anchor)
        self._anchor = text[anchor:position]
        return encoding.ids[first:last], length

    def _first_held(self, encoding: Encoding) -> int:
        first = _token_at(encoding, len(self._anchor))
        if first is None:  # tested when the anchor was chosen; else returned ids would be wrong
            raise RuntimeError("this tokenizer joins words that it kept apart before: its text cannot come in pieces")
        return first

    def state(self) -> dict[str, Any]:
        """Return the encoder's state for JSON; ``restore`` gives an equal encoder."""
        return {"anchor": self._anchor, "held": self.held, "wait": self._wait}

    @classmethod
    def restore(cls, tokenizer: Any, state: dict[str, Any]) -> "StreamEncoder":
        """Build the encoder that gave ``state``, with the same tokenizer."""
        encoder = cls(tokenizer)
        encoder._anchor, encoder._parts, encoder._wait = state["anchor"], [state["held"]], state["wait"]
        encoder._size = len(state["held"])
        return encoder

    def fork(self) -> "StreamEncoder":
        """Return an independent copy at the same position in the text."""
        encoder = copy.copy(self)
        encoder._parts = list(self._parts)
        return encoder


class _Splitter:
    """A copy of a tokenizer that finds where text can be cut so that the tokens on both sides stay as they are.

    ``words``: between two pre-tokens, when more of them and a gap follow. ``pairs``: BPE over the whole text; no token
    of the vocabulary has these two characters side by side, so nothing ever merges across. ``None``: nowhere.
    """

    def __init__(self, backend: Tokenizer) -> None:
        spec = json.loads(backend.to_str())
        spec["post_processor"] = spec["truncation"] = spec["padding"] = None  # they move offsets or cut texts
        self._tokenizer = Tokenizer.from_str(json.dumps(spec))
        self._tokenizer.encode_special_tokens = True
        added = [token for token in spec["added_tokens"] if not token["special"]]
        self.specials = [token["content"] for token in spec["added_tokens"] if token["special"]]
        # Four times: normalisation may have composed several characters into one.
        self._longest = 4 * max((len(token["content"]) for token in added), default=0)
        self._kind = None if any(token["single_word"] for token in added) else _kind(spec)
        if self._kind == "pairs":
            vocabulary = "\0".join(backend.get_vocab(with_added_tokens=False))
            self._joins = lru_cache(1 << 16)(lambda pair: pair in vocabulary)

    def encode(self, text: str) -> Encoding:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def cut(self, text: str, encoding: Encoding, begin: int) -> tuple[int, int, int] | None:
        """Return the last place after ``begin`` that can be cut: token, character, character where to start again.

        Tokenising from there gives the same tokens from the cut on: this is tested.
        """
        # The gap ends words that count from their end (digits in threes) and what normalisation can join.
        limit = min(len(text) - self._longest, max(map(text.rfind, _GAPS)))
        if self._kind is None or limit <= begin:
            return None
        places = self._places(text, encoding, limit)
        token, position = next(places, (0, 0))
        if position <= begin:
            return None
        anchor = next((place for _, place in places if place <= position - _CONTEXT), 0)
        again = self.encode(text[anchor:])
        first = _token_at(again, position - anchor)
        same = first is not None and again.ids[first:] == encoding.ids[token:]
        return (token, position, anchor) if same and _token_at(encoding, position) == token else None

    def _places(self, text: str, encoding: Encoding, limit: int) -> Iterator[tuple[int, int]]:
        """Yield the places where text can be cut, from the end: a token and where it begins."""
        offsets = encoding.offsets
        words: list[Any] = encoding.word_ids if self._kind == "words" else []
        tokens: list[str] = encoding.tokens if self._kind == "pairs" else []
        for token in range(len(offsets) - 1, 0, -1):
            place = offsets[token - 1][1]
            if not 0 < place < limit or place > offsets[token][0] or text[place - 1].isspace():
                continue  # after white space: what comes may belong to the whole run
            if words:
                apart = words[token - 1] != words[token] <= words[-1] - _WORDS_AHEAD
            else:
                apart = not self._joins(tokens[token - 1][-1] + tokens[token][0])
            if apart:
                yield token, place


_SPLITTERS: WeakKeyDictionary[Any, tuple[Any, _Splitter]] = WeakKeyDictionary()  # a copy takes about a second


def _splitter(tokenizer: Any) -> _Splitter:
    backend = tokenizer.backend_tokenizer
    version = (len(tokenizer), repr(backend.normalizer), repr(backend.pre_tokenizer))
    if _SPLITTERS.get(tokenizer, (None,))[0] != version:
        _SPLITTERS[tokenizer] = version, _Splitter(backend)
    return _SPLITTERS[tokenizer][1]


def _kind(spec: dict[str, Any]) -> str | None:
    """Return how this tokenizer's text can be cut, see ``_Splitter``."""
    normalizers, splitters = list(_flat(spec["normalizer"])), list(_flat(spec["pre_tokenizer"]))
    replaced = [part["pattern"].get("String", "") for part in normalizers if part["type"] == "Replace"]
    regexes = [part["pattern"].get("Regex", "") for part in splitters if part["type"] == "Split"]
    local = (
        {part["type"] for part in normalizers} <= _LOCAL_NORMALIZERS
        and {part["type"] for part in splitters} <= _LOCAL_SPLITTERS
        and all(len(pattern) == 1 for pattern in replaced)
        and not any(_AT_START.search(_ORDINARY.sub("", regex)) for regex in regexes)
    )
    if not local:
        return None
    if any(_splits(part, replaced) for part in splitters):
        return "words"
    model = spec["model"]
    plain = model["type"] == "BPE" and not model["continuing_subword_prefix"] and not model["end_of_word_suffix"]
    return "pairs" if plain else None


def _splits(part: dict[str, Any], replaced: list[str]) -> bool:
    """Return whether this pre-tokenizer ever splits; Gemma's looks for characters that its normaliser removed."""
    if part["type"] in ("ByteLevel", "Metaspace"):
        return bool(part["use_regex" if part["type"] == "ByteLevel" else "split"])
    return part["type"] != "Split" or part["pattern"].get("String") not in replaced


def _flat(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the parts of a normaliser or a pre-tokenizer."""
    if part is not None and part["type"] == "Sequence":
        for inner in part.get("normalizers") or part.get("pretokenizers") or ():
            yield from _flat(inner)
    elif part is not None:
        yield part


def _token_at(encoding: Encoding, place: int) -> int | None:
    """Count the tokens before ``place``; None when a token crosses it or normalisation moved one across."""
    offsets = encoding.offsets
    before = sum(start < place for start, _ in offsets)
    return before if all(end <= place for _, end in offsets[:before]) else None


def _prefix(tokenizer: Any) -> list[int]:
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = (start for start in range(len(full)) if full[start : start + len(bare)] == bare)
    return list(full[: next(starts, 0)])


class StreamDecoder:
    """An incremental decoder; characters come when all their bytes are there. Special tokens are skipped.

    The pushes and the flush after them give ``tokenizer.decode(ids, skip_special_tokens=True)`` without clean-up of
    spaces; only where invalid bytes follow a complete character, byte fallback would replace that character, which was
    already returned. ``prompt``: the ids before, so that a first space comes out right; their text is
    not returned.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self._tokenizer: Tokenizer = tokenizer.backend_tokenizer
        self._byte = self._tokenizer.token_to_id("<0x41>")
        """The byte of an "A"; None without byte fallback."""
        # The first text of a sequence loses its space, that after these ids does not.
        self._context, self._pending = self._whole(list(prompt[-_CONTEXT:]))
        self._shown = len(self._tokenizer.decode(self._context))

    def _whole(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Return the ids up to the last whole character, and those of a character to be completed."""
        ends = range(len(ids), max(len(ids) - 4, -1), -1)
        for end, start in product(ends, range(4)):  # the rest of a character that was cut spoils what follows it
            part = ids[start:end]
            if self._is_whole(part, self._tokenizer.decode(part)) and (start < end or start == 0):
                return ids[start:end], ids[end:]
        return ids, []

    def _is_whole(self, ids: list[int], text: str) -> bool:
        """Tell if no byte is missing at the end of ids and their text; one of a real replacement character is found."""
        if not text.endswith(_REPLACEMENT):
            return True
        return self._byte is not None and self._tokenizer.decode([*ids, self._byte]).endswith("A")

    def push(self, token: int) -> str:
        """Add a token; return the text that it completes, "" when there is none."""
        self._pending.append(token)
        ids = self._context + self._pending
        text = self._tokenizer.decode(ids)
        if self._is_whole(ids, text):
            return self._show(text)
        # No character has this many ids: all but the last one are invalid.
        return self._show(text, missing=1) if len(self._pending) >= _PENDING else ""

    def flush(self) -> str:
        """Return replacement characters for bytes that no token completed; "" when nothing is missing."""
        return self._show(self._tokenizer.decode(self._context + self._pending))

    def _show(self, text: str, missing: int = 0) -> str:
        new = text[self._shown : len(text) - missing]
        if new:
            self._context, self._pending = self._pending, []
            self._shown = len(self._tokenizer.decode(self._context)) - missing
        return new

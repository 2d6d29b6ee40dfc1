"""A tokenizer's chat template, turn by turn, in token ids."""

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from itertools import accumulate, pairwise, takewhile
from secrets import token_hex
from typing import Any

from ..errors import UserError
from .state import SessionState
from .writing import Writer, read_exactly, write

Messages = Sequence[Mapping[str, str]]

SOME: Messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
NEXT: Messages = ({"role": "user", "content": f"words{token_hex(8)}"},)
REPLY = f"reply{token_hex(8)}"
"""Placeholder for the model's last answer."""


class Template:
    """A tokenizer's chat template turn by turn, in token ids: of each turn only what was not fed before.

    The template's special tokens are special tokens; what looks like one in the user's words is spelled out, character
    by character if need be. UserError when the template cannot be used so.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        fixed = self._ids(self._render([*SOME, *NEXT], True))
        self.control = {i for i, token in added.items() if token.special or i in fixed} - {tokenizer.unk_token_id}
        """Special tokens, and whatever else was added to the vocabulary and is used by the template."""
        self.ends = [i for i in self.closing(SOME) if i in self.control][:1]
        """The token that ends an answer, if it has one."""

    @classmethod
    def of(cls, session: Any) -> "Template | None":
        """Return the template of a session's tokenizer, if it has one.

        From now on answers of the session, of its forks and of its pool end where the template ends a turn.
        """
        if not getattr(session.tokenizer, "chat_template", None):
            return None
        template = cls(session.tokenizer)
        session._reader.ends = frozenset(template.ends)
        return template

    def feed(self, session: Any, messages: Messages, words: str) -> list[int]:
        """Return the ids that let ``session`` answer the user's words after ``messages``."""
        if not messages and self.has_conversation(session._stream.recent):
            messages = SOME
        ids = self.opening(messages, words)
        if messages:
            return ids
        if not session.stats().in_context and not session.stats().held_characters:
            session._stream.started = True  # the template contains the text's prefix
        return self._after_prefix(session, ids)

    def conversation(self, session: SessionState, messages: Messages, begun: bool) -> list[int]:
        """Return ids, to be read exactly as they are, that let ``session`` answer new messages of any role.

        ``begun``: an answer came before them, whose end was not read. UserError where the template refuses them.
        """
        return self.turn(messages, SOME) if begun else self._after_prefix(session, self.turn(messages, ()))

    @staticmethod
    def _after_prefix(session: SessionState, ids: list[int]) -> list[int]:
        """Return the ids without the tokenizer's prefix, unless a text begins here."""
        stats, encoder = session.stats(), session._encoder
        prefix = [] if encoder is None else encoder.prefix
        inside = stats.in_context or stats.held_characters
        return ids[len(prefix) :] if inside and ids[: len(prefix)] == prefix else ids

    def turn(self, messages: Messages, said: Messages) -> list[int]:
        """Return ids of new messages and of the beginning of an answer to them.

        They begin with the end of the last message in ``said``, an answer, if there is one.
        """
        markers = [f"words{token_hex(8)}" for _ in messages]
        marked = self._text([{**m, "content": mark} for m, mark in zip(messages, markers, strict=True)], said)
        ids = self._ids(self._text(messages, said))
        if self._controls(ids) != self._controls(self._ids(marked)):
            ids, rest = [], marked
            for message, marker in zip(messages, markers, strict=True):
                head, _, rest = rest.partition(marker)
                ids += [*self._ids(head), *self._spell(message["content"])]
            ids += self._ids(rest)
        return ids

    def by_message(self, messages: Messages, said: Messages, ids: list[int]) -> list[list[int]]:
        """Cut the ids of a ``turn`` into those of each message, its frame included, and what follows them."""
        ends = [_common(ids, self._ids(self._text(messages[: n + 1], said, False))) for n in range(len(messages))]
        return [ids[i:j] for i, j in pairwise([0, *accumulate(ends, max), len(ids)])]

    def opening(self, messages: Messages, words: str) -> list[int]:
        """Return ids of a user's turn after ``messages`` (their ``closing`` was fed), up to where the answer begins."""
        ids = self.turn([{"role": "user", "content": words}], messages)
        return ids[_common(ids, self.closing(messages)) :] if messages else ids

    def closing(self, messages: Messages) -> list[int]:
        """Return the ids that follow the last answer in ``messages`` whatever comes next: the end of the turn."""
        end = self._ids(self._text((), messages, False))
        return end[: _common(end, self._ids(self._text(NEXT, messages)))]

    def has_conversation(self, recent: Sequence[int]) -> bool:
        """Return whether a turn ends within ``recent``: the beginning of a conversation (a system prompt) was fed."""
        closing, n = self.closing(SOME), len(self.closing(SOME))
        return bool(self.ends) and any(list(recent[i : i + n]) == closing for i in range(len(recent) - n + 1))

    def _text(self, messages: Messages, said: Messages, prompt: bool = True) -> str:
        """Render what follows the last answer in ``said``; ``prompt``: up to where the next answer begins."""
        if not said:
            return self._render(messages, prompt)
        rendered = self._render([*said[:-1], {"role": "assistant", "content": REPLY}, *messages], prompt)
        _, found, rest = rendered.partition(REPLY)
        if not found:
            raise UserError("this model's chat template changes what was said: --plain does without it")
        return rest

    def _render(self, messages: Messages, prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))
        except (TemplateError, ValueError, TypeError) as error:
            raise UserError(f"this model's chat template fails ({error}): --plain does without it") from None

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _controls(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i in self.control]

    def _spell(self, words: str) -> list[int]:
        """Return the ids of words without the tokens that were added to the vocabulary."""
        from tokenizers import Tokenizer

        spec = json.loads(self.tokenizer.backend_tokenizer.to_str())
        spec |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        ids: list[int] = Tokenizer.from_str(json.dumps(spec)).encode(words, add_special_tokens=False).ids
        if self._controls(ids):
            raise UserError("that has a special token of this model in it, which it cannot read as text: rephrase it")
        return ids


def converse(
    template: Template | None, writer: Writer, messages: Messages, learn: Sequence[str] | None
) -> Generator[str, None, None]:
    """Yield the answer to a chat's messages, in pieces. See ``Session.chat``."""
    session = writer.session
    if template is None:
        raise UserError("this session's tokenizer has no chat template: use generate or ask without chat")
    said = session._stream.messages
    given = tuple({"role": message["role"], "content": message["content"]} for message in messages)
    new = given[len(said) :] if given[: len(said)] == said else given
    if not new:
        raise UserError("there is no new message to answer")
    earlier = said or (SOME if template.has_conversation(session._stream.recent) else ())
    before, reply = session.snapshot(), []
    try:
        ids = template.turn(new, earlier) if earlier else template.conversation(session, new, False)
        parts = [ids] if learn is None else template.by_message(new, earlier, ids)
        wanted = [True] if learn is None else [*(message["role"] in learn for message in new), False]
        skip = _common(ids, template.closing(earlier)) if earlier else 0  # read at the end of the previous turn
        for part, is_learned in zip(parts, wanted, strict=True):
            read_exactly(session, part[skip:], is_learned)
            skip = max(skip - len(part), 0)
        with closing(write(writer, None)) as pieces:
            for piece in pieces:
                reply.append(piece)
                yield piece
    except GeneratorExit:
        pass
    except BaseException:
        session.restore(before)
        raise
    answered = (*said, *new, {"role": "assistant", "content": "".join(reply)})
    read_exactly(session, template.closing(answered), learn is None or "assistant" in learn)
    session._stream.messages = answered
    if session.learns_by_loss:
        session.commit()


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the common beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))

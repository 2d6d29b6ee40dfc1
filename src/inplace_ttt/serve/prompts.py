"""From messages and prompts to what a session reads."""

from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from ..session import Session
from ..session.template import Template
from .engine import Live
from .journal import Prompt, known, message_digest

Message = dict[str, str]


class Prompts:
    """A renderer of requests with a model's chat template; without one, messages are joined by line breaks.

    A model whose tokenizer has a template ends its answers where the template ends a turn, from now on.
    """

    def __init__(self, tokenizer: Any, session: Session) -> None:
        self.template = None if Template.of(session) is None else Template(tokenizer)

    def chat(self, messages: Sequence[Message]) -> Any:
        """Render the messages that a session has not read yet, or all of them where nothing is known."""
        return lambda session, live: self._chat(list(messages), session, live)

    def _chat(self, messages: list[Message], session: Session, live: Live | None) -> Prompt:
        digests = [message_digest(m["role"], m["content"]) for m in messages]
        history = [] if live is None else live.history
        old = known(history, digests)
        if not old and messages[0]["role"] == "system" and digests[0] in history:
            old = 1 + known(history, digests[1:])  # a client that sends the instructions and the latest messages
        new = messages[old:]
        if self.template is not None:
            ids = self.template.conversation(session, new, bool(history)) if new or not history else []
            return Prompt(ids=ids, exact=True, messages=digests[old:])
        stats = session.stats()
        lead = "\n" if new and (stats.in_context or stats.held_characters) else ""
        return Prompt(text=lead + "\n".join(m["content"] for m in new), messages=digests[old:])

    def question(self, text: str) -> Any:
        """Render a question to a session that has no context."""
        if self.template is None:
            return lambda session, live: Prompt(text=text)
        return self.chat([{"role": "user", "content": text}])

    @staticmethod
    def plain(prompt: str | list[int], size: int) -> Any:
        """Take a text, or token ids of a vocabulary of ``size``. UserError for other ids."""
        if isinstance(prompt, str):
            return lambda session, live: Prompt(text=prompt)
        if wrong := [i for i in prompt if not 0 <= i < size]:
            raise UserError(f"token id {wrong[0]} is outside this model's vocabulary, 0 to {size - 1}")
        return lambda session, live: Prompt(ids=prompt)

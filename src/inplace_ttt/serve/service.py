"""Shared by the routes: the engine, how prompts are rendered, the numbers; and how it is made of a model's name."""

import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import Request

from ..errors import UserError
from ..hf.attach import UNTRAINED, is_trained
from ..hf.load import load
from ..session import Session
from ..session.template import Template
from ..shipped import DEFAULT_MODEL
from .engine import Engine, Live
from .files import open_files
from .journal import Prompt, known, message_digest
from .metrics import Metrics
from .settings import Limits, given_settings
from .store import Store


class Service:
    """One served model. ``name``: under which clients ask for it; ``adapters``: where exported LoRA adapters go."""

    def __init__(
        self, engine: Engine, metrics: Metrics, tokenizer: Any, name: str, adapters: Path | None = None
    ) -> None:
        self.engine, self.metrics, self.name, self.adapters = engine, metrics, name, adapters
        self.prompts = Prompts(engine.tokenizer, engine.blank)
        self.vocabulary = len(tokenizer)
        self.created = int(time.time())
        decode = engine.tokenizer.backend_tokenizer.decode
        self.token_text = cache(lambda token: decode([token], skip_special_tokens=False))
        """A token's text by itself, for log-probabilities."""

    @classmethod
    def of(cls, request: Request) -> "Service":
        service: Service = request.app.state.service
        return service


class Prompts:
    """A renderer of requests with a model's chat template; without one, messages are joined by line breaks.

    A model whose tokenizer has a template ends its answers where the template ends a turn, from now on.
    """

    def __init__(self, tokenizer: Any, session: Session) -> None:
        self.template = None if Template.of(session) is None else Template(tokenizer)

    def chat(self, messages: Sequence[dict[str, str]]) -> Any:
        """Render the messages that a session has not read yet, or all of them where nothing is known."""
        return lambda session, live: self._chat(list(messages), session, live)

    def _chat(self, messages: list[dict[str, str]], session: Session, live: Live | None) -> Prompt:
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


def make_service(
    model: Any, tokenizer: Any, name: str, place: str | Path, limits: Limits, adapters: Any = None, **options: Any
) -> Service:
    """Make a service on a loaded model that keeps its sessions below ``place``. ``options``: as for ``Engine``."""
    metrics = Metrics()
    engine = Engine(model, tokenizer, Store(open_files(place)), limits, metrics, **options)
    return Service(engine, metrics, tokenizer, name, adapters)


def load_service(
    model: str | None,
    name: str,
    place: str | Path,
    limits: Limits,
    log: Callable[[str], None] = lambda text: None,
    *,
    device: str | None = None,
    objective: str | None = None,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> Service:
    """Load a model (None: the shipped one) and make its service, with those ``options`` that are not None.

    ``objective``, ``settings``: fast weights of a plain model. UserError where they do not fit. ``log`` gets a warning
    about fast weights that were never trained.
    """
    given = given_settings(objective, settings or {})
    loaded, tokenizer = load(model or DEFAULT_MODEL, device, objective=objective, **given)
    if not is_trained(loaded):
        log(f"warning: {UNTRAINED}")
    options = {key: value for key, value in options.items() if value is not None}
    return make_service(loaded, tokenizer, name, place, limits, **options)

"""Shared by the routes: the engine, how prompts are rendered, the numbers; and how it is made of a model's name."""

import time
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import Request

from ..errors import UserError
from ..hf.load import load
from ..shipped import DEFAULT_MODEL
from .engine import Engine
from .files import open_files
from .metrics import Metrics
from .prompts import Prompts
from .settings import Limits
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
        """Return the service of a request."""
        service: Service = request.app.state.service
        return service


def load_model(name: str | None, device: str | None = None, objective: str | None = None, **settings: Any) -> Any:
    """Load model and tokenizer; a plain model gets fast weights with ``objective``. UserError where it does not fit."""
    given = {key: value for key, value in settings.items() if value is not None}
    if objective is None and given:
        raise UserError(f"{', '.join(given)}: for a plain model only, which needs an objective too")
    return load(name or DEFAULT_MODEL, device, objective=objective, **given)


def make_service(
    model: Any,
    tokenizer: Any,
    name: str,
    state: str | Path,
    limits: Limits,
    adapters: Path | None = None,
    state_form: str | int = "dense",
    **options: Any,
) -> Service:
    """Make a service on a loaded model that keeps its sessions below ``state``. ``options``: as for ``Engine``."""
    metrics = Metrics()
    engine = Engine(model, tokenizer, Store(open_files(state)), limits, metrics, state=state_form, **options)
    return Service(engine, metrics, tokenizer, name, adapters)

"""What the routes share: the engine, how prompts are rendered, the numbers."""

import time
from pathlib import Path
from typing import Any

from fastapi import Request

from .engine import Engine
from .metrics import Metrics
from .prompts import Prompts


class Service:
    """One served model. ``name``: under which clients ask for it; ``adapters``: where exported LoRA adapters go."""

    def __init__(
        self, engine: Engine, metrics: Metrics, tokenizer: Any, name: str, adapters: Path | None = None
    ) -> None:
        self.engine, self.metrics, self.name, self.adapters = engine, metrics, name, adapters
        self.prompts = Prompts(engine.tokenizer, engine.blank)
        self.vocabulary = len(tokenizer)
        self.created = int(time.time())
        self._texts: dict[int, str] = {}
        self._decode = engine.tokenizer.backend_tokenizer.decode

    @classmethod
    def of(cls, request: Request) -> "Service":
        """That of a request."""
        service: Service = request.app.state.service
        return service

    def token_text(self, token: int) -> str:
        """A token by itself, for log-probabilities."""
        if token not in self._texts:
            self._texts[token] = self._decode([token], skip_special_tokens=False)
        return self._texts[token]

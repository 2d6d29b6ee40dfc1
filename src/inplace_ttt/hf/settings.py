"""Present settings of an attached model, and overrides of single threads."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from ..config import InPlaceTTTConfig
from ..core import Rule

Value = TypeVar("Value")


@dataclass(frozen=True)
class Settings:
    """A set of settings of calls. ``form``: of new states; ``disabled_layers`` use their slow weights alone."""

    config: InPlaceTTTConfig
    form: str | int = "dense"
    enabled: bool = True
    disabled_layers: frozenset[int] = frozenset()
    learn: Any = True
    """Tokens to learn: all, none, or a mask [B, T] for the next calls (objective "loss")."""
    rule: Rule = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", self.config.make_rule())


class PerThread(Generic[Value]):
    """A value per thread, with a default for threads that set none. Copies start without values."""

    def __init__(self, default: Value) -> None:
        self.default = default
        self._values: dict[int, Value] = {}

    def get(self) -> Value:
        return self._values.get(_thread(), self.default) if self._values else self.default

    def set(self, value: Value) -> None:
        self._values[_thread()] = value

    def clear(self) -> None:
        self._values.pop(_thread(), None)

    @contextmanager
    def as_(self, value: Value) -> Iterator[None]:
        """Set this thread's value inside the block."""
        key, had = _thread(), self._values
        before = had.get(key, _NOTHING)
        had[key] = value
        try:
            yield
        finally:
            if before is _NOTHING:
                had.pop(key, None)
            else:
                had[key] = before

    def __deepcopy__(self, memo: dict[int, Any]) -> "PerThread[Value]":
        return PerThread(self.default)

    def __reduce__(self) -> Any:
        return PerThread, (self.default,)


_NOTHING: Any = object()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _thread() -> int:
    """Return this thread's number; in compiled code, that of the thread that traced it."""
    return threading.get_ident()

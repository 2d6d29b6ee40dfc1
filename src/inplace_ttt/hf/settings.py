"""How an attached model reads at the moment: settings of the model, and of one thread on top of them."""

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
    """How calls read. ``form``: of states that begin; ``disabled_layers`` read with their slow weights alone."""

    config: InPlaceTTTConfig
    form: str | int = "dense"
    enabled: bool = True
    disabled_layers: frozenset[int] = frozenset()
    learn: Any = True
    """Which tokens are learned: all, none, or a mask [B, T] of the calls to come (objective "loss")."""
    rule: Rule = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", self.config.make_rule())


class PerThread(Generic[Value]):
    """One value for each thread, a default in the others. Copies of it begin without values."""

    def __init__(self, default: Value) -> None:
        self.default = default
        self._values: dict[int, Value] = {}

    def get(self) -> Value:
        """Return this thread's value."""
        return self._values.get(_thread(), self.default) if self._values else self.default

    def set(self, value: Value) -> None:
        """Set this thread's value."""
        self._values[_thread()] = value

    def clear(self) -> None:
        """Go back to the default in this thread."""
        self._values.pop(_thread(), None)

    @contextmanager
    def as_(self, value: Value) -> Iterator[None]:
        """Inside, this thread has another value."""
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
    """Number of this thread; of the one that traced it, in compiled code."""
    return threading.get_ident()

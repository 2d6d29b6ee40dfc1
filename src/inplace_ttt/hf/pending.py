"""The pending columns of a cache that is read with the loss as objective, from which a chunk can be read again.

Shapes: B rows, n pending columns, D width of the embeddings.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from ..errors import UserError

IGNORED = -100
COLUMNS = ("ids", "learn", "positions", "embeds")
Sliding = dict[int, tuple[Tensor, Tensor]]
"""Keys and values of the sliding layers, by layer."""


@dataclass(frozen=True, eq=False)
class PendingColumns:
    """A record of a cache's pending chunks: its columns from ``base`` on. Replaced, never modified in place.

    ids [B, n] (``IGNORED`` where a column has no id), learn [B, n]: True where a column's loss counts; embeds
    [B, n, D]: inputs without ids; real [B, base + n]: which columns are tokens, None: all; starts: the columns at which
    each row's last chunks began, with the chunk's number; sliding: the sliding layers' keys before these columns.
    """

    base: int
    ids: Tensor
    learn: Tensor
    positions: Tensor
    embeds: Tensor | None = None
    real: Tensor | None = None
    starts: tuple[tuple[tuple[int, int], ...], ...] = ()
    sliding: Mapping[int, Sliding] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """Return the total number of columns of the cache."""
        return self.base + self.ids.shape[1]

    def _each(self, function: Callable[[Tensor], Tensor], **values: Any) -> "PendingColumns":
        """Return the record with ``function`` applied to all columns, and other ``values``."""
        found: dict[str, Any] = {name: function(x) for name in COLUMNS if (x := getattr(self, name)) is not None}
        return replace(self, **found, **values)

    def select(self, rows: Tensor) -> "PendingColumns":
        """Return the record of other rows (beam reorder, batch selection or repetition)."""

        def pick(x: Tensor) -> Tensor:
            return x.index_select(0, rows.to(x.device))

        return self._each(
            pick,
            real=None if self.real is None else pick(self.real),
            starts=tuple(self.starts[b] for b in rows.tolist()),
            sliding={c: {i: (pick(k), pick(v)) for i, (k, v) in s.items()} for c, s in self.sliding.items()},
        )

    def append(
        self, ids: Tensor, learn: Tensor, positions: Tensor, embeds: Tensor | None, real: Tensor | None
    ) -> "PendingColumns":
        """Return the record with further columns. ``embeds``: of all columns, old and new."""
        if self.real is not None or real is not None:
            old = self.ids.new_ones(len(ids), self.end).bool() if self.real is None else self.real
            new = torch.ones_like(ids).bool() if real is None else real
            real = torch.cat([old, new.to(old.device)], 1)
        new_columns = {"ids": ids, "learn": learn, "positions": positions.to(self.positions.device)}
        joined: dict[str, Any] = {name: torch.cat([getattr(self, name), x], 1) for name, x in new_columns.items()}
        return replace(self, **joined, embeds=embeds, real=real)

    def crop(self, columns: int, chunks: Sequence[int]) -> "PendingColumns":
        """Return the record without the last ``columns``; ``chunks``: the number of each row's present chunk."""
        n = self.ids.shape[1] - columns
        starts = tuple(tuple(x for x in own if x[0] <= m) for own, m in zip(self.starts, chunks, strict=True))
        if n < 0 or not all(starts):
            raise ValueError("these tokens reach further back than the kept chunks")
        real = None if self.real is None else self.real[:, : self.base + n]
        return self._each(lambda x: x[:, :n], real=real, starts=starts)

    def begin(self, chunks: Sequence[int], cache: Cache, reach: int) -> "PendingColumns":
        """Record the starts of chunks that begin after the last column, with the present keys of sliding layers.

        ``chunks``: the number of each row's present chunk. Columns that the last ``reach`` completed chunks and the
        present one do not need are dropped.
        """
        here = self.end
        pairs = zip(self.starts, chunks, strict=True)
        starts = tuple((own if own and own[-1][0] == m else (*own, (m, here)))[-reach - 1 :] for own, m in pairs)
        sliding = dict(self.sliding)
        if here not in sliding and any(own[-1][1] == here for own in starts):
            sliding[here] = _sliding_keys(cache, here)
        wanted = {column for own in starts for _, column in own}
        first = min(wanted)
        drop = first - self.base
        sliding = {column: s for column, s in sliding.items() if column in wanted}
        return self._each(lambda x: x[:, drop:], base=first, starts=starts, sliding=sliding)

    def groups(self, rows: Sequence[int]) -> list[tuple[list[int], int]]:
        """Group rows by the column at which their present chunk began; return each group with its column."""
        starts: dict[int, list[int]] = {}
        for b in rows:
            starts.setdefault(self.starts[b][-1][1], []).append(b)
        return [(group, start) for start, group in starts.items()]


def _sliding_keys(cache: Cache, columns: int) -> Sliding:
    """Return keys and values of a cache's sliding layers at so many columns, copied if the cache writes in place."""
    found: Sliding = {}
    for i, layer in enumerate(cache.layers):
        x: Any = layer
        if not getattr(x, "is_sliding", False) or x.keys is None:
            continue
        if "Static" in type(x).__name__:
            held = min(columns, x.keys.shape[2])
            found[i] = x.keys[:, :, :held].clone(), x.values[:, :, :held].clone()
        else:
            found[i] = x.keys, x.values
    return found


def check_keys(model: PreTrainedModel) -> None:
    """Raise UserError for a model with layers that keep no keys, from which a chunk could be read again."""
    if any(not hasattr(layer, "keys") for layer in DynamicCache(config=model.config).layers):
        raise UserError(
            'objective="loss" reads a chunk again from the keys of the tokens before it, and this model\'s layers of '
            "linear attention or convolutions keep none: choose another objective"
        )


@contextmanager
def within_windows(cache: Cache) -> Iterator[None]:
    """Hide what sliding layers have recorded beyond their window, for one forward in the block.

    transformers 5.17 passes it on to the attention, and the mask fits only if each forward follows a crop.
    """
    hidden = []
    for layer in cache.layers:
        x: Any = layer
        if not getattr(x, "is_sliding", False) or not getattr(x, "record_past", False) or x.keys is None:
            continue
        past = max(x.keys.shape[2] - x.sliding_window + 1, 0)
        hidden.append((x, x.keys[:, :, :past], x.values[:, :, :past]))
        x.keys, x.values = x.keys[:, :, past:], x.values[:, :, past:]
    yield
    for x, keys, values in hidden:
        x.keys, x.values = torch.cat([keys, x.keys], 2), torch.cat([values, x.values], 2)


def cache_before(cache: Cache, config: Any, columns: int, sliding: Sliding, rows: list[int]) -> DynamicCache:
    """Return a cache of some rows as it was after ``columns`` columns, to read from there again."""
    new: Any = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        x: Any = layer
        if i >= len(new.layers):
            new.layers.append(new.layer_class_to_replicate())
        y: Any = new.layers[i]
        if not hasattr(x, "keys") or not hasattr(y, "keys"):
            raise NotImplementedError(f'objective="loss" cannot read again in a {type(x).__name__}')
        if not columns or x.keys is None:
            continue
        index = torch.tensor(rows, device=x.keys.device)
        keys, values = sliding[i] if i in sliding else (x.keys[:, :, :columns], x.values[:, :, :columns])
        if len(rows) < keys.shape[0]:
            keys, values = keys.index_select(0, index), values.index_select(0, index)
        if getattr(y, "is_sliding", False):
            keys, values = keys[:, :, -(y.sliding_window - 1) :], values[:, :, -(y.sliding_window - 1) :]
        y.lazy_initialization(keys, values)
        y.keys, y.values = keys, values
        if getattr(y, "is_sliding", False):
            y.cumulative_length = columns
    return new  # type: ignore[no-any-return]

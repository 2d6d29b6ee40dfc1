"""One decoding step of a model as one CUDA graph: a token costs the device's work and very little host time."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticCache, StaticLayer

from ..errors import UserError
from .attach import is_attached, runtime_of, unwrap
from .cache import cache_name
from .context import Runtime
from .steps import Step

WARM_UP = 3
"""Steps on another cache before the capture, for compilation, autotuning and the libraries' workspaces."""


class DecodingGraph:
    """A CUDA graph of one decoding step through ``model`` and a filled ``StaticCache``.

    ``graph(ids)`` takes ids [B, 1] and returns the logits [B, 1, V] of the token after them, in a buffer that the next
    call overwrites. The model adapts as it does elsewhere: complete chunks update the fast weights between two
    replays. After ``cache.reset()`` and another prompt the same graph can be used again.

    Raises UserError for an unsupported model, cache or call, and when the cache is full.

    Args:
        model: in ``eval`` mode on one CUDA device, with fast weights (one row or several) or without.
        cache: a ``StaticCache`` without sliding-window layers, filled by ``model(prompt, cache=cache)``, rows unpadded.
        compiled: the step goes through ``torch.compile`` before it is captured, which fuses its small kernels.
    """

    def __init__(self, model: nn.Module, cache: StaticCache, *, compiled: bool = True) -> None:
        self.model, self.cache, self.root = model, cache, unwrap(model)
        self.runtime: Runtime | None = runtime_of(model) if is_attached(model) else None
        self.device: torch.device = self.root.get_input_embeddings().weight.device  # type: ignore[assignment]
        self._check()
        self.rows, self.length = cache.layers[0].keys.shape[0], cache.layers[0].max_cache_len  # type: ignore[union-attr]
        self._call: Any = torch.compile(self.root) if compiled else self.root
        self._ids = torch.zeros(self.rows, 1, dtype=torch.int64, device=self.device)
        self._version, self._left = -1, 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._addresses: tuple[int, ...] = ()

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        if ids.shape != self._ids.shape:
            raise UserError(f"a step takes ids of shape {tuple(self._ids.shape)}, got {tuple(ids.shape)}")
        self._count()
        step = self._begin(self.cache)
        if self._graph is None or self._addresses != self._where(step):
            self._capture(step)
        assert self._graph is not None
        self._ids.copy_(ids)
        self._graph.replay()
        if step is not None:
            step.end()
        return self._logits

    def _check(self) -> None:
        if self.device.type != "cuda":
            raise UserError(f"a CUDA graph needs a CUDA device, the model is on {self.device}")
        if not isinstance(self.cache, StaticCache):
            raise UserError(f"a CUDA graph needs a StaticCache, got {type(self.cache).__name__}")
        for layer in self.cache.layers:
            if not isinstance(layer, StaticLayer) or layer.is_sliding:
                raise UserError(f"a CUDA graph cannot hold a {type(layer).__name__}: use torch.compile(model) there")
            if not layer.is_initialized:
                raise UserError("the cache is empty: read a prompt first, model(prompt, cache=cache)")

    def _count(self) -> None:
        """Count tokens up to the cache's length. Read the device counter only if a call outside the graph moved it."""
        counter: Any = self.cache.layers[0].cumulative_length  # type: ignore[union-attr]
        if counter._version != self._version:
            self._version, self._left = counter._version, self.length - int(counter)
        if not self._left:
            raise UserError(f"the cache is full: it holds {self.length} tokens, make it longer")
        self._left -= 1

    def _begin(self, cache: StaticCache) -> Step | None:
        if self.runtime is None or not self.runtime.enabled:
            return None
        given = {"past_key_values": cache, "input_ids": self._ids}
        step: Step | None = self.runtime.begin_step(given, True)
        if step is None:
            raise UserError(
                "this cache cannot be continued in single steps: read a prompt into it with the fast weights first"
            )
        if any(slot.fast.real is not None for slot in step.slots.values()):
            raise UserError("a CUDA graph takes rows of one length, and these are padded: use torch.compile(model)")
        return step

    def _where(self, step: Step | None) -> tuple[int, ...]:
        """Return the addresses that the graph was captured with."""
        keys: list[Any] = [layer.keys for layer in self.cache.layers]  # type: ignore[union-attr]
        if step is None:
            return tuple(x.data_ptr() for x in keys)
        found = [x for slot in step.slots.values() if (s := slot.steps) for x in (s.z, s.u, s.folded)]
        return tuple(x.data_ptr() for x in (*keys, *found, *step.where.values()) if x is not None)

    def _run(self, cache: StaticCache, step: Step | None) -> Tensor:
        if self.runtime is not None:
            self.runtime.prepared_step = step
        logits: Tensor = self._call(self._ids, **{cache_name(self.root): cache}).logits
        return logits

    def _capture(self, step: Step | None) -> None:
        spare = StaticCache(self.root.config, max_cache_len=self.length)
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            self.root(self._ids, **{cache_name(self.root): spare}, logits_to_keep=1)
            for _ in range(min(WARM_UP, self.length - 1)):
                own = self._begin(spare)
                self._run(spare, own)
                if own is not None:
                    own.end()
        torch.cuda.current_stream(self.device).wait_stream(side)
        del spare
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._run(self.cache, step)
        counter: Any = self.cache.layers[0].cumulative_length  # type: ignore[union-attr]
        self._version = counter._version
        self._addresses = self._where(step)

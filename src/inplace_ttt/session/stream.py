"""A session's state from call to call, and how tokens are fed to it in bounded memory.

Tokens are cut into calls on a grid that depends on their number alone, so the cache sees the same calls however text
arrives, except where a call ends inside a chunk (which changes nothing).
"""

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.cache_utils import Cache, DynamicCache

from ..config import InPlaceTTTConfig
from ..core import FastWeights
from ..core.algebra import cross_entropies
from ..errors import UserError
from ..hf.attach import RUNTIME, runtime_of, unwrap, updates_off
from ..hf.cache import FastCacheLayer, cache_name, fast_layers
from ..hf.loss import commit
from ..hf.relocate import Relocation
from ..hf.settings import Settings
from ..hf.window import clear, empty_cache, evict, native_window, sliding_windows

PIECE = 2048
"""Maximum number of tokens in one call."""
SCORED_LOGITS = 1 << 25
"""Maximum number of logits in one call that returns all of them."""
RECENT = 2048
"""Number of last ids stored: context of the probes and of the repetition penalty."""

DETACHED = "the model's fast weights were taken out since this session began: begin a new one"


@dataclass
class Stream:
    """One row's state: KV cache with fast weights, and its position."""

    cache: DynamicCache
    position: int = 0
    """Position id of the next token."""
    cached: int = 0
    """Tokens that attention can still see (in layers that see everything)."""
    tokens: int = 0
    """Tokens fed in all, written ones included."""
    written: int = 0
    """Tokens that ``generate`` added."""
    started: bool = False
    """True once the tokenizer's prefix (BOS) was fed."""
    logits: Tensor | None = None
    """Logits [V] of the next token; None at a stream's beginning."""
    recent: list[int] = field(default_factory=list)
    messages: tuple[Mapping[str, str], ...] = ()
    """Messages of a chat that are still in context; not saved in a session's file."""

    def copy(self) -> "Stream":
        """Return an independent copy that shares tensors which are only ever replaced."""
        return replace(self, cache=copy_cache(self.cache), recent=list(self.recent))

    @property
    def fast(self) -> dict[int, FastWeights]:
        """Fast weights by layer."""
        return {i: x.fast for i, x in enumerate(self.cache.layers) if isinstance(x, FastCacheLayer)}

    @property
    def record(self) -> Any:
        """Columns of the context that hold what is pending with objective "loss" (``hf.pending.PendingColumns``)."""
        found = next((x.record for x in self.cache.layers if isinstance(x, FastCacheLayer) and x.record), None)
        return found if found is not None and found.end == self.cache.get_seq_length() else None


def copy_cache(cache: DynamicCache) -> DynamicCache:
    """Copy a cache: keys, values and S are shared, as calls replace them; the pending buffers are copied."""
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in new.layers:
        if isinstance(layer, FastCacheLayer):
            layer.fast, layer.steps = copy.copy(layer.fast), None
            layer.fast.z, layer.fast.u = (None if x is None else x.clone() for x in (layer.fast.z, layer.fast.u))
    return new


class Reader:
    """A reader of tokens into streams of one model under one set of settings.

    ``window``: tokens that layers with full attention keep (None: the model's own limit), ``sinks``: the first tokens
    that they keep besides. When the window is full its oldest quarter is dropped and the cached keys move to smaller
    positions, so position ids stay below ``window + sinks`` however long the stream.
    """

    def __init__(self, model: nn.Module, config: InPlaceTTTConfig, window: int | None, sinks: int, form: Any) -> None:
        self.model, self.root, self.runtime = model, unwrap(model), runtime_of(model)
        self.config, self.form = config, form
        self.settings = Settings(config, form)
        self.gates = any(site.gates for site in self.runtime.sites)
        self.by_loss = self.runtime.loss_forward is not None
        self.adapts = True
        """False: reads without fast weights; they stay empty."""
        self.ends: frozenset[int] = frozenset()
        """Tokens that end an answer besides the model's own (a chat template's)."""
        self.device: torch.device = self.root.get_input_embeddings().weight.device  # type: ignore[assignment]
        self.relocation = _relocation(self.runtime, model)
        self.own_window = native_window(model)
        text = self.root.config.get_text_config()
        longest = getattr(text, "max_position_embeddings", None)
        self.longest = longest if isinstance(longest, int) and longest > 0 else None
        """Positions that the model knows, if it says so."""
        self.window, self.sinks = self._check_window(window, sinks), 0 if self.own_window else sinks
        # Attention over a piece costs piece + window a token: a small window is better read in small pieces.
        self.piece = PIECE if self.own_window is None else min(PIECE, max(512, 2 * self.own_window))
        self.scored_piece = max(1, min(self.piece, SCORED_LOGITS // int(text.vocab_size)))
        if self.by_loss and self.window + self.sinks < 2 * config.chunk_size:
            raise UserError(
                f"chunks of {config.chunk_size:,} tokens do not fit twice into a window of {self.window:,}: make "
                "chunk_size smaller"
            )

    def _check_window(self, window: int | None, sinks: int) -> int:
        if not is_count(sinks, 0) or not (window is None or is_count(window, 1)):
            raise UserError(f"window {window} and sinks {sinks}: at least 1 token and 0 sinks")
        own, longest = self.own_window, self.longest
        if own is not None:
            if window is not None and window < own:
                raise UserError(
                    f"this model attends to its last {own} tokens by itself, which a window of {window} cannot "
                    "narrow: leave window out"
                )
            return own
        if longest is not None and (window or 1) + sinks > longest:
            raise UserError(f"window {window} + sinks {sinks} is beyond the {longest} positions that this model knows")
        if window is None:
            return (longest or 4096 + sinks) - sinks
        slides = max((w for w in sliding_windows(self.model) if w is not None), default=0)
        if window - window // 4 < slides:
            raise UserError(f"window {window} is too small: some layers of this model attend to {slides} tokens")
        return window

    def new(self) -> Stream:
        """Return an empty stream."""
        return Stream(empty_cache(self.root.config))

    def reads_like(self, other: "Reader") -> bool:
        """Return whether streams of ``other`` can be continued here."""
        mine, theirs = ((r.runtime, r.config, r.window, r.sinks, r.form) for r in (self, other))
        return mine == theirs

    @property
    def is_attached(self) -> bool:
        """True while the model is attached as it was when the session began."""
        return self.root.__dict__.get(RUNTIME) is self.runtime

    def check_attached(self) -> None:
        """Raise UserError when the model is no longer attached as it was when the session began."""
        if not self.is_attached:
            raise UserError(DETACHED)

    def check(self, ids: Sequence[int]) -> None:
        """Raise UserError for ids that the model does not know."""
        if not ids:
            return
        weight: Any = self.root.get_input_embeddings().weight
        known = weight.shape[0]
        if wrong := [i for i in (min(ids), max(ids)) if not 0 <= i < known]:
            outside = f"token id {wrong[0]} is outside this model's vocabulary, 0 to {known - 1}"
            raise UserError(f"{outside}: use the model's own tokenizer")

    # -- housekeeping ---------------------------------------------------------------------------------------------

    def fits(self, stream: Stream, n: int) -> bool:
        """Return whether ``n`` more tokens can be read without dropping the context first."""
        return self.relocation.supported or self.room(stream) >= n

    def room(self, stream: Stream) -> int:
        """Return how many tokens fit before the window must be moved."""
        if self.own_window is None:
            return self.window + self.sinks - stream.cached
        if not self.relocation.supported:
            return (self.longest or 1 << 62) - stream.position
        return max(8 * self.own_window, 4096) - stream.position

    def make_room(self, stream: Stream, need: int = 1) -> None:
        """Drop the window's oldest quarter and move the rest to smaller positions, if ``need`` tokens do not fit."""
        missing = need - self.room(stream)
        if missing <= 0:
            return
        if not self.relocation.supported:
            raise UserError(
                f"the context is full: {stream.cached or stream.position} tokens, and this model's window cannot move "
                f"on because {self.relocation.reason}. drop_context() forgets the context and keeps what was learned"
            )
        bounded = self.own_window is None
        drop = max(missing, self.window // 4) if bounded else stream.position - (self.own_window or 0) + 1
        with whole(stream.cache):
            if bounded:
                evict(stream.cache, self.sinks, drop)
            self.relocation.move(stream.cache, drop, self.sinks)
        stream.cached -= drop if bounded else 0
        stream.position -= drop

    def drop_context(self, stream: Stream) -> None:
        """Make attention forget everything; the fast weights stay. With the loss, what is pending is learned first."""
        if self.by_loss and self.adapts and stream.fast:
            self.commit(stream)
        clear(stream.cache)
        stream.position = stream.cached = 0
        stream.started, stream.logits = False, None
        stream.recent.clear()
        stream.messages = ()

    # -- calls ----------------------------------------------------------------------------------------------------

    def _fitting(self, stream: Stream, rest: int) -> int:
        """Make room and return how many of ``rest`` tokens fit. With the loss as objective, chunks are never cut."""
        if not self.by_loss or not self.adapts:
            self.make_room(stream)
            return min(rest, self.room(stream))
        C = self.config.chunk_size
        pending = next((fast.seen[0] % C for fast in stream.fast.values()), 0)
        if not pending:
            self.make_room(stream, C)  # for the whole chunk: its later tokens must fit as well
        return min(rest, (pending + self.room(stream)) // C * C - pending)

    def commit(self, stream: Stream) -> bool:
        """Learn what is pending as a shorter chunk; return whether there was anything."""
        self.check_attached()
        with evaluating(self.model), self.runtime.reading(self.config, self.form), whole(stream.cache):
            return commit(self.runtime, stream.cache)

    def detached(self, stream: Stream) -> dict[int, FastWeights]:
        """Return dense states of their own that begin as the stream's, with no updates counted."""
        found = {}
        for site in self.runtime.running_sites():
            found[site.index] = FastWeights(1, self.config.chunk_size, self.settings.rule)
            if (fast := stream.fast.get(site.index)) is not None:
                found[site.index].tensors = fast.as_dense()
        return found

    def adopt(self, stream: Stream, states: dict[int, FastWeights]) -> None:
        """Take over states that began as ``detached`` ones; nothing may be pending."""
        with self.runtime.reading(self.config, self.form):
            settings = self.runtime.settings
            slots = fast_layers(stream.cache, dict.fromkeys(states, False), 1, settings)
        for i, state in states.items():
            slots[i].fast.adopt(state)

    def feed(
        self, stream: Stream, ids: Sequence[int], scored: bool = False, *, learn: bool = True
    ) -> Iterator[tuple[int, Tensor]]:
        """Feed ``ids`` piece by piece; yield each piece's size n and its logits, [n, V] if ``scored``, else [1, V].

        ``learn``: False for tokens that are read but not learned (objective "loss"). A piece is taken whole or not at
        all: after an exception the stream is as it was before the piece.
        """
        at = 0
        while at < len(ids):
            n = min(self._fitting(stream, len(ids) - at), self.scored_piece if scored else self.piece)
            piece = list(ids[at : at + n])
            with whole(stream.cache):
                positions = torch.arange(stream.position, stream.position + n)[None]
                logits = self.call(stream.cache, torch.tensor([piece]), positions, scored=scored, learn=learn)[0]
            self.advance(stream, piece, logits[-1])
            at += n
            yield n, logits

    def losses_on_and_off(self, stream: Stream, ids: Sequence[int]) -> tuple[float, float]:
        """Return the losses of the next ids in nats per token, with the fast weights and without; learn nothing.

        Without: the slow weights alone read as many tokens as attention sees now, at most ``RECENT``, from scratch; a
        model whose window is much longer than that would do a little better.
        """
        plain = copy.copy(self)
        plain.adapts = False
        fresh = plain.new()
        for _ in plain.feed(fresh, stream.recent[-(2 * self.own_window if self.own_window else stream.cached) :]):
            pass
        wanted = torch.tensor(ids[1:], device=self.device)
        on, off = (
            float(cross_entropy(torch.cat([x for _, x in reader.feed(own, ids, scored=True)])[:-1].float(), wanted))
            for reader, own in ((self, stream.copy()), (plain, fresh))
        )
        return on, off

    def call(
        self,
        cache: Cache,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        *,
        scored: bool = False,
        learn: bool = True,
    ) -> Tensor:
        """Return logits [B, n, V] ([B, 1, V] unless ``scored``) of ids [B, n]."""
        self.check_attached()
        if self.adapts and not self.runtime.enabled:
            raise UserError(
                "updates are switched off (updates_off), which a session needs: lr=0 takes their effect away"
            )
        inputs = {"input_ids": ids, "position_ids": positions} | ({} if mask is None else {"attention_mask": mask})
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        how = self.runtime.override(config=self.config, form=self.form, learn=learn)
        with evaluating(self.model), torch.no_grad(), how if self.adapts else updates_off(self.model):
            out = self.model(
                **inputs, use_cache=True, logits_to_keep=0 if scored else 1, **{cache_name(self.model): cache}
            )
        return out.logits  # type: ignore[no-any-return]

    def advance(self, stream: Stream, ids: Sequence[int], logits: Tensor) -> None:
        """Record that ``ids`` were fed, and the logits of the next token."""
        n = len(ids)
        stream.position += n
        stream.tokens += n
        stream.cached += n
        stream.started = True
        stream.logits = logits.detach().clone()
        stream.recent = [*stream.recent, *ids][-RECENT:]


_PROBING = threading.Lock()


def _relocation(runtime: Any, model: nn.Module) -> Relocation:
    """Test once per model, not in several threads at once, whether its cached tokens can be moved."""
    with _PROBING:
        if runtime.relocation is None:
            runtime.relocation = Relocation.of(model)
    found: Relocation = runtime.relocation
    return found


def losses_of(before: Tensor | None, logits_nV: Tensor, ids: Sequence[int]) -> list[float]:
    """Return -log p in nats of ids [n] by the logits of the token before (``before`` [V] for the first, or none)."""
    rows = logits_nV[:-1] if before is None else torch.cat([before[None], logits_nV[:-1]])
    if not len(rows):
        return []
    wanted = torch.tensor(list(ids)[len(ids) - len(rows) :], device=rows.device)
    found: list[float] = cross_entropies(rows, wanted).tolist()
    return found


def is_count(value: Any, least: int) -> bool:
    """Tell if a value is a whole number of at least ``least``."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode inside ``with``; afterwards each module is back in its former mode."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def whole(cache: DynamicCache) -> Iterator[None]:
    """Restore the cache when an exception (Ctrl-C, out of memory) is raised inside ``with``.

    Calls replace a cache's tensors; only the pending buffers are written in place, beyond their filled part.
    """
    layers = list(cache.layers)
    saved = [dict(layer.__dict__) for layer in layers]
    fast = [dict(layer.fast.__dict__) if isinstance(layer, FastCacheLayer) else None for layer in layers]
    try:
        yield
    except BaseException:
        cache.layers = layers
        for layer, values, inner in zip(layers, saved, fast, strict=True):
            layer.__dict__.clear()
            layer.__dict__.update(values)
            if inner is not None:
                values["fast"].__dict__.clear()
                values["fast"].__dict__.update(inner)
        raise

"""The next-token loss itself as the objective: ``v_t = -dL/do_t``, without training.

o_t is the adapting projection's output at token t and L the sum of the next-token losses inside t's chunk, so a chunk
writes minus the gradient of its own loss (dynamic evaluation, Krause et al. 2018; first order, keys and values of
earlier chunks are constants). A chunk's loss needs the model's head, so the whole model's forward is replaced by one
that reads chunk by chunk: a chunk is scored with the fast weights before it, then one backward pass to the projections'
outputs gives its update. The caller sees one call.

A call is cut where a chunk of any row ends. If a piece is a whole chunk of every row, its own forward gives the
gradient. Otherwise (rows of different lengths, single tokens) a chunk is run once more when it is complete, from the
keys before it, so one call, pieces and single tokens learn the same. Every layer's state is as elsewhere, but the
pending tokens are columns of the cache (``PendingColumns``) instead of inputs of the projection.

Shapes: B rows, T tokens of a call, C of a chunk, n of a piece, R rows that complete a chunk, V vocabulary, D, F as
elsewhere.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from ..config import InPlaceTTTConfig
from ..core import FastWeights, Rule
from ..core.algebra import state_dtype
from ..errors import UserError
from . import block_attention as block_attention  # registers its attention
from .cache import FastCacheLayer, cache_name, detach_cache, fast_layers, mark_broken
from .context import Runtime, fast_weights
from .linear import device_of, input_size, is_dense
from .pending import IGNORED, PendingColumns, cache_before, within_windows
from .settings import Settings
from .sites import LayerSite

_AT_ONCE = 1 << 25  # logits converted to float32 at a time
_PACKING = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass(eq=False)
class LossCall:
    """A piece of a call: every layer reads with its state; with ``capture`` the tensors for a gradient are kept.

    ``train``: the parameters require gradients, too (``first_order``).
    """

    rule: Rule
    states: dict[int, FastWeights]
    rows: int
    tokens: int
    capture: bool
    train: bool = False
    inputs: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    slow: dict[int, Tensor | None] = field(default_factory=dict)

    def project(self, site: LayerSite, module: Any, z: Tensor, u: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the projection's output [B, n, D]."""
        out = plain(z)
        with torch.autocast(z.device.type, enabled=False):
            state = self.states[site.index]  # one of its rows may read several texts
            fast = state.output(self.rule, z.reshape(state.rows, -1, z.shape[-1]), site.width)
        if fast is not None:
            out = out + fast.view_as(out).to(out.dtype)
        if self.capture:
            out = out if out.requires_grad else out.detach().requires_grad_()
            self.inputs[site.index], self.outputs[site.index] = z.detach(), out
            # Now: offloaded weights are loaded during the layer's own forward only.
            self.slow[site.index] = site.slow_weight(module, self.rule)
        return out

    def targets(self, result: Tensor, gradient: Tensor | None = None) -> dict[int, Tensor]:
        """Return v = -dL/do of every layer, [B, n, D]. ``gradient``: dL/dresult; None: ``result`` is L itself."""
        with torch.autocast(result.device.type, enabled=False):
            outputs = list(self.outputs.values())
            grads = torch.autograd.grad(result, outputs, gradient, retain_graph=self.train, allow_unused=True)
        found = zip(self.outputs.items(), grads, strict=True)
        return {i: torch.zeros_like(o) if g is None else -g for (i, o), g in found}


class LossForward:
    """A replacement of the model's forward that reads in chunks. ``forward``: the original."""

    def __init__(self, runtime: Runtime, forward: Callable[..., Any]) -> None:
        self.runtime, self.forward = runtime, forward
        self.names = list(inspect.signature(forward).parameters)
        self.cache_name = cache_name(runtime.model)

    @property
    def __signature__(self) -> inspect.Signature:  # transformers reads accepted arguments from it
        return inspect.signature(self.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, settings = self.runtime.model, self.runtime.settings
        if not settings.enabled:
            return self.forward(*args, **kwargs)
        train = torch.is_grad_enabled() and model.training
        if train and not settings.config.first_order:
            raise UserError(
                'objective="loss" learns while it reads, without training; a gradient through its own updates is not '
                "supported. Call model.eval() and torch.no_grad(), train with updates_off(model), or attach with "
                "InPlaceTTTConfig(first_order=True, ...), which takes them as constants"
            )
        if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise UserError(
                'objective="loss" reads chunk by chunk from a cache, which activation checkpointing drops: '
                "model.gradient_checkpointing_disable(), or model.eval() to read without training"
            )
        given = dict(zip(self.names, args, strict=False)) | kwargs
        with torch.inference_mode(False), torch.set_grad_enabled(train):
            plain = {k: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for k, v in given.items()}
            reading = _Reading(self, plain)
            try:
                return reading.run()
            except BaseException:
                reading.abandon()
                raise

    def run(self, call: LossCall, inputs: dict[str, Any], mask: Any = None, cache: Any = None, logits: int = 0) -> Any:
        """Run the model's own forward as ``call``. ``logits``: the number of last tokens that need them, 0: all."""
        frozen = self.runtime.model.parameters() if call.capture and not call.train else ()
        more = {self.cache_name: cache, "attention_mask": mask, "use_cache": True, "logits_to_keep": logits}
        with self.runtime.inner.as_(call), torch.set_grad_enabled(call.capture or call.train), _frozen(frozen):
            return self.forward(**{**inputs, **more})


@contextmanager
def _frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Set ``requires_grad`` False in the block: backward stops at the projections' outputs."""
    asking = [p for p in parameters if p.requires_grad]
    for p in asking:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asking:
            p.requires_grad_(True)


class _Chunks:
    """The chunks of a cache. ``more``: further arguments of the model's forward."""

    def __init__(
        self,
        forward: LossForward,
        cache: Cache,
        slots: dict[int, FastCacheLayer],
        record: PendingColumns,
        more: dict[str, Any],
    ) -> None:
        self.forward, self.cache, self.slots, self.record, self.more = forward, cache, slots, record, more
        settings = forward.runtime.settings
        self.C, self.rule = settings.config.chunk_size, settings.rule

    @torch.no_grad()
    def learn_again(self, rows: list[int], start: int, lengths: Sequence[int]) -> None:
        """Run the columns from ``start`` on once more for some rows, from the keys before them, and learn them.

        ``lengths``: tokens of each row's chunk.
        """
        record, device = self.record, self.record.ids.device
        part = replace(record, sliding={}).select(torch.tensor(rows, device=device))
        span = slice(start - record.base, None)
        ids, learn, positions = (x[:, span] for x in (part.ids, part.learn, part.positions))
        real = torch.ones_like(learn) if part.real is None else part.real[:, start:]
        # A chunk of a padded row may begin after the column from which it is run.
        order = real.cumsum(1)
        inside = real & (order > order[:, -1:] - torch.tensor(lengths, device=device)[:, None])
        counts = _counts(ids, learn & inside) & inside[:, :-1]
        if not (busy := counts.any(1).nonzero().flatten().tolist()):
            self._decay(rows)
            return
        if len(busy) < len(rows):
            self._decay([b for k, b in enumerate(rows) if k not in busy])
            self.learn_again([rows[k] for k in busy], start, [lengths[k] for k in busy])
            return
        source = {"input_ids": ids} if part.embeds is None else {"inputs_embeds": part.embeds[:, span]}
        states = {i: slot.fast for i, slot in self.slots.items()}
        if len(rows) < len(record.ids):
            states = {i: copy.copy(state) for i, state in states.items()}  # select replaces tensors, modifies none
            for state in states.values():
                state.select(rows)
        call = LossCall(self.rule, states, len(rows), ids.shape[1], True)
        config = self.forward.runtime.model.config
        cache = cache_before(self.cache, config, start, record.sliding.get(start, {}), rows)
        mask = None if part.real is None else part.real.long()
        output = self.forward.run(call, {**self.more, **source, "position_ids": positions}, mask, cache)
        self.learn(rows, call, output.logits, ids, counts, inside)

    @torch.no_grad()
    def learn(
        self, rows: list[int], call: LossCall, logits: Tensor, ids: Tensor, counts: Tensor, inside: Tensor | None = None
    ) -> None:
        """Update the states of some rows by a chunk. ``inside`` [R, n]: its tokens; None: all of the call's."""
        targets = call.targets(logits, _loss_gradient(logits, ids[:, 1:].clamp(min=0), counts))
        for i, slot in self.slots.items():
            chunk = {"z": call.inputs[i], "v": targets[i]}
            if inside is not None:
                chunk = {name: _packed_columns(x, inside, self.C) for name, x in chunk.items()}
            slot.fast.complete(rows, self.rule, chunk, call.slow[i])

    def _decay(self, rows: list[int]) -> None:
        """Update the states of some rows by a chunk that has nothing to learn."""
        runtime = self.forward.runtime
        for site in (site for site in runtime.sites if site.index in self.slots):
            module = site.projection()
            dtype = module.weight.dtype if is_dense(module.weight) else runtime.model.dtype
            z = torch.zeros(len(rows), self.C, input_size(module), dtype=dtype, device=device_of(module))
            chunk = {"z": z, "v": z.new_zeros(len(rows), self.C, site.width)}
            self.slots[site.index].fast.complete(rows, self.rule, chunk, None, learned=False)


class _Reading:
    """A call of the whole model."""

    first: FastCacheLayer
    """The layer that keeps the cache's record."""
    chunks: _Chunks

    def __init__(self, forward: LossForward, given: dict[str, Any]) -> None:
        self.forward, self.runtime, self.given = forward, forward.runtime, given
        self.settings: Settings = self.runtime.settings
        caches = [given.pop(name, None) for name in ("cache", "past_key_values")]
        self.cache: Any = next((x for x in caches if x is not None), None)
        self.ids, embeds = given.pop("input_ids", None), given.pop("inputs_embeds", None)
        self.source_name = "inputs_embeds" if self.ids is None else "input_ids"
        self.source: Any = embeds if self.ids is None else self.ids
        if self.source is None or (self.ids is not None and embeds is not None):
            raise ValueError("a call needs input_ids or inputs_embeds, not both")
        if self.source.dim() < 2 or not self.source.numel():
            raise ValueError(f"a call needs input_ids [rows, tokens] with at least one token, got {self.source.shape}")
        self.B, self.T = self.source.shape[:2]
        self.device = self.source.device
        self.mask, self.positions = self.runtime.mask_of(given), given.pop("position_ids", None)
        given.pop("attention_mask", None)
        self.labels, self.use_cache = given.pop("labels", None), given.pop("use_cache", None)
        self.known = self.labels if self.ids is None else self.ids
        """Ids of the call's tokens, [B, T]; None: unknown."""
        self.keep = given.pop("logits_to_keep", 0)
        self.return_dict = given.pop("return_dict", None)
        self.real: Tensor | None = None
        """Which of the call's tokens are not padding, bool [B, T]; None: all."""
        self.begun = False
        """True once the cache may have changed."""
        self._check_given()

    def _check_given(self) -> None:
        """Raise UserError for what a call in chunks cannot return, and for inputs that cannot be read again."""
        config: Any = self.runtime.model_config
        for name in ("output_attentions", "output_router_logits"):
            asked = self.given.get(name)
            if asked or (asked is None and getattr(config, name, False)):
                raise UserError(
                    f'objective="loss" reads in chunks, which have no {name[7:]} of the whole call: leave {name} out '
                    "(False in the model's configuration)"
                )
        others = set(self.forward.names) - {*_PACKING, "shift_labels"}
        tensors = {name: x for name, x in self.given.items() if name in others and isinstance(x, Tensor)}
        if config is not self.runtime.model.config:  # of several modalities
            for name in [n for n, x in tensors.items() if n.endswith("token_type_ids") and not x.any()]:  # no image
                del self.given[name], tensors[name]
        if tensors:
            raise UserError(
                f'{", ".join(tensors)}: objective="loss" reads input_ids or inputs_embeds and nothing else of '
                "its tokens. Leave it out, or read it with updates_off(model)"
            )

    # -- the whole call -------------------------------------------------------------------------------------------

    def run(self) -> Any:
        """Read everything; return the model's output."""
        use_cache = self.use_cache
        if use_cache is None and not torch.is_grad_enabled():
            use_cache = self.runtime.model_config.use_cache
        wanted = self.cache is not None or use_cache
        documents = self._documents()
        if documents is not None:
            padded = documents < 0
            self.real = ~padded.to(self.device)
            first = documents.gather(1, padded.byte().argmin(1, keepdim=True))
            if bool(((documents != first) & ~padded).any()):
                if self.cache is not None:
                    raise UserError("rows of several documents cannot be read into a cache: read each on its own")
                return self._finish(*self._packed(documents), None)
        if self.cache is None:
            self.cache = DynamicCache(config=self.runtime.model.config)
        parts = list(self._pieces())
        last = parts[-1][1]
        logits = torch.cat([logits for logits, _ in parts if logits is not None], 1)
        if getattr(last, "hidden_states", None) is not None:
            last.hidden_states = tuple(torch.cat(x, 1) for x in zip(*(o.hidden_states for _, o in parts), strict=True))
        return self._finish(logits, last, self.cache if wanted else None)

    def abandon(self) -> None:
        """Clean up after a failed call and mark its cache as broken."""
        if self.begun:
            mark_broken(self.chunks.slots)
            detach_cache(self.cache)

    def _finish(self, logits: Tensor, output: Any, cache: Any) -> Any:
        if isinstance(self.keep, Tensor):
            logits = logits[:, self.keep]
        elif self.keep:
            logits = logits[:, -self.keep :]
        values = {**output, "logits": logits}
        if self.labels is not None:
            model: Any = self.runtime.model
            size = self.runtime.model_config.vocab_size
            more = {name: self.given[name] for name in ("num_items_in_batch", "shift_labels") if name in self.given}
            values["loss"] = model.loss_function(logits=logits, labels=self.labels, vocab_size=size, **more)
        values |= {name: cache for name in values if name in ("cache", "past_key_values")}
        output = type(output)(**values)  # anew: a field that is None is not a key of a model's output
        return output if self.return_dict is None or self.return_dict else output.to_tuple()

    def _documents(self) -> Tensor | None:
        """Return document numbers [B, T], -1 for padding; None where every row is one unpadded document."""
        tokens_are_real = self.runtime.tokens_are_real.get()
        self.runtime.tokens_are_real.clear()
        if tokens_are_real and all(self.given.get(name) is None for name in _PACKING):
            return None
        given = {**self.given, "attention_mask": self.mask, "position_ids": self.positions}
        state = None if self.cache is None else next(iter(fast_weights(self.cache).values()), None)
        return self.runtime.documents({**given, "past_key_values": self.cache}, self.B, self.T, self.cache, state)

    def _packed(self, documents: Tensor) -> tuple[Tensor, Any]:
        """Read every document as a separate row; return the logits in the packed order, and an output to fill."""
        real, column = documents >= 0, torch.arange(self.T, device=documents.device)
        begins = real & (documents != nn.functional.pad(documents, (1, 0), value=-1)[:, :-1])
        place = column - torch.where(begins, column, 0).cummax(1).values
        row, at = begins.flatten().cumsum(0).view_as(documents)[real] - 1, place[real]
        shape = int(begins.sum()), int(at.max()) + 1

        def apart(x: Tensor, fill: int = 0) -> Tensor:
            found = x.new_full((*shape, *x.shape[2:]), fill)
            found[row, at] = x[real]
            return found

        def packed(x: Tensor) -> Tensor:
            found = x.new_zeros(self.B, self.T, x.shape[-1])
            found[real] = x[row, at]
            return found

        mask = apart(torch.ones(self.B, self.T, dtype=torch.int64, device=self.device))
        rest = {name: x for name, x in self.given.items() if name not in _PACKING}
        inputs = {self.source_name: apart(self.source), "attention_mask": mask, "use_cache": False}
        reading = _Reading(self.forward, {**rest, **inputs})
        if self.ids is None and self.known is not None:
            reading.known = apart(self.known, IGNORED)
        output = reading.run()
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(packed(x) for x in output.hidden_states)
        return packed(output.logits), output

    # -- pieces ---------------------------------------------------------------------------------------------------

    def _pieces(self) -> Iterator[tuple[Tensor | None, Any]]:
        C = self.settings.config.chunk_size
        sites = dict.fromkeys((site.index for site in self.runtime.running_sites()), False)
        slots = fast_layers(self.cache, sites, self.B, self.settings)
        if not sites:
            raise UserError("no layer adapts at present: leave some on, or read with updates_off(model)")
        self.past = int(self.cache.get_seq_length())
        self.first = next(iter(slots.values()))
        more = {name: x for name, x in self.given.items() if name not in _PACKING}
        self.chunks = _Chunks(self.forward, self.cache, slots, self._record(slots), more)
        self.learn = self._learn()
        counts = None if self.real is None else self.real.long().cumsum(1).cpu()
        at = 0
        while at < self.T:
            need = [C - n % C for n in self.first.fast.seen]
            ends = [at + n for n in need]
            if counts is not None:
                before = counts[:, at - 1].tolist() if at else [0] * self.B
                ends = [int(torch.searchsorted(counts[b], before[b] + n)) + 1 for b, n in enumerate(need)]
            end = min(min(ends), self.T)
            yield self._piece(at, end, [b for b, e in enumerate(ends) if e == end])
            at = end

    def _piece(self, at: int, end: int, done: list[int]) -> tuple[Tensor | None, Any]:
        """Read some columns, then learn the chunks of the rows ``done``, which are complete with them.

        Return the logits that the caller asks for, None if none, and the model's output.
        """
        n, chunks, train, self.begun = end - at, self.chunks, torch.is_grad_enabled(), True
        C, fasts = chunks.C, {i: slot.fast for i, slot in chunks.slots.items()}
        inputs: dict[str, Any] = {**chunks.more, self.source_name: self.source[:, at:end]}
        if self.positions is not None:
            inputs["position_ids"] = self.positions[..., at:end]
        real = None if self.real is None or bool(self.real[:, at:end].all()) else self.real[:, at:end]
        record = chunks.record.begin([n // C for n in self.first.fast.seen], self.cache, self.first.fast.reach)
        chunks.record = record = self._extended(record, at, end, real)

        ids, counts = record.ids[:, -n:], _counts(record.ids[:, -n:], record.learn[:, -n:])
        is_chunk = n == C and len(done) == self.B and record.real is None
        at_once = is_chunk and self._is_dynamic() and bool(counts.any(1).all())
        wanted = n  # last tokens whose logits the caller asks for
        if not isinstance(self.keep, Tensor) and self.keep and self.labels is None:
            wanted = max(0, end - max(self.T - int(self.keep), at))
        call = LossCall(chunks.rule, fasts, self.B, n, at_once, train)
        with within_windows(self.cache):
            logits = n if at_once else wanted or 1
            output = self.forward.run(call, inputs, self._mask(at, end), self.cache, logits)

        own_real = None if real is None else real.cpu()
        tokens = [n] * self.B if own_real is None else own_real.sum(1).tolist()
        for fast in fasts.values():
            fast.note(n, own_real, tuple(s + k for s, k in zip(fast.seen, tokens, strict=True)))
        if at_once:
            if not train:
                detach_cache(self.cache)
            chunks.learn(done, call, output.logits, ids, counts)
        elif done:
            for rows, start in record.groups(done):
                chunks.learn_again(rows, start, [C] * len(rows))
        for slot in chunks.slots.values():
            slot.record = None
        self.first.record = record
        found = output.logits[:, -wanted:] if wanted else None
        return found if found is None or train else found.detach(), output

    def _is_dynamic(self) -> bool:
        return all(type(x).__name__.startswith(("Dynamic", "FastDynamic")) for x in self.cache.layers)

    def _mask(self, at: int, end: int) -> Any:
        """Return the mask of a piece."""
        mask = self.mask
        if mask is None or end - at == self.T:
            return mask
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return mask[:, : min(mask.shape[1] - self.T, self.past) + end]
        # A prepared mask is of the call's size: the model makes one for the piece.
        return None if self.chunks.record.real is None else self.chunks.record.real.long()

    # -- what is pending ------------------------------------------------------------------------------------------

    def _record(self, slots: dict[int, FastCacheLayer]) -> PendingColumns:
        """Return the cache's record; a new one if its columns are no longer the recorded ones."""
        record: PendingColumns | None = self.first.record
        if record is not None and record.end == self.past:
            return record
        for slot in slots.values():  # pending tokens have lost their context: the next one begins a chunk
            slot.fast.close_chunk()
        none = torch.zeros(self.B, 0, dtype=torch.int64, device=self.device)
        real = None
        if self.past and isinstance(self.mask, Tensor) and self.mask.dim() == 2:
            real = self.mask[:, : self.past] != 0
            real = None if bool(real.all()) else real
        return PendingColumns(self.past, none, none.bool(), none, real=real, starts=((),) * self.B)

    def _learn(self) -> Tensor:
        """Return which tokens of the call are learned, bool [B, T]."""
        asked, shape = self.settings.learn, (self.B, self.T)
        if isinstance(asked, Tensor) and asked.shape != shape:
            raise UserError(f"the mask of learned tokens is {tuple(asked.shape)}, the call {shape}")
        learn = torch.as_tensor(asked, device=self.device).bool().expand(shape)
        prompt = self.runtime.prompt.get()
        if prompt is not None and self.settings.config.learn == "read":
            learn = learn & (torch.arange(self.past, self.past + self.T, device=self.device) < prompt)
        return learn if self.real is None else learn & self.real

    @torch.no_grad()
    def _extended(self, record: PendingColumns, at: int, end: int, real: Tensor | None) -> PendingColumns:
        """Return the record with a piece's columns."""
        shape, known, embeds = (self.B, end - at), self.known, record.embeds
        ids = torch.full(shape, IGNORED, device=self.device) if known is None else known[:, at:end]
        if self.ids is None or embeds is not None:
            table: Any = self.runtime.model.get_input_embeddings()
            old = table(record.ids.clamp(min=0)) if embeds is None else embeds
            new = self.source[:, at:end] if self.ids is None else table(ids)
            embeds = torch.cat([old, new.to(old.dtype)], 1)
        if self.positions is None:
            positions = torch.arange(self.past + at, self.past + end, device=self.device)
        else:
            positions = self.positions[..., at:end]
        return record.append(ids, self.learn[:, at:end], positions.expand(shape), embeds, real)


def commit(runtime: Runtime, cache: Cache) -> bool:
    """Learn the pending tokens of a cache's rows as a shorter chunk; the next token begins a chunk.

    Return True if there were any.
    """
    slots: dict[int, Any] = {i: x for i, x in enumerate(cache.layers) if isinstance(x, FastCacheLayer)}
    first = next(iter(slots.values()), None)
    if first is None or first.record is None:
        return False
    pending = {b: k for b, n in enumerate(first.fast.seen) if (k := n % first.fast.chunk_size)}
    with torch.inference_mode(False):
        chunks = _Chunks(runtime.loss_forward, cache, slots, first.record, {})
        for slot in slots.values():
            slot.fast.close_chunk()
        for rows, start in first.record.groups(list(pending)):
            chunks.learn_again(rows, start, [pending[b] for b in rows])
    return bool(pending)


def learn_from(
    runtime: Runtime,
    states: dict[int, FastWeights],
    ids_RMn: Tensor,
    loss: Callable[[Tensor], Tensor],
    config: InPlaceTTTConfig | None = None,
) -> Tensor:
    """Read R * M short texts from an empty context, M with each of the states' R rows, and write one update per row.

    ids: padded at the right. The update is minus the gradient of ``loss(logits)``, logits [R * M, n, V], which must not
    depend on padding; return that loss. ``config``: whose rule writes; None: the one the model reads with now.
    States are dense and belong to no cache.
    """
    rule = (runtime.settings if config is None else Settings(config)).rule
    rule.need("outer", "an update from several short texts")  # padding must add nothing to it
    with torch.inference_mode(False), torch.no_grad():
        call = LossCall(rule, states, ids_RMn.shape[0], ids_RMn.shape[1], True)
        output = runtime.loss_forward.run(call, {"input_ids": ids_RMn})
        with torch.enable_grad():
            found = loss(output.logits)
        targets = call.targets(found)
        for i, v in targets.items():
            state = states[i]
            z, v = (x.reshape(state.rows, -1, x.shape[-1]) for x in (call.inputs[i], v))
            state.add(rule, z, v, call.slow[i])
    return found.detach()


def _counts(ids: Tensor, learn: Tensor) -> Tensor:
    """Return whether the loss of each token after the first counts, bool [B, n - 1]."""
    return learn[:, 1:] & (ids[:, 1:] >= 0)


def _loss_gradient(logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of the summed next-token losses with respect to the logits, computed in float32 or better.

    logits [B, n, V], targets and weight [B, n - 1]: a token's loss counts 0 or 1. Some tokens at a time, so that the
    result is the only tensor of its size.
    """
    slope, dtype = torch.zeros_like(logits), state_dtype(logits.dtype)
    step = max(1, _AT_ONCE // logits[:, 0].numel())
    for at in range(0, targets.shape[1], step):
        here = slice(at, at + step)
        part = logits[:, :-1][:, here].detach().softmax(-1, dtype=dtype)
        index = targets[:, here, None]
        part.scatter_add_(-1, index, part.new_full(index.shape, -1))
        slope[:, :-1][:, here] = part.mul_(weight[:, here, None])
    return slope


def _packed_columns(x_RnW: Tensor, inside: Tensor, C: int) -> Tensor:
    """Return the columns that are ``inside`` [R, n], moved to the front of C; zero behind them."""
    if x_RnW.shape[1] == C and bool(inside.all()):
        return x_RnW
    order = (~inside).long().argsort(dim=1, stable=True)[:, :C]
    picked = x_RnW.gather(1, order[..., None].expand(-1, -1, x_RnW.shape[-1]))
    there = inside.gather(1, order)[..., None]
    return nn.functional.pad(torch.where(there, picked, 0), (0, 0, 0, max(C - order.shape[1], 0)))

"""The next-token loss itself as the objective: ``v_t = -dL/do_t``, without training.

o_t is the adapting projection's output at token t and L the sum of the next-token losses inside t's chunk, so a chunk
writes minus the gradient of its own loss (dynamic evaluation, Krause et al. 2018; first order, keys and values of
earlier chunks are constants). A chunk's loss needs the model's head, so the whole model's forward is replaced by one
that reads chunk by chunk: a chunk is scored with the fast weights before it, then one backward pass to the projections'
outputs gives its update. The caller sees one call.

A chunk that was read in pieces (single tokens, say) is run once more from the keys before it when it is complete, so
one call, pieces and single tokens learn the same. Every layer's state is as elsewhere, but the pending tokens are
columns of the cache (``Record``) instead of inputs of the projection.

Shapes: B rows, T tokens of a call, C of a chunk, n of a piece, V vocabulary, D, F as elsewhere.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from ..config import InPlaceTTTConfig
from ..core import FastWeights, Rule
from ..core.algebra import state_dtype
from ..errors import UserError
from . import block_attention as block_attention  # registers its attention
from .cache import FastCacheLayer, cache_name, fast_layers, mark_broken
from .context import Runtime, fast_weights
from .linear import device_of, input_size, is_dense
from .pending import IGNORED, Record, cache_before, within_windows
from .settings import Settings
from .sites import LayerSite

_AT_ONCE = 1 << 25  # logits converted to float32 at a time


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


@torch.inference_mode(False)
@torch.enable_grad()
def check_backward(model: nn.Module, dtype: torch.dtype) -> None:
    """Raise UserError for a quantised layer without a backward: layers before it would learn nothing."""
    for name, module in model.named_modules():
        size, weight = getattr(module, "in_features", None), getattr(module, "weight", None)
        plain = isinstance(weight, Tensor) and is_dense(weight)
        if size is None or plain or next(module.children(), None) is not None:
            continue
        device = weight.device if isinstance(weight, Tensor) else getattr(model, "device", "cpu")
        if torch.device(device).type == "meta":
            continue
        try:
            passes = module(torch.zeros(1, 1, size, dtype=dtype, device=device, requires_grad=True)).requires_grad
        except NotImplementedError:
            passes = False
        if not passes:
            raise UserError(
                f'{name} ({type(module).__name__}) is quantised in a way that has no backward, which objective="loss" '
                "needs: load the model unquantised, or quantise it with bitsandbytes or torchao's weight-only forms"
            )


def check_keys(model: PreTrainedModel) -> None:
    """Raise UserError for a model with layers that keep no keys, from which a chunk could be read again."""
    if any(not hasattr(layer, "keys") for layer in DynamicCache(config=model.config).layers):
        raise UserError(
            'objective="loss" reads a chunk again from the keys of the tokens before it, and this model\'s layers of '
            "linear attention or convolutions keep none: choose another objective"
        )


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
        if not self.runtime.settings.enabled:
            return self.forward(*args, **kwargs)
        given = dict(zip(self.names, args, strict=False)) | kwargs
        train = torch.is_grad_enabled() and self.runtime.model.training
        if train and not self.runtime.settings.config.first_order:
            raise UserError(
                'objective="loss" learns while it reads, without training; a gradient through its own updates is not '
                "supported. Call model.eval() and torch.no_grad(), train with updates_off(model), or attach with "
                "InPlaceTTTConfig(first_order=True, ...), which takes them as constants"
            )
        if self.runtime.model.training and getattr(self.runtime.model, "is_gradient_checkpointing", False):
            raise UserError(
                'objective="loss" reads chunk by chunk from a cache, which activation checkpointing drops: '
                "model.gradient_checkpointing_disable(), or model.eval() to read without training"
            )
        with torch.inference_mode(False), torch.set_grad_enabled(train):
            plain = {k: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for k, v in given.items()}
            reading = _Reading(self, plain)
            try:
                return reading.run()
            except BaseException:
                reading.abandon()
                raise


class _Learner:
    """A learner of the chunks of one cache."""

    def __init__(self, forward: LossForward, cache: Any, given: dict[str, Any]) -> None:
        self.forward, self.runtime, self.cache, self.given = forward, forward.runtime, cache, given
        self.settings: Settings = self.runtime.settings
        self.config, self.rule = self.settings.config, self.settings.rule
        self.sites: dict[int, LayerSite] = {}
        self.slots: dict[int, FastCacheLayer] = {}
        self.record: Any = None
        self.B = 0
        self.device = torch.device("cpu")

    @property
    def first(self) -> FastCacheLayer:
        """Return the layer that keeps the cache's record."""
        return next(iter(self.slots.values()))

    def call(self, call: LossCall, piece: dict[str, Any], mask: Any, cache: Any, logits: int) -> Any:
        """Run the model's own forward on a piece; ``logits``: the number of last tokens that need them, 0: all."""
        rest = {k: v for k, v in self.given.items() if k not in _PACKING}
        grad, frozen = call.capture or call.train, call.capture and not call.train
        with self.runtime.inner.as_(call), torch.set_grad_enabled(grad), self._frozen(frozen):
            return self.forward.forward(
                **piece,
                **{**rest, self.forward.cache_name: cache},
                attention_mask=mask,
                use_cache=True,
                logits_to_keep=logits,
            )

    @cached_property
    def _asking(self) -> list[nn.Parameter]:
        return [p for p in self.runtime.model.parameters() if p.requires_grad]

    @contextmanager
    def _frozen(self, active: bool) -> Iterator[None]:
        """Set ``requires_grad`` False for all parameters in the block: backward stops at the projections' outputs."""
        asking = self._asking if active else []
        for p in asking:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in asking:
                p.requires_grad_(True)

    @torch.no_grad()
    def _again(self, rows: list[int], start: int, lengths: Sequence[int]) -> None:
        """Run the columns from ``start`` on once more for some rows, from the keys before them, and learn them.

        ``lengths``: tokens of each row's chunk.
        """
        record, index = self.record, torch.tensor(rows, device=self.device)
        part, span = replace(record, sliding={}).select(index), slice(start - record.base, None)
        ids, learn, positions = (x[:, span] for x in (part.ids, part.learn, part.positions))
        real = torch.ones_like(learn) if part.real is None else part.real[:, start:]
        # A chunk of a padded row may begin after the column from which it is run.
        order = real.cumsum(1)
        inside = real & (order > order[:, -1:] - torch.tensor(lengths, device=self.device)[:, None])
        if not bool((learn & inside).any()):
            self._decay(rows)
            return
        cache = cache_before(self.cache, self.runtime.model.config, start, record.sliding.get(start, {}), rows)
        source = {"input_ids": ids} if part.embeds is None else {"inputs_embeds": part.embeds[:, span]}
        states = {}
        for i, slot in self.slots.items():
            states[i] = slot.fast
            if len(rows) < self.B:
                states[i] = copy.copy(slot.fast)  # select replaces tensors and modifies none
                states[i].select(rows)
        call = LossCall(self.rule, states, len(rows), ids.shape[1], True)
        mask = None if part.real is None else part.real.long()
        output = self.call(call, {**source, "position_ids": positions}, mask, cache, 0)
        self._write(rows, call, self._gradients(call, output.logits, ids, learn, inside), inside)

    def _gradients(
        self, call: LossCall, logits: Tensor, ids: Tensor, learn: Tensor, inside: Tensor | None
    ) -> dict[int, Tensor]:
        """Return -dL/do of every layer, [B, n, D]."""
        weight = learn[:, 1:] & (ids[:, 1:] >= 0)
        if inside is not None:
            weight = weight & inside[:, 1:] & inside[:, :-1]
        outputs = list(call.outputs.values())
        slope = _loss_gradient(logits, ids[:, 1:].clamp(min=0), weight)
        with torch.autocast(logits.device.type, enabled=False):
            grads = torch.autograd.grad(logits, outputs, slope, retain_graph=call.train, allow_unused=True)
        found = zip(call.outputs, outputs, grads, strict=True)
        return {i: torch.zeros_like(o) if g is None else -g for i, o, g in found}

    @torch.no_grad()
    def _write(self, rows: list[int], call: LossCall, v: dict[int, Tensor], inside: Tensor | None) -> None:
        """Update the states by a chunk of some rows. ``inside`` [R, n]: its tokens; None: all."""
        for i, slot in self.slots.items():
            chunk = {"z": call.inputs[i], "v": v[i]}
            if inside is not None:
                chunk = {name: _packed_columns(x, inside, self.config.chunk_size) for name, x in chunk.items()}
            slot.fast.complete(rows, self.rule, chunk, call.slow[i])

    def _decay(self, rows: list[int]) -> None:
        """Update the states by a chunk of some rows that has nothing to learn."""
        shape = len(rows), self.config.chunk_size
        for i, site in self.sites.items():
            module = site.projection()
            dtype = module.weight.dtype if is_dense(module.weight) else self.runtime.model.dtype
            z = torch.zeros(*shape, input_size(module), dtype=dtype, device=device_of(module))
            chunk = {"z": z, "v": z.new_zeros(*shape, site.width)}
            self.slots[i].fast.complete(rows, self.rule, chunk, None, learned=False)


class _Reading(_Learner):
    """A call of the whole model."""

    def __init__(self, forward: LossForward, given: dict[str, Any]) -> None:
        caches = [given.pop(name, None) for name in ("cache", "past_key_values")]
        super().__init__(forward, next((x for x in caches if x is not None), None), given)
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
        documents, several = self._documents(), False
        if documents is not None:
            padded = documents < 0
            several = bool(((documents != documents.gather(1, padded.byte().argmin(1, keepdim=True))) & ~padded).any())
            self.real = ~padded.to(self.device)
        if documents is not None and several:
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
            mark_broken(self.slots)
            self._detach_cache()

    def _finish(self, logits: Tensor, output: Any, cache: Any) -> Any:
        if isinstance(self.keep, Tensor):
            logits = logits[:, self.keep]
        elif self.keep:
            logits = logits[:, -self.keep :]
        loss = None
        if self.labels is not None:
            model: Any = self.runtime.model
            size = self.runtime.model_config.vocab_size
            more = {name: self.given[name] for name in ("num_items_in_batch", "shift_labels") if name in self.given}
            loss = model.loss_function(logits=logits, labels=self.labels, vocab_size=size, **more)
        values = {**output, "logits": logits} | ({} if loss is None else {"loss": loss})
        values |= {name: cache for name in values if name in ("cache", "past_key_values")}
        output = type(output)(**values)  # anew: a field that is None is no key of a model's output
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
        spans = []
        for b, row in enumerate(documents.tolist()):
            cuts = [0, *(t for t in range(1, self.T) if row[t] != row[t - 1]), self.T]
            spans += [(b, i, j) for i, j in pairwise(cuts) if row[i] >= 0]
        longest = max(j - i for _, i, j in spans)
        source = self.source
        rows = source.new_zeros(len(spans), longest, *source.shape[2:])
        mask = torch.zeros(len(spans), longest, dtype=torch.int64, device=self.device)
        for k, (b, i, j) in enumerate(spans):
            rows[k, : j - i], mask[k, : j - i] = source[b, i:j], 1
        inner = {k: v for k, v in self.given.items() if k not in _PACKING}
        inner |= {self.source_name: rows, "attention_mask": mask}
        reading = _Reading(self.forward, {**inner, "use_cache": False})
        if self.ids is None and self.known is not None:
            reading.known = self.known.new_full((len(spans), longest), IGNORED)
            for k, (b, i, j) in enumerate(spans):
                reading.known[k, : j - i] = self.known[b, i:j]
        output = reading.run()

        def packed(x: Tensor) -> Tensor:
            found = x.new_zeros(self.B, self.T, x.shape[-1])
            for k, (b, i, j) in enumerate(spans):
                found[b, i:j] = x[k, : j - i]
            return found

        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(packed(x) for x in output.hidden_states)
        return packed(output.logits), output

    # -- pieces ---------------------------------------------------------------------------------------------------

    def _pieces(self) -> Iterator[tuple[Tensor | None, Any]]:
        C = self.config.chunk_size
        sites = {site.index: site for site in self.runtime.running_sites()}
        slots = fast_layers(self.cache, dict.fromkeys(sites, False), self.B, self.settings)
        if not sites:
            raise UserError("no layer adapts at present: leave some on, or read with updates_off(model)")
        self.sites, self.slots = sites, slots
        self.past = int(self.cache.get_seq_length())
        self.record, self.learn = self._record(), self._learn()
        counts = None if self.real is None else self.real.long().cumsum(1).cpu()
        at = 0
        while at < self.T:
            need = [C - n % C for n in self.first.fast.seen]
            ends = [at + n for n in need]
            if counts is not None:
                before = counts[:, at - 1].tolist() if at else [0] * self.B
                ends = [int(torch.searchsorted(counts[b], before[b] + n)) + 1 for b, n in enumerate(need)]
            end = min(min(ends), self.T)
            done = [b for b, e in enumerate(ends) if e == end]
            yield self._piece(at, end, done)
            at = end

    def _piece(self, at: int, end: int, done: list[int]) -> tuple[Tensor | None, Any]:
        n, C, self.begun = end - at, self.config.chunk_size, True
        fasts = {i: slot.fast for i, slot in self.slots.items()}
        numbers = [n // C for n in self.first.fast.seen]
        self.record = self.record.begin(numbers, self.cache, self.first.fast.reach)
        # Where all rows' chunks begin and end with this piece, its own forward gives the gradient.
        at_once = n == C and len(done) == self.B and self.record.real is None and self._dynamic()
        piece: dict[str, Any] = {self.source_name: self.source[:, at:end]}
        if self.positions is not None:
            piece["position_ids"] = self.positions[..., at:end]
        train = torch.is_grad_enabled()
        call = LossCall(self.rule, fasts, self.B, n, at_once, train)
        wanted = n  # last tokens whose logits the caller asks for
        if not isinstance(self.keep, Tensor) and self.keep and self.labels is None:
            wanted = max(0, end - max(self.T - int(self.keep), at))
        with within_windows(self.cache):
            output = self.call(call, piece, self._mask(at, end), self.cache, n if at_once else wanted or 1)
        self.record = self._extended(at, end, piece)
        own_real = None if self.real is None else self.real[:, at:end].cpu()
        tokens = [n] * self.B if own_real is None else own_real.sum(1).tolist()
        for fast in fasts.values():
            fast.note(n, own_real, tuple(s + k for s, k in zip(fast.seen, tokens, strict=True)))
        if done:
            if at_once:
                if not train:
                    self._detach_cache()
                ids = self.record.ids[:, -n:]
                learned = self._gradients(call, output.logits, ids, self.record.learn[:, -n:], None)
                self._write(done, call, learned, None)
            else:
                for rows, start in self.record.groups(done):
                    self._again(rows, start, [C] * len(rows))
        for slot in self.slots.values():
            slot.record = None
        self.first.record = self.record
        logits = output.logits[:, -wanted:] if wanted else None
        return logits.detach() if logits is not None and not train else logits, output

    def _mask(self, at: int, end: int) -> Any:
        """Return the mask of a piece."""
        mask = self.mask
        if mask is None or end - at == self.T:
            return mask
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return mask[:, : min(mask.shape[1] - self.T, self.past) + end]
        # A prepared mask is of the call's size: the model makes one for the piece.
        known = self._real_columns(at, end)
        return None if known is None else known.long()

    def _real_columns(self, at: int, end: int) -> Tensor | None:
        """Return which of the cache's columns are tokens after a piece, bool [B, past + end]; None: all."""
        old, new = self.record.real, None if self.real is None else self.real[:, at:end]
        if old is None and new is None:
            return None
        old = torch.ones(self.B, self.record.end, dtype=torch.bool, device=self.device) if old is None else old
        new = torch.ones(self.B, end - at, dtype=torch.bool, device=self.device) if new is None else new
        return torch.cat([old, new.to(old.device)], 1)

    # -- what is pending ------------------------------------------------------------------------------------------

    def _record(self) -> Record:
        """Return the cache's record; a new one if its columns are no longer the recorded ones."""
        record: Record | None = self.first.record
        if record is None or record.end != self.past:
            for slot in self.slots.values():  # pending tokens have lost their context: the next one begins a chunk
                slot.fast.close_chunk()
            none = torch.zeros(self.B, 0, dtype=torch.int64, device=self.device)
            known = None
            if self.mask is not None and self.past and isinstance(self.mask, Tensor) and self.mask.dim() == 2:
                known = self.mask[:, : self.past] != 0
                known = None if bool(known.all()) else known
            record = Record(self.past, none, none.bool(), none, real=known, starts=((),) * self.B)
        return record

    def _learn(self) -> Tensor:
        """Return which tokens of the call are learned, bool [B, T]."""
        learn = torch.ones(self.B, self.T, dtype=torch.bool, device=self.device)
        asked = self.settings.learn
        if isinstance(asked, Tensor):
            if asked.shape != learn.shape:
                raise UserError(f"the mask of learned tokens is {tuple(asked.shape)}, the call {tuple(learn.shape)}")
            learn = asked.to(self.device).bool()
        elif not asked:
            learn = torch.zeros_like(learn)
        prompt = self.runtime.prompt.get()
        if prompt is not None and self.config.learn == "read":
            learn = learn & (torch.arange(self.past, self.past + self.T, device=self.device) < prompt)
        if self.known is None:
            learn = torch.zeros_like(learn)  # tokens without ids have no loss
        return learn if self.real is None else learn & self.real

    @torch.no_grad()
    def _extended(self, at: int, end: int, piece: dict[str, Any]) -> Record:
        """Return the record with a piece's columns."""
        n = end - at
        record: Record = self.record
        known = self.known
        ids = torch.full((self.B, n), IGNORED, device=self.device) if known is None else known[:, at:end]
        embeds = record.embeds
        if self.ids is None or embeds is not None:
            table: Any = self.runtime.model.get_input_embeddings()
            old = table(record.ids.clamp(min=0)) if embeds is None else embeds
            new = self.source[:, at:end] if self.ids is None else table(ids)
            embeds = torch.cat([old, new.to(old.dtype)], 1)
        positions = piece.get("position_ids")
        if positions is None:
            positions = torch.arange(self.past + at, self.past + end, device=self.device)[None]
        whole = self._real_columns(at, end)
        positions = positions.expand(self.B, n).to(record.positions.device)
        pairs = (record.ids, ids), (record.learn, self.learn[:, at:end]), (record.positions, positions)
        ids, learn, positions = (torch.cat(pair, 1) for pair in pairs)
        return replace(record, ids=ids, learn=learn, positions=positions, embeds=embeds, real=whole)

    def _dynamic(self) -> bool:
        return all(type(x).__name__.startswith(("Dynamic", "FastDynamic")) for x in self.cache.layers)

    def _detach_cache(self) -> None:
        for layer in self.cache.layers:
            if getattr(layer, "keys", None) is not None:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()


_PACKING = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def commit(runtime: Runtime, cache: Cache) -> bool:
    """Learn the pending tokens of a cache's rows as a shorter chunk; the next token begins a chunk.

    Return True if there were any.
    """
    layers: list[Any] = list(cache.layers)
    slots: dict[int, FastCacheLayer] = {i: x for i, x in enumerate(layers) if isinstance(x, FastCacheLayer)}
    first = next(iter(slots.values()), None)
    if first is None or first.record is None or not any(n % first.fast.chunk_size for n in first.fast.seen):
        return False
    with torch.inference_mode(False), torch.no_grad():
        learner = _Learner(runtime.loss_forward, cache, {})
        learner.slots, learner.record = slots, first.record
        learner.sites = {site.index: site for site in runtime.sites if site.index in slots}
        learner.B, learner.device = first.fast.rows, first.record.ids.device
        pending = {b: n % first.fast.chunk_size for b, n in enumerate(first.fast.seen) if n % first.fast.chunk_size}
        for slot in slots.values():
            slot.fast.close_chunk()
        for rows, start in learner.record.groups(list(pending)):
            learner._again(rows, start, [pending[b] for b in rows])
    return True


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
    settings, (rows, tokens) = runtime.settings if config is None else Settings(config), ids_RMn.shape
    settings.rule.need("outer", "an update from several short texts")  # padding must add nothing to it
    with torch.inference_mode(False), torch.no_grad():
        call = LossCall(settings.rule, states, rows, tokens, True)
        output = _Learner(runtime.loss_forward, None, {}).call(call, {"input_ids": ids_RMn}, None, None, 0)
        with torch.enable_grad():
            found = loss(output.logits)
        grads = torch.autograd.grad(found, list(call.outputs.values()), allow_unused=True)
        for (i, z), grad in zip(call.inputs.items(), grads, strict=True):
            state = states[i]
            v = torch.zeros_like(call.outputs[i]) if grad is None else -grad
            z, v = (x.reshape(state.rows, -1, x.shape[-1]) for x in (z, v))
            state.add(settings.rule, z, v, call.slow[i])
    return found.detach()


def _packed_columns(x_RnW: Tensor, inside: Tensor, C: int) -> Tensor:
    """Return the columns that are ``inside`` [R, n], moved to the front of C; zero behind them."""
    if x_RnW.shape[1] == C and bool(inside.all()):
        return x_RnW
    order = (~inside).long().argsort(dim=1, stable=True)[:, :C]
    picked = x_RnW.gather(1, order[..., None].expand(-1, -1, x_RnW.shape[-1]))
    there = inside.gather(1, order)[..., None]
    return nn.functional.pad(torch.where(there, picked, 0), (0, 0, 0, max(C - order.shape[1], 0)))

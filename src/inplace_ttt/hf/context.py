"""Hooks that turn a forward call of the model into a call of the adapting layers and pass it to them.

A pre-hook on the base model makes a ``CallContext`` and passes it as one keyword argument; transformers passes it to
every attention module, whose pre-hook removes it; the MLP of the same layer runs next and its projection uses it.
Because it travels with the call's own arguments, a recomputation under activation checkpointing sees the same one.
Hooks are bound methods of plain objects, so deep copies of a model point to the copy.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from ..config import InPlaceTTTConfig
from ..core import ChunkTable, FastWeights, document_ids
from ..errors import UserError
from .cache import FastCacheLayer, cache_name, fast_layers, mark_broken, mark_stale
from .calls import CALL, WholeCall
from .masks import read_mask
from .settings import PerThread, Settings
from .sites import CONTEXT, CallContext, LayerCall, LayerSite
from .steps import Step, may_step, source_of


class Runtime:
    """An attached model's runtime: settings, sites, and the running call."""

    def __init__(self, model: PreTrainedModel, config: InPlaceTTTConfig, base: nn.Module) -> None:
        self._settings = PerThread(Settings(config))
        self._current: PerThread[CallContext | None] = PerThread(None)
        self.model_config = model.config.get_text_config(decoder=True)
        self.sites: list[LayerSite] = []
        self.handles: list[Any] = []
        self.parameters = list(inspect.signature(base.forward).parameters)
        self.cache_name = cache_name(base)
        self.model = model
        self.prepared_step: Step | None = None
        """Step prepared by the caller, who must also call ``end()`` (``DecodingGraph``)."""
        self.tokens_are_real = PerThread(False)
        """True if the tokens of the next call are known to be real (``generate`` wrote them)."""
        self.inner: PerThread[LayerCall | None] = PerThread(None)
        """The call for the model's own forward, where ``loss.LossForward`` runs it in pieces."""
        self.relocation: Any = None
        """Cached ``relocate.Relocation`` of this model; None until first used."""
        self.loss_forward: Any = None
        """The forward that reads with the loss as objective (``loss.LossForward``)."""
        self.prompt: PerThread[int | None] = PerThread(None)
        """Prompt length of the running ``generate``: the model wrote the tokens after it."""
        self.extended_mask: PerThread[Tensor | None] = PerThread(None)
        """The mask to which ``generate`` has just added a token."""
        self.prepared_mask: PerThread[Any] = PerThread((None, None))
        """The last mask that ``generate`` prepared for a static cache, and the 2-D mask that it was made from."""

    @property
    def settings(self) -> Settings:
        return self._settings.get()

    @property
    def config(self) -> InPlaceTTTConfig:
        return self.settings.config

    @property
    def enabled(self) -> bool:
        return self.settings.enabled

    @property
    def current(self) -> CallContext | None:
        return self._current.get()

    def configure(self, **values: Any) -> None:
        """Set fields of ``Settings`` for all threads that have no settings of their own."""
        self._settings.default = replace(self._settings.default, **values)

    @contextmanager
    def override(self, **values: Any) -> Iterator[None]:
        """Override settings for this thread's calls inside the block."""
        with self._settings.as_(replace(self.settings, **values)):
            yield

    def reading(self, config: InPlaceTTTConfig, form: Any = "dense") -> Any:
        """Use this configuration for this thread's calls inside the block; new states have this form."""
        return self.override(config=config, form=form)

    # -- hooks ----------------------------------------------------------------------------------------------------

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        if type(given.get("cache")).__name__ == "PagedAttentionCache" or "write_index" in given:
            no_continuous_batching()
        if given.get("cache") is not None:
            given["past_key_values"] = given["cache"]
        if getattr(module, "_is_replica", False):
            raise NotImplementedError(
                "torch.nn.DataParallel runs one model in several threads, which fast weights cannot follow: start one "
                "process per device (torchrun, accelerate launch), or make a single device visible"
            )
        tokens_are_real = self.tokens_are_real.get()
        self.tokens_are_real.clear()
        step, self.prepared_step = self.prepared_step, None
        mine, settings, inner = step is None, self.settings, self.inner.get()
        context = CallContext(inner, settings)
        context.outer = self._current.get()
        self._current.set(context)  # before anything can fail: the end of the call clears it
        if mine and inner is None and settings.enabled and may_step(given):
            step = self.begin_step(given, tokens_are_real)
        cache = None
        if step is not None:
            context.call, context.step = step, step if mine else None
        elif inner is None:
            context.call, cache = self._call(module, given)
        if given.get("inputs_embeds") is not None:
            context.embeddings = given["inputs_embeds"]
        kwargs = {**kwargs, CONTEXT: context}
        if cache is not None and given.get("past_key_values") is None:
            if len(args) > self.parameters.index(self.cache_name):
                raise ValueError(f"pass {self.cache_name} by keyword")
            kwargs[self.cache_name] = cache
        return args, kwargs

    def before_whole(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``before_model`` of a model of several modalities, whose vision tower does not see the context."""
        args, kwargs = self.before_model(module, args, kwargs)
        return args, {k: v for k, v in kwargs.items() if k != CONTEXT}

    def before_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pass the running call's context to its language model, with the embeddings that this reads.

        Image features replace placeholder tokens there; mask, positions and cache are those of the whole model's call.
        """
        context = self.current
        if context is None:
            return None
        if kwargs.get("inputs_embeds") is not None:
            context.embeddings = kwargs["inputs_embeds"]
        return args, {**kwargs, CONTEXT: context}

    def after_embedding(self, module: nn.Module, args: Any, output: Tensor) -> None:
        context = self._current.get()
        if context is not None and context.embeddings is None:
            context.embeddings = output

    def before_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if CONTEXT not in kwargs:
            return None
        if not torch.compiler.is_compiling():
            kwargs[CONTEXT].begun = True
        return args, {k: v for k, v in kwargs.items() if k != CONTEXT}

    def after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        context = self._current.get()
        if context is None:
            return
        if context.outer is None:
            self._current.clear()
        else:
            self._current.set(context.outer)
        if output is None:  # the call failed: leave nothing of it
            for site in self.sites:
                site.forget()
            if context.begun:
                mark_broken(getattr(context.call, "slots", {}))
        elif context.step is not None:
            context.step.end()

    # -- one call -------------------------------------------------------------------------------------------------

    def _call(self, module: nn.Module, given: dict[str, Any]) -> tuple[LayerCall | None, Cache | None]:
        source, settings = source_of(given), self.settings
        if source is None:
            raise ValueError("a call needs input_ids or inputs_embeds")
        rows, tokens = source.shape[:2]
        cache = self._cache(module, given)
        if not settings.enabled:
            if cache is not None:
                mark_stale(cache)
            return None, None
        if self.loss_forward is not None:
            raise UserError(
                "objective=\"loss\" needs the language model's head: call the whole model, not its base (as trl's "
                "SFTTrainer does: take transformers' Trainer)"
            )
        if given.get(CALL) is not None:
            return given[CALL].begin(settings), None
        if (refusal := rows_are_cut()) is not None:
            raise UserError(refusal)
        running = self.running_sites()
        slots = {} if cache is None else fast_layers(cache, {s.index: s.gates for s in running}, rows, settings)
        first = next((slot.fast for slot in slots.values()), None)
        seen = None if first is None else first.seen
        if any(slot.fast.seen != seen for slot in slots.values()):
            raise ValueError("a call on this cache broke off half way through the layers: start from an empty cache")
        documents = self.documents(given, rows, tokens, cache, first)
        table = ChunkTable.build(
            rows, tokens, settings.config.chunk_size, documents=documents, seen=seen, keep_state=bool(slots),
            from_zero=settings.rule.from_zero,
        )  # fmt: skip
        return WholeCall(settings, table, slots), cache

    def documents(
        self, given: dict[str, Any], rows: int, tokens: int, cache: Cache | None, state: FastWeights | None
    ) -> Tensor | None:
        """Return the document number of each token of a call, as ``core.document_ids`` does."""
        numbers, positions = given.get("seq_idx"), given.get("position_ids")
        real, found = read_mask(self.mask_of(given), rows, tokens, cache, state, divided=numbers is None)
        if given.get("past_key_values") is not None or (positions is not None and positions.dim() != 2):
            positions = None
        numbers = found if numbers is None else numbers
        return document_ids(real, positions, numbers, given.get("cu_seq_lens_q"), rows=rows, tokens=tokens)

    def mask_of(self, given: dict[str, Any]) -> Any:
        """Return a call's mask; the 2-D one where ``generate`` prepared another from it."""
        mask = given.get("attention_mask")
        return mask if mask is None or getattr(mask, "ndim", 4) == 2 else self._original_mask(mask)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _original_mask(self, mask: Any) -> Any:
        prepared, original = self.prepared_mask.get()
        return original if mask is prepared else mask

    # Not traced: compiled code would recompile for values that change from token to token.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin_step(self, given: dict[str, Any], tokens_are_real: bool) -> Step | None:
        """Prepare a step with these arguments. See ``Step.begin``."""
        if self.loss_forward is not None:
            return None
        return Step.begin(
            self.running_sites(), self.settings, given | {"attention_mask": self.mask_of(given)}, tokens_are_real
        )

    def running_sites(self) -> list[LayerSite]:
        """Return the layers that adapt at present."""
        off = self.settings.disabled_layers
        running = self.model_config.num_hidden_layers  # early-exit drafting lowers it temporarily
        return [site for site in self.sites if site.index < running and site.index not in off]

    def _cache(self, module: nn.Module, given: dict[str, Any]) -> Cache | None:
        """Return the call's cache: the given one, or a new one where transformers would make one."""
        cache, use_cache = given.get("past_key_values"), given.get("use_cache")
        drops = torch.is_grad_enabled() or _DROPS_WITHOUT_GRADIENTS
        if module.training and drops and any(getattr(m, "gradient_checkpointing", False) for m in module.modules()):
            return None  # transformers drops the cache in this case
        if cache is not None:
            if not isinstance(cache, Cache):
                raise NotImplementedError(f"cannot keep fast weights in a {type(cache).__name__}: pass a DynamicCache")
            return cache  # transformers reads and fills it even with use_cache=False
        wanted = self.model_config.use_cache if use_cache is None else use_cache
        is_training = use_cache is None and module.training and torch.is_grad_enabled()
        return DynamicCache(config=self.model_config) if wanted and self.settings.enabled and not is_training else None


def no_continuous_batching(*args: Any, **kwargs: Any) -> NoReturn:
    """Refuse transformers' continuous batching, as a method of the model or in a call."""
    raise NotImplementedError(
        "continuous batching mixes requests in one row and names none of them, so fast weights cannot follow: "
        "call generate() instead"
    )


def rows_are_cut() -> str | None:
    """Return an error message if PyTorch splits rows over processes, so that they cannot be read; else None."""
    now = nn.functional.scaled_dot_product_attention
    if now is _ATTENTION:  # torch.compile can trace this
        return None
    if not (getattr(now, "__module__", None) or "").startswith("torch.distributed.tensor.experimental"):
        return None
    return (
        "this row is cut over processes, and the fast weights would start anew on each: call "
        'inplace_ttt.hf.parallel.enable_context_parallel(model, mesh, attention="torch") first'
    )


_ATTENTION = nn.functional.scaled_dot_product_attention
_DROPS_WITHOUT_GRADIENTS = "is_grad_enabled" not in inspect.getsource(GradientCheckpointingLayer)
"""True if this transformers (5.17, say) drops the cache under activation checkpointing without gradients, too."""


def fast_weights(cache: Cache) -> dict[int, FastWeights]:
    """Return the fast weights that a cache carries, by layer."""
    return {i: layer.fast for i, layer in enumerate(cache.layers) if isinstance(layer, FastCacheLayer)}

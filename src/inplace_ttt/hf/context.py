"""What one forward call means for the adapting layers, and how it reaches them.

A pre-hook on the base model makes a ``CallContext`` and passes it as one keyword argument; transformers hands it to
every attention module, whose pre-hook takes it out; the MLP of the same layer runs next and its projection uses it.
Because it travels with the call's own arguments, a recomputation under activation checkpointing sees the same one.
Hooks are bound methods of plain objects, so deep copies of a model point to the copy.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from ..config import InPlaceTTTConfig
from ..core import ChunkTable, FastWeights, document_ids, scan, target
from ..core.target import SHIFTS
from ..errors import UserError
from .cache import FastCacheLayer, fast_layers, mark_stale
from .linear import FastWeight
from .masks import real_tokens
from .parallel_attention import SLICES, RowSlices, torch_cuts_rows
from .parallel_projection import project_slice
from .steps import Step, may_step, source_of
from .tensor_parallel import is_split, local_input, replicated, summand

CONTEXT = "inplace_ttt_context"
CLIP_SPLIT = "clip needs the norm of whole updates, which tensor parallelism splits: leave it out (decay works)"


class CallContext:
    """One forward call: the chunk table, each layer's cache slot, the settings of the moment, and the embeddings."""

    def __init__(self, table: ChunkTable | None, slots: dict[int, FastCacheLayer], enabled: bool, lr: float) -> None:
        self.table, self.slots, self.enabled, self.lr = table, slots, enabled, lr
        self.grad = torch.is_grad_enabled()
        self.embeddings: Tensor | None = None
        self.slices: RowSlices | None = None
        """How the rows are cut over ranks (context parallelism)."""
        self.outer: CallContext | None = None
        self.step: Step | None = None
        """The call as a decoding step, which needs no table."""
        self.ends_step = False
        self._moved: dict[torch.device, ChunkTable] = {}

    def table_on(self, device: torch.device) -> ChunkTable:
        assert self.table is not None
        if self.table.index is None:
            return self.table
        if device not in self._moved:
            self._moved[device] = self.table.to(device)
        return self._moved[device]


class Runtime:
    """The attached state of one model: settings, sites, and the call that is running."""

    def __init__(self, model: PreTrainedModel, config: InPlaceTTTConfig) -> None:
        self.config, self.lr, self.enabled = config, config.lr, True
        self.form: Any = "dense"
        self.silent: frozenset[int] = frozenset()
        """Layers that read with their slow weights alone."""
        self.model_config = model.config
        self.sites: list[LayerSite] = []
        self.current: CallContext | None = None
        self.handles: list[Any] = []
        self.parameters = list(inspect.signature(model.base_model.forward).parameters)
        self.cache_name = "cache" if "cache" in self.parameters else "past_key_values"
        """transformers' name for the cache: the first from 5.24 on, in most families."""
        self.model = model
        self.prepared: Step | None = None
        """The next call as a step that was begun already, and is ended by whoever began it (``DecodingGraph``)."""
        self.vouched = False
        """Whether the tokens of the next call are known to be real (``generate`` wrote them)."""
        self.extended: Tensor | None = None
        """The mask to which ``generate`` has just added a token."""

    @contextmanager
    def reading(self, config: InPlaceTTTConfig, form: Any = "dense") -> Iterator[None]:
        """Inside, calls read with these settings, and caches that begin hold their state in this form."""
        saved = self.config, self.lr, self.form
        self.config, self.lr, self.form = config, config.lr, form
        try:
            yield
        finally:
            self.config, self.lr, self.form = saved

    # -- hooks ----------------------------------------------------------------------------------------------------

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        if type(given.get("cache")).__name__ == "PagedAttentionCache" or "write_index" in given:
            self.no_continuous_batching()
        if given.get("cache") is not None:
            given["past_key_values"] = given["cache"]
        if getattr(module, "_is_replica", False):
            raise NotImplementedError(
                "torch.nn.DataParallel runs one model in several threads, which fast weights cannot follow: start one "
                "process per device (torchrun, accelerate launch), or make a single device visible"
            )
        vouched, self.vouched = self.vouched, False
        step, self.prepared = self.prepared, None
        mine = step is None
        if mine and self.enabled and may_step(given):
            step = Step.begin(self, given, vouched)
        context, cache = self._context(module, given) if step is None else (CallContext(None, {}, True, self.lr), None)
        context.step, context.ends_step = step, mine and step is not None
        context.outer, self.current = self.current, context
        if given.get("inputs_embeds") is not None:
            context.embeddings = given["inputs_embeds"]
        kwargs = {**kwargs, CONTEXT: context}
        if cache is not None and given.get("past_key_values") is None:
            if len(args) > self.parameters.index(self.cache_name):
                raise ValueError(f"pass {self.cache_name} by keyword")
            kwargs[self.cache_name] = cache
        return args, kwargs

    def after_embedding(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.current is not None and self.current.embeddings is None:
            self.current.embeddings = output

    def before_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if CONTEXT not in kwargs:
            return None
        return args, {k: v for k, v in kwargs.items() if k != CONTEXT}

    def after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        context = self.current
        if context is not None:
            self.current = context.outer
            if context.ends_step and context.step is not None and output is not None:
                context.step.end()

    # -- one call -------------------------------------------------------------------------------------------------

    def _context(self, module: nn.Module, given: dict[str, Any]) -> tuple[CallContext, Cache | None]:
        source = source_of(given)
        if source is None:
            raise ValueError("a call needs input_ids or inputs_embeds")
        rows, tokens = source.shape[:2]
        cache = self._cache(module, given)
        if not self.enabled:
            if cache is not None:
                mark_stale(cache)
            return CallContext(ChunkTable.build(rows, tokens, self.config.chunk_size), {}, False, self.lr), None
        if given.get(SLICES) is not None:
            context = CallContext(ChunkTable.build(rows, tokens, self.config.chunk_size), {}, True, self.lr)
            context.slices = given[SLICES]
            return context, None
        if torch_cuts_rows():
            raise UserError(
                "this row is cut over processes, and the fast weights would start anew on each: call "
                'inplace_ttt.hf.parallel.enable_context_parallel(model, mesh, attention="torch") first'
            )
        indices = [site.index for site in self.running_sites()]
        C, decay = self.config.chunk_size, self.config.decay
        slots = {} if cache is None else fast_layers(cache, indices, rows, C, decay, self.form)
        seen = next((slot.fast.seen for slot in slots.values()), None)
        if any(slot.fast.seen != seen for slot in slots.values()):
            raise ValueError("a call on this cache broke off half way through the layers: start from an empty cache")
        fresh = given.get("past_key_values") is None
        position_ids = given.get("position_ids")
        documents = document_ids(
            real_tokens(given.get("attention_mask"), rows, tokens, cache),
            position_ids if fresh and position_ids is not None and position_ids.dim() == 2 else None,
            given.get("seq_idx"),
            given.get("cu_seq_lens_q"),
            rows=rows,
            tokens=tokens,
        )
        table = ChunkTable.build(
            rows, tokens, self.config.chunk_size, documents=documents, seen=seen, keep_state=bool(slots)
        )
        return CallContext(table, slots, True, self.lr), cache

    def running_sites(self) -> "list[LayerSite]":
        """The layers that adapt at present."""
        running = self.model_config.num_hidden_layers  # early-exit drafting lowers it for a while
        return [site for site in self.sites if site.index < running and site.index not in self.silent]

    def _cache(self, module: nn.Module, given: dict[str, Any]) -> Cache | None:
        """The call's cache: the given one, or a new one where transformers would make one for later use."""
        cache, use_cache = given.get("past_key_values"), given.get("use_cache")
        if module.training and any(getattr(m, "gradient_checkpointing", False) for m in module.modules()):
            return None  # transformers drops the cache in this case
        if cache is not None:
            if not isinstance(cache, Cache):
                raise NotImplementedError(f"cannot keep fast weights in a {type(cache).__name__}: pass a DynamicCache")
            return cache  # transformers reads and fills it even with use_cache=False
        wanted = self.model_config.use_cache if use_cache is None else use_cache
        if not wanted or not self.enabled or (use_cache is None and module.training and torch.is_grad_enabled()):
            return None
        return DynamicCache(config=self.model_config)

    # -- methods of the model that do not work with fast weights --------------------------------------------------

    def overrides(self) -> dict[str, Callable[..., Any]]:
        """By the names under which they replace the model's own."""
        return {
            "_valid_auto_compile_criteria": self.may_compile,
            "prepare_inputs_for_generation": PrepareInputs(self),
            "_update_model_kwargs_for_generation": self.extend_mask,
            "init_continuous_batching": self.no_continuous_batching,
        }

    def may_compile(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        """generate() compiles decoding with static caches by itself: single steps, not pieces of a prompt."""
        if getattr(generation_config, "prefill_chunk_size", None) is not None:
            return False
        model: Any = type(self.model)
        found: bool = model._valid_auto_compile_criteria(self.model, model_kwargs, generation_config)
        return found

    def extend_mask(self, *args: Any, **kwargs: Any) -> Any:
        """generate()'s own: adds the written token to the mask."""
        model: Any = type(self.model)
        found = model._update_model_kwargs_for_generation(self.model, *args, **kwargs)
        self.extended = found.get("attention_mask")
        return found

    def no_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            "continuous batching mixes requests in one row and names none of them, so fast weights cannot follow: "
            "call generate() instead"
        )


class PrepareInputs:
    """generate()'s own method. Without a mask, or with one that it has just extended, the next token is a real one."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    @property
    def __signature__(self) -> inspect.Signature:  # by which transformers tells what a model understands
        return inspect.signature(self._own)

    @property
    def _own(self) -> Any:
        model: Any = self.runtime.model
        return type(model).prepare_inputs_for_generation.__get__(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mask, runtime = kwargs.get("attention_mask"), self.runtime
        runtime.vouched, runtime.extended = mask is None or mask is runtime.extended, None
        return self._own(*args, **kwargs)


class LayerSite:
    """One adapting layer: receives the call's context, the MLP's input and the projection's input."""

    def __init__(self, runtime: Runtime, index: int, mlp: nn.Module) -> None:
        self.runtime, self.index, self.mlp = runtime, index, mlp
        self.context: CallContext | None = None
        self.mlp_input: Tensor | None = None

    def before_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.context = kwargs.get(CONTEXT)
        return None

    def projection(self) -> Any:
        """The adapting module itself, under whatever wraps it."""
        return next(m for m in self.mlp.modules() if isinstance(m, FastWeight))

    def before_mlp(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.mlp_input = args[0] if args else kwargs["hidden_states"]

    def after_mlp(self, module: nn.Module, args: Any, output: Any) -> None:
        self.context = self.mlp_input = None

    def project(self, module: Any, z: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
        """The projection's output for input z [B, T, F]: slow and fast weights together."""
        context, config = self.context, self.runtime.config
        if context is None:
            raise RuntimeError(
                f"layer {self.index} was called outside the model's forward, so its fast weights do not know the "
                "document: call the whole model, or detach first (a family whose attention takes no extra keyword "
                "arguments cannot be adapted)"
            )
        if not context.enabled or self.index in self.runtime.silent:
            return plain(z)
        if context.slices is not None:
            return project_slice(self, module, z, plain, context.slices)
        if context.step is not None:
            return context.step.project(self.index, module, self.compute_dtype(z), self._source(context), plain)
        slot = context.slots.get(self.index)
        state = None if slot is None else slot.fast
        table = context.table_on(z.device)
        if state is None and not table.updates:
            return plain(z)
        whole = z if is_split(z) else None
        if whole is not None:
            z = local_input(whole)
        z, u = self.compute_dtype(z), self._source(context)
        past_z, past_u = (None, None) if state is None else state.past(table)
        v = self.targets(u, past_u, table)
        if whole is not None and v is not None:
            v = replicated(v, whole)
        clip = self.clip(module)
        own = table if state is None else state.begin(table, z, v)
        keywords: dict[str, Any] = {
            "lr": context.lr,
            "decay": config.decay,
            "clip": clip,
            "state_BDF": None if state is None else state.S,
            "past_BPF": past_z,
        }
        if not own.updates and keywords["state_BDF"] is None:
            out, S = plain(z if whole is None else whole), None
        elif whole is not None:
            fast, S = scan(z, v, None, own, **keywords)
            out = plain(whole) + summand(fast, whole)
        elif getattr(module, "fuses", False):
            bias = None if module.bias is None else module.bias.to(z.dtype)
            out, S = scan(z, v, module.weight.to(z.dtype), own, bias_D=bias, **keywords)
        else:
            fast, S = scan(z, v, None, own, **keywords)
            out = plain(z) + fast
        if slot is not None and state is not None:
            old = state.recall(table, z)
            if old is not None:
                old = context.lr * old
                out = (out + (old if whole is None else summand(old, whole))).to(out.dtype)
            slot.clip = clip
            state.absorb(table, z, u, v, S, clip)
        return out

    def _source(self, context: CallContext) -> Tensor:
        """u [B, T, D]."""
        if self.runtime.config.target == "hidden_states":
            assert self.mlp_input is not None
            return self.mlp_input
        if context.embeddings is None:
            raise RuntimeError("the token embeddings of this call were not seen: was the embedding module replaced?")
        if context.grad and not torch.is_grad_enabled():
            raise RuntimeError(
                "reentrant activation checkpointing cannot carry gradients to the embeddings that In-Place TTT learns "
                'from: use gradient_checkpointing_kwargs={"use_reentrant": False}, or target="hidden_states"'
            )
        return context.embeddings.to(self.mlp_input.device) if self.mlp_input is not None else context.embeddings

    def targets(self, u: Tensor, past_u: Tensor | None, table: ChunkTable) -> Tensor | None:
        """v of the chunks that update, as ``core.target`` gives it."""
        config = self.runtime.config
        conv, proj = getattr(self.mlp, "ttt_conv", None), getattr(self.mlp, "ttt_proj", None)
        return target(
            u,
            None if conv is None else conv()[:, 0],
            None if proj is None else proj(),
            table,
            lookahead=config.lookahead,
            shift=SHIFTS.get(config.objective, 1),
            past_BPD=past_u,
        )

    def clip(self, module: nn.Module) -> Tensor | None:
        """The largest norm of one chunk's update, 0-d."""
        config = self.runtime.config
        if config.clip is None:
            return None
        if getattr(module, "split", False):
            raise UserError(CLIP_SPLIT)
        weight: Tensor = module.weight  # type: ignore[assignment]
        if not config.clip_relative:
            return torch.tensor(config.clip, device=weight.device)
        if not weight.is_floating_point():
            raise NotImplementedError("clip_relative needs the norm of a dense weight: use an absolute clip")
        norm: Tensor = torch.linalg.vector_norm(weight.detach().float())
        return config.clip * norm

    def compute_dtype(self, z: Tensor) -> Tensor:
        """z in the precision in which the projection's product is taken."""
        device = z.device.type
        if z.dtype == torch.float32 and torch.is_autocast_enabled(device):
            return z.to(torch.get_autocast_dtype(device))
        return z


def fast_weights(cache: Cache) -> dict[int, FastWeights]:
    """The fast weights that a cache carries, by layer."""
    return {i: layer.fast for i, layer in enumerate(cache.layers) if isinstance(layer, FastCacheLayer)}

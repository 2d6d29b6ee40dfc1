"""The interface between a forward call and the adapting layers.

A ``CallContext`` is one of the call's keyword arguments; each ``LayerSite`` removes it and gets the output of the
layer's projection from its call.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core import Rule, Target, Teacher
from ..errors import UserError
from .linear import FastWeight, dense_weight, innermost, is_dense, transforms
from .settings import PerThread, Settings

CONTEXT = "inplace_ttt_context"


class LayerCall(Protocol):
    """A call as the layers see it."""

    rows: int
    tokens: int

    def project(
        self, site: "LayerSite", module: Any, z: Tensor, u: Tensor, plain: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the output [B, T, D] of a layer's projection for its inputs z [B, T, F], u its target's source."""
        ...


class CallContext:
    """A forward call while it runs. ``call`` None: with the slow weights alone."""

    def __init__(self, call: LayerCall | None, settings: Settings) -> None:
        self.call, self.settings = call, settings
        self.grad = torch.is_grad_enabled()
        self.embeddings: Tensor | None = None
        self.begun = False
        """True once a layer was entered, so that the cache may have changed."""
        self.outer: CallContext | None = None
        self.step: Any = None
        """The decoding step that the runtime must end after the model's forward."""
        self.last_layer = -1


class LayerSite:
    """An adapting layer: receives the call's context, the MLP's input and the projection's input."""

    def __init__(self, runtime: Any, index: int, mlp: nn.Module, name: str, target: Target, width: int) -> None:
        self.runtime, self.index, self.mlp, self.name = runtime, index, mlp, name
        """``name``: of the projection in ``mlp``."""
        self.target, self.width = target, width
        self.names = tuple(name for name, _ in target.named_children())
        """Of the target's modules, which stand beside the projection as ``mlp.ttt_NAME``."""
        self._context: PerThread[CallContext | None] = PerThread(None)
        self._input: PerThread[Tensor | None] = PerThread(None)
        self._projected = PerThread(False)
        self.wrapper: nn.Module | None = None
        """peft's wrapper that changes the projection's input or output, as of the last check."""
        self.wrapper_hook: Any = None
        self.teacher: Teacher | None = None
        """The target's teacher during training."""

    @property
    def context(self) -> CallContext | None:
        return self._context.get()

    @property
    def gates(self) -> bool:
        return self.target.gates

    def before_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Receive the context. UserError on a second pass: the state would read every token twice."""
        context: CallContext | None = kwargs.get(CONTEXT)
        # Recomputations (activation checkpointing) come after the call's end.
        if not torch.compiler.is_compiling() and context is not None and context is self.runtime.current:
            if context.last_layer >= self.index:
                raise UserError(
                    f"layer {self.index} runs several times per token in this model, so its fast weights would read "
                    "each token as often: this family cannot adapt"
                )
            context.last_layer = self.index
        self._context.set(context)

    def projection(self) -> Any:
        """Return the adapting module itself, inside any wrappers."""
        module = getattr(*innermost(self.mlp, self.name))
        return next(m for part in (module, self.mlp) for m in part.modules() if isinstance(m, FastWeight))

    def fuses(self, module: Any) -> bool:
        return module.fuses and is_dense(module.weight) and self._outside() is None

    def _outside(self) -> nn.Module | None:
        """Return an adapter that scales or rotates the projection (DoRA, IA3, OFT); the fast weights' part bypasses it.

        So that part is the same before and after the adapter is merged into the slow weight.
        """
        outer = self.mlp._modules[self.name]
        return None if outer is None or isinstance(outer, FastWeight) or not transforms(outer) else outer

    def before_mlp(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (outer := self._outside()) is not self.wrapper:
            self._watch(outer)
        source = args[0] if args else kwargs["hidden_states"]
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            self._recomputed(source)
        self._input.set(source)
        self._projected.set(False)

    def _recomputed(self, source: Tensor) -> None:
        """Restore the call when backward recomputes the MLP alone (activation checkpointing of MLPs).

        The input, which checkpointing keeps, has a reference to the call.
        """
        context: Any = self.context
        if context is None:
            context = getattr(source, CONTEXT, None)
            if context is not None and torch._C._current_graph_task_id() != -1:
                self._context.set(context)
        elif not getattr(context.call, "slots", None):
            setattr(source, CONTEXT, context)

    def after_mlp(self, module: nn.Module, args: Any, output: Any) -> None:
        context, projected = self.context, self._projected.get()
        self.forget()
        if output is not None and not projected and context is not None and context.call is not None:
            raise RuntimeError(
                f"layer {self.index}: the MLP ran without calling its last projection, so the fast weights had no "
                "effect (a fused MLP kernel, or a projection that was replaced after attach?): switch the kernel off, "
                "or attach last"
            )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _watch(self, outer: nn.Module | None) -> None:
        if outer is not None and self.projection().split:
            raise UserError(
                f"layer {self.index}: a {type(outer).__name__} scales or rotates a projection that is split over "
                "processes (tensor parallelism): merge the adapter first"
            )
        with _WATCHING:
            if outer is self.wrapper:  # another thread was faster
                return
            if self.wrapper_hook is not None:
                self.wrapper_hook.remove()
            hook = None if outer is None else outer.register_forward_hook(self.after_wrapper, with_kwargs=True)
            self.wrapper, self.wrapper_hook = outer, hook

    def after_wrapper(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add the fast weights' part, for the MLP's own z, to the output of a wrapped projection."""
        z = args[0] if args else next(iter(kwargs.values()))
        return self._read(self.projection(), z, lambda _: output)

    def forget(self) -> None:
        self._context.clear()
        self._input.clear()
        self._projected.clear()

    def project(self, module: Any, z: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the projection's output for input z [B, T, F] or [B * T, F]: slow and fast weights together."""
        return plain(z) if self.wrapper is not None else self._read(module, z, plain)

    def _read(self, module: Any, z: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
        context = self.context
        if context is None and torch._C._current_graph_task_id() != -1:
            raise NotImplementedError(
                f"the MLP of layer {self.index} is computed again in backward in a way that does not tell its fast "
                "weights the document (use_reentrant=True, a cache, a tiled MLP or a replaced forward): pass "
                "use_reentrant=False and use_cache=False, or checkpoint whole decoder layers "
                "(gradient_checkpointing_enable)"
            )
        if context is None:
            raise RuntimeError(
                f"layer {self.index} was called outside the model's forward, so its fast weights do not know the "
                "document: call the whole model, or detach first (a family whose attention takes no extra keyword "
                "arguments cannot be adapted)"
            )
        self._projected.set(True)
        call = context.call
        if call is None or self.index in context.settings.disabled_layers:
            return plain(z)
        flat, shape = z.dim() == 2, (call.rows, call.tokens)
        if tuple(z.shape[:-1]) not in (shape, (call.rows * call.tokens,)):
            raise NotImplementedError(
                f"layer {self.index} got {' x '.join(map(str, z.shape[:-1]))} tokens of a call of {call.rows} x "
                f"{call.tokens}: fast weights need a layer's tokens together (switch tiled MLPs off)"
            )
        z = z.view(*shape, -1) if flat else z
        u = z if self.target.source == "loss" else self.source(context, call)
        out = call.project(self, module, compute_dtype(z), u, plain)
        return out.flatten(0, 1) if flat else out

    def source(self, context: CallContext, call: LayerCall) -> Tensor:
        """Return u [B, T, D]; [B, T, 2 D] for a target that wants both sources."""
        mlp_input = self._input.get()
        source = self.target.source or context.settings.config.target
        if source in ("hidden_states", "both"):
            assert mlp_input is not None
            mlp_input = mlp_input if mlp_input.dim() == 3 else mlp_input.view(call.rows, call.tokens, -1)
            if source == "hidden_states":
                return mlp_input
        if context.embeddings is None:
            raise RuntimeError("the token embeddings of this call were not seen: was the embedding module replaced?")
        if context.grad and not torch.is_grad_enabled():
            raise RuntimeError(
                "reentrant activation checkpointing cannot carry gradients to the embeddings that In-Place TTT learns "
                'from: use gradient_checkpointing_kwargs={"use_reentrant": False}, or target="hidden_states"'
            )
        embeddings = context.embeddings if mlp_input is None else context.embeddings.to(mlp_input.device)
        if source != "both":
            return embeddings
        assert mlp_input is not None
        return torch.cat([embeddings, mlp_input.to(embeddings.dtype)], -1)

    def bound_target(self) -> Target:
        """Return the target with the modules that stand beside the projection now (adapters may have wrapped them)."""
        for name in self.names:
            module = self.mlp._modules[f"ttt_{name}"]
            if self.target._modules[name] is not module:
                self.target._modules[name] = module
        return self.target

    @contextmanager
    def learning_from(self, target: Target) -> Iterator[None]:
        """Use another target inside the block; it keeps its own parameters."""
        own = self.target, self.names
        self.target, self.names = target, ()
        try:
            yield
        finally:
            self.target, self.names = own

    def anchored(self, out: Tensor) -> Tensor:
        """Return ``out`` with the target's parameters in its graph, although no chunk was complete."""
        if not torch.is_grad_enabled():
            return out
        parameters = [p for p in self.bound_target().parameters() if p.requires_grad]
        return Anchor.apply(out, *parameters) if parameters else out  # type: ignore[no-untyped-call]

    def slow_weight(self, module: Any, rule: Rule) -> Tensor | None:
        """Return W0 [D, F] for a rule's update; None where it is split, or quantised and the rule needs none."""
        weight: Tensor = module.weight
        if hasattr(weight, "device_mesh") or not (rule.needs_weight or is_dense(weight)):
            return None
        return dense_weight(module)


_WATCHING = threading.Lock()


def compute_dtype(z: Tensor) -> Tensor:
    """Cast z to the precision of the projection's product."""
    device = z.device.type
    is_cast = z.dtype == torch.float32 and torch.is_autocast_enabled(device)
    return z.to(torch.get_autocast_dtype(device)) if is_cast else z


class Anchor(torch.autograd.Function):
    """An identity of x that gives every parameter a zero gradient, so that it is always part of the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (grads[0], *(torch.zeros_like(p) for p in ctx.saved_tensors))

"""attach and detach: add fast weights to an existing model, and remove them again."""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from ..config import InPlaceTTTConfig
from ..core import Call, ChunkTable, Rule, Target, make_target
from ..core.scan import path_for
from ..errors import UserError
from .context import Runtime
from .families import attention_of, check_layers, decoder_layers, family_of, place, text_model
from .linear import (
    FastWeight,
    check_backward,
    check_replaceable,
    innermost,
    input_size,
    is_dense,
    make_fast,
    make_slow,
    output_size,
)
from .loss import LossForward
from .names import rename_attached, rename_detached
from .overrides import Forward, InitWeights, Overrides
from .pending import check_keys
from .sites import LayerSite
from .tensor_parallel import check_split, is_split

log = logging.getLogger("inplace_ttt")
Model = TypeVar("Model", bound=nn.Module)
RUNTIME = "_inplace_ttt"
READING = ("chunk_size", "lr", "decay", "clip", "clip_relative", "update_size", "learn")
"""Settings that can change without other parameters."""


def unwrap(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside ``model`` (itself, or the one that peft, torch.compile or DDP wraps)."""
    inner: Any = getattr(model, "_orig_mod", model)
    if isinstance(inner, DistributedDataParallel):
        inner = inner.module
    if not isinstance(inner, PreTrainedModel) and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise UserError(f"expected a transformers causal language model, got {type(model).__name__}")
    return inner


def unwrap_to_save(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside, to be saved whole; UserError if other adapters (peft's) are inside it."""
    root = unwrap(model)
    if any(hasattr(m, "base_layer") or hasattr(m, "original_module") for m in root.modules()):
        raise UserError(
            "the model has other adapters in it (LoRA?): call merge_and_unload() first, or save them with peft and the "
            "fast weights' parameters with adapter_only=True"
        )
    return root


@contextmanager
def plain_config(root: PreTrainedModel) -> Iterator[None]:
    """Hide the fast weights' settings from the model's configuration inside the block, for files of the base model."""
    saved = root.config.inplace_ttt
    del root.config.inplace_ttt
    try:
        yield
    finally:
        root.config.inplace_ttt = saved


def runtime_of(model: nn.Module) -> Runtime:
    """Return the attached runtime; UserError when nothing is attached."""
    runtime = unwrap(model).__dict__.get(RUNTIME)
    if runtime is None:
        raise UserError("this model has no fast weights: call inplace_ttt.attach(model, config) first")
    return runtime  # type: ignore[no-any-return]


UNTRAINED = (
    "the fast weights of this model were never trained, so nothing changes while it reads: attach with "
    'objective="loss", which needs no training, '
    "or train it (docs/training.md; inplace-ttt train RECIPE --plan tells what that takes)"
)
"""Message for an attached model that was never trained."""
PLAIN = (
    "is a plain model without fast weights: load it with transformers and call inplace_ttt.attach. With "
    'objective="loss" it learns as it reads, nothing to train (on the command line: --objective loss); with any other '
    "it has to be trained first (docs/training.md; inplace-ttt train RECIPE --plan tells what that takes)"
)
"""Message for a model without fast weights; follows its name."""


def is_trained(model: nn.Module) -> bool:
    """Tell if an attached model's updates can be nonzero; always with objective "loss"."""
    return any(site.bound_target().is_trained for site in runtime_of(model).sites)


def is_attached(model: nn.Module) -> bool:
    """Tell if the model has fast weights."""
    return RUNTIME in unwrap(model).__dict__


def attach(model: Model, config: InPlaceTTTConfig | None = None) -> Model:
    """Add fast weights to ``model`` in place and return it; outputs stay the same, bit for bit, until it is trained.

    The last projection of each chosen MLP becomes a ``FastWeight`` module around the same parameters; the modules of
    the target are beside it as ``mlp.ttt_NAME``: of the learned one ``ttt_conv`` [D, 1, K] (zero) and ``ttt_proj``
    [D, D] (diagonal, N(0, sigma^2)), section 2 of docs/method.md. A fixed target has no convolution and its projection
    starts at zero; without a projection either, nothing can be zero and the outputs change at once.

    Raises UserError, changing nothing, when the model's family is unknown, a chosen layer does not exist or cannot
    adapt, the rule or the target refuses its options, or the model is attached already. Logs a warning if outputs
    cannot change before the model is trained.
    """
    install(model, InPlaceTTTConfig() if config is None else config)
    if not is_trained(model):
        log.warning(UNTRAINED)
    return model


def install(model: Model, config: InPlaceTTTConfig) -> Model:
    """Attach without the warning, for parameters that are loaded or trained next."""
    root = unwrap(model)
    if RUNTIME in root.__dict__:
        raise UserError("the model has fast weights already: detach(model) first")
    family = family_of(root, config)
    layers = decoder_layers(root, family)
    places = [place(layers, i, family) for i in config.layer_indices(len(layers))]
    check_layers(layers, places)
    base: Any = root.base_model
    if base is root:  # Llama 4's text model gives a wrong name
        base = text_model(root, family)
    runtime = Runtime(root, config, base)
    settings = config.settings
    if config.init_std is None:
        settings["init_std"] = getattr(root.config.get_text_config(decoder=True), "initializer_range", 0.02)
    holders = [innermost(p.mlp, p.name) for p in places]
    for where, holder in zip(places, holders, strict=True):
        projection = getattr(*holder)
        width = output_size(projection)
        check_replaceable(projection)
        if is_split(projection.weight):
            check_split(runtime.settings.rule)
        target = _target(config, width, settings, projection, root)
        runtime.sites.append(LayerSite(runtime, where.index, where.mlp, where.name, target, width))
    by_loss = runtime.sites[0].target.source == "loss"
    if by_loss:
        check_keys(root)
        check_backward(root, root.dtype)
    fasts = [make_fast(getattr(*holder), site) for holder, site in zip(holders, runtime.sites, strict=True)]

    for where, holder, site, fast in zip(places, holders, runtime.sites, fasts, strict=True):
        setattr(*holder, fast)
        for name in sorted(site.names):
            setattr(where.mlp, f"ttt_{name}", getattr(site.target, name))
        runtime.handles += [
            where.attention.register_forward_pre_hook(site.before_attention, with_kwargs=True),
            where.mlp.register_forward_pre_hook(site.before_mlp, with_kwargs=True),
            where.mlp.register_forward_hook(site.after_mlp, always_call=True),
        ]
    # After the sites' own hooks, and in every layer: the keyword must not reach code below the attention modules.
    for layer in layers:
        if (attention := attention_of(layer)) is not None:
            runtime.handles.append(attention.register_forward_pre_hook(runtime.before_attention, with_kwargs=True))
    text = text_model(root, family)
    nested = text is not base
    if nested:
        runtime.handles.append(text.register_forward_pre_hook(runtime.before_text, with_kwargs=True))
    before_model = runtime.before_whole if nested else runtime.before_model
    runtime.handles += [
        base.register_forward_pre_hook(before_model, with_kwargs=True),
        base.register_forward_hook(runtime.after_model, always_call=True),
        root.get_input_embeddings().register_forward_hook(runtime.after_embedding),
    ]
    runtime.handles.append(Forward(runtime, base))
    base.__dict__["forward"] = runtime.handles[-1]
    if by_loss:
        runtime.loss_forward = LossForward(runtime, root.forward)
    root.__dict__[RUNTIME] = runtime
    root.__dict__.update(Overrides(runtime).by_name())
    for part in root.modules():
        if isinstance(part, PreTrainedModel):
            part.__dict__["_init_weights"] = InitWeights(part)
    root.config.inplace_ttt = config.to_dict()
    rename_attached(root)
    return model


def detach(model: Model) -> Model:
    """Remove the fast weights from ``model`` in place and return it: the plain model with its present parameters."""
    root, runtime = unwrap(model), runtime_of(model)
    rename_detached(root)
    for handle in (*runtime.handles, *(site.wrapper_hook for site in runtime.sites if site.wrapper_hook)):
        handle.remove()
    for site in runtime.sites:
        for name in site.names:
            delattr(site.mlp, f"ttt_{name}")
    for parent in list(root.modules()):
        parent.__dict__.pop("_init_weights", None)
        for name, child in list(parent.named_children()):
            if isinstance(child, FastWeight):
                setattr(parent, name, make_slow(child))
    for name in (RUNTIME, *Overrides(runtime).by_name()):
        del root.__dict__[name]
    before = None if runtime.loss_forward is None else runtime.loss_forward.forward
    if before is not None and getattr(before, "__func__", None) is not type(root).forward:
        root.__dict__["forward"] = before  # another library's, from before attach
    del root.config.inplace_ttt
    return model


def _target(
    config: InPlaceTTTConfig, width: int, settings: dict[str, Any], projection: nn.Module, root: PreTrainedModel
) -> Target:
    """Make a layer's target in the projection's dtype and on its device, the same on all processes."""
    weight: torch.Tensor = projection.weight  # type: ignore[assignment]
    dtype: Any = weight.dtype if is_dense(weight) else root.get_input_embeddings().weight.dtype
    with torch.device("cpu"):
        target = make_target(config.objective, width, config.objective_options, settings)
    target.to(device=weight.device, dtype=dtype)
    for module in target.modules():
        if hasattr(module, "reset_parameters"):
            added: Any = module
            added._inplace_ttt_added, added._is_hf_initialized = True, not weight.is_meta
    if is_split(weight):  # random numbers differ between processes
        group = weight.device_mesh.get_group()  # type: ignore[attr-defined]
        for parameter in target.parameters():
            torch.distributed.broadcast(parameter.data, group=group, group_src=0)
    return target


# -- settings of an attached model ------------------------------------------------------------------------------------


def set_lr(model: nn.Module, lr: float) -> None:
    """Set the inner learning rate from the next forward on (for a warm-up, say); 0 removes the updates' effect."""
    configure(model, lr=float(lr))


def fast_settings(model: nn.Module) -> dict[str, Any]:
    """Return the present values of the settings that ``configure`` can change."""
    config = runtime_of(model).config
    return {name: getattr(config, name) for name in READING}


def configure(model: nn.Module, **settings: Any) -> None:
    """Change settings of an attached model: ``chunk_size``, ``lr``, ``decay``, ``clip``, ``clip_relative``, ...

    They apply from the next forward on and are saved by ``save_pretrained``. Parameters do not change, so chunks may
    have another size than in training. A cache filled before cannot be continued with another chunk size or
    decay. Raises UserError on other settings (they need other parameters: attach again) and on values out of range.
    """
    root, runtime = unwrap(model), runtime_of(model)
    if wrong := sorted(set(settings) - set(READING)):
        raise UserError(f"cannot change {', '.join(wrong)} of an attached model, only {', '.join(READING)}")
    runtime.configure(config=replace(runtime.config, **settings))
    root.config.inplace_ttt = runtime.config.to_dict()


def updates_off(model: nn.Module) -> Any:
    """Disable the fast weights in this thread, as a context. A cache filled inside cannot be continued outside."""
    return runtime_of(model).override(enabled=False)


def layers_off(model: nn.Module, layers: Collection[int]) -> Any:
    """Disable the fast weights of these layers in this thread, as a context; for ablations of layers.

    Do not reuse a cache with a different set of layers. UserError for a layer that does not adapt.
    """
    runtime = runtime_of(model)
    known = {site.index for site in runtime.sites}
    if unknown := sorted(set(layers) - known):
        raise UserError(f"layers {unknown} do not adapt, only {sorted(known)}")
    return runtime.override(disabled_layers=frozenset(layers))


# -- inspection --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerInfo:
    """A summary of one adapting layer: names, extra parameters, bytes of fast weights per row, path of the scan.

    ``path``: the path of the scan of whole calls on the layer's device: a registered fast path, or "generic".
    """

    index: int
    projection: str
    kind: str
    shape: tuple[int, int]
    extra_parameters: int
    state_bytes: int
    rule: str
    path: str


def adapting_layers(model: nn.Module) -> list[LayerInfo]:
    """List the adapting layers. Bytes: of a row's state (for "sum": S, D x F in float32), without pending tokens.

    A model on the meta device is assumed to move to the CUDA device, or to the CPU where there is none.
    """
    root, runtime = unwrap(model), runtime_of(model)
    names, rule = {id(module): name for name, module in root.named_modules()}, runtime.settings.rule
    infos = []
    for site in runtime.sites:
        fast = site.projection()
        D, F = output_size(fast), input_size(fast)
        extra = sum(p.numel() for n, p in site.mlp.named_parameters() if n.startswith("ttt_"))
        state = rule.init(1, D, F, torch.empty(0, dtype=torch.float32, device="meta"))
        size = sum(x.numel() * x.element_size() for x in state.values())
        path = _path(rule, D, F, fast.weight.device, site.gates)
        infos.append(LayerInfo(site.index, names[id(fast)], type(fast).__name__, (D, F), extra, size, rule.name, path))
    return infos


inspect = adapting_layers
"""Older name of `adapting_layers`, which shadows the standard library's module."""


def _path(rule: Rule, D: int, F: int, device: torch.device, gates: bool) -> str:
    """Return the name of the path that scans a call of two chunks in one row, without a state before it."""
    if device.type == "meta":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    one = torch.empty(1, 1, 1, device=device)  # expanded: only shapes matter
    z, v, weight = one.expand(1, 2, F), one.expand(1, 1, D), one[0].expand(D, F)
    keep = one[0] if gates else None
    return path_for(Call(rule, ChunkTable.build(1, 2, 1), z, v, D, keep=keep, weight=weight, slow=weight)).name

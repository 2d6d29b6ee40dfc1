"""The adapting projection and the parameters beside it."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import UserError
from .tensor_parallel import split_forward


class FastWeight:
    """A mixin for a last projection whose weight adapts while the model reads. The slow weight keeps its name.

    ``site``: the ``LayerSite`` to which it passes its input.
    """

    slow_class: type[nn.Module]
    split = False
    """True if tensor parallelism gives this process a share of F only."""
    fuses = False
    """True if slow and fast product may be computed together (a plain dense ``nn.Linear``)."""

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.__dict__["site"].project(self, z, super().forward)  # type: ignore[misc]
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.slow_class,), self.__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        site = self.__dict__["site"]
        if id(site.mlp) not in memo:  # copied alone, by peft's modules_to_save: a projection of the same layer
            memo[id(site)] = site
        memo[id(self)] = new = _rebuild(self.slow_class)
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


class FastWeightLinear(FastWeight, nn.Linear):
    """An ``nn.Linear`` that adapts."""

    slow_class = nn.Linear
    fuses = True


class FastWeightConv1D(FastWeight, Conv1D):
    """A ``Conv1D`` (GPT-2's transposed linear layer) that adapts."""

    slow_class = Conv1D


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FastWeightLinear, Conv1D: FastWeightConv1D}


def _class_for(slow_class: type[nn.Module]) -> type[nn.Module]:
    """Return the adapting subclass of a linear layer's class (made on first use for quantised and custom ones)."""
    if slow_class not in _CLASSES:
        namespace = {"slow_class": slow_class, "__module__": __name__}
        _CLASSES[slow_class] = type(f"FastWeight{slow_class.__name__}", (FastWeight, slow_class), namespace)
    return _CLASSES[slow_class]


def _rebuild(slow_class: type[nn.Module]) -> nn.Module:
    cls = _class_for(slow_class)
    return cls.__new__(cls)


def make_fast(slow: nn.Module, site: Any) -> nn.Module:
    """Make an adapting module that shares parameters, buffers and hooks with ``slow``; accelerate's device hook moves.

    Raises UserError where the weight is offloaded or something else replaced the module's forward.
    """
    return _remade(slow, _class_for(type(slow)), site)


def make_slow(fast: nn.Module) -> nn.Module:
    """Return the plain module, with the same parameters, buffers and hooks."""
    return _remade(fast, fast.slow_class)  # type: ignore[arg-type]


def _remade(old: nn.Module, cls: type[nn.Module], site: Any = None) -> nn.Module:
    check_replaceable(old)
    hook: Any = old.__dict__.get("_hf_hook")  # accelerate's; it wraps a bound forward and would call the old module
    if hook is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(old)
        old.__dict__.pop("forward", None)
    split = split_forward(old)
    new = cls.__new__(cls)
    left = {"site"} if split is None else {"site", "split", "forward"}
    new.__dict__.update({k: v for k, v in old.__dict__.items() if k not in left})
    if site is not None:
        new.__dict__.update({"site": site} if split is None else {"site": site, "split": True})
    if split is not None:
        split[0].install_forward(new, split[1])
    return new if hook is None else add_hook_to_module(new, hook)


def innermost(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module and attribute that hold the projection itself, inside peft's wrappers."""
    while True:
        outer: Any = getattr(module, name)
        if isinstance(getattr(outer, "base_layer", None), nn.Module):
            module, name = outer, "base_layer"
        elif isinstance(copies := getattr(outer, "modules_to_save", None), nn.ModuleDict):
            active = outer.active_adapters
            in_use = active and not outer.disable_adapters
            module, name = (copies, active[0]) if in_use else (outer, "original_module")
        else:
            return module, name


def transforms(outer: nn.Module) -> bool:
    """Tell if a wrapper of the projection does more than add to its output, as DoRA does and LoRA does not."""
    while isinstance(inner := getattr(outer, "base_layer", None), nn.Module):
        if getattr(outer, "lora_variant", True):
            return True
        outer = inner
    return False


def check_replaceable(module: nn.Module) -> None:
    """Raise UserError if the module's forward is not its class's own and cannot be moved to another module."""
    if not isinstance(getattr(module, "weight", None), Tensor):
        raise UserError(
            f"a {type(module).__name__} ({type(module).__module__}) holds no weight tensor (torch's dynamic "
            "quantisation?): attach to the plain model, or quantise with bitsandbytes"
        )
    hook = module.__dict__.get("_hf_hook")
    if "forward" in module.__dict__ and (hook is None or getattr(hook, "offload", True)):
        if split_forward(module) is not None:
            return
        raise UserError(
            f"the forward of a {type(module).__name__} was replaced (offloaded weights?): load the model whole onto "
            "one or more devices, without offloading, attach, and offload it then (accelerate.dispatch_model)"
        )


_DENSE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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


def is_dense(weight: Any) -> bool:
    """Tell if a weight is a plain dense tensor: bitsandbytes packs values, torchao uses tensor subclasses.

    Float8 values have their scales elsewhere.
    """
    if weight.dtype not in _DENSE or getattr(weight, "quant_state", None) is not None:
        return False
    return type(weight).dequantize is Tensor.dequantize


def dense_weight(module: Any) -> Tensor:
    """Return the slow weight [D, F] of an adapting projection, de-quantised where it is quantised (a copy then)."""
    weight: Any = module.weight
    if is_dense(weight):
        return weight.mT if module.slow_class is Conv1D else weight  # type: ignore[no-any-return]
    with torch.no_grad():
        if getattr(weight, "quant_state", None) is not None:
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[no-any-return]
        if type(weight).dequantize is not Tensor.dequantize:
            return weight.dequantize()  # type: ignore[no-any-return]
        # Any other quantiser: the product with the identity.
        dtype = next((p.dtype for p in module.parameters() if p.dtype in _DENSE), torch.get_default_dtype())
        eye = torch.eye(module.in_features, device=weight.device, dtype=dtype)
        parts = eye.split(1024)  # type: ignore[no-untyped-call]
        dense = torch.cat([module.slow_class.forward(module, rows) for rows in parts])
        return (dense if module.bias is None else dense - module.bias).mT


def device_of(module: Any) -> torch.device:
    """Return the device on which a projection computes; offloaded weights are on no device between calls."""
    weight: Tensor = module.weight
    hook = getattr(module, "_hf_hook", None)
    return torch.device(hook.execution_device) if weight.is_meta and hook is not None else weight.device


def output_size(projection: nn.Module) -> int:
    """Return D of a linear-like module."""
    return _size(projection, "output", "out_features", "nf")


def input_size(projection: nn.Module) -> int:
    """Return F of a linear-like module."""
    return _size(projection, "input", "in_features", "nx")


def _size(projection: nn.Module, side: str, *names: str) -> int:
    for name in names:
        if isinstance(size := getattr(projection, name, None), int):
            return size
    raise UserError(f"cannot tell the {side} size of {type(projection).__name__}: it must be a linear layer")

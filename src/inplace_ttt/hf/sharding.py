"""FSDP2 for an attached (or plain) transformers model: PyTorch's ``fully_shard``, one unit a decoder layer.

The parameters that ``attach`` adds lie in the MLP, so they are sharded and gathered with their layer. What a call
communicates is FSDP2's own: nothing of the fast weights (they are activations).
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError
from .attach import is_attached, runtime_of, unwrap
from .families import FAMILIES, decoder_layers, family_of


def shard_layers(
    model: PreTrainedModel,
    mesh: Any,
    *,
    precision: torch.dtype | None = None,
    reshard_after_forward: bool = True,
) -> PreTrainedModel:
    """Shards ``model`` in place over ``mesh`` and returns it: every decoder layer, then the rest.

    mesh: a ``DeviceMesh`` of one dimension, or of two (replicas, shards). precision: what layers compute in (say
    ``torch.bfloat16``); parameters, gradients' reduction and optimizer stay in the parameters' own dtype; None: that
    too. Gradients are means over the mesh's ranks. Call ``attach`` before, the optimizer after.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    root = unwrap(model)
    layers = layers_of(root)
    settings: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": reshard_after_forward}
    if precision is not None:
        kept = next(p.dtype for p in root.parameters() if p.is_floating_point())
        settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=kept)
    for layer in layers:
        fully_shard(layer, **settings)
    fully_shard(root, **settings)
    return root


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers. Raises UserError for a model that does not say which they are."""
    if is_attached(model):
        return list(decoder_layers(model, family_of(model, runtime_of(model).config)))
    if model.config.model_type in FAMILIES:
        return list(decoder_layers(model, FAMILIES[model.config.model_type]))
    names = set(getattr(model, "_no_split_modules", None) or [])
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        raise UserError(f"cannot tell the decoder layers of {type(model).__name__}: shard it yourself (fully_shard)")
    return found


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter is distributed (FSDP2, tensor parallelism)."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a distributed tensor on the CPU (all its ranks call this), any other tensor on the CPU."""
    full = getattr(tensor.detach(), "full_tensor", None)
    return (tensor.detach() if full is None else full()).cpu()


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole state dict on the CPU, tied parameters once under all their names. All ranks call it together."""
    known: dict[Any, torch.Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        local = getattr(tensor, "_local_tensor", tensor)
        key = (local.data_ptr(), tuple(tensor.shape)) if local.numel() else name
        if key not in known:
            known[key] = whole(tensor)
        state[name] = known[key]
    return state

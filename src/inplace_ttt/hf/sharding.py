"""FSDP2 for an attached (or plain) transformers model: PyTorch's ``fully_shard``, one unit a decoder layer.

The parameters that ``attach`` adds lie in the MLP, so they are sharded and gathered with their layer. A call
communicates only FSDP2's own data: fast weights are activations and stay local.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from ..errors import UserError
from .attach import is_attached, runtime_of, unwrap
from .families import FAMILIES, decoder_layers, family_of


def shard_layers(
    model: PreTrainedModel, mesh: Any, *, precision: torch.dtype | None = None, reshard_after_forward: bool = True
) -> PreTrainedModel:
    """Shard ``model`` in place over ``mesh`` and return it: every decoder layer, then the rest.

    mesh: a ``DeviceMesh`` of one dimension, or of two (replicas, shards). precision: dtype in which layers compute
    (``torch.bfloat16``, say); parameters, gradient reduction and optimizer keep the parameters' own dtype; None: layers
    compute in it too. Gradients are means over the mesh's ranks. Call ``attach`` before, the optimizer after.
    """
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


def broadcast_structure(model: PreTrainedModel | None) -> PreTrainedModel:
    """Broadcast the model's structure: rank 0 keeps its model; the others pass None and get a copy on the meta device.

    Buffers, settings, fast weights and the random state are copied. All ranks call it, then ``broadcast_and_shard``.
    """
    sent: list[Any] = [None, None, None]
    if model is not None:
        empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
        sent = [copy.deepcopy(model, empty), torch.initial_seed(), torch.get_rng_state()]
    dist.broadcast_object_list(sent)
    if model is None:
        model = sent[0]
        torch.manual_seed(sent[1])  # seeds the GPU too
        torch.set_rng_state(sent[2])
    return model


def broadcast_and_shard(model: PreTrainedModel, mesh: Any, **settings: Any) -> PreTrainedModel:
    """Run ``shard_layers`` on the result of ``broadcast_structure``: only rank 0 ever holds all of the weights."""
    first = dist.get_rank() == 0
    weights: dict[str, Any] = {n: p.detach() for n, p in model.named_parameters()} if first else {}
    root: Any = shard_layers(model, mesh, **settings)
    if not first:
        root._apply(lambda x: torch.empty_like(x, device=mesh.device_type) if x.is_meta else x)  # not the buffers
    # Not strict: tied parameters are present under their first name only.
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(root, weights, options=options)
    return model


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers. UserError for a model that does not declare them."""
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
    """Tell if any parameter is distributed (FSDP2, tensor parallelism)."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the CPU, gathered if it is distributed (then all its ranks call this)."""
    return gathered(tensor).cpu()


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on its device, gathered if it is distributed (then all its ranks call this)."""
    full = getattr(tensor.detach(), "full_tensor", None)
    return tensor.detach() if full is None else full()


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gather the state dict on rank 0's CPU, tied parameters once under all their names; return {} on other ranks.

    All ranks call it together. Only rank 0 keeps it, so that a machine's memory does not hold a copy per rank.
    """
    writes = dist.get_rank() == 0
    known: dict[Any, torch.Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        local = getattr(tensor, "_local_tensor", tensor)
        key = (local.data_ptr(), tuple(tensor.shape)) if local.numel() else name
        if key not in known:
            known[key] = whole(tensor) if writes else gathered(tensor).new_empty(0)
        state[name] = known[key]
    return state if writes else {}


@dataclass(frozen=True)
class Meshes:
    """A process's place among ``data x shard x context`` processes, the last varying fastest."""

    data: int
    shard: int
    context: int
    parameters: Any
    """``DeviceMesh`` for ``shard_layers``: over shard and context together, replicated ``data`` times."""
    slices: Any
    """``DeviceMesh`` for ``enable_context_parallel``."""

    @property
    def row_groups(self) -> int:
        """Return the number of groups of processes that read different rows."""
        return self.data * self.shard

    @property
    def row_group(self) -> int:
        """Return the number of this process's group."""
        return int(dist.get_rank() // self.context)

    readers, reader = row_groups, row_group
    """Older names."""


def make_meshes(device: str, *, data: int = 1, shard: int = 1, context: int = 1) -> Meshes:
    """Make the meshes of the started processes. UserError unless there are ``data * shard * context`` of them.

    Parameters are sharded over context-parallel ranks as well (their gradients must be averaged in any case).
    """
    count = dist.get_world_size()
    if data * shard * context != count:
        raise UserError(
            f"data {data} x shard {shard} x context {context} needs {data * shard * context} processes, "
            f"{count} were started"
        )
    both = init_device_mesh(device, (data, shard * context), mesh_dim_names=("replicate", "shard"))
    slices = init_device_mesh(device, (data * shard, context), mesh_dim_names=("row_group", "context"))
    return Meshes(data, shard, context, both["shard"] if data == 1 else both, slices["context"])


# -- sharded checkpoints: each rank writes its own part, any number of ranks can resume --------------------------------


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
"""By parameter, so that another layout can use other groups."""


def save_sharded(directory: str | Path, model: nn.Module, optimizer: Any = None) -> None:
    """Save model and optimizer with torch.distributed.checkpoint; all ranks call it."""
    save(_states(model, optimizer), checkpoint_id=directory)


def _states(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, () if optimizer is None else optimizer, options=FLAT)
    return {"model": model_state} if optimizer is None else {"model": model_state, "optimizer": optimizer_state}


def load_sharded(directory: str | Path, model: nn.Module, optimizer: Any = None) -> None:
    """Load a checkpoint of ``save_sharded`` into a model (and optimizer) of any layout; all ranks call it.

    Raises UserError when there is no checkpoint, or one of another model.
    """
    if not (Path(directory) / ".metadata").is_file():
        raise UserError(f"no complete checkpoint in {directory}")
    state = _states(model, optimizer)
    try:
        load(state, checkpoint_id=directory)
    except (RuntimeError, KeyError, CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{directory} is not a checkpoint of this model: {reason}") from None
    set_state_dict(
        model,
        () if optimizer is None else optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state.get("optimizer", {}),
        options=FLAT,
    )

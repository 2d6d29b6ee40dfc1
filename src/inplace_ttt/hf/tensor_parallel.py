"""Tensor parallelism as transformers does it (``from_pretrained(..., tp_plan="auto")``): the projection split over F.

Each rank holds W0, S and z for its share of F; the targets v are the same on all ranks. An update is an outer product
of v with the rank's own z, so it communicates nothing, and the fast product joins the slow one before the sum over
ranks that the projection makes anyway. In training, v's gradient is summed over the ranks (each knows a share of F).
"""

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from ..core import Rule
from ..errors import UserError


def split_forward(module: nn.Module) -> tuple[Any, Any] | None:
    """Return (style, mesh) of the forward that transformers' tensor parallelism put on a module, or None.

    The style object's own ``install_forward`` can then put it on another module. UserError for a projection that is
    split in another way than over its input.
    """
    forward: Any = module.__dict__.get("forward")
    code = getattr(forward, "__code__", None)
    if code is None or not forward.__closure__ or not {"self", "mesh", "original_forward"} <= set(code.co_freevars):
        return None
    cells = dict(zip(code.co_freevars, (cell.cell_contents for cell in forward.__closure__), strict=True))
    style = cells["self"]
    if not hasattr(style, "install_forward"):
        return None
    if "RowwiseParallel" not in {cls.__name__ for cls in type(style).__mro__}:
        raise UserError(f"this projection is split as {type(style).__name__}: only a split over its input can adapt")
    return style, cells["mesh"]


def is_split(tensor: Any) -> bool:
    """Tell if a tensor is a DTensor."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "to_local")


def check_split(rule: Rule) -> None:
    """Raise UserError for a rule whose updates need all of F at once."""
    if rule.whole:
        raise UserError(
            f"the updates of rule {rule.name!r} need whole matrices (clip, update_size, soft_cap: their norm), which "
            "tensor parallelism splits: leave that out (decay works)"
        )


def local_input(z: Any) -> Tensor:
    """Return this rank's part of z [B, T, F / ranks]; its gradient is that part's."""
    part: Tensor = z.to_local(grad_placements=z.placements)
    return part


def replicated(v: Tensor, z: Any) -> Tensor:
    """Return v, the same on all ranks; backward sums its gradient over the ranks, of which each has a share."""
    whole: Any = DTensor.from_local(v, z.device_mesh, [Replicate()], run_check=False)
    part: Tensor = whole.to_local(grad_placements=[Partial()])
    return part


def summand(out: Tensor, z: Any) -> Any:
    """Wrap this rank's part of a sum over the ranks as a DTensor that can be added to the slow product."""
    return DTensor.from_local(out, z.device_mesh, [Partial()], run_check=False)

"""One weight per chunk, by a cumulative sum: the formula of the authors' release, in place of ``core.scan``.

Shapes: T tokens, C a chunk, M chunks, D output width, F width of z.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..core.scan import PATHS, Call, Path, Result
from ..errors import UserError
from ..hf.attach import runtime_of, set_lr, updates_off
from ..hf.cache import cache_of
from ..hf.context import fast_weights
from .timing import measured, rates

SHARE = 0.3
"""Norm of ``lr * S`` over W0's during a check, large enough to reveal errors."""
OFF = 1 / 3
"""Limit of our distance from the formula, over the distance between updates on and off. Rounding is about 0.1."""


def product(z_1TF: Tensor, v_1ND: Tensor, weight_DF: Tensor, C: int, lr: float) -> tuple[Tensor, Tensor]:
    """Return outputs [1, T, D] and every chunk's update [N / C, D, F], in z's precision."""
    T, whole = z_1TF.shape[1], z_1TF.shape[1] // C
    z_MCF, v_UCD = z_1TF[0, : whole * C].view(whole, C, -1), v_1ND[0].view(-1, C, v_1ND.shape[2])
    dW = lr * torch.bmm(v_UCD.mT, z_MCF[: len(v_UCD)])
    most = -(-T // C) - 1
    weights = torch.cat([weight_DF[None], dW[:most]]).cumsum(0)
    out = torch.bmm(z_MCF, weights[:whole].mT).view(1, whole * C, -1)
    return (out if whole * C == T else torch.cat([out, linear(z_1TF[:, whole * C :], weights[-1])], 1)), dW


def run(call: Call) -> Result:
    """Run a call of one row that begins here (a path of ``core.scan``)."""
    table = call.table
    begins = table.index is None and table.rows == 1 and not table.prefix and not call.state
    if not begins or call.weight is None or call.rule.keep != 1:
        raise NotImplementedError(
            "the materialised formula takes one whole row from its beginning, without clip or decay"
        )
    if call.v is None:
        return Result(linear(call.z, call.weight, call.bias), None)
    lr = call.rule.lr
    out, dW = product(call.z, call.v.to(call.z.dtype), call.weight, table.chunk_size, lr)
    out = out if call.bias is None else out + call.bias
    S = (dW.sum(0, dtype=torch.float32) / lr)[None] if table.keep_state and lr else None
    return Result(out, None if S is None else {"S": S})


@contextmanager
def formula() -> Iterator[None]:
    """Make adapting layers use the materialised formula."""
    path = Path("materialised", lambda call: True, run)
    PATHS.insert(0, path)
    try:
        yield
    finally:
        PATHS.remove(path)


def timed(
    model: nn.Module, run: Callable[[], Any], device: torch.device, rounds: int
) -> tuple[dict[str, float], dict[str, int | None]]:
    """Return median seconds and peak memory of ``run`` without fast weights, as it is, and by the formula, by name."""
    runs = {"no TTT": updates_off(model)(run), "ours": run, "materialised": formula()(run)}
    return measured(runs, device, rounds=rounds)


def choose_large_lr(model: nn.Module, ids_1T: Tensor) -> float:
    """Return an inner learning rate at which the fast weights after ``ids`` are ``SHARE`` of the slow ones."""
    out = model(ids_1T, use_cache=True, logits_to_keep=1)
    sites = {site.index: site for site in runtime_of(model).sites}
    ratios = [
        sites[i].projection().weight.norm() / S.norm()
        for i, fast in fast_weights(cache_of(out)).items()
        if (S := fast.dense()) is not None
    ]
    return SHARE * (sum(ratios) / len(ratios)).item()


@torch.no_grad()
def check(model: nn.Module, ids_1T: Tensor) -> float:
    """Return our logits' distance from the formula's, over that between updates on and off, with large updates.

    UserError where it is more than ``OFF``: wrong results are not timed.
    """
    before = runtime_of(model).config.lr
    set_lr(model, choose_large_lr(model, ids_1T))
    try:
        ours = model(ids_1T, use_cache=False).logits.float()
        with formula():
            theirs = model(ids_1T, use_cache=False).logits.float()
        with updates_off(model):
            off = model(ids_1T, use_cache=False).logits.float()
    finally:
        set_lr(model, before)
    found = ((ours - theirs).norm() / (ours - off).norm()).item()
    if not found <= OFF:
        raise UserError(
            f"results are wrong, so no timings are shown: logits are {found:.2f} of the updates' effect from the "
            "formula's"
        )
    return found


def checked(model: Any, shape: dict[str, int], C: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """Start a record of a whole model: its distance from the formula (``check``) and the device's rates."""
    probe = torch.randint(0, shape["vocab_size"], (1, 2 * C + C // 2), device=device)
    speed = rates(device, model.dtype, tokens, shape["intermediate_size"], shape["hidden_size"])
    return {"from_the_formula": check(model, probe), "rates": speed}


def extra_products(shape: dict[str, int], layers: int, tokens: int, *, training: bool = False) -> float:
    """Count FLOPs that fast weights add: of the chunks' updates and P, and for training their backward.

    One product of D * F a token for the updates and one of D * D for P; in a training step the same again where
    activations are recomputed, and in the backward three of D * F and two of D * D.
    """
    D, F = shape["hidden_size"], shape["intermediate_size"]
    wide, square = (5, 4) if training else (1, 1)
    return 2.0 * tokens * layers * (wide * D * F + square * D * D)

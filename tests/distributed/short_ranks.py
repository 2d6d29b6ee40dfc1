"""What the processes of test_short_ranks.py do: rows too short to complete a chunk on one, long ones on another."""

from typing import Any

import torch.distributed as dist
from contract.families import C, adapted, tokens
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from inplace_ttt.hf.sharding import whole

STEPS = ((C - 1, 3 * C), (2 * C + 1, 2), (C - 1, C))
"""Length of each rank's row, step by step; in the last one nothing adapts anywhere."""


def model_of(is_frozen: bool) -> Any:
    model = adapted("llama").train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_frozen or "ttt_" in name)
    return model


def loss_of(model: Any, step: int, rank: int) -> Tensor:
    row = tokens(1, STEPS[step][rank], seed=10 * step + rank)
    loss: Tensor = model(row, use_cache=False).logits.square().mean()
    return loss


def differences(way: str, is_frozen: bool) -> list[float]:
    """Of every step's gradients to those of one process that reads all rows, relative to the largest."""
    model, alone, found = model_of(is_frozen), model_of(is_frozen), []
    if way == "ddp":
        running: Any = DistributedDataParallel(model)
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        running = fully_shard(model)
    for step in range(len(STEPS)):
        for one in (model, alone):
            one.zero_grad(set_to_none=True)
        loss_of(running, step, dist.get_rank()).backward()
        sum(loss_of(alone, step, rank) / 2 for rank in range(2)).backward()
        wanted = {n: p.grad for n, p in alone.named_parameters() if p.requires_grad}
        got = {n: whole(p.grad) for n, p in model.named_parameters() if p.requires_grad}
        scale = max([1e-3, *(float(g.abs().max()) for g in wanted.values())])
        found.append(max(float((got[n] - g).abs().max()) for n, g in wanted.items()) / scale)
    return found


def everything() -> dict[str, list[float]]:
    return {f"{way} {frozen}": differences(way, frozen) for way in ("ddp", "fsdp2") for frozen in (False, True)}

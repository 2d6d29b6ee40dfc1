"""What the processes of tests/gpu/test_gpu_ranks.py do; runs on CPUs too."""

import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).resolve().parents[1] / "contract"))

from families import C, adapted, tokens

from inplace_ttt.hf.parallel import enable_context_parallel
from inplace_ttt.hf.sharding import make_meshes, shard_layers, whole

T = 64 * C


def everything(kind: str, attentions: list[str]) -> dict[str, Any]:
    """Loss and gradients of FSDP2 and context parallelism, float32 and bfloat16, relative to one process."""
    device = torch.device(kind, dist.get_rank()) if kind == "cuda" else torch.device(kind)
    ids = tokens(1, T).to(device)
    inputs = {"input_ids": ids, "labels": ids}
    head = {"head_dim": 32, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    found: dict[str, Any] = {}
    for precision in (None, torch.bfloat16):
        alone = adapted("qwen3", torch.float32, head, chunk_size=4 * C).train().to(device)
        models = {name: copy.deepcopy(alone) for name in attentions}
        for parameter in alone.parameters() if precision is not None else ():
            parameter.data = parameter.data.to(precision)
        expected = alone(**inputs, use_cache=False).loss
        expected.backward()
        for attention, model in models.items():
            meshes = make_meshes(kind, context=2)
            shard_layers(model, meshes.parameters, precision=precision)
            context = enable_context_parallel(model, meshes.slices, attention=attention)
            with context.step():
                loss = model(**context.cut(inputs), use_cache=False).loss
                loss.backward()
            total = loss.detach().clone()
            dist.all_reduce(total)
            got = {n: whole(p.grad).float() for n, p in model.named_parameters()}
            want = {n: p.grad.float().cpu() for n, p in alone.named_parameters()}
            found[f"{attention} {precision}"] = {
                "loss": float((total / 2 - expected).abs()),
                "gradients": max(float((got[n] - g).norm() / g.norm()) for n, g in want.items()),
            }
    return found

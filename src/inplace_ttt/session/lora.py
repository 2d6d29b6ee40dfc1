"""Export of a session's fast weights as a PEFT LoRA adapter of the base model, for servers that support LoRA."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ..errors import UserError
from ..hf.attach import UNTRAINED, is_trained
from ..hf.names import base_of
from .state import SessionState
from .stream import is_count

RANK = 64
"""LoRA servers limit the rank to a few hundred, some to 64; S has full rank min(D, F)."""
EXACT = 1e-6
"""Singular values below this share of the largest one are rounding."""


@dataclass(frozen=True)
class ExportedLayer:
    """One layer of an adapter. ``error``: ||lr S - B A||_F / ||lr S||_F; ``full_rank``: the rank that makes it zero."""

    layer: int
    module: str
    rank: int
    full_rank: int
    error: float

    def __str__(self) -> str:
        return f"layer {self.layer}: rank {self.rank} of {self.full_rank}, relative error {self.error:.1%}"


def export(session: SessionState, directory: str | Path, rank: int | None = RANK) -> list[ExportedLayer]:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``: lr * S of every layer as B A, by truncated SVD.

    ``rank``: maximum rank per layer; None: the rank of S, which is lossless. A warning gives the truncation error, and
    so do the returned layers. Loaded with peft on the base model (without fast weights) it gives the logits of the
    session's present weights; it does not keep learning. Tokens whose chunk is not full yet (``stats().pending``) are
    not in it. For a rule that keeps the norms of W0's rows it is a DoRA adapter, with these norms as its magnitude.

    Raises UserError on a rank below 1, when nothing was learned yet, and when the fast weights are not finite; OSError
    when the files cannot be written.
    """
    if rank is not None and not is_count(rank, 1):
        raise UserError(f"rank {rank!r}: a whole number of at least 1, or None")
    reader = session._reader
    reader.check_attached()
    rule = reader.settings.rule
    rule.need("linear", "an export as LoRA")
    learned = {i: S[0] for i, fast in session.fast_weights.items() if (S := fast.dense()) is not None and S.any()}
    if rule.dora is not None:
        learned = {i: session.fast_weights[i].tensors[rule.dora][0] for i in learned}
    if not learned and not is_trained(reader.model):
        raise UserError(UNTRAINED)
    if not learned:
        raise UserError(
            f"nothing was learned yet: this session learns after every {reader.config.chunk_size:,} tokens, and it has "
            f"read {session.stats().tokens:,}"
        )
    if broken := [i for i, S in learned.items() if not S.isfinite().all()]:
        raise UserError(f"the fast weights of layer {broken[0]} are not finite: read again with a decay or less lr")
    names = {id(module): name for name, module in reader.root.named_modules()}
    tensors: dict[str, Tensor] = {}
    layers: list[ExportedLayer] = []
    transposed = False
    for site in reader.runtime.sites:
        if site.index not in learned:
            continue
        module = site.projection()
        transposed = isinstance(module, Conv1D)
        name = names[id(module)].removesuffix(".base_layer")
        A, B, full, error = factor(reader.config.lr * learned[site.index].double(), rank)
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = A.float(), B.float()
        if rule.dora is not None:
            slow = site.slow_weight(module, rule)
            assert slow is not None  # a DoRA rule has no updates without W0
            tensors[f"{prefix}.lora_magnitude_vector"] = torch.linalg.vector_norm(slow.detach().float(), dim=1)
        layers.append(ExportedLayer(site.index, name, len(A), full, error))
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.cpu().contiguous() for k, v in tensors.items()}, path / "adapter_model.safetensors", {"format": "pt"}
    )
    settings = _adapter_config(layers, transposed, reader.root, rule.dora is not None)
    (path / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if any(layer.error for layer in layers):
        lost = "; ".join(map(str, layers))
        warnings.warn(f"this LoRA adapter is an approximation ({lost}); rank=None loses nothing", stacklevel=3)
    return layers


def factor(change_DF: Tensor, rank: int | None) -> tuple[Tensor, Tensor, int, float]:
    """Return A [r, F] and B [D, r] with ``B A`` nearest to ``change``; its own rank; the relative Frobenius error."""
    U, s, Vh = torch.linalg.svd(change_DF, full_matrices=False)
    full = max(int((s > EXACT * s[0]).sum()), 1)
    r = full if rank is None else min(rank, full)
    root = s[:r].sqrt()
    lost = float(torch.linalg.vector_norm(s[r:]) / torch.linalg.vector_norm(s)) if r < full else 0.0
    return root[:, None] * Vh[:r], U[:, :r] * root, full, lost


def _adapter_config(layers: list[ExportedLayer], transposed: bool, root: Any, use_dora: bool) -> dict[str, Any]:
    top = max(layer.rank for layer in layers)
    ranks = {layer.module: layer.rank for layer in layers if layer.rank != top}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": (base := base_of(root)).place or base.name or None,
        "inference_mode": True,
        "r": top,
        "lora_alpha": top,  # so that lora_alpha / r = 1
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        **({"use_dora": True} if use_dora else {}),
        "target_modules": [layer.module for layer in layers],
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
    }

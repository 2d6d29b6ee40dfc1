"""A training step of a whole model: forward, backward with activation checkpointing, and the optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from ..hf.attach import runtime_of
from . import SHAPES
from .materialised import checked, extra_products, timed
from .prefill import LAYERS, build

PIECE = 4096
"""Number of tokens whose logits are in memory."""


def loss_of(model: Any, ids_BT: Tensor) -> Tensor:
    """Return the mean next-token loss, the logits made piece by piece and again in backward."""
    hidden = model.model(ids_BT, use_cache=False).last_hidden_state[:, :-1]

    def piece(h: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(model.lm_head(h).float().flatten(0, 1), labels.flatten(), reduction="sum")

    pairs = zip(hidden.split(PIECE, 1), ids_BT[:, 1:].split(PIECE, 1), strict=True)
    total: Tensor = sum(checkpoint(piece, h, labels, use_reentrant=False) for h, labels in pairs)
    return total / ids_BT[:, 1:].numel()


def measure(
    shape: str, lengths: list[int], C: int, device: torch.device, dtype: torch.dtype,
    *, rounds: int, log: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Time training steps of one row at each length; JSON-ready, seconds are medians of interleaved steps."""
    model = build(shape, LAYERS, C, None, device, dtype).train()
    known, adapting = SHAPES[shape], len(runtime_of(model).sites)
    found: dict[str, Any] = {"shape": shape, "layers": LAYERS, "chunk_size": C, "results": []}
    found |= checked(model, known, C, min(lengths), device)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device.type == "cuda")
    for T in lengths:
        ids = torch.randint(0, model.config.vocab_size, (1, T), device=device)

        def step(ids: Tensor = ids) -> None:
            loss_of(model, ids).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        times, peaks = timed(model, step, device, rounds)
        pace = {name: T / seconds for name, seconds in times.items()}
        share = pace["ours"] / pace["no TTT"]
        least = extra_products(known, adapting, T, training=True) / found["rates"]["flops"]
        found["results"].append(
            {
                "tokens": T,
                "seconds": times,
                "tokens_per_second": pace,
                "peak_bytes": peaks,
                "of_no_ttt": share,
                "materialised_of_no_ttt": pace["materialised"] / pace["no TTT"],
                "limit_of_no_ttt": times["no TTT"] / (times["no TTT"] + least),
            }
        )
        log(f"{T:,} tokens: {pace['no TTT']:,.0f} tokens/s without, {share:.3f} of it with fast weights")
    return found


def table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for row in record["results"]:
        speed, peaks = row["tokens_per_second"], row["peak_bytes"]
        memory = "" if peaks["ours"] is None else f"{peaks['ours'] / peaks['no TTT']:.3f}"
        names = ("of_no_ttt", "materialised_of_no_ttt", "limit_of_no_ttt")
        more = [f"{row[name]:.3f}" for name in names]
        rows.append([f"{row['tokens']:,}", f"{speed['no TTT']:,.0f}", *more, memory])
    return ["tokens", "no TTT (tokens/s)", "ours", "materialised", "limit", "peak memory"], rows

"""Throughput and memory of a session that reads one long row, on a model with a sliding window."""

import time
from collections.abc import Callable
from typing import Any

import torch

from ..session import Session
from .prefill import LAYERS, build

PARTS = 10


def measure(
    shape: str, lengths: list[int], C: int, device: torch.device, dtype: torch.dtype,
    *, window: int, log: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Read as many tokens as each length says, in ten parts; tokens per second and memory of each part. JSON-ready."""
    model = build(shape, LAYERS, C, window, device, dtype)
    found: dict[str, Any] = {"shape": shape, "layers": LAYERS, "chunk_size": C, "window": window, "results": []}
    for T in lengths:
        session, parts = Session(model, probe_every=0), []
        for n in range(PARTS):
            ids = torch.randint(0, model.config.vocab_size, (T * (n + 1) // PARTS - T * n // PARTS,)).tolist()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            session.read(ids)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            stats = session.stats()
            parts.append(
                {
                    "tokens": stats.tokens,
                    "tokens_per_second": len(ids) / (time.perf_counter() - start),
                    "bytes_context": stats.bytes_context,
                    "bytes_fast_weights": stats.bytes_fast_weights,
                    "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
                }
            )
            log(f"{stats.tokens:,} tokens: {parts[-1]['tokens_per_second']:,.0f} tokens/s")
        norms = [x.norm().item() for fast in session.fast_weights.values() if (x := fast.dense()) is not None]
        found["results"].append({"tokens": T, "parts": parts, "norms": norms})
    return found


def table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for row in record["results"]:
        for part in row["parts"]:
            peak = part["peak_bytes"] or part["bytes_context"] + part["bytes_fast_weights"]
            rows.append([f"{part['tokens']:,}", f"{part['tokens_per_second']:,.0f}", f"{peak / 2**20:,.1f}"])
    return ["tokens read", "tokens/s", "peak or held memory (MiB)"], rows

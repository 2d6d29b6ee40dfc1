"""Interleaved timing and peak memory, on a GPU or a CPU."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

Run = Callable[[], Any]


def seconds(run: Run, device: torch.device) -> float:
    """Return the seconds of one run, by the device's own clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000


def interleaved(
    runs: Mapping[str, Run],
    device: torch.device,
    *,
    rounds: int,
    warmup: int = 2,
    before: Callable[[str], Any] = lambda name: None,
) -> dict[str, float]:
    """Return median seconds of each run; each runs once per round, so that drift of the machine meets all of them.

    ``before`` is called with a run's name ahead of it, untimed.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    for n in range(-warmup, rounds):
        for name, run in runs.items():
            before(name)
            took = seconds(run, device)
            if n >= 0:
                found[name].append(took)
    return {name: median(values) for name, values in found.items()}


def measured(
    runs: Mapping[str, Run],
    device: torch.device,
    *,
    rounds: int,
    warmup: int = 1,
    before: Callable[[str], Any] = lambda name: None,
) -> tuple[dict[str, float], dict[str, int | None]]:
    """Return median seconds of interleaved runs, and the peak memory of one more each; ``before`` as there."""
    times, peaks = interleaved(runs, device, rounds=rounds, warmup=warmup, before=before), {}
    for name, run in runs.items():
        before(name)
        peaks[name] = peak_bytes(run, device)
    return times, peaks


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """Return the most bytes allocated on the GPU during a run, earlier ones included; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device))


def rates(device: torch.device, dtype: torch.dtype, m: int, n: int, k: int) -> dict[str, float]:
    """Measure the device: FLOP/s of an [m, k] x [k, n] product, bytes/s of a large copy (read and written)."""
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
    size = 2**30 if device.type == "cuda" else 2**26
    x, y = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    found = interleaved({"product": lambda: a @ b, "copy": lambda: x.copy_(y)}, device, rounds=9)
    return {"flops": 2 * m * n * k / found["product"], "bytes": 2 * size / found["copy"]}

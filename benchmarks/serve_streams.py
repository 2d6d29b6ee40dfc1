"""Many streams that write at once, in one batch, beside one after another and beside no fast weights.

    python benchmarks/serve_streams.py --out benchmarks/results/serve/streams.json

Qwen3's 0.6B and 4B shapes with random weights, a window of 1,024 tokens, six adapting layers of either; 1 to 16 streams
whose chunks end at different tokens. ``dense``: the state is S; ``pairs``: the pairs of keys and targets, at a chunk
size and length where they are the smaller form. "bytes allow" is what n streams in a batch could gain if a step took
as long as it takes to read the weights, the states and the context from memory: n (W + s) / (W + n s). On one H100
about four minutes; the record is written after every row. ``--shapes tiny`` tries the script without a GPU.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.cache_utils import DynamicCache

import inplace_ttt as ittt
from inplace_ttt.bench.prefill import build, plain_twin
from inplace_ttt.records import git_commit, hardware, versions, write_json

SETTINGS = {  # shape, state: chunk size, tokens read before
    ("0.6b", "dense"): (1024, 1990), ("0.6b", "pairs"): (256, 300),
    ("4b", "dense"): (1024, 1990), ("4b", "pairs"): (512, 1100),
    ("tiny", "dense"): (16, 37), ("tiny", "pairs"): (8, 20),
}  # fmt: skip
STREAMS = (1, 2, 4, 8, 16)


def open_pool(model: Any, state: str, streams: int, prompt: int) -> ittt.SessionPool:
    """Sessions that have read random tokens, each some fewer than the one before."""
    pool = ittt.SessionPool(model, batch=streams, state="auto" if state == "pairs" else "dense", probe_every=0)
    for n in range(streams):
        pool.open(str(n)).read(torch.randint(0, model.config.vocab_size, (prompt - 7 * n % (prompt // 2),)).tolist())
    return pool


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, int | None]:
    """Seconds, and the peak of memory in bytes (CUDA)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def written(found: dict[str, list[int]], tokens: int) -> None:
    """Raises where a stream ended early: its tokens would not have been paid for."""
    if short := [name for name, ids in found.items() if len(ids) != tokens]:
        raise RuntimeError(f"stream {short[0]} wrote {len(found[short[0]])} tokens of {tokens}")


@torch.no_grad()
def plain(model: Any, streams: int, prompt: int, tokens: int, device: torch.device) -> tuple[float, int | None]:
    """The same batch without fast weights; every step's tokens come to the CPU, as a server needs them."""
    cache = DynamicCache(config=model.config)
    ids = torch.randint(0, model.config.vocab_size, (streams, prompt), device=device)
    following = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]

    def write() -> None:
        nonlocal following
        for _ in range(tokens):
            chosen = following.float().cpu().argmax(-1)
            following = model(chosen[:, None].to(device), past_key_values=cache, logits_to_keep=1).logits[:, -1]

    return timed(write, device)


def measure(
    shape: str, streams: Sequence[int], tokens: int, window: int, device: torch.device, dtype: torch.dtype,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """All rows of one shape."""
    layers = "0::6" if shape != "tiny" else "0::2"
    for state in ("dense", "pairs"):
        C, prompt = SETTINGS[shape, state]
        model = build(shape, layers, C, window, device, dtype)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        open_pool(model, state, 1, prompt).generate(["0"], max_new_tokens=4)  # warm
        one = 0.0
        for n in streams:
            pool = open_pool(model, state, n, prompt)
            held = pool.nbytes / n
            found: dict[str, list[int]] = {}
            seconds, peak = timed(lambda p=pool, f=found: f.update(p.generate(list(p), max_new_tokens=tokens)), device)
            written(found, tokens)
            rate = n * tokens / seconds
            one = one or rate
            yield {
                "shape": shape, "state": state, "streams": n, "chunk_size": C, "prompt": prompt, "tokens": tokens,
                "tokens_per_second": rate, "ms_per_token": 1000 * seconds / tokens, "times_one": rate / one,
                "bytes_allow": n * (weights + held) / (weights + n * held), "weight_bytes": weights,
                "state_bytes": held, "peak_bytes": peak,
            }  # fmt: skip
        if state == "dense":
            n = min(8, max(streams))
            pool = open_pool(model, state, n, prompt)
            few = max(8, tokens // 3)
            seconds, peak = timed(lambda p=pool, k=few: [p.generate([x], max_new_tokens=k) for x in p], device)
            yield _simple(shape, "dense, one after another", n, few, n * few / seconds, peak)
            twin = plain_twin(model)
            plain(twin, 1, prompt, 4, device)
            for n in streams:
                seconds, peak = plain(twin, n, prompt, tokens, device)
                yield _simple(shape, "no fast weights", n, tokens, n * tokens / seconds, peak)
            del twin
        del model, pool
        gc.collect()  # models and their hooks refer to each other
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _simple(shape: str, state: str, n: int, tokens: int, rate: float, peak: int | None) -> dict[str, Any]:
    ms = 1000 * n / rate
    found = {"shape": shape, "state": state, "streams": n, "tokens": tokens, "tokens_per_second": rate}
    return found | {"ms_per_token": ms, "peak_bytes": peak}


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The rows as a table."""
    table = Table("shape", "state", "streams", "tokens/s", "ms a step", "times one", "bytes allow", "GiB at the peak")
    for row in rows:
        peak = f"{row['peak_bytes'] / 2**30:.2f}" if row["peak_bytes"] else ""
        more = [f"{row[key]:.2f}" if key in row else "" for key in ("times_one", "bytes_allow")]
        numbers = [f"{row['tokens_per_second']:,.1f}", f"{row['ms_per_token']:.1f}", *more, peak]
        table.add_row(row["shape"], row["state"], str(row["streams"]), *numbers)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4b,0.6b")
    parser.add_argument("--streams", default=",".join(map(str, STREAMS)))
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)

    started = datetime.now(UTC)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    console = Console(stderr=True)
    rows: list[dict[str, Any]] = []
    record = {
        "what": "decoding of many streams in one batch", "date": started.isoformat(timespec="seconds"),
        "commit": git_commit(), "hardware": hardware(), "versions": versions(), "dtype": str(dtype),
        "window": given.window, "rows": rows,
    }  # fmt: skip
    began = time.perf_counter()
    for shape in given.shapes.split(","):
        torch.manual_seed(0)
        streams = [int(n) for n in given.streams.split(",")]
        for row in measure(shape, streams, given.tokens, given.window, device, dtype):
            rows.append(row)
            write_json(given.out, record | {"seconds": time.perf_counter() - began})
            console.print(f"{row['shape']}, {row['state']}, {row['streams']}: {row['tokens_per_second']:,.1f} tokens/s")
    show(rows, Console())


if __name__ == "__main__":
    main()

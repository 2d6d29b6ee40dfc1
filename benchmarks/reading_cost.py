"""Speed and memory of reading by the loss, beside plain prefill in the same chunks.

    python benchmarks/reading_cost.py --out benchmarks/results/reading-cost

Models of Qwen3's shapes with random weights, bfloat16, C 1,024. Speed: one row of ``--tokens`` tokens; plain prefill
once with the logits of its last token alone and once with those of every chunk, as scoring needs them. Memory: peak
above plain prefill, for two chunks behind ``--behind`` tokens whose keys and values are random numbers. ``--attention
inplace_ttt_pieces`` reads pieces without a mask and without copies of shared heads; "sdpa" is transformers' own.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

import inplace_ttt as ittt
from inplace_ttt.bench import SHAPES
from inplace_ttt.bench.prefill import build
from inplace_ttt.bench.timing import interleaved
from inplace_ttt.hf.attach import runtime_of
from inplace_ttt.hf.block_attention import PIECES
from inplace_ttt.hf.cache import cache_name
from inplace_ttt.records import about, write_json

SETTINGS = {"tiny": ("0::3", "0::2"), "0.6b": ("0::3", "0::5"), "4b": ("0::3", "0::6")}
"""Layers of each shape: every third, and six of them (two of the tiny shape)."""
GIB = 2**30


def model_of(shape: str, layers: str, C: int, attention: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of random weights that learns by the loss."""
    model = build(shape, layers, C, None, device, dtype)
    ittt.detach(model)
    ittt.attach(model, ittt.InPlaceTTTConfig(objective="loss", layers=layers, chunk_size=C))
    model.set_attn_implementation(attention)
    return model


@torch.no_grad()
def plainly(model: Any, ids: Tensor, C: int, cache: Any, logits: int) -> None:
    """Prefill in chunks without updates."""
    with ittt.updates_off(model):
        for at in range(0, ids.shape[1], C):
            model(ids[:, at : at + C], use_cache=True, logits_to_keep=logits, **{cache_name(model): cache})


@torch.no_grad()
def by_the_loss(model: Any, ids: Tensor, cache: Any) -> None:
    """The same chunks, learned."""
    model(ids, use_cache=True, logits_to_keep=1, **{cache_name(model): cache})


def behind(model: Any, cache: Any, tokens: int) -> None:
    """Make a cache that was read a little hold so many random keys and values."""
    for layer in cache.layers:
        shape = (*layer.keys.shape[:2], tokens, layer.keys.shape[3])
        layer.keys, layer.values = (torch.randn(shape, dtype=x.dtype, device=x.device) for x in
                                    (layer.keys, layer.values))  # fmt: skip


def peak_of(run: Callable[[], Any], device: torch.device) -> tuple[int | None, str | None]:
    """Bytes at the peak of a run, or why it did not end."""
    if device.type != "cuda":
        run()
        return None, None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        run()
    except torch.cuda.OutOfMemoryError as error:
        return None, str(error).splitlines()[0][:200]
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)), None


def memory(model: Any, C: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """Peaks of two chunks behind ``tokens`` tokens, plain and by the loss."""
    ids = torch.randint(model.config.vocab_size, (1, 2 * C), device=device)
    found: dict[str, Any] = {"behind": tokens, "chunk_size": C}
    for name in ("plain", "loss"):
        cache = DynamicCache(config=model.config)
        if name == "plain":
            plainly(model, ids[:, :1], C, cache, 1)
        else:
            by_the_loss(model, ids[:, :1], cache)
        behind(model, cache, tokens)

        def run(name: str = name, cache: Any = cache) -> None:
            if name == "plain":
                plainly(model, ids, C, cache, 1)
            else:
                by_the_loss(model, ids, cache)

        found[name], failed = peak_of(run, device)
        if failed:
            found[f"{name}_failed"] = failed
        del cache, run
    if found["plain"] and found["loss"]:
        found["extra_gib"] = (found["loss"] - found["plain"]) / GIB
    return found


def speed(model: Any, C: int, tokens: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds of a row, plain and by the loss."""
    ids = torch.randint(model.config.vocab_size, (1, tokens), device=device)
    new = lambda: DynamicCache(config=model.config)  # noqa: E731
    runs: dict[str, Callable[[], Any]] = {
        "plain": lambda: plainly(model, ids, C, new(), 1),
        "plain, all logits": lambda: plainly(model, ids, C, new(), 0),
        "loss": lambda: by_the_loss(model, ids, new()),
    }
    seconds = interleaved(runs, device, rounds=rounds, warmup=1)
    ratios = {f"loss over {name}": seconds[name] / seconds["loss"] for name in list(runs)[:2]}
    return {"tokens": tokens, "rounds": rounds, "seconds": seconds, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="0.6b,4b")
    parser.add_argument("--attention", default=f"sdpa,{PIECES}")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--behind", type=int, default=131_072 - 2048)
    parser.add_argument("--chunk-size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--share", default="0/1", help="K/N: every N-th row from the K-th on")
    parser.add_argument("--seconds", type=float, default=1e9, help="no new row after so many")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, begin, C = torch.bfloat16, time.perf_counter(), arguments.chunk_size
    own, of = map(int, arguments.share.split("/"))
    jobs = [
        (shape, layers, attention)
        for attention in arguments.attention.split(",")
        for shape in arguments.shapes.split(",")
        for layers in SETTINGS[shape]
    ]
    for shape, layers, attention in jobs[own::of]:
        if time.perf_counter() - begin > arguments.seconds:
            print("out of time before", shape, layers, attention, flush=True)
            break
        model = model_of(shape, layers, C, attention, device, dtype)
        adapting = len(runtime_of(model).sites)
        found = {"speed": speed(model, C, arguments.tokens, arguments.rounds, device)}
        print(f"{shape}, {adapting} layers, {attention}:", found["speed"], flush=True)
        found["memory"] = memory(model, C, arguments.behind, device)
        print(f"{shape}, {adapting} layers, {attention}:", found["memory"], flush=True)
        record = {
            "shape": shape, "sizes": SHAPES[shape], "layers": layers, "adapting": adapting, "chunk_size": C,
            "attention": attention, "dtype": str(dtype), **found, **about(),
        }  # fmt: skip
        name = f"{shape}-{layers.replace(':', '-')}-{attention}.json"
        write_json(arguments.out / name, record)
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

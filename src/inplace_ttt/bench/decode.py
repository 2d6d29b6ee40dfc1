"""Decoding speed, eager and compiled into CUDA graphs, with and without fast weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from ..errors import UserError
from ..hf.attach import runtime_of, set_lr
from ..hf.cache import cache_name
from ..hf.graph import DecodingGraph
from .materialised import choose_large_lr
from .prefill import LAYERS, build, plain_twin
from .timing import measured

WORSE = 1.5
"""Limit of the difference between decoding and one pass, over the same difference without fast weights."""


class Decoding:
    """Greedy decoding of one row; its cache and the next token stay on the device."""

    def __init__(self, model: Any, cache: Cache, way: str) -> None:
        self.model, self.cache, self.way, self.name = model, cache, way, cache_name(model)
        self.step = torch.compile(model, backend="eager") if way == "compiled" else model
        self.graph: DecodingGraph | None = None

    def read(self, prompt: Tensor) -> None:
        """Begin anew with a prompt [1, T]."""
        if isinstance(self.cache, StaticCache):
            self.cache.reset()  # the graphs hold its addresses
        else:
            self.cache = DynamicCache(config=self.model.config)
        out = self.model(prompt, **{self.name: self.cache}, logits_to_keep=1)
        self.following = out.logits[:, -1:].argmax(-1)

    def feed(self, ids: Tensor) -> Tensor:
        """Return logits [1, 1, V] after one more token."""
        if self.way == "graph":
            self.graph = self.graph or DecodingGraph(self.model, self.cache)  # type: ignore[arg-type]
            return self.graph(ids)
        return self.step(torch.empty_like(self.following).copy_(ids), **{self.name: self.cache}).logits

    def write(self, tokens: int) -> None:
        """Decode greedily, without synchronising with the device."""
        for _ in range(tokens):
            self.following = self.feed(self.following)[:, -1:].argmax(-1)


def differs(decoding: Decoding, ids: Tensor, prompt: int) -> float:
    """Return the relative difference between the logits of single steps and those of one pass."""
    decoding.read(ids[:, :prompt])
    got = torch.cat([decoding.feed(token).clone() for token in ids[:, prompt:].split(1, 1)], 1).double()
    want = decoding.model(ids, use_cache=False).logits[:, prompt:].double()
    return ((got - want).norm() / want.norm()).item()


def measure(
    shape: str, lengths: list[int], C: int, device: torch.device, dtype: torch.dtype,
    *, rounds: int, log: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Measure the seconds a token of batch 1 behind a prompt of one length; JSON-ready. A run in graphs writes a whole
    chunk of tokens and so meets one update; reading is not timed.

    UserError where steps differ from one pass by more than ``WORSE`` times what they do without fast weights.
    """
    (prompt,) = lengths
    model = build(shape, LAYERS, C, None, device, dtype)
    plain, lr = plain_twin(model), runtime_of(model).config.lr
    few = max(8, C // 16)
    text, ids = (torch.randint(0, model.config.vocab_size, (1, n), device=device) for n in (prompt, C + C // 2))
    length = max(prompt + C, ids.shape[1])
    runs: dict[str, tuple[Decoding, int]] = {}
    errors = {}
    way = "graph" if device.type == "cuda" else "compiled"  # on a CPU only traced, to test that tracing works
    torch.compiler.reset()
    with torch.no_grad():
        for name, one in (("no TTT", plain), ("ours", model)):
            graphs = Decoding(one, StaticCache(one.config, max_cache_len=length), way)
            if one is model:
                set_lr(model, choose_large_lr(model, ids))
            errors[name] = differs(graphs, ids, C - C // 4)
            log(f"{name}: steps differ from one pass by {errors[name]:.2e}")
            runs[f"eager, {name}"] = Decoding(one, DynamicCache(config=one.config), "eager"), few
            runs[f"graphs, {name}"] = graphs, C
        floor = 1e-5 if dtype == torch.float32 else 0.0
        if not errors["ours"] <= WORSE * max(errors["no TTT"], floor):
            wrong = f"steps differ from one pass by {errors['ours']:.2e}"
            raise UserError(f"results are wrong, so no timings are shown: {wrong}")
        set_lr(model, lr)
        writing = {name: partial(decoding.write, n) for name, (decoding, n) in runs.items()}
        times, peaks = measured(writing, device, rounds=rounds, before=lambda name: runs[name][0].read(text))
    found = {name: whole / runs[name][1] for name, whole in times.items()}
    row = {
        "prompt": prompt,
        "tokens_a_run": {name: n for name, (_, n) in runs.items()},
        "seconds_a_token": found,
        "peak_bytes": peaks,
        "difference_to_one_pass": errors,
        "graphs_over_no_ttt": found["graphs, ours"] / found["graphs, no TTT"],
        "times_eager": found["eager, ours"] / found["graphs, ours"],
    }
    log(f"over the same graphs without TTT {row['graphs_over_no_ttt']:.3f}, {row['times_eager']:.2f} times eager")
    return {"shape": shape, "layers": LAYERS, "chunk_size": C, "cache_length": length, "way": way, "results": [row]}


def table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    times = record["results"][0]["seconds_a_token"]
    base = times["graphs, no TTT"]
    return ["decoding", "ms a token", "tokens/s", "over graphs, no TTT"], [
        [name, f"{1000 * s:.3f}", f"{1 / s:.1f}", f"{s / base:.3f}"] for name, s in times.items()
    ]

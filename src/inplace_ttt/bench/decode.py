"""Token after token: eager and compiled into CUDA graphs, with fast weights and without."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from ..errors import UserError
from ..hf.cache import cache_name
from .prefill import build, plain_twin
from .timing import interleaved, peak_bytes

WORSE = 1.5
"""How much larger than without fast weights the difference between decoding and reading at once may be."""


class Decoding:
    """One row that goes on writing: the cache, the last token and its position, all on the device."""

    def __init__(self, model: Any, step: Any, cache: Cache, prompt: Tensor) -> None:
        self.step, self.cache, self.name = step, cache, cache_name(model)
        out = model(prompt, **{self.name: cache}, logits_to_keep=1)
        self.following = out.logits[:, -1:].argmax(-1)
        self.token = self.following.clone()
        self.position = torch.full_like(self.token, prompt.shape[1])

    def feed(self, ids: Tensor) -> Tensor:
        """Logits [B, 1, V] after one more token, fed from where the last one was."""
        self.token.copy_(ids)
        out = self.step(self.token, position_ids=self.position, **{self.name: self.cache})
        self.position.add_(1)
        logits: Tensor = out.logits
        return logits

    def write(self, tokens: int) -> None:
        """Greedy; nothing waits for the device."""
        for _ in range(tokens):
            self.following = self.feed(self.following)[:, -1:].argmax(-1)


def compiled(model: Any, device: torch.device) -> Any:
    """The model's step as CUDA graphs; on a CPU only traced, which shows that it can be."""
    return (
        torch.compile(model, mode="reduce-overhead") if device.type == "cuda" else torch.compile(model, backend="eager")
    )


def differs(model: Any, step: Any, cache: Cache, ids: Tensor, prompt: int) -> float:
    """Relative difference between the logits of single steps and those of one pass."""
    decoding = Decoding(model, step, cache, ids[:, :prompt])
    got = torch.cat([decoding.feed(token).clone() for token in ids[:, prompt:].split(1, 1)], 1).double()
    want = model(ids, use_cache=False).logits[:, prompt:].double()
    return ((got - want).norm() / want.norm()).item()


def measure(
    shape: str, prompt: int, C: int, device: torch.device, dtype: torch.dtype,
    *, layers: str = "0::6", tokens: int | None = None, rounds: int = 3, log: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Seconds a token of batch 1 behind ``prompt`` tokens; JSON-ready. Each compiled run takes a whole chunk of tokens.

    UserError where steps differ from one pass by more than ``WORSE`` times what they do without fast weights.
    """
    model = build(shape, layers, C, None, device, dtype)
    plain = plain_twin(model)
    many = tokens or C
    few = max(8, many // 16)
    length = prompt + many * (rounds + 4)
    vocabulary = model.config.vocab_size
    ids = torch.randint(0, vocabulary, (1, C + C // 2), device=device)
    runs: dict[str, Callable[[], Any]] = {}
    steps, errors = {}, {}
    torch.compiler.reset()
    with torch.no_grad():
        for name, one in (("no TTT", plain), ("ours", model)):
            torch.manual_seed(0)
            text = torch.randint(0, vocabulary, (1, prompt), device=device)
            step = compiled(one, device)
            cache = StaticCache(one.config, max_cache_len=length)
            errors[name] = differs(one, step, cache, ids, C - C // 4)
            log(f"{name}: steps differ from one pass by {errors[name]:.2e}")
            cache.reset()
            eager = Decoding(one, one, DynamicCache(config=one.config), text)
            graphs = Decoding(one, step, cache, text)
            runs[f"eager, {name}"], steps[f"eager, {name}"] = lambda d=eager: d.write(few), few  # type: ignore[misc]
            runs[f"graphs, {name}"], steps[f"graphs, {name}"] = lambda d=graphs: d.write(many), many  # type: ignore[misc]
        floor = 1e-5 if dtype == torch.float32 else 0.0
        if not errors["ours"] <= WORSE * max(errors["no TTT"], floor):
            raise UserError(f"no speed of wrong results: steps differ from one pass by {errors['ours']:.2e}")
        times = interleaved(runs, device, rounds=rounds, warmup=1)
        peaks = {name: peak_bytes(run, device) for name, run in runs.items() if name.startswith("graphs")}
    found = {name: seconds / steps[name] for name, seconds in times.items()}
    row = {
        "prompt": prompt,
        "tokens_a_run": steps,
        "seconds_a_token": found,
        "peak_bytes": peaks,
        "difference_to_one_pass": errors,
        "graphs_over_no_ttt": found["graphs, ours"] / found["graphs, no TTT"],
        "times_eager": found["eager, ours"] / found["graphs, ours"],
    }
    log(f"over the same graphs without TTT {row['graphs_over_no_ttt']:.3f}, {row['times_eager']:.2f} times eager")
    return {"shape": shape, "layers": layers, "chunk_size": C, "cache_length": length, "results": [row]}


def table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows to print."""
    seconds = record["results"][0]["seconds_a_token"]
    base = seconds["graphs, no TTT"]
    return ["decoding", "ms a token", "tokens/s", "over graphs, no TTT"], [
        [name, f"{1000 * s:.3f}", f"{1 / s:.1f}", f"{s / base:.3f}"] for name, s in seconds.items()
    ]

"""Prefill of a long prompt by a whole model: time and memory with fast weights over without."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from ..config import InPlaceTTTConfig
from ..hf.attach import install, runtime_of
from ..plots import OFF, ON, add_heading, add_legend, add_title, save, styled
from ..train.attention import choose_attention
from . import SHAPES
from .materialised import checked, extra_products, timed

LAYERS = "0::6"
"""Layers that adapt."""
WAYS = {
    "over_no_ttt": ("this library", ON, "-"),
    "materialised_over_no_ttt": ("one weight per chunk (the authors' release)", "#b08968", "-"),
    "limit_over_no_ttt": ("arithmetic alone", OFF, "--"),
}
"""Column of a record -> label, colour and style of its line."""


def build(shape: str, layers: str, C: int, window: int | None, device: torch.device, dtype: torch.dtype) -> Any:
    """Build a model of random weights with fast weights whose updates are not zero."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"max_position_embeddings": 2**20, "tie_word_embeddings": True, **SHAPES[shape]}
    if window is not None:
        options |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = Qwen3ForCausalLM(Qwen3Config(**options)).eval()
    finally:
        torch.set_default_dtype(before)
    install(model, InPlaceTTTConfig(layers=layers, chunk_size=C))
    for name, parameter in model.named_parameters():
        if "ttt_conv" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def plain_twin(model: Any) -> Any:
    """Build the same model without fast weights; it shares the weights."""
    config = copy.deepcopy(model.config)
    del config.inplace_ttt
    with torch.device("meta"):
        twin = type(model)(config)
    weights = {name: x for name, x in model.state_dict().items() if ".ttt_" not in name}
    twin.load_state_dict(weights, assign=True)
    twin.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)  # its buffers are not in the state
    return twin.eval()


def measure(
    shape: str, lengths: list[int], C: int, device: torch.device, dtype: torch.dtype,
    *, window: int | None, rounds: int, log: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Measure prefill of one row at each length with a cache; JSON-ready, seconds are medians of interleaved runs."""
    model = build(shape, LAYERS, C, window, device, dtype)
    if window is not None:  # a dense mask of a long prompt would be larger than the model
        model.set_attn_implementation(choose_attention("auto", device))
    found: dict[str, Any] = {"shape": shape, "layers": LAYERS, "chunk_size": C, "window": window, "results": []}
    found["attention"] = model.config._attn_implementation
    known, adapting = SHAPES[shape], len(runtime_of(model).sites)
    found |= checked(model, known, C, min(lengths), device)
    for T in lengths:
        ids = torch.randint(0, known["vocab_size"], (1, T), device=device)
        with torch.no_grad():
            often = rounds * max(max(lengths) // 4 // T, 1)  # short prompts need more rounds, and cost less
            times, peaks = timed(model, partial(model, ids, use_cache=True, logits_to_keep=1), device, often)
        over = times["ours"] / times["no TTT"]
        found["results"].append(
            {
                "tokens": T,
                "rounds": often,
                "seconds": times,
                "peak_bytes": peaks,
                "over_no_ttt": over,
                "materialised_over_no_ttt": times["materialised"] / times["no TTT"],
                "limit_over_no_ttt": 1 + extra_products(known, adapting, T) / found["rates"]["flops"] / times["no TTT"],
            }
        )
        extra = None if peaks["ours"] is None or peaks["no TTT"] is None else peaks["ours"] - peaks["no TTT"]
        more = "" if extra is None else f", {extra / 2**30:+.2f} GiB at the peak"
        log(f"{T:,} tokens: no TTT {times['no TTT']:.3f} s, ours {100 * (over - 1):+.1f}%{more}")
    return found


def table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for row in record["results"]:
        peaks = row["peak_bytes"]
        extra = "" if peaks["ours"] is None else f"{(peaks['ours'] - peaks['no TTT']) / 2**30:+.2f}"
        names = ("over_no_ttt", "materialised_over_no_ttt", "limit_over_no_ttt")
        more = [f"{100 * (row[name] - 1):+.1f}%" for name in names]
        rows.append([f"{row['tokens']:,}", f"{row['seconds']['no TTT']:.3f}", *more, extra])
    return ["tokens", "no TTT (s)", "ours", "materialised", "limit", "extra peak (GiB)"], rows


def draw(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a row of panels per attention: extra time in per cent, and extra GiB at the peak where it was measured.

    Records of the same window are merged (for a length in several, the last one counts).
    """
    groups: dict[int | None, dict[int, Any]] = {}
    for record in records:
        groups.setdefault(record["window"], {}).update({row["tokens"]: row for row in record["results"]})
    memory = all(row["peak_bytes"]["ours"] is not None for rows in groups.values() for row in rows.values())
    figure, panels = styled(7.0, 2.4 * len(groups) + 0.6, len(groups), 2 if memory else 1, sharex="col", sharey="col")
    for line, (window, rows) in zip(panels, groups.items(), strict=True):
        lengths, name = sorted(rows), "full attention" if window is None else f"window {window:,}"
        for column, (label, colour, style) in WAYS.items():
            extra = [100 * (rows[n][column] - 1) for n in lengths]
            line[0].plot(range(len(lengths)), extra, style, marker="o", ms=4, lw=1.6, color=colour, label=label)
        add_title(line[0], f"time, {name}")
        line[0].set_ylabel("over no TTT (%)")
        if memory:
            peaks = [rows[n]["peak_bytes"] for n in lengths]
            for way, column in (("ours", "over_no_ttt"), ("materialised", "materialised_over_no_ttt")):
                more = [(p[way] - p["no TTT"]) / 2**30 for p in peaks]
                line[1].plot(range(len(lengths)), more, marker="o", ms=4, lw=1.6, color=WAYS[column][1])
            own = (peaks[-1]["ours"] - peaks[-1]["no TTT"]) / 2**30
            place = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
            line[1].annotate(f"{own:.2f}", (len(lengths) - 1, own), (0, 5), color=ON, **place)
            add_title(line[1], f"peak memory, {name}")
            line[1].set_ylabel("over no TTT (GiB)")
        for axes in line:
            axes.set_xticks(range(len(lengths)), [f"{n // 1024}k" if n % 1024 == 0 else f"{n:,}" for n in lengths])
    for axes in panels[-1]:
        axes.set_ylim(bottom=0)
        axes.set_xlabel("prompt (tokens)")
    first = records[0]
    device = (first["hardware"].get("gpus") or ["a CPU"])[0]
    add_heading(figure, f"Prefill, {first['shape'].upper()} shape, {device}")
    add_legend(figure, 3)
    save(figure, path)

"""Tiny models for the tests of the commands."""

from typing import Any

import torch
from transformers import MistralConfig, MistralForCausalLM

import inplace_ttt as ittt

CHUNK, WINDOW, LAYERS = 16, 8, 3
NAMES = ("read_header", "TarInfo", "blockSize", "Moonfleet", "sha256", "_private")


def tiny(seed: int = 0, **changes: Any) -> MistralForCausalLM:
    """A plain random Mistral with a sliding window."""
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "sliding_window": WINDOW,
        "initializer_range": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return MistralForCausalLM(MistralConfig(**{**values, **changes})).eval()


def with_updates(model: MistralForCausalLM, scale: float = 1.0) -> MistralForCausalLM:
    """Attached, with random instead of neutral target parameters."""
    ittt.attach(model, ittt.InPlaceTTTConfig(layers="0::2", chunk_size=CHUNK, lr=scale))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ttt_" in name:
                parameter.normal_(0, 0.3)
    return model

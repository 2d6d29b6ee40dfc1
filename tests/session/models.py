"""Tiny models that read text with the shipped model's tokenizer, and the shipped model itself."""

from functools import cache
from typing import Any

import torch
from contract.families import adapted
from transformers import AutoTokenizer

import inplace_ttt as ittt

FAMILIES = ("llama", "gemma3_text", "glm")
"""Plain, sliding windows mixed with full attention, interleaved partial rotary embedding."""

TEXT = """\
Call me Ishmael. Some years ago--never mind how long precisely--having little or no money in my purse, and nothing
particular to interest me on shore, I thought I would sail about a little and see the watery part of the world. It is
a way I have of driving off the spleen, and regulating the circulation. \N{WHALE} caf\u00e9, na\u00efve;
1,234.5 <|endoftext|>

    def whale(self, name="Moby"):   # it's
        return self.ship[name] + 3
"""


@cache
def tokenizer() -> Any:
    """The shipped model's."""
    return AutoTokenizer.from_pretrained(ittt.DEFAULT_MODEL)


@cache
def tiny(family: str, **settings: Any) -> Any:
    """A family's tiny random model in float64 whose fast weights matter."""
    return adapted(family, torch.float64, {"vocab_size": len(tokenizer())}, **settings)


@cache
def shipped(dtype: torch.dtype = torch.float64) -> Any:
    """The shipped model."""
    return ittt.from_pretrained(ittt.DEFAULT_MODEL, dtype=dtype).eval()


def ids_of(text: str) -> list[int]:
    """Token ids of a text, as a whole."""
    found: list[int] = tokenizer()(text, split_special_tokens=True)["input_ids"]
    return found

"""Tiny models for the tests of the commands."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

import inplace_ttt as ittt

CHUNK, WINDOW, LAYERS = 16, 8, 3
NAMES = ("read_header", "TarInfo", "blockSize", "Moonfleet", "sha256", "_private")

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(words: str, *special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with 300 tokens; <|end|> is one of its special tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>", *special], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([words], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def chat_tokenizer(words: str, template: str = CHATML) -> PreTrainedTokenizerFast:
    """The same with a chat template."""
    tokenizer = byte_tokenizer(words, "<|im_start|>", "<|im_end|>")
    tokenizer.chat_template = template
    return tokenizer


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


def opened(path: Path, model: Path) -> ittt.Session:
    """The session in a file, on its saved model."""
    return ittt.Session.load(
        path, ittt.from_pretrained(model, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(model)
    )


def fed(path: Path, model: Path) -> list[int]:
    """All tokens of a short session, as the model got them."""
    return list(opened(path, model)._stream.recent)

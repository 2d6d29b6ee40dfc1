"""A model whose weights any version makes alike, and the texts that a session of format 1 read (data/)."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import inplace_ttt as ittt

IDS = [(7 * i * i + 3 * i) % 97 for i in range(61)]
MORE = [(5 * i * i + i) % 97 for i in range(30)]


def model():
    """Two layers, every parameter a slow sine."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    made = LlamaForCausalLM(config)
    ittt.attach(made, ittt.InPlaceTTTConfig(layers=":", chunk_size=8, lr=0.5))
    for n, (name, p) in enumerate(sorted(made.named_parameters())):
        wave = torch.sin(torch.arange(p.numel(), dtype=torch.float64) * (0.7 + 0.01 * n)).view_as(p)
        p.data = (1 + 0.1 * wave if "norm" in name else 0.3 * wave).float()
    return made.eval()

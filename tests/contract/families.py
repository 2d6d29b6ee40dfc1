"""A tiny random model of every family in the table, and fast weights large enough to matter."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import inplace_ttt as ittt

C = 4
"""Chunk size of the tests."""
VOCAB = 97
IMAGE = VOCAB - 1
"""Placeholder of an image's tokens, without meaning in a call without an image."""
LAYERS = 3
LENGTHS = (1, C - 1, C, C + 1, 2 * C + 3)
TARGETS = ("input_embed", "hidden_states")

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}


_LINEAR: dict[str, Any] = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_PIXELS: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def _config(name: str, **changes: Any) -> Callable[[], transformers.PretrainedConfig]:
    return lambda: getattr(transformers, name)(**(_COMMON | changes))


def _nested(name: str, text: dict[str, Any], **others: Any) -> Callable[[], transformers.PretrainedConfig]:
    """A configuration with the language model's one inside."""
    return lambda: getattr(transformers, name)(
        text_config=_COMMON | {"head_dim": 8} | text, tie_word_embeddings=False, **copy.deepcopy(others)
    )


BUILDERS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "apertus": _config("ApertusConfig"),
    "arcee": _config("ArceeConfig"),
    "cohere": _config("CohereConfig", logit_scale=1.0),
    "cohere2": _config("Cohere2Config", logit_scale=1.0, sliding_window=6, sliding_window_pattern=2),
    "deepseek_v3": _config(
        "DeepseekV3Config",
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
        n_routed_experts=2,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        n_group=1,
        topk_group=1,
        experts_implementation="eager",
    ),
    "ernie4_5": _config("Ernie4_5Config", head_dim=8),
    "exaone4": _config("Exaone4Config", head_dim=8, sliding_window=6, sliding_window_pattern=2),
    "gemma": _config("GemmaConfig", head_dim=8),
    "gemma2": _config("Gemma2Config", head_dim=8, query_pre_attn_scalar=8, sliding_window=6),
    "gemma3": _nested(
        "Gemma3Config",
        {"query_pre_attn_scalar": 8, "sliding_window": 6, "sliding_window_pattern": 2},
        vision_config=_PIXELS,
        mm_tokens_per_image=1,
        image_token_id=IMAGE,
    ),
    "gemma3_text": _config(
        "Gemma3TextConfig", head_dim=8, query_pre_attn_scalar=8, sliding_window=6, sliding_window_pattern=2
    ),
    "glm": _config("GlmConfig", head_dim=8),
    "glm4": _config("Glm4Config", head_dim=8),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_inner=48,
        n_layer=LAYERS,
        n_head=4,
        n_positions=256,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    ),
    "gpt_neox": _config("GPTNeoXConfig"),
    "granite": _config("GraniteConfig", embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.3),
    "helium": _config("HeliumConfig", head_dim=8),
    "hunyuan_v1_dense": _config("HunYuanDenseV1Config", head_dim=8),
    "lfm2": _config("Lfm2Config", layer_types=["full_attention", "conv", "full_attention"], block_multiple_of=8),
    "llama": _config("LlamaConfig"),
    "llama4_text": _config(
        "Llama4TextConfig",
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        moe_layers=[],
        no_rope_layers=[1, 1, 0],
        attention_chunk_size=6,
    ),
    "ministral": _config("MinistralConfig", head_dim=8, sliding_window=6),
    "mistral": _config("MistralConfig", head_dim=8, sliding_window=6),
    "mistral3": _nested(
        "Mistral3Config",
        {"model_type": "mistral", "sliding_window": 6},
        vision_config={"model_type": "pixtral"} | _PIXELS,
        spatial_merge_size=1,
        image_token_index=IMAGE,
    ),
    "olmo": _config("OlmoConfig"),
    "olmo2": _config("Olmo2Config"),
    "olmo3": _config("Olmo3Config", sliding_window=6),
    "phi": _config("PhiConfig", resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0),
    "phi3": _config("Phi3Config"),
    "qwen2": _config("Qwen2Config"),
    "qwen3": _config("Qwen3Config", head_dim=8),
    "qwen3_5": _nested(
        "Qwen3_5Config",
        _LINEAR,
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "num_position_embeddings": 16,
        },
        image_token_id=IMAGE,
        video_token_id=IMAGE - 1,
    ),
    "qwen3_5_text": _config("Qwen3_5TextConfig", **_LINEAR),
    "qwen3_moe": _config(
        "Qwen3MoeConfig",
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        mlp_only_layers=[0, 2],
        decoder_sparse_step=1,
        experts_implementation="eager",
    ),
    "seed_oss": _config("SeedOssConfig", head_dim=8, attention_dropout=0.0, residual_dropout=0.0),
    "smollm3": _config("SmolLM3Config"),
    "starcoder2": _config("Starcoder2Config", residual_dropout=0.0, embedding_dropout=0.0, attention_dropout=0.0),
}
"""Configurations by ``model_type``."""


def one_target_each(first: int = 0, among: Collection[str] = BUILDERS) -> pytest.MarkDecorator:
    """Parametrise over families, each with one target, every other family with the other one.

    Tests take turns in ``first``, so that every family meets both targets, and every test does.
    """
    cases = [(model_type, TARGETS[(first + i) % 2]) for i, model_type in enumerate(sorted(among))]
    return pytest.mark.parametrize(("model_type", "target"), cases)


PADDED_DTYPE = {"gemma2": torch.float32}
"""float64 elsewhere. Gemma 2's own attention turns padding into NaN there: its mask overflows a softmax in float32."""


LINEAR = {"qwen3_5", "qwen3_5_text"}
"""Families with layers of linear attention, which cannot take tokens back."""

RECURRENT = LINEAR | {"lfm2"}
"""Families with layers that keep a recurrent state. In transformers itself their caches cannot choose among rows, their
packed documents see each other, and padding is only understood in the first call on a cache."""

LEAKS = RECURRENT | {"llama4_text"}
"""Families whose packed documents may see each other (Llama 4's do in transformers 5.17)."""

FLOAT32 = {"deepseek_v3"}
"""Families that compute parts in float32, whatever the model's dtype, as linear attention does."""


def tolerance(model_type: str, dtype: torch.dtype = torch.float64) -> dict[str, float]:
    """For logits of whole models (some families take norms in float32 anyway); the tests' effect is above 1e-2."""
    error = 1e-6 if dtype == torch.float64 else 2e-5
    return {"atol": 1e-4 if model_type in LINEAR else 2e-5 if model_type in FLOAT32 else error, "rtol": 0.0}


def plain(
    model_type: str, dtype: torch.dtype = torch.float64, changes: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    """The family's tiny model without fast weights, in eval mode, with weights large enough to tell tokens apart."""
    key = model_type, dtype, repr(dict(changes))
    if key not in _MODELS:
        config = BUILDERS[model_type]()
        for name, value in changes.items():
            setattr(config.get_text_config(), name, value)
        with torch.random.fork_rng():  # a test's random numbers do not depend on which tests ran before
            torch.manual_seed(0)
            _MODELS[key] = random_model(config, dtype)
    return copy.deepcopy(_MODELS[key])


_MODELS: dict[tuple[str, torch.dtype, str], Any] = {}


def random_model(config: transformers.PretrainedConfig, dtype: torch.dtype = torch.float64) -> Any:
    """A model whose logits have a spread of about one, in eval mode."""
    nested = config.get_text_config() is not config
    cls = transformers.AutoModelForImageTextToText if nested else transformers.AutoModelForCausalLM
    model = cls.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * (1.0 if "embed" in name or "wte" in name else parameter.shape[-1] ** -0.5))
    return model.to(dtype).eval()


def randomise(model: nn.Module, scale: float = 1.0) -> None:
    """Gives the added parameters values as if trained."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ttt_conv." in name:
                parameter.copy_(0.5 * scale * torch.randn(parameter.shape, generator=generator))
            elif ".ttt_proj." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[0] ** -0.5)


def adapted(
    model_type: str,
    dtype: torch.dtype = torch.float64,
    changes: Mapping[str, Any] = MappingProxyType({}),
    **settings: Any,
) -> Any:
    """The family's tiny model with fast weights that change its logits visibly from the second chunk on."""
    model = plain(model_type, dtype, changes)
    values: dict[str, Any] = {"layers": "0::2", "chunk_size": C, "lr": 0.03} | settings
    ittt.attach(model, ittt.InPlaceTTTConfig(**values))
    randomise(model)
    return model


ONE_LAYER = {"num_hidden_layers": 1}
"""For what is compiled, where every layer takes seconds."""


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random ids without the padding token."""
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(100 + seed))


def logits(model: nn.Module, input_ids: Tensor, **keywords: Any) -> Tensor:
    """Logits without a cache."""
    with torch.no_grad():
        out: Tensor = model(input_ids, use_cache=False, **keywords).logits
    return out


def padded(rows: Sequence[Tensor], side: str) -> dict[str, Tensor]:
    """Rows [1, n] as one batch: input_ids, attention_mask and the position_ids that ``generate`` would give."""
    width = max(row.shape[1] for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for b, row in enumerate(rows):
        n = row.shape[1]
        where = slice(width - n, width) if side == "left" else slice(n)
        ids[b, where], mask[b, where] = row[0], 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}

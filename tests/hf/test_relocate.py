"""Cached tokens moved to other positions: as if they had been read there."""

import copy

import pytest
import torch
import transformers
from contract.families import BUILDERS, C, adapted, plain, random_model, tokens
from torch.testing import assert_close
from transformers import LlamaConfig, Phi3Config
from transformers.cache_utils import DynamicCache

import inplace_ttt as ittt
from inplace_ttt.hf.attach import runtime_of
from inplace_ttt.hf.relocate import Relocation, Rotation
from inplace_ttt.hf.window import evict

N, OFFSET = 3 * C + 3, 45
IDS, MORE = tokens(2, N), tokens(2, C + 2, seed=1)
ABSOLUTE = "gpt2"
NORM_AFTER = "hunyuan_v1_dense"
"""Its norm after the rotation scales the dimensions apart, so that attention depends on positions, not distances."""
STAY = {
    "deepseek_v3": "the cached values of layer 0 depend on position",
    "lfm2": "a state of linear attention holds no single tokens",
    "llama4_text": "layers that attend within fixed chunks of the text are not supported",
    "qwen3_5": "a state of linear attention holds no single tokens",
    "qwen3_5_text": "a state of linear attention holds no single tokens",
}
"""Families whose cached tokens cannot be moved, and why."""
ROTARY = sorted(set(BUILDERS) - {ABSOLUTE, NORM_AFTER, *STAY})
TOLERANCE = {"atol": 1e-5, "rtol": 0.0}
"""The models round their rotary phases to float32, whatever their own precision."""


def read(model, cache, ids, position=0, sizes=None):
    """Logits of ``ids`` fed in pieces from ``position`` on."""
    out = []
    for piece in ids.split(sizes or ids.shape[1], 1):
        positions = torch.arange(position, position + piece.shape[1]).expand(len(ids), -1)
        with torch.no_grad():
            out.append(model(piece, past_key_values=cache, position_ids=positions).logits)
        position += piece.shape[1]
    return torch.cat(out, 1)


def filled(model, position=0, sizes=None, ids=IDS):
    cache = DynamicCache(config=model.config)
    read(model, cache, ids, position, sizes)
    return cache


def largest(a, b):
    return float((a - b).abs().max())


def check_moves(model):
    relocation = Relocation.of(model)
    assert relocation.supported, relocation.reason
    want = read(model, filled(model), MORE, N)
    for sizes in (None, [N - 5, *[1] * 5]):
        cache = filled(model, OFFSET, sizes)
        unmoved = copy.deepcopy(cache)
        relocation.move(cache, OFFSET)
        assert_close(read(model, cache, MORE, N, sizes=[1, 2, *[1] * (C - 1)]), want, **TOLERANCE)
    assert largest(read(model, unmoved, MORE, N), want) > 1e-2
    return relocation


@pytest.mark.parametrize("model_type", ROTARY)
def test_moved_tokens_count_as_read_there(model_type):
    check_moves(adapted(model_type))


@pytest.mark.parametrize("model_type", sorted(STAY))
def test_families_whose_tokens_stay(model_type):
    relocation = Relocation.of(adapted(model_type))
    assert not relocation.supported
    assert STAY[model_type] in relocation.reason


def test_without_fast_weights():
    check_moves(plain("gemma3_text"))


def test_layers_without_positions_stay():
    model = adapted("smollm3", changes={"no_rope_layers": [1, 0, 1]})
    for layer, use in zip(model.model.layers, (1, 0, 1), strict=True):
        layer.self_attn.use_rope = use
    relocation = check_moves(model)
    assert [relocation.rotations[i] is None for i in range(3)] == [False, True, False]
    cache = filled(model)
    keys = cache.layers[1].keys
    relocation.move(cache, 5)
    assert cache.layers[1].keys is keys
    exaone = Relocation.of(adapted("exaone4"))
    assert [exaone.rotations[i] is None for i in range(3)] == [False, True, False]


def test_layers_of_two_kinds_have_their_own_frequencies():
    angles = [rotation.angles for rotation in Relocation.of(plain("gemma3_text")).rotations.values()]
    assert angles[0] == angles[2] != angles[1]
    x = torch.zeros(1, 1, 1)
    assert largest(angles[0].turn(9, x)[0], angles[1].turn(9, x)[0]) > 0.1


SCALED = {
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "linear": {"factor": 3.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
SIZE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def scaled(kind, **values):
    rope = {"rope_type": kind, "rope_theta": 10000.0, **values}
    return LlamaConfig(**SIZE, rope_parameters=rope)


@pytest.mark.parametrize("kind", sorted(SCALED))
def test_scaled_frequencies(kind):
    model = random_model(scaled(kind, **SCALED[kind]))
    assert (model.model.rotary_emb.attention_scaling != 1) is (kind == "yarn")  # which must not scale twice
    check_moves(model)


def test_what_cannot_be_moved_says_why():
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 3.0, 2.0, 1.5],
        "original_max_position_embeddings": 64,
        "factor": 4.0,
    }
    reasons = {
        "its position embeddings are absolute (it reads at most 256 tokens)": adapted(ABSOLUTE),
        "its rotary frequencies change with the length of the text": random_model(scaled("dynamic", factor=2.0)),
        "the keys of layer 0, rotated back, are not those of earlier positions (what follows the rotation?)": adapted(
            NORM_AFTER
        ),
    }
    for reason, model in reasons.items():
        relocation = Relocation.of(model)
        assert not relocation.supported
        assert relocation.reason == reason
        cache = filled(model)
        with pytest.raises(NotImplementedError) as error:
            relocation.move(cache, 3)
        assert reason in str(error.value)
    model = random_model(Phi3Config(**SIZE, rope_parameters=longrope))
    assert Relocation.of(model).reason == "its rotary frequencies change with the length of the text"


def test_looking_at_a_dynamic_model_changes_no_frequencies():
    model = random_model(scaled("dynamic", factor=2.0))
    before = model.model.rotary_emb.inv_freq.clone()
    Relocation.of(model)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


def test_a_norm_that_scales_all_alike_is_no_obstacle():
    model = adapted(NORM_AFTER)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.key_layernorm.weight.fill_(0.7)
            layer.self_attn.query_layernorm.weight.fill_(1.3)
    check_moves(model)


def test_attention_that_counts_positions_is_noticed():
    """Keys that do not depend on positions are not enough: here the queries do."""
    model = plain("llama")
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def louder(hidden_states, position_embeddings, **keywords):
        attention.scaling = 0.3 * (1 + float(position_embeddings[0].abs().mean()))
        return forward(hidden_states, position_embeddings, **keywords)

    attention.forward = louder
    assert Relocation.of(model).reason == "the attention of layer 1 depends on more than the distance between tokens"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "exaone4", "glm", "qwen2", "gpt_neox", "cohere"])
def test_other_precisions(model_type, dtype):
    model = adapted(model_type, dtype)
    relocation = Relocation.of(model)
    assert relocation.supported, relocation.reason
    moved, there = filled(model, OFFSET), filled(model)
    relocation.move(moved, OFFSET)
    moved, there = moved.layers[0].keys, there.layers[0].keys
    assert moved.dtype == dtype
    assert float((moved - there).norm() / there.norm()) < 2 * torch.finfo(dtype).eps + 2e-6
    assert not Relocation.of(adapted(NORM_AFTER, dtype)).supported
    assert not Relocation.of(adapted(ABSOLUTE, dtype)).supported


@pytest.mark.parametrize(("theta", "bias"), [(1e4, 200.0), (1e6, 200.0), (1e6, 1000.0)])
def test_large_biases_of_keys_in_bfloat16(theta, bias, monkeypatch):
    """As in Qwen2: scores of hundreds, so that attention differs by its own rounding, and keys that turn by little."""
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    model, generator = plain("qwen2", torch.bfloat16, rope), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in model.model.layers:
            key, query = layer.self_attn.k_proj.bias, layer.self_attn.q_proj.bias
            key[torch.tensor([3, 11])] += bias  # of the slowest pair in each head
            query += 0.05 * bias * torch.randn(query.shape, generator=generator).to(query)
    relocation = Relocation.of(model)
    assert relocation.supported, relocation.reason
    assert None not in relocation.rotations.values()
    monkeypatch.setattr(Rotation, "back", lambda self, keys, by, turns: keys)
    assert not Relocation.of(model).supported


def test_a_deep_model_in_bfloat16():
    """Over many layers the two readings drift apart; each layer is judged by itself."""
    config = BUILDERS["qwen2"]()
    config.num_hidden_layers = 40
    config.layer_types = ["full_attention"] * 40
    relocation = Relocation.of(random_model(config, torch.bfloat16))
    assert relocation.supported, relocation.reason


def test_far_moves_are_exact():
    """One float32 phase of a million positions is off by hundredths; a product of exact ones is not."""
    model = random_model(LlamaConfig(**SIZE, head_dim=32))
    angles, rotary = Relocation.of(model).rotations[0].angles, model.model.rotary_emb
    by, x = 1_000_003, torch.zeros(1, 1, 1, dtype=torch.float64)
    phase = by * torch.cat([rotary.inv_freq, rotary.inv_freq]).double()
    cos, sin = angles.turn(by, x)
    assert largest(cos[0, 0], phase.cos()) < 1e-5
    assert largest(sin[0, 0], phase.sin()) < 1e-5
    assert largest(rotary(x, torch.tensor([[by]]))[0][0, 0], phase.cos()) > 1e-2


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mistral"])
def test_sinks_stay_in_full_layers_only(model_type):
    model = plain(model_type)
    relocation, cache, whole = Relocation.of(model), filled(model), filled(model)
    keys = [layer.keys for layer in cache.layers]
    kept = [k.clone() for k in keys]
    relocation.move(cache, 4, first=3)
    relocation.move(whole, 4)
    for layer, moved, before, copy_of_it in zip(cache.layers, whole.layers, keys, kept, strict=True):
        stay = 0 if layer.is_sliding else 3
        assert torch.equal(layer.keys[:, :, :stay], before[:, :, :stay])
        assert torch.equal(layer.keys[:, :, stay:], moved.keys[:, :, stay:])
        assert torch.equal(before, copy_of_it)  # tensors are replaced, not written into
        assert largest(layer.keys[:, :, stay:], before[:, :, stay:]) > 0.1


def test_there_and_back_and_nowhere():
    model = plain("glm")
    relocation, cache = Relocation.of(model), filled(model, 5)
    keys = [layer.keys for layer in cache.layers]
    relocation.move(cache, 0)
    assert all(layer.keys is k for layer, k in zip(cache.layers, keys, strict=True))
    relocation.move(cache, 5, first=N)
    relocation.move(DynamicCache(config=model.config), 5)
    for layer, k in zip(cache.layers, keys, strict=True):
        assert torch.equal(layer.keys, k)
    relocation.move(cache, -9)
    assert_close(read(model, cache, MORE, N + 14), read(model, filled(model, 14), MORE, N + 14), **TOLERANCE)
    relocation.move(cache, 9)
    for layer, k in zip(cache.layers, keys, strict=True):
        assert_close(layer.keys[:, :, :N], k, **TOLERANCE)
    with pytest.raises(ValueError, match="negative"):
        relocation.move(cache, 1, first=-1)


SINKS, DROP = 2, 7
KEPT = [*range(SINKS), *range(SINKS + DROP, N)]


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "glm", "cohere", "gpt_neox"])
def test_evict_and_move_is_the_kept_text_read_anew_in_one_layer(model_type):
    """StreamingLLM: positions are those within the cache. In one layer keys depend on their own token only."""
    config = BUILDERS[model_type]()
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    model = random_model(config)
    relocation, cache = Relocation.of(model), filled(model)
    evict(cache, SINKS, DROP)
    relocation.move(cache, DROP, first=SINKS)
    want = read(model, filled(model, ids=IDS[:, KEPT]), MORE, len(KEPT))
    assert_close(read(model, cache, MORE, len(KEPT), sizes=2), want, **TOLERANCE)


@pytest.mark.parametrize("model_type", ["llama", "smollm3", "helium", "qwen3"])
def test_evict_and_move_in_the_first_of_several_layers(model_type):
    model = adapted(model_type)
    relocation, cache = Relocation.of(model), filled(model)
    for _ in range(3):  # the window moves on again and again
        evict(cache, SINKS, 2)
        relocation.move(cache, 2, first=SINKS)
    there = filled(model, ids=IDS[:, [*range(SINKS), *range(SINKS + 6, N)]])
    assert_close(cache.layers[0].keys, there.layers[0].keys, **TOLERANCE)
    assert_close(cache.layers[0].values, there.layers[0].values, **TOLERANCE)


def test_the_model_is_left_as_it_was():
    model = adapted("qwen3", changes={"attention_dropout": 0.5})
    enabled = []
    model.model.register_forward_pre_hook(lambda *_: enabled.append(runtime_of(model).enabled))
    model.train()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    state = torch.get_rng_state()
    assert Relocation.of(model).supported
    assert [m.training for m in model.modules()] == modes
    assert [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert enabled == [False, False]
    model.eval()
    want = read(model, DynamicCache(config=model.config), IDS)
    with ittt.updates_off(model):
        assert Relocation.of(model).supported
        assert largest(read(model, DynamicCache(config=model.config), IDS), want) > 1e-2


OTHERS = {
    "FalconConfig": {},
    "StableLmConfig": {},  # hands over only the dimensions that turn
    "GptOssConfig": {
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "experts_implementation": "eager",
        "head_dim": 8,
        "sliding_window": 6,
    },
    "Cohere2Config": {"sliding_window": 6, "sliding_window_pattern": 2},
}


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_models_beyond_the_table_of_families(name):
    check_moves(random_model(getattr(transformers, name)(**(SIZE | OTHERS[name]))))


LATENT = {
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 3,
    "num_key_value_heads": 4,
}
LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2, "num_experts": 2, "num_hidden_layers": 4}
REFUSED = {
    "BloomConfig": ({"hidden_size": 32, "n_layer": 2, "n_head": 4}, "its forward takes no position_ids"),
    "GPTJConfig": (
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4},
        "the keys of layer 0 depend on position, but not by a rotation known here",
    ),
    "OPTConfig": (
        {**SIZE, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        "its position embeddings are absolute (it reads at most 64 tokens)",
    ),
    "DeepseekV3Config": (SIZE | LATENT, "the cached values of layer 0 depend on position"),
    "Qwen3NextConfig": (
        SIZE | LINEAR,
        "layer 0 of this cache is a LinearAttentionLayer: a state of linear attention holds no single tokens",
    ),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_models_that_are_refused(name):
    values, reason = REFUSED[name]
    config = getattr(transformers, name)(**{"vocab_size": 97, "bos_token_id": 1, "eos_token_id": None, **values})
    assert Relocation.of(transformers.AutoModelForCausalLM.from_config(config)).reason == reason

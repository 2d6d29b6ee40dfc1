"""Families: described by hand, refused with the reason, and language models inside models that also see images."""

import pytest
import torch
import transformers
from contract.families import BUILDERS, IMAGE, VOCAB, C, adapted, logits, plain, random_model, randomise, tokens
from torch import nn
from torch.testing import assert_close
from transformers.cache_utils import DynamicCache

import inplace_ttt as ittt
from inplace_ttt.hf.attach import runtime_of
from inplace_ttt.hf.families import REFUSED
from inplace_ttt.hf.parallel import enable_context_parallel

IDS = tokens(2, 2 * C + 3)
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "num_layers": 3, "num_heads": 4, "d_model": 32, "n_heads": 4}


def config(**settings):
    return ittt.InPlaceTTTConfig(**({"layers": "0::2", "chunk_size": C, "lr": 0.03} | settings))


def tiny(model_type, **changes):
    return random_model(transformers.AutoConfig.for_model(model_type, **SHAPE | changes))


def unchanged(model, before):
    """Whether a refused attach left everything as it was."""
    return not ittt.is_attached(model) and before == {n: (type(m), len(m._forward_pre_hooks)) for n, m in named(model)}


def named(model):
    return list(model.named_modules())


def refused(model, settings, match):
    before = {n: (type(m), len(m._forward_pre_hooks)) for n, m in named(model)}
    with pytest.raises(ittt.UserError, match=match):
        ittt.attach(model, settings)
    assert unchanged(model, before)


# -- described by hand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "projection"),
    [("nanochat", "mlp.fc2"), ("bitnet", "mlp.down_proj"), ("persimmon", "mlp.dense_4h_to_h")],
)
def test_an_unknown_family_in_two_strings(model_type, projection):
    model = tiny(model_type)
    with pytest.raises(ittt.UserError, match=r'layers_path="model.layers", projection_path="mlp.down_proj"') as error:
        ittt.attach(model, config())
    assert repr(model_type) in str(error.value)
    want = logits(model, IDS)
    ittt.attach(model, config(layers_path="model.layers", projection_path=projection))
    assert torch.equal(logits(model, IDS), want)
    randomise(model)
    on = logits(model, IDS)
    assert torch.equal(on[:, :C], want[:, :C])
    assert float((on - want)[:, C:].abs().max()) > 1e-2
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        pieces = [model(part, past_key_values=cache).logits for part in IDS.split((C - 1, 2, C + 2), 1)]
    assert_close(torch.cat(pieces, 1), on, atol=1e-6, rtol=0)
    keywords = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": C + 1, "do_sample": False}
    assert torch.equal(model.generate(IDS, **keywords), model.generate(IDS, use_cache=False, **keywords))
    ittt.detach(model)
    assert torch.equal(logits(model, IDS), want)


@pytest.mark.parametrize(
    ("paths", "say"),
    [
        (("model.blocks", "mlp.down_proj"), "LlamaForCausalLM has no module 'model.blocks'"),
        (("model.norm", "mlp.down_proj"), "'model.norm' of LlamaForCausalLM is not a list of layers"),
        (
            ("model.layers", "mlp.fc2"),
            "layer 0 .LlamaMLP. has no projection 'mlp.fc2'; no layer has a module",
        ),
        (("model.layers", "ffn.fc2"), "layer 0 .LlamaDecoderLayer. has no projection 'ffn.fc2'"),
        (("model.layers", "mlp.act_fn"), "cannot tell the output size of SiLU"),
        (("model.layers", "input_layernorm"), "must lie in an MLP module"),
    ],
)
def test_wrong_strings(paths, say):
    refused(plain("llama"), config(layers_path=paths[0], projection_path=paths[1]), say)


# -- refused ----------------------------------------------------------------------------------------------------------


def test_experts_are_refused_with_a_reason():
    say = r"layer 1 is a mixture of experts \(Qwen3MoeSparseMoeBlock\).*no one last projection.*dense layers: \[0, 2\]"
    refused(plain("qwen3_moe"), config(layers=":"), say)
    refused(plain("qwen3_moe", changes={"mlp_only_layers": []}), config(), "dense layers: this model has none")


@pytest.mark.parametrize(
    ("model_type", "layers", "projection", "name"),
    [
        ("falcon", "transformer.h", "mlp.dense_4h_to_h", "FalconDecoderLayer"),
        ("bloom", "transformer.h", "mlp.dense_4h_to_h", "BloomBlock"),
        ("mpt", "transformer.blocks", "ffn.down_proj", "MptBlock"),
        ("stablelm", "model.layers", "mlp.down_proj", "StableLmDecoderLayer"),
        ("nemotron", "model.layers", "mlp.down_proj", "NemotronDecoderLayer"),
        ("gpt_neo", "transformer.h", "mlp.c_proj", "GPTNeoBlock"),
    ],
)
def test_families_that_keep_keywords_from_attention(model_type, layers, projection, name):
    """A wrong answer is not an option: their fast weights never get the call's context."""
    changes = GPT | ({"attention_types": [[["global"], 3]]} if model_type == "gpt_neo" else {})
    model = tiny(model_type, **changes)
    say = f"{name} does not pass keyword arguments on to its attention.*this family cannot adapt"
    refused(model, config(layers_path=layers, projection_path=projection), say)


def test_families_with_a_reason_of_their_own():
    """Also when they are described: what the description says is not what is wrong."""
    shape = {"ffn_dim": 48, "word_embed_proj_dim": 32}
    say = "opt models cannot have fast weights: their decoder layers have no MLP module"
    for paths in ({}, {"layers_path": "model.decoder.layers", "projection_path": "fc2"}):
        refused(tiny("opt", **shape), config(**paths), say)
    assert all(reason.startswith("the") for reason in REFUSED.values())


def test_layers_that_run_several_times_are_refused():
    model = tiny("hrm_text", head_dim=8)
    settings = config(layers=(0, 1), layers_path="model.L_module.layers", projection_path="mlp.down_proj")
    refused(model, settings, "hrm_text models cannot have fast weights: they run their layers several times per token")


@pytest.mark.parametrize("nested", [False, True])
def test_an_unknown_model_that_runs_its_layers_several_times(nested):
    """The first forward says so: reading it further would take each token twice."""
    model = plain("gemma3" if nested else "llama")
    looped = model.get_decoder()
    once = type(looped).forward

    def twice(self, *args, **kwargs):
        once(self, *args, **kwargs)
        return once(self, *args, **kwargs)

    def layers_twice(self, *args, **kwargs):
        self.layers = nn.ModuleList([*self.layers, *self.layers])
        self.config.num_hidden_layers *= 2
        try:
            return once(self, *args, **kwargs)
        finally:
            self.layers = self.layers[:3]
            self.config.num_hidden_layers //= 2

    looped.__class__ = type("Looped", (type(looped),), {"forward": twice if nested else layers_twice})
    logits(model, IDS)
    ittt.attach(model, config())
    with pytest.raises(ittt.UserError, match="layer 0 runs several times per token in this model"):
        logits(model, IDS)
    assert runtime_of(model).current is None


def test_one_mlp_in_two_layers_is_refused():
    model = plain("llama")
    model.model.layers[1].mlp = model.model.layers[2].mlp
    for layers, pair in (((2,), "layers 2 and 1"), ((0, 1), "layers 1 and 2")):
        refused(
            model, config(layers=layers), f"{pair} share one LlamaMLP, whose fast weights would read each token twice"
        )
    ittt.attach(model, config(layers=(0,)))
    model = plain("llama")
    model.model.layers[1].mlp.down_proj = model.model.layers[2].mlp.down_proj
    refused(model, config(layers=(1,)), "layers 1 and 2 share one Linear, whose")


def test_one_layer_at_two_places_is_refused():
    model = plain("llama")
    model.model.layers[2] = model.model.layers[0]
    refused(model, config(layers=(2,)), "layers 2 and 0 share one LlamaMLP")


def test_layers_without_attention_name_those_with():
    say = r"layer 1 \(Lfm2DecoderLayer\) has no attention module.*Choose layers with attention: \[0, 2\]"
    refused(plain("lfm2"), config(layers=(1,)), say)


# -- text models inside others ----------------------------------------------------------------------------------------


def picture(model_type):
    """A prompt [1, 11] with one image in it, as the family's processor would give it."""
    sizes = {"gemma3": 1, "mistral3": 4, "qwen3_5": 4}
    ids = tokens(1, 2 * C + 3) % (IMAGE - 2) + 1
    ids[:, 2 : 2 + sizes[model_type]] = IMAGE
    pixels = torch.randn((16, 96) if model_type == "qwen3_5" else (1, 3, 28, 28), dtype=torch.float64)
    more = {
        "gemma3": {},
        "mistral3": {"image_sizes": torch.tensor([[28, 28]])},
        "qwen3_5": {"image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (ids == IMAGE).int()},
    }
    return {"input_ids": ids, "pixel_values": pixels, **more[model_type]}


@pytest.mark.parametrize("model_type", ["gemma3", "mistral3", "qwen3_5"])
@pytest.mark.parametrize("target", ["input_embed", "hidden_states"])
def test_an_image_in_the_prompt(model_type, target):
    """The fast weights learn from what the language model reads: image features, not placeholder tokens."""
    model, inputs = plain(model_type), picture(model_type)
    read, base = [], logits(model, **inputs)
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs), with_kwargs=True
    )
    logits(model, **inputs)
    handle.remove()
    ittt.attach(model, config(target=target))
    assert torch.equal(logits(model, **inputs), base)
    randomise(model)
    on = logits(model, **inputs)
    assert torch.equal(on[:, :C], base[:, :C])
    assert float((on - base)[:, C:].abs().amax(-1).min()) > 1e-2
    # the same through embeddings, where every token is a given vector
    positions = {} if read[0].get("position_ids") is None else {"position_ids": read[0]["position_ids"]}
    embedded = model(inputs_embeds=read[0]["inputs_embeds"], use_cache=False, **positions).logits
    assert_close(embedded, on, atol=1e-4 if model_type == "qwen3_5" else 1e-9, rtol=0)
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
    u = next(iter(ittt.fast_weights(out.past_key_values).values())).u
    if target == "input_embed":
        assert torch.equal(u[:, :3], read[0]["inputs_embeds"][:, 2 * C :])


@pytest.mark.parametrize("model_type", ["gemma3", "mistral3", "qwen3_5"])
def test_generate_with_an_image(model_type):
    model, inputs = adapted(model_type), picture(model_type)
    prompt = inputs["input_ids"]
    got = model.generate(**inputs, max_new_tokens=2 * C, do_sample=False)
    with ittt.updates_off(model):
        off = model.generate(**inputs, max_new_tokens=2 * C, do_sample=False)
    want = prompt
    for _ in range(2 * C):
        again = inputs | {"input_ids": want}
        if "mm_token_type_ids" in again:
            again["mm_token_type_ids"] = (want == IMAGE).int()
        want = torch.cat([want, logits(model, **again)[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, want)
    assert not torch.equal(got, off)


@pytest.mark.parametrize("model_type", ["gemma3", "mistral3"])
def test_the_loss_as_objective_reads_no_images(model_type):
    model, inputs = adapted(model_type, objective="loss"), picture(model_type)
    with pytest.raises(ittt.UserError, match=r'pixel_values.*: objective="loss" reads input_ids'):
        model(**inputs)
    ids = tokens(1, 2 * C + 3) % (IMAGE - 2) + 1
    assert_close(logits(model, ids, token_type_ids=torch.zeros_like(ids)), logits(model, ids))  # as a processor gives


@pytest.mark.parametrize("model_type", ["lfm2", "qwen3_5", "qwen3_5_text"])
def test_the_loss_as_objective_needs_keys_in_every_layer(model_type):
    refused(plain(model_type), config(objective="loss"), "linear attention or convolutions keep none")


def test_a_model_whose_base_model_is_itself():
    """Llama 4's text model names its base model wrongly, so transformers takes the whole model for it."""
    model, ids = adapted("llama4_text", objective="loss", update_size=0.05), tokens(2, 4 * C + 3)
    want = logits(model, ids)
    assert float((want - logits(plain("llama4_text"), ids)).abs().max()) > 1e-2
    with torch.no_grad():
        cache, out = None, []
        for n in (3, C, 1, 2 * C, C - 1):
            found = model(ids[:, sum(x.shape[1] for x in out) :][:, :n], use_cache=True, past_key_values=cache)
            cache = found.past_key_values
            out.append(found.logits)
    assert_close(torch.cat(out, 1), want)


def test_an_image_that_is_seen_both_ways_with_a_static_cache():
    """Gemma's tokens of an image see each other; the mask that generate prepares for a static cache shows it."""
    model, ids = adapted("gemma3"), tokens(1, 2 * C + 3) % (IMAGE - 2) + 1
    ids[:, 2:4] = IMAGE
    pixels = torch.randn(2, 3, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == IMAGE).int()}
    want, got = (
        model.generate(**inputs, max_new_tokens=2 * C, do_sample=False, cache_implementation=kind)
        for kind in (None, "static")
    )
    assert torch.equal(got, want)


def test_the_vision_tower_sees_nothing_of_fast_weights():
    model, seen = adapted("qwen3_5"), []
    model.model.visual.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True
    )
    logits(model, **picture("qwen3_5"))
    assert seen
    assert not any("inplace_ttt" in name for names in seen for name in names)


def test_a_text_model_is_loaded_as_one(tmp_path):
    """An adapter on the text model of a checkpoint with images comes back on the text model."""
    whole = plain("qwen3_5", torch.float32)
    whole.save_pretrained(tmp_path / "hub")
    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub").eval()
    assert text.config.model_type == "qwen3_5_text"
    ittt.attach(text, config())
    randomise(text)
    ittt.save_pretrained(text, tmp_path / "adapter", adapter_only=True)
    again = ittt.from_pretrained(tmp_path / "adapter").eval()
    assert type(again) is type(text)
    assert torch.equal(logits(again, IDS), logits(text, IDS))
    whole.config._name_or_path = str(tmp_path / "hub")
    ittt.attach(whole, config())
    randomise(whole)
    ittt.save_pretrained(whole, tmp_path / "other", adapter_only=True)
    again = ittt.from_pretrained(tmp_path / "other").eval()
    assert type(again) is type(whole)
    assert torch.equal(logits(again, IDS), logits(whole, IDS))


def test_linear_attention_tells_a_cache_that_was_read_before():
    model = plain("qwen3_5_text")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    ittt.attach(model, config(layers=(0,)))
    with pytest.raises(ValueError, match="filled without fast weights"):
        model(IDS, past_key_values=cache)


def test_rows_of_a_nested_model_are_not_cut():
    with pytest.raises(ittt.UserError, match="cuts rows of text models alone, not of gemma3 models"):
        enable_context_parallel(plain("gemma3"))


def test_every_nested_family_is_tested_with_an_image():
    nested = {name for name, build in BUILDERS.items() if (c := build()).get_text_config() is not c}
    assert nested == {"gemma3", "mistral3", "qwen3_5"}

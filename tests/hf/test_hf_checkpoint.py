"""Files: what is written, what comes back, and every damaged or foreign one refused with a reason."""

import json
import shutil
import warnings

import pytest
import torch
from contract.families import C, adapted, logits, plain, randomise, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import inplace_ttt as ittt
from inplace_ttt.hf.attach import runtime_of

IDS = tokens(2, 2 * C + 3)
SETTINGS, TENSORS = "inplace_ttt.json", "inplace_ttt.safetensors"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A whole model, an adapter, and what transformers' own save_pretrained writes."""
    root = tmp_path_factory.mktemp("stored")
    model = adapted("llama", torch.float32)
    ittt.save_pretrained(model, root / "whole")
    ittt.save_pretrained(model, root / "adapter", adapter_only=True)
    model.save_pretrained(root / "transformers")
    return root


@pytest.fixture
def copy_of(stored, tmp_path):
    """A copy of a stored directory that a test may damage."""

    def make(kind):
        return shutil.copytree(stored / kind, tmp_path / kind)

    return make


def edit_settings(path, **changes):
    values = json.loads((path / SETTINGS).read_text())
    (path / SETTINGS).write_text(json.dumps(values | changes))


def edit_tensors(path, change):
    tensors = load_file(path / TENSORS)
    change(tensors)
    save_file(tensors, path / TENSORS, metadata={"format": "pt"})


# -- what is written --------------------------------------------------------------------------------------------------


def test_files(stored):
    whole, adapter = stored / "whole", stored / "adapter"
    assert sorted(p.name for p in whole.iterdir()) == ["README.md", "base", "config.json", SETTINGS, TENSORS]
    assert sorted(p.name for p in adapter.iterdir()) == ["README.md", "config.json", SETTINGS, TENSORS]
    names = [f"model.layers.{i}.mlp.ttt_{n}.weight" for i in (0, 2) for n in ("conv", "proj")]
    for path in (whole, adapter):
        assert sorted(load_file(path / TENSORS)) == names
    assert not any("ttt_" in name for name in load_file(whole / "base" / "model.safetensors"))
    settings = json.loads((whole / SETTINGS).read_text())
    assert settings["kind"] == "model"
    assert settings["inplace_ttt"]["format_version"] == 1
    assert "inplace_ttt" not in json.loads((whole / "base" / "config.json").read_text())


def test_saving_leaves_the_model_as_it_was(tmp_path):
    model = adapted("llama", torch.float32)
    want, settings = logits(model, IDS), model.config.inplace_ttt
    for adapter_only in (False, True):
        ittt.save_pretrained(model, tmp_path / str(adapter_only), adapter_only=adapter_only)
    assert model.config.inplace_ttt == settings
    assert torch.equal(logits(model, IDS), want)
    ittt.detach(model)


def test_what_transformers_writes_of_an_attached_model(stored):
    again = ittt.from_pretrained(stored / "transformers", dtype=torch.float32).eval()
    assert torch.equal(logits(again, IDS), logits(adapted("llama", torch.float32), IDS))


def test_several_files_of_weights(tmp_path):
    model = adapted("llama", torch.float32)
    model.save_pretrained(tmp_path / "a", max_shard_size="50KB")
    ittt.save_pretrained(model, tmp_path / "b", max_shard_size="50KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    assert len(list((tmp_path / "b" / "base").glob("*.safetensors"))) > 1
    for name in "ab":
        again = ittt.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        assert torch.equal(logits(again, IDS), logits(model, IDS))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("settings", [{"projection": False}, {"objective": "next_token"}, {"decay": 0.1, "clip": 0.5}])
def test_other_settings(model_type, settings, tmp_path):
    model = adapted(model_type, torch.float32, **settings)
    ittt.save_pretrained(model, tmp_path)
    again = ittt.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert runtime_of(again).config == runtime_of(model).config
    assert torch.equal(logits(again, IDS), logits(model, IDS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(stored, dtype):
    """The stored precision is kept unless asked otherwise; the fingerprint knows its base in any."""
    again = ittt.from_pretrained(stored / "whole", dtype=dtype)
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert ittt.is_attached(ittt.from_pretrained(stored / "adapter", model=plain("llama", dtype)))


def test_trained_projections_travel_with_the_adapter(tmp_path):
    model = adapted("llama", torch.float32)
    with torch.no_grad():
        for i in (0, 2):
            model.model.layers[i].mlp.down_proj.weight.mul_(1.5)
    ittt.save_pretrained(model, tmp_path, adapter_only=True, projections=True)
    again = ittt.from_pretrained(tmp_path, model=plain("llama", torch.float32))
    assert torch.equal(logits(again, IDS), logits(model, IDS))


def test_an_adapter_finds_its_base_by_name(tmp_path):
    plain("llama", torch.float32).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    ittt.attach(model, ittt.InPlaceTTTConfig(layers="0::2", chunk_size=C, lr=0.03))
    randomise(model)
    ittt.save_pretrained(model, tmp_path / "adapter", adapter_only=True)
    again = ittt.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    assert torch.equal(logits(again, IDS), logits(model, IDS))


def test_a_tokenizer_is_saved_beside_it(tmp_path):
    class Tokenizer:
        def save_pretrained(self, path):
            (path / "tokenizer.json").write_text("{}")

    ittt.save_pretrained(adapted("llama"), tmp_path, Tokenizer())
    assert (tmp_path / "tokenizer.json").is_file()
    assert ittt.is_attached(AutoModelForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_a_device_map_of_one_device(stored, device_map):
    again = ittt.from_pretrained(stored / "whole", dtype=torch.float32, device_map=device_map)
    assert torch.equal(logits(again, IDS), logits(adapted("llama", torch.float32), IDS))


def test_a_device_map_that_spreads_the_model_is_refused(stored, tmp_path):
    names = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    device_map = dict.fromkeys(names, "cpu") | {"model.layers.1": "disk", "model.layers.2": "disk"}
    with pytest.raises(ittt.UserError, match="without offloading"):
        ittt.from_pretrained(stored / "whole", device_map=device_map, offload_folder=tmp_path)


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["whole", "adapter"])
@pytest.mark.parametrize(
    ("change", "say"),
    [
        (lambda t: t.pop("model.layers.2.mlp.ttt_conv.weight"), "lacks model.layers.2.mlp.ttt_conv.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "has tensors that this model has not: extra"),
        (
            lambda t: t.update({"model.layers.0.mlp.ttt_conv.weight": torch.zeros(32, 1, 3)}),
            r"model.layers.0.mlp.ttt_conv.weight has shape \(32, 1, 3\), this model needs \(32, 1, 5\)",
        ),
        (lambda t: t.clear(), "lacks .* and 1 more"),
    ],
)
def test_tensors_that_do_not_fit(copy_of, kind, change, say):
    path, base = copy_of(kind), plain("llama", torch.float32)
    edit_tensors(path, change)
    with pytest.raises(ittt.UserError, match=say):
        ittt.from_pretrained(path, **({"model": base} if kind == "adapter" else {}))
    assert not ittt.is_attached(base)
    assert torch.equal(logits(base, IDS), logits(plain("llama", torch.float32), IDS))


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_truncated_and_missing_tensors(copy_of, kind):
    path = copy_of(kind)
    data = (path / TENSORS).read_bytes()
    for part in (data[: len(data) // 2], data[:4], b""):
        (path / TENSORS).write_bytes(part)
        with pytest.raises(ittt.UserError, match=f"{TENSORS} is missing or damaged"):
            ittt.from_pretrained(path)
    (path / TENSORS).unlink()
    with pytest.raises(ittt.UserError, match=f"{TENSORS} is missing or damaged"):
        ittt.from_pretrained(path)


def test_a_truncated_base(copy_of):
    path = copy_of("whole")
    weights = path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ittt.UserError, match=r"base.*(missing or )?damaged"):
        ittt.from_pretrained(path)
    shutil.rmtree(path / "base")
    with pytest.raises(ittt.UserError, match="base"):
        ittt.from_pretrained(path)


def test_a_base_that_lacks_weights(copy_of):
    path = copy_of("whole")
    weights = load_file(path / "base" / "model.safetensors")
    up = weights.pop("model.layers.1.mlp.up_proj.weight")
    for wrong in ({}, {"model.layers.1.mlp.up_proj.weight": up[:, :16].clone()}):
        save_file(weights | wrong, path / "base" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ittt.UserError, match=r"lacks or misshapes weights .*layers.1.mlp.up_proj"):
            ittt.from_pretrained(path)


@pytest.mark.parametrize("text", ["{", "", "[]", "{}", '{"inplace_ttt": 3}', '{"inplace_ttt": {}}', '"x"', "\udcff"])
def test_damaged_settings(copy_of, text):
    path = copy_of("whole")
    (path / SETTINGS).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ittt.UserError, match=f"{SETTINGS} is damaged .*save the model again"):
        ittt.from_pretrained(path)


def test_newer_formats(copy_of):
    path = copy_of("whole")
    settings = json.loads((path / SETTINGS).read_text())["inplace_ttt"]
    edit_settings(path, inplace_ttt=settings | {"format_version": 2})
    with pytest.raises(ittt.UserError, match=r"format 2, .*reads up to 1: update inplace-ttt"):
        ittt.from_pretrained(path)
    edit_settings(path, inplace_ttt=settings | {"chunk_size": 0})
    with pytest.raises(ittt.UserError, match="chunk_size must be at least 1"):
        ittt.from_pretrained(path)
    edit_settings(path, inplace_ttt=settings | {"later": 1})
    with pytest.warns(UserWarning, match="ignored unknown settings of In-Place TTT: later"):
        ittt.from_pretrained(path)


def test_a_wrong_base(stored):
    other = plain("llama", torch.float32)
    with torch.no_grad():
        other.model.layers[2].mlp.down_proj.weight.add_(0.05 * torch.randn(32, 48))
    want = logits(other, IDS)
    with pytest.raises(ittt.UserError, match="wrong base model: the weights of layer 2 are not those"):
        ittt.from_pretrained(stored / "adapter", model=other)
    assert not ittt.is_attached(other)
    assert torch.equal(logits(other, IDS), want)
    with pytest.raises(ittt.UserError, match="belongs on a llama model, got qwen2"):
        ittt.from_pretrained(stored / "adapter", model=plain("qwen2"))
    with pytest.raises(ittt.UserError, match=r"no layer|reaches outside|lacks|wrong base|has shape"):
        ittt.from_pretrained(stored / "adapter", model=plain("llama", changes={"num_hidden_layers": 1}))
    with pytest.raises(ittt.UserError, match="fast weights already: detach"):
        ittt.from_pretrained(stored / "adapter", model=adapted("llama"))
    with pytest.raises(ittt.UserError, match="holds a whole model: leave out model="):
        ittt.from_pretrained(stored / "whole", model=plain("llama"))
    with pytest.raises(ittt.UserError, match="an adapter without its base model's name: pass model="):
        ittt.from_pretrained(stored / "adapter")


def test_a_swapped_base(copy_of):
    """The whole model's own base is checked too."""
    path, other = copy_of("whole"), plain("llama", torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.2)
    other.save_pretrained(path / "base")
    with pytest.raises(ittt.UserError, match="wrong base model"):
        ittt.from_pretrained(path)


def test_a_base_by_name_that_is_not_there(copy_of):
    path = copy_of("adapter")
    edit_settings(path, base={"model_type": "llama", "name": "/nowhere/llama"})
    with pytest.raises(ittt.UserError, match=r"its base model '/nowhere/llama' .*pass model="):
        ittt.from_pretrained(path)


def test_directories_that_hold_something_else(stored, tmp_path):
    plain("llama").save_pretrained(tmp_path / "plain")
    with pytest.raises(ittt.UserError, match=r"is a plain model without fast weights: load it .* inplace_ttt.attach"):
        ittt.from_pretrained(tmp_path / "plain")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ittt.UserError, match="holds no model: it has neither"):
        ittt.from_pretrained(tmp_path / "empty")
    with pytest.raises(ittt.UserError, match="no model directory at"):
        ittt.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ittt.UserError, match="no model directory at"):
        ittt.from_pretrained(stored / "whole" / SETTINGS)
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(ittt.UserError, match=r"config.json is damaged"):
        ittt.from_pretrained(tmp_path / "empty")


def test_what_transformers_wrote_but_damaged(copy_of):
    path = copy_of("transformers")
    weights = load_file(path / "model.safetensors")
    conv = weights.pop("model.layers.0.mlp.ttt_conv.weight")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ittt.UserError, match=r"lacks model.layers.0.mlp.ttt_conv.weight"):
        ittt.from_pretrained(path)
    save_file(weights | {"model.layers.0.mlp.ttt_conv.weight": conv, "more": conv.clone()}, path / "model.safetensors")
    with pytest.raises(ittt.UserError, match="weights that LlamaForCausalLM does not know: more"):
        ittt.from_pretrained(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(ittt.UserError, match="transformers"):
        ittt.from_pretrained(path)


def test_nothing_to_save(tmp_path):
    with pytest.raises(ittt.UserError, match=r"no fast weights: call inplace_ttt.attach"):
        ittt.save_pretrained(plain("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_loading_is_silent(stored):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ittt.from_pretrained(stored / "whole", dtype=torch.float32)

"""attach, detach, what they refuse, and models that are copied, stored, described by hand or used side by side."""

import copy
import io

import pytest
import torch
from contract.families import LAYERS, VOCAB, C, adapted, logits, plain, randomise, tokens
from torch.testing import assert_close
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache

import inplace_ttt as ittt
from inplace_ttt.hf.attach import runtime_of

IDS = tokens(2, 2 * C + 3)


def config(**settings):
    return ittt.InPlaceTTTConfig(**({"layers": "0::2", "chunk_size": C, "lr": 0.03} | settings))


def generate(model, prompt=IDS, **keywords):
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, max_new_tokens=C + 1, do_sample=False, **keywords)


# -- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "want"),
    [
        (":", (0, 1, 2)),
        ("0::2", (0, 2)),
        ("1:", (1,) if LAYERS == 2 else (1, 2)),
        ("-2:", (1, 2)),
        ("::-2", (0, 2)),
        ([2, 0], (0, 2)),
        ((-1,), (2,)),
        ((0, -3, 0), (0,)),
    ],
)
def test_choice_of_layers(layers, want):
    model = plain("llama")
    ittt.attach(model, config(layers=layers))
    assert tuple(layer.index for layer in ittt.adapting_layers(model)) == want


@pytest.mark.parametrize(
    ("layers", "say"),
    [
        ((3,), "no layer 3: the model has 3 layers, 0 to 2"),
        ((0, -4), "no layer -4: the model has 3 layers"),
        ("0:36:6", "'0:36:6' reaches outside the model, which has 3 layers"),
        ("-4:", "reaches outside the model, which has 3 layers"),
        ("3::6", "chooses none of the model's 3 layers"),
        ("::0", "reaches outside"),
        ((), "chooses none"),
        ("all", "must be a slice"),
        ("1", "must be a slice"),
    ],
)
def test_layers_that_do_not_exist(layers, say):
    model = plain("llama")
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(ittt.UserError, match=say):
        ittt.attach(model, config(layers=layers))
    assert {n: type(m) for n, m in model.named_modules()} == before
    assert not ittt.is_attached(model)


# -- wrong use --------------------------------------------------------------------------------------------------------


def test_attach_twice_and_detach_without():
    model = plain("llama")
    for act in (
        ittt.detach,
        ittt.adapting_layers,
        lambda m: ittt.set_lr(m, 1.0),
        lambda m: ittt.updates_off(m).__enter__(),
    ):
        with pytest.raises(ittt.UserError, match=r"no fast weights: call inplace_ttt.attach"):
            act(model)
    ittt.attach(model, config())
    with pytest.raises(ittt.UserError, match="fast weights already: detach"):
        ittt.attach(model, config())
    ittt.detach(model)
    ittt.attach(model, config(layers=(1,)))
    assert [layer.index for layer in ittt.adapting_layers(model)] == [1]


def test_what_is_no_transformers_model():
    with pytest.raises(ittt.UserError, match="expected a transformers causal language model, got Linear"):
        ittt.attach(torch.nn.Linear(2, 2))


def test_a_layer_called_by_itself():
    model = adapted("llama")
    hidden = torch.randn(2, 3, 32, dtype=torch.float64)
    embeddings = model.model.rotary_emb(hidden, torch.arange(3)[None])
    say = "layer 0 was called outside the model's forward.*call the whole model, or detach"
    with pytest.raises(RuntimeError, match=say):
        model.model.layers[0](hidden, position_embeddings=embeddings)
    with pytest.raises(RuntimeError, match=say):
        model.model.layers[0].mlp(hidden)
    with pytest.raises(RuntimeError, match=say):
        model.model.layers[0].mlp.down_proj(torch.randn(2, 3, 48, dtype=torch.float64))
    want = logits(model, IDS)
    model.model.layers[1](hidden, position_embeddings=embeddings)
    assert torch.equal(logits(model, IDS), want)


def test_an_exception_in_a_forward_leaves_nothing_behind():
    model = adapted("llama")
    want = logits(model, IDS)
    with pytest.raises(IndexError):
        model(torch.full((1, 3), VOCAB + 5))
    broken = model.model.layers[2].mlp.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(IDS)
    broken.remove()
    runtime = runtime_of(model)
    assert runtime.current is None
    assert all(site.context is None and site._input.get() is None for site in runtime.sites)
    assert torch.equal(logits(model, IDS), want)
    with pytest.raises(RuntimeError, match="outside the model's forward"):
        model.model.layers[0].mlp(torch.randn(2, 3, 32, dtype=torch.float64))


def test_a_projection_that_was_dispatched():
    model = plain("llama")
    model.model.layers[0].mlp.down_proj.forward = lambda z: z
    with pytest.raises(ittt.UserError, match="without offloading"):
        ittt.attach(model, config())
    assert not ittt.is_attached(model)
    assert type(model.model.layers[2].mlp.down_proj) is torch.nn.Linear


def test_a_new_embedding_module_is_noticed():
    model = adapted("llama")
    model.set_input_embeddings(copy.deepcopy(plain("llama").get_input_embeddings()))
    with pytest.raises(RuntimeError, match="embedding module replaced"):
        model(IDS)


def test_replicas_of_data_parallel_are_refused():
    """Their threads would share hooks. ``Trainer`` makes such replicas by itself where it sees several devices."""
    model = adapted("llama")
    replica = model._replicate_for_data_parallel()
    replica.model = model.model._replicate_for_data_parallel()
    with pytest.raises(NotImplementedError, match=r"torch.nn.DataParallel .*torchrun"):
        replica.model(IDS)
    assert runtime_of(model).current is None


def test_continuous_batching_is_refused():
    """Before it starts: in its own thread the error would only mark requests as failed, or hang."""
    model = adapted("llama", torch.float32)
    say = "continuous batching mixes requests in one row.*call generate"
    settings = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0)
    with pytest.raises(NotImplementedError, match=say):
        model.generate_batch(inputs=[[3, 4, 5], [6, 7]], generation_config=settings)
    with pytest.raises(NotImplementedError, match=say):
        model.init_continuous_batching(settings)
    paged = type("PagedAttentionCache", (), {})()
    for given in ({"cache": paged}, {"write_index": object()}):
        with pytest.raises(NotImplementedError, match=say):
            model(IDS, **given)
    assert runtime_of(model).current is None


# -- settings and inspection ------------------------------------------------------------------------------------------


def test_without_effect_is_the_base_bit_for_bit():
    model, base = adapted("llama"), logits(plain("llama"), IDS)
    assert not torch.equal(logits(model, IDS), base)
    with ittt.updates_off(model):
        assert torch.equal(logits(model, IDS), base)
        with ittt.updates_off(model):
            pass
        assert torch.equal(logits(model, IDS), base)
    ittt.set_lr(model, 0)
    assert torch.equal(logits(model, IDS), base)
    ittt.set_lr(model, 0.03)
    assert torch.equal(logits(model, IDS), logits(adapted("llama"), IDS))
    with pytest.raises(ZeroDivisionError), ittt.updates_off(model):
        1 / 0  # noqa: B018
    assert not torch.equal(logits(model, IDS), base)


@pytest.mark.parametrize(
    ("model_type", "name", "kind"),
    [
        ("llama", "model.layers.{}.mlp.down_proj", "FastWeightLinear"),
        ("gpt2", "transformer.h.{}.mlp.c_proj", "FastWeightConv1D"),
    ],
)
def test_adapting_layers(model_type, name, kind):
    infos = ittt.adapting_layers(adapted(model_type))
    assert [info.projection for info in infos] == [name.format(i) for i in (0, 2)]
    assert {(info.kind, info.shape, info.extra_parameters) for info in infos} == {(kind, (32, 48), 32 * 5 + 32 * 32)}


def test_the_older_name():
    """Alone and from its module, as users have it."""
    from inplace_ttt.hf.attach import inspect

    model = adapted("llama")
    assert ittt.inspect(model) == inspect(model) == ittt.adapting_layers(model)


def test_adapting_layers_tells_the_size_of_a_row():
    model = adapted("llama", torch.float32)
    with torch.no_grad():
        cache = model(IDS).past_key_values
    for info in ittt.adapting_layers(model):
        S = ittt.fast_weights(cache)[info.index].S
        assert info.state_bytes == S[0].numel() * S.element_size()


# -- copies and several models ----------------------------------------------------------------------------------------


def copied(model, how):
    if how == "deepcopy":
        return copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("target", ["input_embed", "hidden_states"])
def test_a_copy_is_a_model_of_its_own(how, model_type, target):
    model = adapted(model_type, target=target)
    want, text = logits(model, IDS), generate(model)
    other = copied(model, how)
    assert torch.equal(logits(other, IDS), want)
    assert torch.equal(generate(other), text)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    ittt.set_lr(other, 0.5)
    assert not torch.equal(logits(other, IDS), want)
    assert torch.equal(logits(model, IDS), want)
    ittt.detach(model)
    assert ittt.is_attached(other)
    generate(other)
    ittt.detach(other)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in other.modules())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    assert torch.equal(logits(other, IDS), logits(model, IDS))


def test_two_models_in_turns():
    """One reads a piece, then the other: neither sees the other's state."""
    models = adapted("llama"), adapted("gpt2", chunk_size=2 * C), adapted("llama", target="hidden_states")
    caches = [DynamicCache() for _ in models]
    parts = [[] for _ in models]
    for piece in IDS.split((C - 1, 2, C + 2), 1):
        for model, cache, got in zip(models, caches, parts, strict=True):
            with torch.no_grad():
                got.append(model(piece, past_key_values=cache).logits)
    for model, got in zip(models, parts, strict=True):
        assert_close(torch.cat(got, 1), logits(model, IDS), atol=1e-6, rtol=0)


@pytest.mark.parametrize("where", ["model", "model.layers.0.mlp", "model.layers.1.self_attn", "model.embed_tokens"])
def test_one_model_inside_a_hook_of_another(where):
    outer, inner = adapted("llama"), adapted("llama", target="hidden_states")
    want, inside, seen = logits(outer, IDS), logits(inner, IDS[:, : C + 2]), []

    def call(module, args, kwargs):
        seen.append(logits(inner, IDS[:, : C + 2]))

    handle = outer.get_submodule(where).register_forward_pre_hook(call, with_kwargs=True)
    assert torch.equal(logits(outer, IDS), want)
    handle.remove()
    assert len(seen) == 1
    assert torch.equal(seen[0], inside)


def test_a_model_inside_a_hook_of_its_own_embedding():
    model = adapted("llama")
    want, inside, seen = logits(model, IDS), logits(model, IDS[:, : C + 2]), []

    def call(module, args):
        handle.remove()
        seen.append(logits(model, IDS[:, : C + 2]))

    handle = model.get_input_embeddings().register_forward_pre_hook(call)
    assert torch.equal(logits(model, IDS), want)
    assert torch.equal(seen[0], inside)
    assert runtime_of(model).current is None


class OddLinear(torch.nn.Linear):
    """A projection of a class that this library has never seen."""

    def forward(self, z):
        return 2 * super().forward(z)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_projection_of_another_class(how):
    """Its own forward gives the slow part; the fast part is added. Its class is made at run time, yet can be stored."""
    model, same = plain("llama"), adapted("llama")
    for i in (0, 2):
        slow = model.model.layers[i].mlp.down_proj
        model.model.layers[i].mlp.down_proj = odd = OddLinear(48, 32, bias=False, dtype=torch.float64)
        odd.weight = torch.nn.Parameter(slow.weight.detach() / 2)
    ittt.attach(model, config())
    randomise(model)
    other = copied(model, how)
    for one in (model, other):
        assert_close(logits(one, IDS), logits(same, IDS), atol=1e-9, rtol=0)
        assert ittt.adapting_layers(one)[0].kind == "FastWeightOddLinear"
        assert type(ittt.detach(one).model.layers[0].mlp.down_proj) is OddLinear


def test_generation_settings_of_a_config_object():
    model = adapted("llama")
    settings = GenerationConfig(max_new_tokens=C + 1, do_sample=False, pad_token_id=0, cache_implementation="static")
    got = model.generate(IDS, attention_mask=torch.ones_like(IDS), generation_config=settings)
    assert torch.equal(got, generate(model, use_cache=False))


def test_a_model_that_accelerate_dispatched():
    """Its device hooks wrap a bound forward: they must move to the adapting module and back."""
    accelerate = pytest.importorskip("accelerate")
    want = adapted("llama")
    model = accelerate.dispatch_model(plain("llama"), device_map={"": "cpu"}, force_hooks=True)
    before = logits(model, IDS)
    ittt.attach(model, ittt.InPlaceTTTConfig(layers="0::2", chunk_size=C, lr=0.03))
    assert torch.equal(logits(model, IDS), before)
    randomise(model)
    assert_close(logits(model, IDS), logits(want, IDS))
    assert hasattr(model.model.layers[0].mlp.down_proj, "_hf_hook")
    ittt.detach(model)
    assert torch.equal(logits(model, IDS), before)


def test_offloaded_weights_are_refused_before_anything_changes():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(plain("llama"), execution_device="cpu")
    before = logits(model, IDS)
    with pytest.raises(ittt.UserError, match="without offloading"):
        ittt.attach(model, config())
    assert not ittt.is_attached(model)
    assert torch.equal(logits(model, IDS), before)

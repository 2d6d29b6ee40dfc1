"""Adapters (peft) on the very projection that adapts: both orders, trained together, merged, saved."""

import copy

import pytest
import torch
from contract.families import ONE_LAYER, C, adapted, logits, plain, randomise, tokens
from torch.testing import assert_close

import inplace_ttt as ittt
from inplace_ttt.hf.cache import cache_name, cache_of
from inplace_ttt.hf.linear import FastWeight, FastWeightLinear

peft = pytest.importorskip("peft")

IDS = tokens(2, 2 * C + 3)
TARGETS = {"llama": ["down_proj", "q_proj"], "gpt2": ["c_proj", "c_attn"]}
ADDED = ["ttt_conv", "ttt_proj"]


def lora(model, model_type="llama", **changes):
    settings = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": TARGETS[model_type]} | changes
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings)).to(torch.float64)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


def attached(model, **settings):
    ittt.attach(model, ittt.InPlaceTTTConfig(**({"layers": "0::2", "chunk_size": C, "lr": 0.03} | settings)))
    randomise(model)
    return model


def generate(model, **keywords):
    mask = torch.ones_like(IDS)
    return model.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=C + 1, do_sample=False, **keywords)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("target", ["input_embed", "hidden_states"])
def test_both_orders_are_the_same_model(model_type, target):
    """o = (W0 + lr S) z + B A z, whichever came first."""
    first = lora(adapted(model_type, target=target), model_type)
    second = attached(lora(plain(model_type), model_type), target=target)
    want = logits(first, IDS)
    assert_close(logits(second, IDS), want, atol=1e-9, rtol=0)
    assert torch.equal(generate(first), generate(second))
    assert torch.equal(generate(first), generate(first, use_cache=False))
    with first.disable_adapter():
        assert_close(logits(first, IDS), logits(adapted(model_type, target=target), IDS), atol=1e-9, rtol=0)
        assert float((logits(first, IDS) - want).abs().max()) > 1e-2
    with ittt.updates_off(first):
        assert_close(logits(first, IDS), logits(lora(plain(model_type), model_type), IDS), atol=1e-9, rtol=0)
    for model in (first, second):
        ittt.detach(model)
        assert not any(isinstance(m, FastWeight) for m in model.modules())
        assert_close(logits(model, IDS), logits(lora(plain(model_type), model_type), IDS), atol=1e-9, rtol=0)


@pytest.mark.parametrize("order", ["attach first", "lora first"])
def test_merge_and_unload(order):
    model = lora(adapted("llama")) if order == "attach first" else attached(lora(plain("llama")))
    want = logits(model, IDS)
    merged = model.merge_and_unload()
    assert ittt.is_attached(merged)
    assert type(merged.model.layers[0].mlp.down_proj) is FastWeightLinear
    assert_close(logits(merged, IDS), want, atol=1e-9, rtol=0)
    ittt.detach(merged)
    assert type(merged.model.layers[0].mlp.down_proj) is torch.nn.Linear


def test_merge_in_place_and_back():
    model = lora(adapted("llama"))
    want = logits(model, IDS)
    model.merge_adapter()
    assert_close(logits(model, IDS), want, atol=1e-9, rtol=0)
    model.unmerge_adapter()
    assert_close(logits(model, IDS), want, atol=1e-9, rtol=0)


def test_training_both_together_and_saving(tmp_path):
    """``modules_to_save`` trains the added parameters beside LoRA's; a reload gives the same model."""
    model = lora(adapted("llama"), modules_to_save=ADDED).train()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.rsplit("layers.", 1)[1] for n in trained if "ttt_" in n} == {
        f"{i}.mlp.{name}.modules_to_save.default.weight" for i in (0, 2) for name in ADDED
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trained
    want = logits(model.eval(), IDS)
    model.save_pretrained(tmp_path)
    base = attached(plain("llama"))
    again = peft.PeftModel.from_pretrained(base, tmp_path).to(torch.float64).eval()
    assert_close(logits(again, IDS), want, atol=1e-6, rtol=0)
    merged = again.merge_and_unload()
    assert_close(logits(merged, IDS), want, atol=1e-6, rtol=0)
    ittt.save_pretrained(merged, tmp_path / "merged")
    assert_close(logits(ittt.from_pretrained(tmp_path / "merged", dtype=torch.float64), IDS), want, atol=1e-6, rtol=0)


def test_saving_only_what_was_added_under_lora(tmp_path):
    model = lora(adapted("llama"), modules_to_save=ADDED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ttt_" in name and "modules_to_save" in name:
                parameter.mul_(2)
    ittt.save_pretrained(model, tmp_path, adapter_only=True)
    again = lora(ittt.from_pretrained(tmp_path, model=plain("llama")))
    assert_close(logits(again, IDS), logits(model, IDS), atol=1e-9, rtol=0)


def test_saving_a_whole_model_with_lora_inside_is_refused(tmp_path):
    model = lora(adapted("llama"))
    with pytest.raises(ittt.UserError, match=r"merge_and_unload.*adapter_only"):
        ittt.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ittt.UserError, match="merge_and_unload"):
        ittt.save_release(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_embeddings_beside_it():
    """peft copies a module of ``modules_to_save``: attach afterwards, so that the copy in use is the one watched."""
    model = attached(lora(plain("llama"), modules_to_save=["embed_tokens"])).train()
    assert_close(logits(model.eval(), IDS), logits(lora(adapted("llama")), IDS), atol=1e-9, rtol=0)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "embed_tokens.modules_to_save" in n)
    wrong = lora(adapted("llama"), modules_to_save=["embed_tokens"])
    with pytest.raises(RuntimeError, match="embedding module replaced"):
        wrong(input_ids=IDS)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_training_of_a_frozen_base(reentrant):
    model = lora(adapted("llama", target="hidden_states"), modules_to_save=ADDED).train()

    def gradients():
        model.zero_grad(set_to_none=True)
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    want = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    got = gradients()
    assert set(got) == set(want)
    for name, g in want.items():
        assert_close(got[name], g, atol=1e-9, rtol=0)


PROJECTION = {"target_modules": ["down_proj"]}
METHODS = {
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, **PROJECTION),
    "ia3 of the input": lambda: peft.IA3Config(feedforward_modules=["down_proj"], **PROJECTION),
    "ia3 of the output": lambda: peft.IA3Config(feedforward_modules=[], **PROJECTION),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=8, **PROJECTION),
    "boft": lambda: peft.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=1, **PROJECTION),
    "road": lambda: peft.RoadConfig(group_size=8, **PROJECTION),
    "hra": lambda: peft.HRAConfig(r=2, **PROJECTION),  # never calls the projection, reads its weight
    "shira": lambda: peft.ShiraConfig(r=2, **PROJECTION),  # the same
    "loha": lambda: peft.LoHaConfig(r=2, **PROJECTION),
    "whole": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"]),
}


def wrapped(model, method):
    """The model under an adapter that changes it visibly."""
    found = peft.get_peft_model(model, METHODS[method]()).to(torch.float64).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return found


@pytest.mark.parametrize("order", ["attach first", "adapter first"])
@pytest.mark.parametrize("method", METHODS)
def test_merging_changes_nothing(method, order):
    """o = adapted(W0)(z) + lr S z for any method: what the MLP gives is what is remembered and looked up."""
    model = wrapped(adapted("llama"), method) if order == "attach first" else attached(wrapped(plain("llama"), method))
    want, written = logits(model, IDS), generate(model)
    with ittt.updates_off(model):
        assert float((logits(model, IDS) - want).abs().max()) > 1e-2
    assert torch.equal(written, generate(model, use_cache=False))
    if order == "attach first":
        with model.disable_adapter():
            assert_close(logits(model, IDS), logits(adapted("llama"), IDS), atol=1e-9, rtol=0)
    assert_close(logits(copy.deepcopy(model), IDS), want, atol=1e-9, rtol=0)
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].mlp.down_proj) is FastWeightLinear
    assert_close(logits(merged, IDS), want, atol=1e-9, rtol=0)
    assert torch.equal(generate(merged), written)


@pytest.mark.parametrize("method", ["dora", "ia3 of the input", "hra", "whole"])
def test_the_loss_as_objective_under_an_adapter(method):
    loss = ittt.InPlaceTTTConfig(objective="loss", layers="0::2", chunk_size=C, clip=0.1)  # update_size asks for |W0|
    model = wrapped(ittt.attach(plain("llama"), loss), method)
    want = logits(model, IDS)
    with ittt.updates_off(model):
        assert float((logits(model, IDS) - want).abs().max()) > 1e-3
    assert_close(logits(model.merge_and_unload(), IDS), want, atol=1e-9, rtol=0)


def test_an_adapter_that_comes_and_goes():
    """Between two tokens of a text too; nothing of it is left after detach."""
    model = wrapped(adapted("llama"), "dora")
    read = model(IDS[:, :-2], use_cache=True)
    for token, name in ((IDS[:, -2:-1], "merged"), (IDS[:, -1:], "unmerged")):
        read = model(token, **{cache_name(model): cache_of(read)})
        model.merge_adapter() if name == "merged" else model.unmerge_adapter()
    assert_close(read.logits[:, -1], logits(model, IDS)[:, -1], atol=1e-9, rtol=0)
    with ittt.updates_off(model):
        without = logits(model, IDS)
    ittt.detach(model)
    assert not any(m._forward_hooks for m in model.modules())
    assert_close(logits(model, IDS), without, atol=1e-9, rtol=0)


def test_training_under_dora():
    """Gradients pass around the fast weights' part and through it: those of the magnitudes equal differences."""
    model = wrapped(adapted("llama"), "dora").train()

    def loss():
        scores = model(input_ids=IDS, use_cache=False).logits[:, :-1].log_softmax(-1)
        return -scores.gather(2, IDS[:, 1:, None]).mean()

    loss().backward()
    magnitudes = [p for n, p in model.named_parameters() if "magnitude" in n]
    assert len(magnitudes) == 3
    for parameter in magnitudes:
        step = 1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)).double()
        with torch.no_grad():
            parameter.add_(step)
            above = loss()
            parameter.sub_(2 * step)
            below = loss()
            parameter.add_(step)
        assert_close((above - below) / 2, (parameter.grad * step).sum(), atol=0, rtol=1e-2)


@pytest.mark.parametrize("read_before", [False, True])
def test_dora_compiles(read_before):
    """Whether the adapter was noticed before the model is compiled or inside."""
    torch._dynamo.reset()
    model = wrapped(adapted("llama", changes=ONE_LAYER), "dora")
    want = logits(model, IDS) if read_before else None
    for layer in model.base_model.model.model.layers:  # a whole model has sixty graphs around peft's layers
        layer.compile(backend="eager")
    got = logits(model, IDS)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    for layer in model.base_model.model.model.layers:
        layer._compiled_call_impl = None
    assert_close(got, logits(model, IDS) if want is None else want, atol=1e-9, rtol=0)
    torch._dynamo.reset()

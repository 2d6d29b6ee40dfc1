"""Training as users switch it on: transformers' own switches, compile, accumulation, packing arguments, precision."""

import functools
import inspect

import pytest
import torch
from contract.families import ONE_LAYER, TARGETS, C, adapted, logits, plain, tokens
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicCache

import inplace_ttt as ittt

IDS = tokens(2, 2 * C + 3)
targets = pytest.mark.parametrize("target", TARGETS)


def gradients(model, ids=IDS, **keywords):
    model.zero_grad(set_to_none=True)
    model(ids, labels=ids, **keywords).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got, want, tolerance=1e-9):
    assert set(got) == set(want)
    for name, g in want.items():
        assert_close(got[name], g, atol=tolerance * max(float(g.abs().max()), 1.0), rtol=0)


@pytest.mark.parametrize("name", ["gradient_checkpointing_enable", "activation_checkpointing_enable"])
@targets
def test_checkpointing_as_it_comes(name, target):
    """With no argument at all, under either of its names."""
    model = adapted("llama", target=target).train()
    if not hasattr(model, name):
        pytest.skip(f"this transformers has no {name}")
    want = gradients(model)
    getattr(model, name)()
    assert_same(gradients(model), want)
    getattr(model, name.replace("enable", "disable"))()
    assert_same(gradients(model), want)


@targets
@pytest.mark.parametrize("given", ["a cache", "use_cache"])
def test_checkpointing_drops_a_cache(target, given):
    """transformers keeps no keys there, so neither may the fast weights: a recomputation would read the text twice."""
    model = adapted("llama", target=target).train()
    want = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    cache = DynamicCache()
    keywords = {"past_key_values": cache} if given == "a cache" else {"use_cache": True}
    assert_same(gradients(model, **keywords), want)
    assert not ittt.fast_weights(cache)


@targets
def test_checkpointing_with_padding_and_packing(target):
    model = adapted("llama", target=target).train()
    mask = torch.ones_like(IDS)
    mask[0, :3], mask[1, -2:] = 0, 0
    positions = torch.cat([torch.arange(C + 1), torch.arange(IDS.shape[1] - C - 1)])[None]
    for keywords in ({"attention_mask": mask}, {"position_ids": positions, "use_cache": False}):
        model.gradient_checkpointing_disable()
        want = gradients(model, **keywords)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        assert_same(gradients(model, **keywords), want)
        assert any(not torch.equal(want[n], g) for n, g in gradients(model).items())


def checkpoint_mlps(model, way):
    """Activation checkpointing of the MLPs alone, as torch offers it, or in their forward."""
    if way == "forward":
        for layer in model.model.layers:
            layer.mlp.forward = functools.partial(checkpoint, layer.mlp.forward, use_reentrant=False)
        return
    kind = CheckpointImpl.REENTRANT if way == "reentrant" else CheckpointImpl.NO_REENTRANT
    wrap = functools.partial(checkpoint_wrapper, checkpoint_impl=kind)
    kinds = {type(layer.mlp) for layer in model.model.layers}
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrap, check_fn=lambda m: type(m) in kinds)


@targets
def test_text_sampled_while_training_with_checkpointing(target):
    """In training mode, as trainers of reinforcement learning do it between steps."""
    settings = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 2 * C, "do_sample": False}

    def written(model):
        model.train().gradient_checkpointing_enable()
        return model.generate(IDS, **settings)

    if not torch.equal(written(plain("llama")), plain("llama").generate(IDS, **settings)):
        pytest.skip("this transformers itself drops the cache here")
    model = adapted("llama", target=target)
    want = model.generate(IDS, **settings)
    assert not torch.equal(want, plain("llama").generate(IDS, **settings))
    assert torch.equal(written(model), want)


def unwrapped(found):
    return {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in found.items()}


@targets
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_checkpointing_of_the_mlps_alone(model_type, target):
    """Backward computes an MLP again after the model's call; two calls before it, and settings of their own."""
    model = adapted(model_type, target=target).train()

    def both():
        model.zero_grad(set_to_none=True)
        losses = [model(IDS, labels=IDS, position_ids=packed, use_cache=False).loss]
        with ittt.updates_off(model):
            losses.append(model(IDS.flip(1), labels=IDS, use_cache=False).loss)
        ittt.set_lr(model, 0.02)
        losses.append(model(IDS.flip(1), labels=IDS, use_cache=False).loss)
        ittt.set_lr(model, 0.03)
        sum(losses).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    packed = torch.cat([torch.arange(C + 1), torch.arange(IDS.shape[1] - C - 1)])[None].expand(2, -1)
    want = both()
    checkpoint_mlps(model, "not reentrant")
    assert_same(unwrapped(both()), want)


@pytest.mark.parametrize("way", ["reentrant", "forward"])
def test_other_ways_to_compute_an_mlp_again_are_refused(way):
    model = adapted("llama", target="hidden_states").train()
    checkpoint_mlps(model, way)
    with pytest.raises(
        NotImplementedError, match=r"the MLP of layer 2 is computed again in backward.*use_reentrant=False"
    ):
        gradients(model, use_cache=False)


def test_a_recomputed_mlp_never_reads_into_a_cache_twice():
    model = adapted("llama").train()
    checkpoint_mlps(model, "not reentrant")
    with pytest.raises(NotImplementedError, match=r"use_cache=False"):
        gradients(model, use_cache=True)


@pytest.mark.parametrize(("target", "reentrant"), [(TARGETS[0], False), (TARGETS[1], False), (TARGETS[1], True)])
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_the_lr_of_the_forward_counts_in_the_backward(model_type, target, reentrant):
    """A warm-up changes the lr between steps; a recomputation uses the lr of its own forward."""
    model = adapted(model_type, target=target).train()
    want = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.zero_grad(set_to_none=True)
    loss = model(IDS, labels=IDS).loss
    ittt.set_lr(model, 0.5)
    loss.backward()
    assert_same({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, want)


@targets
def test_updates_off_between_forward_and_backward(target):
    model = adapted("llama", target=target).train()
    want = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.zero_grad(set_to_none=True)
    loss = model(IDS, labels=IDS).loss
    with ittt.updates_off(model):
        loss.backward()
    assert_same({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, want)


def test_two_models_in_one_loss():
    """A reference model's forward between the other's forward and backward, as preference losses do it."""
    model, other = adapted("llama").train(), adapted("llama", target="hidden_states").train()
    want = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.zero_grad(set_to_none=True)
    loss = model(IDS, labels=IDS).loss
    with torch.no_grad():
        other(IDS.flip(1)[:, : C + 2])
        model(IDS.flip(1)[:, : C + 2])
    loss.backward()
    assert_same({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, want)


@targets
def test_generating_in_the_middle_of_training(target):
    model = adapted("llama", target=target).train()
    want = gradients(model)
    model.zero_grad(set_to_none=True)
    loss = model(IDS, labels=IDS).loss
    model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=C + 1, do_sample=False)
    loss.backward()
    assert_same({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, want)


@targets
@pytest.mark.parametrize("frozen", [True, False])
def test_adapter_only_training(target, frozen):
    """A frozen base: only the added parameters get gradients, and the same ones."""
    model = adapted("llama", target=target).train()
    want = gradients(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".ttt_" in name or not frozen)
    got = gradients(model)
    assert_same(got, {n: g for n, g in want.items() if ".ttt_" in n or not frozen})


@pytest.mark.parametrize("objective", ["next_token", "reconstruction"])
def test_a_fixed_objective_trains_its_projection_from_step_one(objective):
    """Without a convolution P starts at zero, and gets its gradient at once."""
    model = plain("llama").train()
    base = logits(model, IDS)
    ittt.attach(model, ittt.InPlaceTTTConfig(layers="0::2", chunk_size=C, objective=objective))
    assert not any("ttt_conv" in n for n, _ in model.named_parameters())
    assert torch.equal(logits(model, IDS), base)
    found = {n: g for n, g in gradients(model).items() if "ttt_proj" in n}
    assert len(found) == 2
    assert all(bool(g.any()) for g in found.values())


def test_sequence_numbers_of_flattened_batches():
    """``seq_idx`` and ``cu_seq_lens_q`` of transformers' flattening collator mean the same documents as positions."""
    model, ids = adapted("llama"), tokens(1, 3 * C + 2)
    sizes = [C + 1, 2 * C + 1]
    positions = torch.cat([torch.arange(n) for n in sizes])[None]
    want = logits(model, ids, position_ids=positions)
    bounds = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32)
    flat = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 2 * C + 1, "max_length_k": 2 * C + 1}
    assert_close(logits(model, ids, position_ids=positions, **flat), want)
    numbers = torch.repeat_interleave(torch.arange(2, dtype=torch.int32), torch.tensor(sizes))[None]
    assert_close(logits(model, ids, position_ids=positions, seq_idx=numbers), want)


def test_the_state_stays_in_float32_in_half_precision():
    model = adapted("llama", torch.bfloat16)
    with torch.no_grad():
        cache = model(IDS).past_key_values
    for state in ittt.fast_weights(cache).values():
        assert state.S.dtype == torch.float32
        assert state.z.dtype == state.u.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        cache = adapted("llama", torch.float32)(IDS).past_key_values
    assert {state.S.dtype for state in ittt.fast_weights(cache).values()} == {torch.float32}


@targets
def test_autocast_decoding_equals_autocast_in_one_call(target):
    model = adapted("llama", torch.float32, target=target)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        want = logits(model, IDS).float()
        cache = model(IDS[:, : C + 1]).past_key_values
        got = torch.cat([model(IDS[:, t : t + 1], past_key_values=cache).logits for t in range(C + 1, IDS.shape[1])], 1)
    with ittt.updates_off(model):
        effect = (logits(model, IDS) - want)[:, C + 1 :].square().mean().sqrt()
    error = (got.float() - want[:, C + 1 :]).square().mean().sqrt()
    assert error < 0.1 * effect


# -- compile ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@targets
def test_a_training_step_compiles_without_graph_breaks(target, dynamo):
    """fullgraph: the whole model in one graph, so no break inside the fast layers either."""
    model = adapted("llama", torch.float32, ONE_LAYER, target=target).train()
    want = gradients(model, use_cache=False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad(set_to_none=True)
    compiled(IDS, labels=IDS, use_cache=False).loss.backward()
    assert_same({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, want, 1e-5)
    assert ittt.is_attached(compiled)
    with torch.no_grad(), ittt.updates_off(compiled):
        assert_close(compiled(IDS, use_cache=False).logits, logits(ittt.detach(model), IDS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_a_packed_or_padded_step_compiles(kind, dynamo):
    """Documents and padding are read on the host, so the graph breaks there: before the first layer, not in any.

    Packed rows through aot_eager as well: tests/train/test_train_loss.py.
    """
    model = adapted("llama", torch.float32, ONE_LAYER).train()
    positions, mask = torch.cat([torch.arange(C + 1), torch.arange(IDS.shape[1] - C - 1)])[None], torch.ones_like(IDS)
    mask[1, :3] = 0
    keywords = {"position_ids": positions.expand(2, -1)} if kind == "packed" else {"attention_mask": mask}
    want = gradients(model, use_cache=False, **keywords)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    model.zero_grad(set_to_none=True)
    compiled(IDS, labels=IDS, use_cache=False, **keywords).loss.backward()
    assert_same({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, want, 1e-5)
    assert counter.frame_count <= 3


def test_a_graph_that_breaks_inside_a_layer(dynamo):
    """Before the MLP, and behind it."""
    model = adapted("llama", torch.float32, ONE_LAYER)
    want = logits(model, IDS)
    for name in ("self_attn", "mlp"):
        getattr(model.model.layers[0], name).register_forward_hook(lambda *_: torch._dynamo.graph_break())
    with torch.no_grad():
        assert_close(torch.compile(model, backend="eager")(IDS, use_cache=False).logits, want, atol=1e-5, rtol=1e-5)


def test_hooks_are_found_by_their_signature():
    """The base model's forward names the arguments that the hooks read."""
    names = inspect.signature(plain("llama").base_model.forward).parameters
    assert {"input_ids", "attention_mask", "position_ids", "inputs_embeds", "use_cache"} <= set(names)
    assert len({"past_key_values", "cache"} & set(names)) == 1  # transformers' older name and its newer one

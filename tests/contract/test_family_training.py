"""Training: who gets a gradient when, and that every way transformers trains gives the same one."""

import contextlib

import pytest
import torch
from contract.families import BUILDERS, ONE_LAYER, TARGETS, C, adapted, logits, one_target_each, plain, tokens
from torch.testing import assert_close

import inplace_ttt as ittt

families = pytest.mark.parametrize("model_type", sorted(BUILDERS))
targets = pytest.mark.parametrize("target", TARGETS)


def step(model, *batches):
    """Loss and gradients by name; several batches are one loss, so all forwards come before the backward."""
    model.zero_grad(set_to_none=True)
    loss = sum(model(ids, labels=ids).loss for ids in batches)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(got, want, tolerance=1e-6):
    assert_close(got[0], want[0], atol=tolerance, rtol=0)
    assert set(got[1]) == set(want[1])
    for name, b in want[1].items():
        scale = max(float(b.abs().max()), 1.0)
        assert_close(got[1][name], b, atol=tolerance * scale, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def added(gradients, name):
    return [g for n, g in gradients.items() if f".{name}." in n]


def checkpointing(model, reentrant):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


@families
@targets
def test_who_gets_a_gradient_at_the_initial_values(model_type, target):
    """kappa = 0 makes every c_t zero: kappa's gradient is c's, times u, so it is there at once; P's is c^T dL/dv = 0.

    One step on kappa later P has its own.
    """
    model = plain(model_type).train()
    ittt.attach(model, ittt.InPlaceTTTConfig(layers="0::2", chunk_size=C, target=target))
    ids = tokens(2, 3 * C)
    _, gradients = step(model, ids)
    convs, projections = added(gradients, "ttt_conv"), added(gradients, "ttt_proj")
    assert len(convs) == len(projections) == 2
    assert all(bool(g.abs().amax((0, 1)).gt(0).all()) for g in convs), "a tap of the convolution has no gradient"
    assert not any(bool(g.any()) for g in projections)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ttt_conv." in name:
                parameter -= 1e-2 * parameter.grad / parameter.grad.norm()
    _, gradients = step(model, ids)
    assert all(bool(g.any()) for g in added(gradients, "ttt_proj"))
    assert all(bool(torch.isfinite(g).all()) for g in gradients.values())


@families
def test_a_text_of_one_chunk_trains_nothing_new(model_type):
    """Only complete chunks with tokens after them matter, so nothing shorter reaches the added parameters."""
    model = adapted(model_type).train()
    _, gradients = step(model, tokens(2, C))
    assert not any(bool(g.any()) for g in added(gradients, "ttt_conv") + added(gradients, "ttt_proj"))


@one_target_each()
def test_activation_checkpointing(model_type, target):
    model, ids = adapted(model_type, target=target).train(), tokens(2, 2 * C + 3)
    want = step(model, ids)
    assert added(want[1], "ttt_conv")[0].abs().max() > 1e-3
    checkpointing(model, reentrant=False)
    assert_same_step(step(model, ids), want, 1e-9)
    if target == "hidden_states":
        checkpointing(model, reentrant=True)
        assert_same_step(step(model, ids), want, 1e-9)


@one_target_each(1)
def test_two_forwards_before_one_backward(model_type, target):
    """Of different lengths, so that one forward's chunks would not fit the other's."""
    model = adapted(model_type, target=target).train()
    first, second = tokens(2, 2 * C + 3), tokens(1, 4 * C, seed=1)
    a, b = step(model, first), step(model, second)
    want = a[0] + b[0], {n: a[1][n] + b[1][n] for n in a[1]}
    assert_same_step(step(model, first, second), want)
    checkpointing(model, reentrant=False)
    assert_same_step(step(model, first, second), want)


@families
def test_reentrant_checkpointing_with_the_embedding_target_is_refused(model_type):
    model = adapted(model_type).train()
    checkpointing(model, reentrant=True)
    with pytest.raises(RuntimeError, match=r"use_reentrant.: False.*or target=.hidden_states."):
        model(tokens(2, 2 * C + 3), labels=tokens(2, 2 * C + 3))


@one_target_each(1)
def test_autocast_is_close_to_float32(model_type, target):
    """The error is of the size of the plain model's own, and far below what the fast weights change."""
    model, ids = adapted(model_type, torch.float32, target=target), tokens(4, 3 * C)
    with ittt.updates_off(model):
        slow = logits(model, ids)
        with torch.autocast("cpu", torch.bfloat16):
            slow_error = logits(model, ids).float() - slow
    exact = logits(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        error = logits(model, ids).float() - exact
        loss, gradients = step(model.train(), ids)
    effect = (exact - slow)[:, C:].square().mean().sqrt()
    assert error.square().mean().sqrt() < 3 * slow_error.square().mean().sqrt()
    assert error.square().mean().sqrt() < 0.25 * effect
    want = step(model, ids)
    assert_close(loss.float(), want[0], atol=0.1, rtol=0.03)
    for name in ("ttt_conv", "ttt_proj"):
        for g, w in zip(added(gradients, name), added(want[1], name), strict=True):
            assert g.dtype == torch.float32
            assert torch.nn.functional.cosine_similarity(g.flatten(), w.flatten(), 0) > 0.95


def test_compiled_training_step():
    """With a cache, and of a family whose projection is a Conv1D; others are in tests/hf/test_hf_training.py."""
    model, ids = adapted("gpt2", torch.float32, ONE_LAYER, target="hidden_states").train(), tokens(2, 2 * C + 3)
    want = step(model, ids)
    torch._dynamo.reset()
    with contextlib.ExitStack() as stack:
        stack.callback(torch._dynamo.reset)
        compiled = torch.compile(model, backend="aot_eager")
        model.zero_grad(set_to_none=True)
        loss = compiled(ids, labels=ids).loss
        loss.backward()
    got = loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same_step(got, want, 1e-5)

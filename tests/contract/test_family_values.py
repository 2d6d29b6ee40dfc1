"""The adapting layers compute the specification, however the tokens are fed."""

import pytest
import torch
from contract.families import (
    BUILDERS,
    LEAKS,
    LENGTHS,
    PADDED_DTYPE,
    RECURRENT,
    TARGETS,
    VOCAB,
    C,
    adapted,
    logits,
    one_target_each,
    padded,
    plain,
    tokens,
    tolerance,
)
from torch.testing import assert_close
from transformers.cache_utils import DynamicCache

import inplace_ttt as ittt
from inplace_ttt.core import reference
from inplace_ttt.hf.attach import runtime_of

families = pytest.mark.parametrize("model_type", sorted(BUILDERS))
targets = pytest.mark.parametrize("target", TARGETS)
EXACT = {torch.float64: {"atol": 1e-9, "rtol": 1e-9}, torch.float32: {"atol": 1e-4, "rtol": 1e-4}}
"""Outputs and gradients of one layer."""


class Cut:
    """Records a site's z, u and output, each cut off from what came before, so gradients are the projection's own."""

    def __init__(self, model, site):
        self.site, self.module = site, site.projection()
        self.handles = [
            self.module.register_forward_pre_hook(self.cut_z, prepend=True),
            self.module.register_forward_hook(self.keep),
            site.mlp.register_forward_pre_hook(self.cut_u, prepend=True)
            if runtime_of(model).config.target == "hidden_states"
            else model.get_input_embeddings().register_forward_hook(self.cut_embedding, prepend=True),
        ]

    def remove(self):
        for handle in self.handles:
            handle.remove()

    def cut_z(self, module, args):
        self.z = args[0].detach().requires_grad_()
        return (self.z,)

    def cut_u(self, module, args):
        self.u = args[0].detach().requires_grad_()
        return (self.u,)

    def cut_embedding(self, module, args, output):
        self.u = output.detach().requires_grad_()
        return self.u

    def keep(self, module, args, output):
        self.out = output

    def parameters(self):
        mlp = self.site.mlp
        bias = getattr(self.module, "bias", None)
        return [self.module.weight, mlp.ttt_conv.weight, mlp.ttt_proj.weight, *([] if bias is None else [bias])]

    def specification(self, documents=None, lr=0.03):
        weight, kappa, proj, *bias = self.parameters()
        if type(self.module).__name__ == "FastWeightConv1D":
            weight = weight.T
        out, states = reference(self.z, self.u, weight, kappa[:, 0], proj, lr=lr, chunk_size=C, documents_BT=documents)
        return (out + bias[0] if bias else out), torch.stack([state.S for state in states])


def check_against_specification(model, ids, documents=None, **keywords):
    """One layer at a time: values, and the gradients of z, u and every parameter."""
    for index in range(len(runtime_of(model).sites)):
        cut = Cut(model, runtime_of(model).sites[index])
        model(ids, use_cache=False, **keywords)
        cut.remove()
        want, _ = cut.specification(documents)
        assert_close(cut.out, want, **EXACT[want.dtype])
        inputs, g = [cut.z, cut.u, *cut.parameters()], torch.randn_like(want)
        got_grads = torch.autograd.grad(cut.out, inputs, g, allow_unused=True)
        want_grads = torch.autograd.grad(want, inputs, g, allow_unused=True)
        for a, b in zip(got_grads, want_grads, strict=True):
            if a is None or b is None:
                assert a is None or not a.any()
                assert b is None or not b.any()
            else:
                assert_close(a, b, **EXACT[want.dtype])


@families
@targets
def test_layers_equal_the_specification(model_type, target):
    model = adapted(model_type, target=target)
    for length in LENGTHS:
        check_against_specification(model, tokens(2, length))


@one_target_each(1)
def test_padded_layers_equal_the_specification(model_type, target):
    model = adapted(model_type, PADDED_DTYPE.get(model_type, torch.float64), target=target)
    for side in ("left", "right"):
        batch = padded([tokens(1, n, n) for n in (3 * C, C + 2, 3)], side)
        documents = torch.where(batch["attention_mask"] > 0, 0, -1)
        check_against_specification(model, batch.pop("input_ids"), documents, **batch)


@one_target_each()
def test_the_state_equals_the_specification(model_type, target):
    model, ids = adapted(model_type, target=target), tokens(2, 2 * C + 3)
    cuts = [Cut(model, site) for site in runtime_of(model).sites]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    fast = ittt.fast_weights(cache)
    assert list(fast) == [cut.site.index for cut in cuts]
    for cut, state in zip(cuts, fast.values(), strict=True):
        _, S = cut.specification()
        assert state.S.dtype == torch.float64
        assert state.seen == (2 * C + 3,) * 2
        assert state.updates == (2, 2)
        assert_close(state.S, S, atol=1e-10, rtol=1e-10)
        assert_close(state.u[:, :3], cut.u[:, 2 * C :])


@one_target_each(1)
def test_any_pieces_equal_one_call(model_type, target):
    model, ids = adapted(model_type, target=target), tokens(2, 2 * C + 3)
    want = logits(model, ids)
    for length in LENGTHS:
        assert_close(logits(model, ids[:, :length]), want[:, :length], **tolerance(model_type, want.dtype))
    for sizes in ((2 * C + 3,), (1,) * (2 * C + 3), (C - 1, C + 1, 3), (C, C, 3), (2 * C + 2, 1), (2, 2 * C, 1)):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            got = torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(sizes, 1)], 1)
        assert_close(
            got, want, **tolerance(model_type, want.dtype), msg=lambda text, sizes=sizes: f"pieces {sizes}: {text}"
        )


@one_target_each()
def test_generate_equals_one_call(model_type, target):
    model, prompt = adapted(model_type, target=target), tokens(2, C + 2)
    out = model.generate(
        prompt, max_new_tokens=2 * C + 1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    want = logits(model, out.sequences)
    assert_close(torch.stack(out.logits, 1), want[:, C + 1 : -1].float(), **tolerance(model_type, torch.float32))
    assert torch.equal(out.sequences[:, C + 2 :], want[:, C + 1 : -1].argmax(-1))
    assert all(state.updates == (3, 3) for state in ittt.fast_weights(out.past_key_values).values())


@one_target_each(1)
def test_rows_are_independent_and_padding_changes_nothing(model_type, target):
    model = adapted(model_type, PADDED_DTYPE.get(model_type, torch.float64), target=target)
    rows = [tokens(1, n, n) for n in (3 * C, C + 2, 3, 2 * C)]
    wants = [logits(model, row) for row in rows]
    for side in ("left", "right"):
        batch = padded(rows, side)
        ids, mask, positions = batch["input_ids"], batch["attention_mask"].bool(), batch["position_ids"]
        got = logits(model, **batch)
        for row, want, real in zip(got, wants, mask, strict=True):
            assert_close(row[real], want[0], **tolerance(model_type, want.dtype))
        cache, parts, at = DynamicCache(config=model.config), [], 0
        for n in (3 * C - 2, 1, 1) if model_type in RECURRENT else (C - 1, 1, C + 2, C - 2):
            with torch.no_grad():
                parts.append(
                    model(
                        ids[:, at : at + n],
                        attention_mask=mask[:, : at + n].long(),
                        position_ids=positions[:, at : at + n],
                        past_key_values=cache,
                    ).logits
                )
            at += n
        for row, want, real in zip(torch.cat(parts, 1), wants, mask, strict=True):
            assert_close(row[real], want[0], **tolerance(model_type, want.dtype))
        for state in ittt.fast_weights(cache).values():
            assert state.seen == tuple(len(row[0]) for row in rows)


@one_target_each(1)
def test_packed_documents_equal_separate_ones(model_type, target):
    """Logits and every gradient, with another packing in each row."""
    model, ids = adapted(model_type, target=target), tokens(2, 16)
    layout = ((C + 1, C, 16 - 2 * C - 1), (2 * C + 1, 16 - 2 * C - 1))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in layout])
    if model_type in LEAKS:
        documents = (positions == 0).cumsum(1) - 1
        check_against_specification(model, ids, documents, position_ids=positions)
        base = plain(model_type)
        first = logits(base, ids[:1], position_ids=positions[:1])[:, : 2 * C + 1]
        alone = [logits(base, part) for part in ids[:1, : 2 * C + 1].split((C + 1, C), 1)]
        if float((first - torch.cat(alone, 1)).abs().max()) > 1e-2:
            return  # the base model itself
    weights = torch.randn(2, 16, VOCAB, dtype=torch.float64)
    packed = model(ids, position_ids=positions, use_cache=False).logits
    parameters = [p for p in model.parameters() if p.requires_grad]
    got = torch.autograd.grad((packed * weights).sum(), parameters, allow_unused=True)
    rows = [
        torch.cat([model(part, use_cache=False).logits for part in row[None].split(sizes, 1)], 1)
        for row, sizes in zip(ids, layout, strict=True)
    ]
    separate = torch.cat(rows)
    assert_close(packed, separate, **tolerance(model_type, packed.dtype))
    want = torch.autograd.grad((separate * weights).sum(), parameters, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        if a is None or b is None:
            assert a is b or not (b if a is None else a).any()
        else:
            assert_close(a, b, atol=1e-5 * max(float(b.abs().max()), 1.0), rtol=0)
    joined = logits(model, ids)
    assert float((joined - packed.detach())[:, C + 1 :].abs().max()) > 1e-2


@one_target_each()
def test_a_later_token_changes_nothing_earlier(model_type, target):
    model, ids = adapted(model_type, target=target), tokens(1, 3 * C)
    want = logits(model, ids)
    for t in range(1, 3 * C):
        other = ids.clone()
        other[:, t:] = other[:, t:] % (VOCAB - 1) + 1
        got = logits(model, other)
        assert_close(got[:, :t], want[:, :t], **tolerance(model_type, want.dtype))
        assert float((got - want)[:, t:].abs().max()) > 1e-2

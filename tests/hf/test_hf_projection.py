"""The projection is not what is called: skipped, replaced, fed in other shapes, quantised; and rows too short."""

import pytest
import torch
from contract.families import C, adapted, logits, plain, tokens
from torch.nn.functional import linear
from torch.testing import assert_close

import inplace_ttt as ittt

IDS = tokens(2, 2 * C + 3)


def fused(mlp):
    """A kernel that reads the weight and calls no module."""
    weight = mlp.down_proj.weight
    mlp.forward = lambda x: linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), weight)


def replaced(mlp):
    """As a quantiser does it after attach."""
    plain = torch.nn.Linear(48, 32, bias=False, dtype=torch.float64)
    plain.weight = mlp.down_proj.weight
    mlp.down_proj = plain


@pytest.mark.parametrize("change", [fused, replaced])
def test_a_projection_that_is_not_called_is_noticed(change):
    """At the first forward, with updates on; without them nothing is missing."""
    model = adapted("llama")
    with ittt.updates_off(model):
        want = logits(model, IDS)
    for layer in model.model.layers:
        change(layer.mlp)
    with pytest.raises(RuntimeError, match=r"layer 0: the MLP ran without calling its last projection.*attach last"):
        logits(model, IDS)
    with ittt.updates_off(model):
        assert_close(logits(model, IDS), want)


def reshaped(mlp, form):
    own = mlp.forward
    mlp.forward = {
        "flat": lambda x: own(x.reshape(-1, x.shape[-1])).view(x.shape),
        "tiles of tokens": lambda x: torch.cat([own(part) for part in x.chunk(3, 1)], 1),
        "tiles of flat tokens": lambda x: torch.cat([own(part) for part in x.flatten(0, 1).chunk(2)]).view(x.shape),
    }[form]


@pytest.mark.parametrize("target", ["input_embed", "hidden_states"])
def test_flattened_tokens_are_the_same_tokens(target):
    model = adapted("llama", target=target)
    want = logits(model, IDS)
    for layer in model.model.layers:
        reshaped(layer.mlp, "flat")
    assert_close(logits(model, IDS), want)
    assert torch.equal(
        model.generate(IDS, max_new_tokens=C, do_sample=False),
        model.generate(IDS, max_new_tokens=C, do_sample=False, use_cache=False),
    )


@pytest.mark.parametrize("form", ["tiles of tokens", "tiles of flat tokens"])
def test_tiled_mlps_are_refused(form):
    model = adapted("llama")
    for layer in model.model.layers:
        reshaped(layer.mlp, form)
    with pytest.raises(NotImplementedError, match=r"layer 0 got .* tokens of a call of 2 x 11.*switch tiled MLPs off"):
        logits(model, IDS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamically_quantised_projections_are_refused_at_once():
    model = plain("llama", torch.float32)
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ittt.UserError, match="holds no weight tensor"):
        ittt.attach(quantised, ittt.InPlaceTTTConfig(layers="0::2", chunk_size=C))
    assert not ittt.is_attached(quantised)


class Packed(torch.Tensor):
    """A weight as torchao has them: of a floating dtype, but only a linear layer and ``dequantize`` can use it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is linear:
            x, weight, *bias = args
            return linear(x, weight.dequantize(), *bias, **(kwargs or {}))
        if func in (torch.Tensor.to, torch.Tensor.flatten, torch.linalg.vector_norm, torch.Tensor.float):
            raise NotImplementedError(f"unimplemented operator {func}")
        return super().__torch_function__(func, types, args, kwargs or {})

    def dequantize(self):
        return torch.Tensor._make_subclass(torch.Tensor, self)


@pytest.mark.parametrize("settings", [{}, {"rule_options": {"soft_cap": 0.1}}])
def test_packed_weights_of_a_floating_dtype(settings, tmp_path):
    want, model = adapted("llama", **settings), adapted("llama", **settings)
    for layer in model.model.layers:
        weight = layer.mlp.down_proj.weight.detach()
        layer.mlp.down_proj.weight = torch.nn.Parameter(weight.as_subclass(Packed), requires_grad=False)
        assert type(layer.mlp.down_proj.weight) is Packed
    assert_close(logits(model, IDS), logits(want, IDS), atol=1e-12, rtol=0)
    ittt.save_pretrained(model, tmp_path, adapter_only=True)
    assert any(tmp_path.iterdir())


# -- rows too short to complete a chunk --------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("length", [1, C - 1, C])
def test_short_rows_leave_every_trained_parameter_in_the_graph(length, frozen):
    """What data parallelism waits for: a gradient of zero, not none, also where nothing else is trained."""
    model = adapted("llama").train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or "ttt_" in name)
    ids = tokens(2, length)
    model(ids, labels=ids, use_cache=False).logits.square().sum().backward()
    added = {n: p.grad for n, p in model.named_parameters() if "ttt_" in n}
    assert len(added) == 4
    assert all(g is not None and not g.any() for g in added.values())


def test_the_gradient_of_short_and_long_rows_is_the_sum_of_theirs():
    """Whichever process reads which rows: packed short documents with a long one, rows apart."""
    model = adapted("llama").train()
    rows = [tokens(1, 3 * C + 1), tokens(1, C - 1, seed=1), tokens(1, 2, seed=2)]
    ids = torch.cat(rows, 1)
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]

    def gradients(*calls):
        model.zero_grad(set_to_none=True)
        for call in calls:
            model(**call, use_cache=False).logits.square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    want = gradients({"input_ids": ids, "position_ids": positions})
    got = gradients(*({"input_ids": row} for row in rows))
    for name, g in want.items():
        assert_close(got[name], g, atol=1e-9 * max(float(g.abs().max()), 1.0), rtol=0)

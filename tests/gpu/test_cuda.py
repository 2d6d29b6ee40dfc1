"""The same numbers on a CUDA device: the scan in every precision, and a whole model as users run it."""

import pytest
import torch
from method import scan, target
from transformers import LlamaConfig, LlamaForCausalLM

import inplace_ttt as ittt
from inplace_ttt.core import ChunkTable, reference

pytestmark = pytest.mark.gpu
D, F, K, C = 48, 80, 5, 32


def inputs(B, T, dtype):
    def make(*shape, scale=1.0):
        return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype).cuda().requires_grad_()

    return make(B, T, F), make(B, T, D), make(D, F, scale=0.1), make(D, K, scale=0.1), make(D, D, scale=0.1)


def fast(tensors, documents, lr):
    z, u, weight, kappa, proj = tensors
    table = ChunkTable.build(*z.shape[:2], C, documents=documents, keep_state=True).to(z.device)
    v = target(u, kappa, proj, table)
    return scan(z, v, weight, table, lr=lr)[0]


def documents_of(kind, B, T):
    if kind == "plain":
        return None
    docs = (torch.rand(B, T) < 0.01).long().cumsum(1)
    docs[0, :13] = -1
    return docs


@pytest.mark.parametrize("kind", ["plain", "padded packed"])
def test_float64_equals_the_reference(kind):
    tensors = inputs(2, 5 * C + 3, torch.float64)
    documents = documents_of(kind, 2, 5 * C + 3)
    got = fast(tensors, documents, 0.3)
    want, _ = reference(*tensors, lr=0.3, chunk_size=C, documents_BT=documents)
    torch.testing.assert_close(got, want)
    g = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, tensors, g), torch.autograd.grad(want, tensors, g), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_a_plain_linear(dtype):
    """Relative error against float64 on the same rounded inputs, values and gradients, over that of a plain Linear."""
    tensors = inputs(2, 32 * C, dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    got, want = fast(tensors, None, 0.05), fast(exact, None, 0.05)
    g = torch.randn_like(got)
    grads = torch.autograd.grad(got, tensors, g), torch.autograd.grad(want, exact, g.double())

    def error(a, b):
        return ((a.double() - b).norm() / b.norm()).item()

    plain = error(torch.nn.functional.linear(tensors[0], tensors[2]), torch.nn.functional.linear(exact[0], exact[2]))
    assert error(got, want) < 2.5 * plain
    for name, a, b in zip(("z", "u", "weight", "kappa", "proj"), *grads, strict=True):
        assert error(a, b) < 4 * plain, name


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config).cuda().eval()
    ittt.attach(model, ittt.InPlaceTTTConfig(layers="0::2", chunk_size=8))
    for name, parameter in model.named_parameters():
        if "ttt_conv" in name:
            torch.nn.init.normal_(parameter, std=100.0)
    return model


@pytest.mark.parametrize("kw", [{}, {"cache_implementation": "static"}, {"num_beams": 3}])
def test_generate_with_left_padding_equals_no_cache(model, kw):
    ids = torch.randint(1, 128, (3, 21), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    mask[1, :2] = 0
    common = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    beams = {k: v for k, v in kw.items() if k == "num_beams"}
    want = model.generate(ids, use_cache=False, **common, **beams)
    torch.testing.assert_close(model.generate(ids, **common, **kw), want)
    with torch.no_grad():
        on = model(want, use_cache=False).logits
        with ittt.updates_off(model):
            assert (on - model(want, use_cache=False).logits).abs().max() > 1e-2, "the fast weights do too little here"


def test_compiled_training_step_in_bfloat16(model):
    ids = torch.randint(1, 128, (2, 40), device="cuda")
    model.train()
    losses, grads = [], []
    for run in (model, torch.compile(model)):
        model.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = run(ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        grads.append(model.model.layers[0].mlp.ttt_conv.weight.grad.clone())
    assert abs(losses[0] - losses[1]) < 0.02
    assert (grads[0] - grads[1]).norm() < 0.1 * grads[0].norm()

"""Attention of packed rows: varlen and flex_attention against transformers' own masks, alone and in a model."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from inplace_ttt.train import attention
from inplace_ttt.train.attention import VARLEN, choose_attention, document_bounds, varlen_works

T = 48


def reference_varlen(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, bounds_k: Tensor, longest: int, longest_k: int, **settings: Any
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` documents, in a loop over documents: q, k, v [N, H, d]."""
    assert torch.equal(bounds, bounds_k)
    assert bounds.dtype == torch.int32
    left, right = settings["window_size"]
    assert right == 0
    outs = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        assert end - start <= longest
        t = torch.arange(end - start)
        back = t[:, None] - t[None, :]
        mask = (back >= 0) & ((back <= left) | (left < 0))
        parts = [x[start:end].transpose(0, 1) for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask, scale=settings["scale"])
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs varlen attention's own code on the CPU, with the loop in place of the CUDA kernel."""
    monkeypatch.setattr(attention, "_varlen", reference_varlen)
    attention.register()


def packed_positions(*rows: tuple[int, ...]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])


def tiny_model(window: int | None = 8, kv_heads: int = 1) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mistral",
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=kv_heads,
        head_dim=16,
        sliding_window=window,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def test_document_bounds() -> None:
    positions = packed_positions((5, 3), (8,), (1, 1, 6))
    assert document_bounds(positions, 3, 8, torch.device("cpu")).tolist() == [0, 5, 8, 16, 17, 18, 24]
    assert document_bounds(None, 2, 8, torch.device("cpu")).tolist() == [0, 8, 16]
    shared = torch.arange(8)[None]  # one row of positions for all rows
    assert document_bounds(shared, 3, 8, torch.device("cpu")).tolist() == [0, 8, 16, 24]


def test_bounds_are_kept_for_the_same_tensor_only() -> None:
    positions = packed_positions((5, 3))
    first = document_bounds(positions, 1, 8, torch.device("cpu"))
    assert document_bounds(positions, 1, 8, torch.device("cpu")) is first
    positions[0] = torch.arange(8)
    assert document_bounds(positions, 1, 8, torch.device("cpu")).tolist() == [0, 8], "changed in place"
    assert document_bounds(packed_positions((2, 6)), 1, 8, torch.device("cpu")).tolist() == [0, 2, 8]


@pytest.mark.usefixtures("on_cpu")
def test_self_check_notices_a_wrong_window(monkeypatch: pytest.MonkeyPatch) -> None:
    assert varlen_works(torch.device("cpu"))

    def off_by_one(*tensors: Any, window_size: tuple[int, int], **settings: Any) -> Tensor:
        return reference_varlen(*tensors, window_size=(window_size[0] + 1, 0), **settings)

    monkeypatch.setattr(attention, "_varlen", off_by_one)
    assert not varlen_works(torch.device("cpu"))


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("window", [8, None])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("rows", [((T,), (T,)), ((20, 28), (T,)), ((1, 30, 17), (9, 9, 30))], ids=str)
def test_model_with_varlen_equals_sdpa(
    monkeypatch: pytest.MonkeyPatch, window: int | None, kv_heads: int, rows: tuple[tuple[int, ...], ...]
) -> None:
    """Loss and gradients under bf16 autocast, as in training; a dense mask would hide nothing here."""
    model = tiny_model(window, kv_heads)
    ids, positions = torch.randint(50, (2, T)), packed_positions(*rows)
    calls = []
    monkeypatch.setattr(attention, "_varlen", lambda *a, **k: calls.append(1) or reference_varlen(*a, **k))
    gradients, losses = [], []
    for implementation in ("sdpa", VARLEN):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    undivided = window is None and all(len(row) == 1 for row in rows)
    assert len(calls) == (0 if undivided else 2), "one call a layer; whole rows go by sdpa"
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.999


@torch.library.custom_op("inplace_ttt_tests::varlen", mutates_args=())
def opaque_varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float, left: int) -> Tensor:
    """The reference as one operator, as PyTorch's own is."""
    return reference_varlen(q, k, v, bounds, bounds, len(q), len(q), scale=scale, window_size=(left, 0))


@opaque_varlen.register_fake
def _(q: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(q)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("window", [8, None])
def test_compiled_model_with_varlen_is_one_graph(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """Rows with other documents in them run the same graph: nothing is compiled again, no bounds are remembered."""
    model = tiny_model(window)
    model.set_attn_implementation(VARLEN)
    ids, graphs = torch.randint(50, (2, T)), []

    def varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *_: Any, scale: float, window_size: Any) -> Tensor:
        result: Tensor = opaque_varlen(q, k, v, bounds, scale, window_size[0])
        return result

    monkeypatch.setattr(attention, "_varlen", varlen)

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for rows in (((T,), (T,)), ((20, 28), (T,)), ((1, 30, 17), (9, 9, 30))):
            inputs = {"input_ids": ids, "position_ids": packed_positions(*rows), "use_cache": False}
            assert torch.allclose(compiled(**inputs).logits, model(**inputs).logits, atol=0.02), rows
    assert len(graphs) == 1


@pytest.mark.usefixtures("on_cpu")
def test_varlen_model_reads_with_a_cache_and_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where flash attention cannot be used, the mask is there: pieces, padding and float32 equal sdpa."""
    model = tiny_model().eval()
    ids, mask = torch.randint(50, (2, T)), torch.ones(2, T, dtype=torch.long)
    mask[0, :5] = 0
    monkeypatch.setattr(attention, "_varlen", lambda *a, **k: pytest.fail("no half precision here"))
    outputs = []
    for implementation in ("sdpa", VARLEN):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            whole = model(input_ids=ids, use_cache=False).logits
            first = model(input_ids=ids[:, :30], use_cache=True)
            second = model(input_ids=ids[:, 30:], past_key_values=first.past_key_values, use_cache=True)
            padded = model(input_ids=ids, attention_mask=mask).logits
        pieces = torch.cat([first.logits, second.logits], 1)
        assert torch.allclose(whole, pieces, atol=1e-5)
        outputs.append(torch.cat([whole, pieces, padded]))
    assert torch.allclose(*outputs, atol=1e-6)


@pytest.mark.usefixtures("on_cpu")
def test_what_flash_attention_lacks_is_refused() -> None:
    q = torch.zeros(1, 2, 4, 8, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="softcap"):
        attention.varlen_attention(torch.nn.Identity(), q, q, q, None, softcap=30.0)


def test_choice() -> None:
    assert choose_attention("auto", torch.device("cpu")) == "sdpa"
    assert choose_attention("eager", torch.device("cpu")) == "eager"
    assert choose_attention("varlen", torch.device("cpu")) == VARLEN
    assert not varlen_works(torch.device("cpu")), "no such kernel on the CPU, said without an exception"


@pytest.mark.gpu
def test_kernels_on_the_gpu() -> None:
    """The real kernels in a model on packed rows, against a dense mask."""
    device = torch.device("cuda")
    assert varlen_works(device)
    assert choose_attention("auto", device) == VARLEN
    model = tiny_model(window=100, kv_heads=1).to(device)
    ids, positions = torch.randint(50, (2, 512), device=device), packed_positions((300, 212), (512,)).to(device)
    gradients = {}
    for name in ("sdpa", "varlen", "flex_attention"):
        model.set_attn_implementation(choose_attention(name, device))
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False).loss
        loss.backward()
        gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters()])
    for name in ("varlen", "flex_attention"):
        assert torch.nn.functional.cosine_similarity(gradients["sdpa"], gradients[name], dim=0) > 0.999, name

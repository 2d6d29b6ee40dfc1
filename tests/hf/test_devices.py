"""Where tensors are made: another default device, models without values (meta), offloaded weights."""

from functools import partial

import pytest
import torch
import transformers
from contract.families import BUILDERS, TARGETS, C, adapted, logits, padded, plain, tokens
from torch.testing import assert_close
from transformers.cache_utils import DynamicCache

import inplace_ttt as ittt
from inplace_ttt.fast.ranks import Slices, SliceTable

IDS = tokens(2, 2 * C + 3)
ROWS = [tokens(1, n, n) for n in (3 * C, C + 2, 3)]
LEFT, RIGHT = padded(ROWS, "left"), padded(ROWS, "right")
PACKED = torch.cat([torch.arange(C + 1), torch.arange(C + 2)])[None]


def read(model, *pieces, act=lambda cache: None, **keywords):
    """Logits of pieces on one cache, with something done to the cache before the last."""
    cache, out = DynamicCache(config=model.config), []
    cache.activate_past_recording()
    for i, piece in enumerate(pieces):
        if i == len(pieces) - 1:
            act(cache)
        out.append(model(piece, past_key_values=cache, **keywords).logits)
    return torch.cat([x[:1] for x in out], 1)


def padded_pieces(model):
    cache, out, at = DynamicCache(config=model.config), [], 0
    for n in (2 * C, 1, 1, 2):
        ids, positions = (LEFT[name][:, at : at + n] for name in ("input_ids", "position_ids"))
        at += n
        mask = LEFT["attention_mask"][:, :at]
        out.append(model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits)
    return torch.cat(out, 1)


def gradients(model):
    with torch.enable_grad():
        model(IDS, labels=IDS, position_ids=PACKED, use_cache=False).loss.backward()
    found = torch.stack([p.grad.norm() for p in model.parameters()])
    model.zero_grad()
    return found


ACTS = {
    "plain": lambda m: logits(m, IDS),
    "left padding": lambda m: logits(m, **LEFT),
    "right padding": lambda m: logits(m, **RIGHT),
    "positions": lambda m: logits(m, IDS, position_ids=PACKED.expand(2, -1)),
    "seq_idx": lambda m: logits(m, IDS, position_ids=PACKED, seq_idx=(PACKED == 0).cumsum(1)),
    "cu_seq_lens": lambda m: logits(
        m, IDS[:1], position_ids=PACKED, cu_seq_lens_q=torch.tensor([0, C + 1, 2 * C + 3], device="cpu")
    ),
    "pieces": lambda m: read(m, *IDS.split((C - 1, 2, C + 2), 1)),
    "steps": lambda m: read(m, *IDS.split(1, 1)),
    "padded pieces": padded_pieces,
    "crop": lambda m: read(m, IDS, IDS, act=lambda cache: cache.crop(-C - 1)),
    "select": lambda m: read(m, IDS, IDS[:1], act=lambda cache: cache.batch_select_indices([1])),
    "repeat": lambda m: read(m, IDS, IDS.repeat(2, 1), act=lambda cache: cache.batch_repeat_interleave(2)),
    "generate": lambda m: m.generate(
        IDS, attention_mask=torch.ones_like(IDS, device="cpu"), max_new_tokens=C + 1, do_sample=False
    ),
    "gradients": gradients,
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("settings", [{}, {"decay": 0.1, "clip": 0.5, "target": "hidden_states"}])
def test_another_default_device(act, settings):
    """Scripts set it to the GPU while a model and its inputs may lie elsewhere; meta stands for the GPU here."""
    model = adapted("llama", **settings)
    with torch.no_grad():
        want = ACTS[act](model)
        torch.set_default_device("meta")
        try:
            got = ACTS[act](model)
        finally:
            torch.set_default_device(None)
    assert torch.equal(got, want)


@pytest.mark.parametrize("packed", [False, True])
def test_pieces_of_rows_under_another_default_device(packed):
    """Tables of the pieces that ranks read are made on the host."""
    documents = torch.tensor([[0] * 4 + [1] * 28, [0] * 16 + [1] * 16]) if packed else None
    build = partial(SliceTable.build, Slices(2, 1), 2, 32, 4, documents=documents, keep=0.9)
    want = build()
    torch.set_default_device("meta")
    try:
        got = build()
    finally:
        torch.set_default_device(None)
    assert torch.equal(got.carry, want.carry)
    assert torch.equal(got.weights, want.weights)


def test_attach_under_another_default_device():
    """The same parameters as without."""
    models = [plain("llama"), plain("llama")]
    for model, device in zip(models, ("cpu", "meta"), strict=True):
        torch.manual_seed(0)
        with torch.device(device):
            ittt.attach(model, ittt.InPlaceTTTConfig(layers="0::2", chunk_size=C))
    want, got = (m.state_dict() for m in models)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("way", ["apply", "init_weights", "reset_parameters"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3"])
def test_a_model_without_values_begins_like_any_other(model_type, way):
    """Built and attached on the meta device, then ``to_empty``, then filled: as large models are."""
    config = BUILDERS[model_type]()
    nested = config.get_text_config() is not config
    auto = transformers.AutoModelForImageTextToText if nested else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    ittt.attach(model, ittt.InPlaceTTTConfig(layers="0::2", chunk_size=C))
    model.to_empty(device="cpu")
    added = {n: p for n, p in model.named_parameters() if ".ttt_" in n}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    if way == "apply":
        model.apply(model._init_weights)
    elif way == "init_weights":
        model.init_weights()
    else:
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    assert len(added) == 4
    for name, parameter in added.items():
        if ".ttt_conv." in name:
            assert not parameter.any()
        else:
            diagonal = parameter.detach().diagonal()
            assert torch.equal(parameter.detach(), torch.diag(diagonal))
            assert 0.01 < float(diagonal.std()) < 0.04
    if way == "init_weights":  # the others do not reach all of transformers' own modules
        assert all(bool(p.isfinite().all()) for p in model.parameters())
    ittt.detach(model)
    assert not any("_init_weights" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("way", ["init_weights", "reset_parameters"])
@pytest.mark.parametrize("objective", ["learned", "next_error"])
def test_targets_that_begin_with_zero_projections(objective, way):
    """``start="next_token"`` and the error of the next token, without values first and then filled."""
    options = {"start": "next_token"} if objective == "learned" else {}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(BUILDERS["llama"]())
    config = ittt.InPlaceTTTConfig(layers="0::2", chunk_size=C, objective=objective, objective_options=options)
    ittt.attach(model, config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    if way == "init_weights":
        model.init_weights()
    else:
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    added = {n: p.detach() for n, p in model.named_parameters() if ".ttt_" in n}
    assert len(added) == 4
    for name, parameter in added.items():
        assert float(parameter.sum()) == (parameter.shape[0] if ".ttt_conv." in name else 0)
        assert ".ttt_conv." not in name or parameter[:, 0, config.conv_kernel - config.lookahead].eq(1).all()
    assert not ittt.is_trained(model)


def test_trained_parameters_are_not_drawn_again():
    """Transformers' ``init_weights`` leaves alone what has values."""
    model = adapted("llama")
    want = logits(model, IDS)
    model.init_weights()
    assert torch.equal(logits(model, IDS), want)


def offloaded(model, where, directory):
    accelerate = pytest.importorskip("accelerate")
    if where == "cpu":
        return accelerate.cpu_offload(model, execution_device="cpu")
    return accelerate.disk_offload(model, directory, execution_device="cpu")


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("target", TARGETS)
def test_offloaded_after_attach(where, target, tmp_path):
    settings = {"target": target, "clip": 0.5, "clip_relative": True}
    want = adapted("llama", **settings)
    model = offloaded(adapted("llama", **settings), where, tmp_path)
    assert all(p.is_meta for n, p in model.named_parameters() if ".ttt_" in n or "down_proj" in n)
    with torch.no_grad():
        assert torch.equal(logits(model, IDS), logits(want, IDS))
        pieces = IDS.split((C - 1, 1, 1, 1, C + 1), 1)
        assert_close(read(model, *pieces), read(want, *pieces), atol=1e-9, rtol=0)
    keywords = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 2 * C, "do_sample": False}
    assert torch.equal(model.generate(IDS, **keywords), want.generate(IDS, **keywords))
    for adapter_only in (True, False):
        with pytest.raises(ittt.UserError, match=r"has no values here \(offloaded.*save the model before that"):
            ittt.save_pretrained(model, tmp_path / "saved", adapter_only=adapter_only)
    assert not (tmp_path / "saved").exists()

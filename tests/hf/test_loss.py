"""The next-token loss as objective: the naive loop, every form of call, nothing left behind."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import inplace_ttt as ittt
from inplace_ttt.hf import loss
from inplace_ttt.hf.attach import runtime_of
from inplace_ttt.hf.cache import cache_name, cache_of

C, VOCAB, SIZE = 8, 97, 0.1
KINDS = ("llama", "gemma3", "gpt2")
kinds = pytest.mark.parametrize("kind", KINDS)
sizings = pytest.mark.parametrize("size", [SIZE, "auto"])


def plain(kind, dtype=torch.float64):
    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    shape = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4}
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=4, n_head=4, n_positions=128, **ends))
    elif kind == "gemma3":
        layers = ["sliding_attention", "full_attention"] * 2
        config = Gemma3TextConfig(
            vocab_size=VOCAB, **shape, num_key_value_heads=2, head_dim=8, sliding_window=12, layer_types=layers, **ends
        )
        model = Gemma3ForCausalLM(config)
    else:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **shape, num_key_value_heads=2, **ends))
    return model.to(dtype).eval()


def reader(kind, dtype=torch.float64, **settings):
    values = {"layers": "0::2", "chunk_size": C, "update_size": SIZE, **settings}
    return ittt.attach(plain(kind, dtype), ittt.InPlaceTTTConfig(objective="loss", **values))


def tokens(rows, n, seed=1):
    return torch.randint(1, VOCAB, (rows, n), generator=torch.Generator().manual_seed(seed))


IDS = tokens(2, 45)


@torch.no_grad()
def logits(model, ids, **keywords):
    return model(ids, use_cache=False, **keywords).logits


@torch.no_grad()
def pieces(model, ids, sizes, cache=None):
    out, at = [], 0
    for n in sizes:
        found = model(ids[:, at : at + n], use_cache=True, **{cache_name(model): cache})
        cache, at = cache_of(found), at + n
        out.append(found.logits)
    return torch.cat(out, 1), cache


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def projections(model, kind):
    layers = model.transformer.h if kind == "gpt2" else model.model.layers
    return [layers[i].mlp.c_proj if kind == "gpt2" else layers[i].mlp.down_proj for i in (0, 2)]


@kinds
@pytest.mark.parametrize("settings", [{}, {"decay": 0.2}, {"update_size": None, "clip": 0.3, "lr": 0.5}])
def test_equals_gradient_descent_on_the_weights_themselves(kind, settings):
    """The naive loop: after each chunk, one step of the projections' weights down the gradient of its loss."""
    got = logits(reader(kind, **settings), IDS[:1])
    model, out = plain(kind), []
    modules, cache = projections(model, kind), DynamicCache(config=model.config)
    slow = [m.weight.detach().clone() for m in modules]
    size, clip, lr = settings.get("update_size", SIZE), settings.get("clip"), settings.get("lr", 1.0)
    sums = [torch.zeros_like(w) for w in slow]
    for at in range(0, IDS.shape[1], C):
        ids = IDS[:1, at : at + C]
        found = model(ids, use_cache=True, **{cache_name(model): cache})
        out.append(found.logits.detach())
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        if ids.shape[1] < C:
            break
        loss = cross_entropy(found.logits[0, :-1], ids[0, 1:], reduction="sum")
        for S, W, module, g in zip(
            sums, slow, modules, torch.autograd.grad(loss, [m.weight for m in modules]), strict=True
        ):
            step = -g * (size * W.norm() / g.norm() if size else min(1.0, clip / float(g.norm())))
            S.mul_(1 - settings.get("decay", 0.0)).add_(step)
            module.weight.data = W + lr * S
    close(got, torch.cat(out, 1))
    assert not torch.allclose(got[:, C:], logits(plain(kind), IDS[:1])[:, C:])


@sizings
@kinds
@pytest.mark.parametrize("sizes", [[13, 3, 20, 9], [1] * 45, [8] * 5 + [5], [45]])
def test_one_call_is_any_pieces(kind, size, sizes):
    model = reader(kind, update_size=size)
    close(pieces(model, IDS, sizes)[0], logits(model, IDS))


@sizings
@kinds
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(kind, size, side):
    model, rows, pads = reader(kind, update_size=size), tokens(3, 45), (0, 5, 11)
    ids, mask = torch.zeros(3, 56, dtype=torch.int64), torch.zeros(3, 56, dtype=torch.int64)
    spans = [slice(p, p + 45) if side == "left" else slice(0, 45 - p) for p in pads]
    for b, span in enumerate(spans):
        ids[b, span] = rows[b, : span.stop - span.start]
        mask[b, span] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = logits(model, ids, attention_mask=mask, position_ids=positions)
    for b, span in enumerate(spans):
        close(got[b, span], logits(model, rows[b : b + 1, : span.stop - span.start])[0])


@sizings
@kinds
def test_packed_documents_are_read_apart(kind, size):
    model = reader(kind, update_size=size)
    positions = torch.cat([torch.arange(30), torch.arange(15)])[None]
    got = logits(model, IDS[:1], position_ids=positions)
    want = torch.cat([logits(model, IDS[:1, :30]), logits(model, IDS[:1, 30:])], 1)
    close(got, want)


@sizings
@kinds
def test_scores_come_before_updates(kind, size):
    model, changed = reader(kind, update_size=size), IDS.clone()
    changed[:, 30] = (changed[:, 30] + 1) % VOCAB
    moved = (logits(model, changed) - logits(model, IDS)).abs().amax(-1)
    assert moved[:, :30].max() == 0
    assert moved[:, 30:].min(1).values.max() > 0


@sizings
def test_rows_are_independent(size):
    model = reader("llama", update_size=size)
    close(logits(model, IDS), torch.cat([logits(model, row[None]) for row in IDS]))


@pytest.mark.parametrize(
    ("kind", "learn", "size"),
    [
        *((kind, "read", SIZE) for kind in KINDS),
        ("llama", "all", "auto"),
        ("gemma3", "all", SIZE),
        ("gpt2", "all", SIZE),
    ],
)
def test_generate_in_all_modes(kind, learn, size):
    model = reader(kind, learn=learn, update_size=size)
    found, cache = pieces(model, IDS, [45])
    want = IDS
    for _ in range(12):
        token = found[:, -1:].argmax(-1)
        want = torch.cat([want, token], 1)
        with runtime_of(model).override(learn=learn == "all"):
            found, cache = pieces(model, token, [1], cache)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), want)
    assert torch.equal(model.generate(IDS, cache_implementation="static", **options), want)
    assert torch.equal(model.generate(IDS, prefill_chunk_size=7, **options), want)
    assert torch.equal(model.generate(IDS[:1], prompt_lookup_num_tokens=5, **options), want[:1])
    beams = [model.generate(IDS, num_beams=3, use_cache=use, **options) for use in (True,)]
    assert beams[0].shape == want.shape


def test_what_the_model_writes_is_learned_only_when_asked():
    read, everything = reader("llama"), reader("llama", learn="all")
    options = {"max_new_tokens": 3 * C, "do_sample": False, "return_dict_in_generate": True}
    states = []
    for model in (read, everything):
        cache = DynamicCache(config=model.config)
        model.generate(IDS[:1, : 2 * C], **{cache_name(model): cache}, **options)
        states.append(ittt.fast_weights(cache)[0].S)
    want = ittt.fast_weights(pieces(read, IDS[:1, : 2 * C], [2 * C])[1])[0].S
    close(states[0], want)
    assert not torch.allclose(states[1], want)


@sizings
@pytest.mark.parametrize(("kind", "layers"), [*((kind, "0::2") for kind in KINDS), ("gemma3", "1::2")])
def test_caches_are_cropped_reordered_and_repeated(kind, layers, size):
    model, plain_model = (reader(kind, layers=layers, update_size=size) for _ in range(2))
    want = logits(plain_model, IDS)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    _, cache = pieces(model, IDS, [30, 15], cache)
    cache.crop(-17)
    close(pieces(model, IDS[:, 28:], [17], cache)[0], want[:, 28:])
    _, cache = pieces(model, IDS, [29])
    cache.reorder_cache(torch.tensor([1, 1]))
    close(pieces(model, IDS[[1, 1], 29:], [16], cache)[0], want[[1, 1], 29:])


def test_nothing_is_left_behind():
    model = reader("llama")
    want = logits(model, IDS)
    with torch.inference_mode():
        close(model(IDS, use_cache=False).logits.clone(), want)
    out = model(IDS, labels=IDS, use_cache=False)  # without no_grad
    assert not out.logits.requires_grad
    torch.testing.assert_close(out.loss.double(), cross_entropy(want[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    _, cache = pieces(model, IDS, [45])
    assert not any(x.requires_grad for layer in cache.layers for x in (layer.keys, layer.values))
    before = logits(plain("llama"), IDS)
    with ittt.updates_off(model):
        close(logits(model, IDS), before)
    close(logits(ittt.detach(model), IDS), before)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("keep", [1, 3, 20])
def test_logits_to_keep(keep):
    model = reader("llama")
    close(logits(model, IDS, logits_to_keep=keep), logits(model, IDS)[:, -keep:])
    which = torch.tensor([0, 9, 44])
    close(logits(model, IDS, logits_to_keep=which), logits(model, IDS)[:, which])


def test_a_call_returns_a_cache_where_the_plain_model_does():
    model, other = reader("llama"), plain("llama")
    for asked in ({}, {"use_cache": True}, {"use_cache": False}):
        with torch.no_grad():
            assert (cache_of(model(IDS, **asked)) is None) == (cache_of(other(IDS, **asked)) is None)
    with torch.no_grad():
        first = model(IDS[:, :20])
        rest = model(IDS[:, 20:], **{cache_name(model): cache_of(first)})
    close(torch.cat([first.logits, rest.logits], 1), logits(model, IDS))
    for use_cache in (True, False):  # no cache is no key of the output, which beam search looks at
        found = model.generate(IDS, max_new_tokens=12, num_beams=3, do_sample=False, use_cache=use_cache)
        assert found.shape[1] == 57
    model.config.use_cache = False
    with torch.no_grad():
        assert cache_of(model(IDS)) is None


def test_hidden_states_are_those_of_the_whole_call():
    model = reader("llama")
    with torch.no_grad():
        asked = model(IDS, use_cache=False, output_hidden_states=True).hidden_states
        parts = [model(x, use_cache=False, output_hidden_states=True).hidden_states for x in (IDS[:, :20], IDS[:, 20:])]
        positions = torch.cat([torch.arange(20), torch.arange(25)])[None].expand(2, -1)
        packed = model(IDS, position_ids=positions, use_cache=False, output_hidden_states=True).hidden_states
        model.config.output_hidden_states = True
        by_config = model(IDS, use_cache=False).hidden_states
    assert all(x.shape[:2] == IDS.shape for x in asked)
    for a, b in zip(asked, by_config, strict=True):
        close(a, b)
    for a, b, c in zip(packed, *parts, strict=True):
        close(a, torch.cat([b, c], 1))


def test_packed_embeddings_are_learned_by_their_labels():
    model = reader("llama")
    positions = torch.cat([torch.arange(20), torch.arange(25)])[None].expand(2, -1)
    embeds = model.get_input_embeddings()(IDS).detach()
    want = logits(model, IDS, position_ids=positions)
    with torch.no_grad():
        got = model(inputs_embeds=embeds, labels=IDS, position_ids=positions, use_cache=False)
    close(got.logits, want)
    with torch.no_grad():
        close(got.loss, model(IDS, labels=IDS, position_ids=positions, use_cache=False).loss)


def test_tokens_can_be_left_out_of_learning():
    model = reader("llama")
    mask = torch.ones_like(IDS)
    mask[:, :C] = 0
    with runtime_of(model).override(learn=mask):
        got = logits(model, IDS)
    with runtime_of(model).override(learn=False):
        off = logits(model, IDS)
    close(got[:, : 2 * C], off[:, : 2 * C])  # the first chunk taught nothing
    close(off, logits(plain("llama"), IDS))
    assert not torch.allclose(got[:, 2 * C :], off[:, 2 * C :])


@pytest.mark.parametrize(
    "settings",
    [{"update_size": size} for size in (SIZE, "auto")] + [{"rule": r} for r in ("delta", "momentum", "muon")],
)
def test_chunks_that_are_left_out_write_nothing(settings):
    """Of one row or of all, in one call or in pieces: rules that forget as they write forget where they learn."""
    model = reader("llama", **({"update_size": None, "lr": 0.05} if "rule" in settings else {"decay": 0.1}) | settings)
    mask = torch.ones_like(IDS, dtype=torch.bool)
    mask[:, 2 * C : 3 * C] = mask[0, C : 2 * C] = False

    def read(rows, sizes):
        at, cache, found, states = 0, None, [], []
        for n in sizes:
            with runtime_of(model).override(learn=mask[rows, at : at + n]):
                part, cache = pieces(model, IDS[rows, at : at + n], [n], cache)
            at, found, states = at + n, [*found, part], [*states, ittt.fast_weights(cache)[0].S]
        return torch.cat(found, 1), states

    want, (_, before, after, *_) = read([0, 1], [C] * 5 + [5])
    keep = 0.9 if settings.get("update_size") == SIZE else 1
    torch.testing.assert_close(after, keep * before, atol=0, rtol=1e-12)
    for rows, sizes in (([0, 1], [45]), ([0, 1], [3, 5, 10, 4, 23]), ([0], [45]), ([1], [45])):
        close(read(rows, sizes)[0], want[rows])


@pytest.mark.parametrize("rule", ["delta", "momentum", "muon"])
def test_any_rule(rule):
    model = reader("llama", rule=rule, update_size=None, lr=0.05)
    close(pieces(model, IDS, [13, 3, 29])[0], logits(model, IDS))
    assert not torch.allclose(logits(model, IDS)[:, C:], logits(plain("llama"), IDS)[:, C:])


@pytest.mark.parametrize("at_once", [1, 3 * 2 * VOCAB, 1 << 25])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradient_of_the_loss_is_the_same_in_slices(dtype, at_once, monkeypatch):
    monkeypatch.setattr(loss, "_AT_ONCE", at_once)
    scores = torch.randn(2, C, VOCAB, dtype=dtype, generator=torch.Generator().manual_seed(0)).mul(3).requires_grad_()
    targets, weight = tokens(2, C - 1), torch.rand(2, C - 1) < 0.7
    wide = scores[:, :-1].flatten(0, 1).to(torch.promote_types(dtype, torch.float32))
    losses = cross_entropy(wide, targets.flatten(), reduction="none")
    (expected,) = torch.autograd.grad((losses * weight.flatten()).sum(), scores)
    found = loss._loss_gradient(scores, targets, weight)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=1e-12 if dtype == torch.float64 else 1e-6, rtol=1e-12 if
                               dtype == torch.float64 else 1e-2)  # fmt: skip


def test_bfloat16_and_autocast():
    half = logits(reader("llama", torch.bfloat16), IDS).float()
    exact = logits(reader("llama"), IDS).float()
    off = logits(plain("llama"), IDS).float()
    assert (half - exact)[:, C:].norm() < 0.5 * (exact - off)[:, C:].norm()
    single = reader("llama", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cast = logits(single, IDS).float()
    assert (cast - exact)[:, C:].norm() < 0.5 * (exact - off)[:, C:].norm()


def test_under_lora():
    peft = pytest.importorskip("peft")
    model = plain("llama")
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj", "q_proj"], r=4)).eval()
    for name, p in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    before = logits(lora, IDS)
    ittt.attach(lora, ittt.InPlaceTTTConfig(objective="loss", layers="0::2", chunk_size=C, update_size=SIZE))
    got = logits(lora, IDS)
    close(got[:, :C], before[:, :C])
    assert not torch.allclose(got[:, C:], before[:, C:])
    close(pieces(lora, IDS, [13, 32])[0], got)


class Int8Linear(nn.Linear):
    """A layer that holds whole numbers and one scale, as quantised ones do; ``packed``: as bitsandbytes packs them."""

    passes = True

    def __init__(self, dense):
        super().__init__(dense.in_features, dense.out_features, bias=dense.bias is not None)
        self.scale = dense.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((dense.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = dense.bias

    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.passes):
            return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Float8Linear(Int8Linear):
    """The same in float8: a dtype that is floating point, and whose numbers are still not those of the layer."""

    def __init__(self, dense):
        super().__init__(dense)
        self.weight = nn.Parameter((dense.weight.detach() / self.scale).to(torch.float8_e4m3fn), requires_grad=False)


class NoBackward(Int8Linear):
    passes = False


def quantised(model, kind):
    """The model with quantised layers, and one of the same numbers without."""
    dense = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, kind(module))
            twin = dense.get_submodule(name)
            made = model.get_submodule(name)
            twin.weight.data = made.weight.to(twin.weight.dtype) * made.scale
    return model, dense


@pytest.mark.parametrize("kind", [Int8Linear, Float8Linear])
@pytest.mark.parametrize(
    "settings",
    [{"update_size": SIZE}, {"update_size": "auto"}, {"rule": "delta"}, {"rule_options": {"soft_cap": 0.1}}],
    ids=str,
)
def test_a_quantised_base_learns_as_its_dense_twin(settings, kind):
    bias = LlamaConfig(**{**plain("llama").config.to_dict(), "mlp_bias": True})
    torch.manual_seed(0)
    model, dense = quantised(LlamaForCausalLM(bias).double().eval(), kind)
    config = ittt.InPlaceTTTConfig(objective="loss", layers="0::2", chunk_size=C, **settings)
    off = logits(model, IDS)
    got, want = (logits(ittt.attach(m, config), IDS) for m in (model, dense))
    close(got, want)
    assert (got - off)[:, C:].abs().max() > 1e-4


def test_a_quantised_base_without_a_backward_is_refused():
    model, _ = quantised(plain("llama"), NoBackward)
    with pytest.raises(ittt.UserError, match=r"q_proj \(NoBackward\) .* no backward.* load the model unquantised"):
        ittt.attach(model, ittt.InPlaceTTTConfig(objective="loss", layers="0::2", chunk_size=C))
    assert not ittt.is_attached(model)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights(where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    want, model = logits(reader("llama"), IDS), reader("llama")
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    close(logits(model, IDS), want)
    close(pieces(model, IDS, [13, 32])[0], want)
    with runtime_of(model).override(learn=False):
        close(pieces(model, IDS, [13, 32])[0], logits(plain("llama"), IDS))


def first_order(kind, **settings):
    model = reader(kind, first_order=True, **settings).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def total(found, ids):
    return cross_entropy(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum", ignore_index=-100)


@sizings
@kinds
def test_first_order_training_is_the_gradient_with_every_state_a_constant(kind, size):
    """The naive loop: weights that are what they were plus a constant, one chunk after another, one graph."""
    model = first_order(kind, update_size=size)
    states = []
    for n in range(0, IDS.shape[1], C):  # S before each chunk, from reading alone
        found = pieces(model.eval(), IDS[:1], [n] if n else [1])[1]
        states.append({i: fast.S for i, fast in ittt.fast_weights(found).items()} if n else {})
    loss = total(model.train()(IDS[:1]).logits, IDS[:1])
    got = torch.autograd.grad(loss, list(model.parameters()))
    other = plain(kind)
    names = {id(m): n for n, m in other.named_modules()}
    out, cache = [], DynamicCache(config=other.config)
    for state, at in zip(states, range(0, IDS.shape[1], C), strict=True):
        changed = dict(other.named_parameters())
        for module, S in zip(projections(other, kind), state.values(), strict=False):
            name = f"{names[id(module)]}.weight"
            changed[name] = changed[name] + (S[0].mT if kind == "gpt2" else S[0])
        given = {"use_cache": True, cache_name(other): cache}
        out.append(torch.func.functional_call(other, changed, (IDS[:1, at : at + C],), given).logits)
    want = total(torch.cat(out, 1), IDS[:1])
    close(loss, want)
    for a, b in zip(got, torch.autograd.grad(want, list(other.parameters())), strict=True):
        close(a, b)


def test_first_order_training_of_padded_rows_is_that_of_each():
    model, mask = first_order("llama"), torch.ones(2, 45, dtype=torch.int64)
    mask[1, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    labels = IDS.masked_fill(positions == 0, -100)  # padding, and what nothing comes before
    both = total(model(IDS, attention_mask=mask, position_ids=positions).logits, labels)
    got = torch.autograd.grad(both, list(model.parameters()))
    alone = sum(total(model(row).logits, row) for row in (IDS[:1], IDS[1:, 7:]))
    for a, b in zip(got, torch.autograd.grad(alone, list(model.parameters())), strict=True):
        close(a, b)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_refusals():
    model = reader("llama")
    with pytest.raises(ittt.UserError, match=r"a gradient through its own updates is not supported.*model.eval\(\)"):
        model.train()(IDS, labels=IDS)
    with pytest.raises(ittt.UserError, match="call the whole model, not its base"):
        model.eval().model(IDS)
    numbers = (torch.arange(45) >= 30).long()[None].expand(2, -1)
    with pytest.raises(ittt.UserError, match="read each on its own"):
        model(IDS, seq_idx=numbers, **{cache_name(model): DynamicCache()})
    with pytest.raises(ittt.UserError, match=r'learn must be "read" or "all"'):
        ittt.InPlaceTTTConfig(objective="loss", learn="none")
    model = first_order("llama")
    model.gradient_checkpointing_enable()
    with pytest.raises(ittt.UserError, match="gradient_checkpointing_disable"):
        model(IDS, labels=IDS)
    with torch.no_grad(), pytest.raises(ittt.UserError, match=r"model.eval\(\)"):
        model(IDS)
    model = reader("llama")
    with pytest.raises(ValueError, match="input_ids or inputs_embeds, not both"):
        model(IDS, inputs_embeds=model.get_input_embeddings()(IDS))
    for shape in ((2, 0), (0, 5), (5,)):
        with pytest.raises(ValueError, match=r"input_ids \[rows, tokens\]"):
            model(torch.zeros(shape, dtype=torch.int64))
    for name in ("output_attentions", "output_router_logits"):
        with pytest.raises(ittt.UserError, match="reads in chunks"):
            model(IDS, **{name: True})
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(ittt.UserError, match="reads in chunks"):
        model(IDS)
    model = reader("gpt2")
    with pytest.raises(ittt.UserError, match="token_type_ids: objective"):
        model(IDS, token_type_ids=torch.ones_like(IDS))
    with pytest.raises(ittt.UserError, match=r'update_size="auto" .* needs objective="loss"'):
        ittt.InPlaceTTTConfig(update_size="auto")
    with pytest.raises(ittt.UserError, match="clip and update_size both set the size"):
        ittt.InPlaceTTTConfig(objective="loss", update_size="auto", clip=1.0)
    with pytest.raises(ittt.UserError, match="update_size must be a number or"):
        ittt.InPlaceTTTConfig(objective="loss", update_size="large")

"""Diagnostics of a model at work against a recomputation from the text, their timeline, the warning, the picture."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from contract.families import C, adapted, padded, tokens
from matplotlib.image import imread
from rich.console import Console
from transformers import DynamicCache

import inplace_ttt as ittt
from inplace_ttt.core.diagnostics import LayerDiagnostics
from inplace_ttt.core.reference import chunk_targets, clipped
from inplace_ttt.hf.attach import runtime_of
from inplace_ttt.session.diagnostics import Timeline, harm, measure
from inplace_ttt.session.plots import FEW, diagnostics_table, save_diagnostics

LR = 0.03


def read(model, ids, pieces=1000, cache=None, **keywords):
    cache = DynamicCache() if cache is None else cache
    with torch.no_grad():
        for part in ids.split(pieces, 1):
            model(part, past_key_values=cache, **keywords)
    return cache


def inputs(model, ids):
    """(z [T, F], u [T, D]) of every adapting layer when the row is read at once."""
    seen = {}
    hooks = [
        site.projection().register_forward_pre_hook(lambda _, args, i=site.index: seen.update({i: args[0][0].detach()}))
        for site in runtime_of(model).sites
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
        u = model.get_input_embeddings()(ids)[0]
    for hook in hooks:
        hook.remove()
    return {i: (z, u) for i, z in seen.items()}


def brute_force(model, ids):
    """Every figure of one row from its tokens alone, chunk after chunk, with dense matrices and SVDs."""
    config, found = runtime_of(model).config, []
    for site in runtime_of(model).sites:
        z, u = inputs(model, ids)[site.index]
        conv, proj, module = site.mlp.ttt_conv.weight.detach(), site.mlp.ttt_proj.weight.detach(), site.projection()
        W = module.weight.detach() if isinstance(module, torch.nn.Linear) else module.weight.detach().mT
        clip = config.clip if not config.clip_relative else config.clip * W.norm()
        S = before = torch.zeros_like(W)
        n = len(z) // C
        for i in range(n):
            part = slice(i * C, (i + 1) * C)
            dW, before = chunk_targets(u[part], conv[:, 0], proj, config.lookahead).mT @ z[part], S
            longer, dW = clip is not None and bool(dW.norm() > clip), clipped(dW, clip)
            S = (1 - config.decay) * S + dW
        keys = z[(n - 1) * C : n * C]
        _, s, Vh = torch.linalg.svd(before, full_matrices=False)
        k = int((s.square().cumsum(0) < 0.99 * s.square().sum()).sum()) + 1
        p = torch.linalg.svdvals(S)
        p = p / p.sum()
        found.append(
            LayerDiagnostics(
                layer=site.index,
                updates=n,
                tokens=len(z),
                relative_norm=float(config.lr * S.norm() / W.norm()),
                output_change=float(config.lr * (keys @ before.mT).norm() / (keys @ W.mT).norm()),
                effective_rank=float(torch.exp(-(p * p.clamp(min=1e-300).log()).sum())),
                largest_rank=min(W.shape),
                key_overlap=float((keys @ Vh[:k].mT).norm() ** 2 / keys.norm() ** 2) if n > 1 else 0.0,
                update_norm=float(config.lr * dW.norm() / W.norm()),
                clipped=None if clip is None else longer,
            )
        )
    return found


def assert_same(got, want, rel=1e-5):
    assert len(got) == len(want) == 2
    for a, b in zip(got, want, strict=True):
        a, b = asdict(a), asdict(b)
        assert {k: v is None for k, v in a.items()} == {k: v is None for k, v in b.items()}
        for name in a:
            assert a[name] == (b[name] if b[name] is None else pytest.approx(b[name], rel=rel, abs=1e-9)), name


# -- measure -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [C, 2 * C, 5 * C + 3])
@pytest.mark.parametrize("settings", [{}, {"decay": 0.2}, {"decay": 0.1, "clip": 0.3, "clip_relative": True}])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_measure_equals_brute_force(model_type, settings, length):
    model, ids = adapted(model_type, **settings), tokens(1, length)
    want = brute_force(model, ids)
    for pieces in (1000, 3):
        assert_same(measure(model, ittt.fast_weights(read(model, ids, pieces))), want)


@pytest.mark.parametrize(("clip", "cut"), [(1e-3, True), (1e3, False)])
def test_clipped(clip, cut):
    model, ids = adapted("llama", clip=clip), tokens(1, 3 * C)
    got = measure(model, ittt.fast_weights(read(model, ids)))
    assert_same(got, brute_force(model, ids))
    assert [d.clipped for d in got] == [cut, cut]


def test_rows_are_measured_apart():
    model = adapted("llama", decay=0.1)
    rows = [tokens(1, 2 * C + 1), tokens(1, 4 * C, seed=1)]
    cache = read(model, **{"ids": (batch := padded(rows, "left")).pop("input_ids")}, **batch)
    for b, ids in enumerate(rows):
        assert_same(measure(model, ittt.fast_weights(cache), row=b), brute_force(model, ids))


def test_before_the_first_update():
    model = adapted("llama")
    for fast in ({}, ittt.fast_weights(read(model, tokens(1, C - 1)))):
        got = measure(model, fast)
        assert len(got) == len(fast)
        for d in got:
            assert (d.updates, d.tokens, d.relative_norm, d.effective_rank, d.largest_rank) == (0, C - 1, 0, 0, 32)
            assert d.output_change is d.key_overlap is d.update_norm is d.clipped is None


def test_a_chunk_taken_back_is_not_the_sample():
    model, ids = adapted("llama"), tokens(1, 3 * C)
    cache = read(model, ids)
    cache.crop(-C)
    assert_same(measure(model, ittt.fast_weights(cache)), brute_force(model, ids[:, : 2 * C]))
    cache.crop(-2 * C + 1)
    assert all(d.updates == 0 and d.key_overlap is None for d in measure(model, ittt.fast_weights(cache)))


def test_the_settings_the_cache_was_read_with():
    model = adapted("llama")
    fast = ittt.fast_weights(read(model, tokens(1, 3 * C)))
    want = measure(model, fast)
    ittt.set_lr(model, 10 * LR)
    assert measure(model, fast)[0].relative_norm == pytest.approx(10 * want[0].relative_norm)
    assert measure(model, fast, config=replace(runtime_of(model).config, lr=LR)) == want


def test_quantised_weights_leave_out_what_needs_them_dense():
    model = adapted("llama")
    fast = ittt.fast_weights(read(model, tokens(1, 3 * C)))
    want = measure(model, fast)[0]
    module = runtime_of(model).sites[0].projection()
    module.weight = torch.nn.Parameter(module.weight.detach().to(torch.int8), requires_grad=False)
    assert measure(model, fast)[0] == replace(want, relative_norm=None, output_change=None, update_norm=None)


@pytest.mark.parametrize("form", ["auto", 40])
@pytest.mark.parametrize("settings", [{}, {"decay": 0.1, "clip": 0.3, "clip_relative": True}])
def test_state_in_factors(form, settings):
    model, ids = adapted("llama", **settings), tokens(1, 3 * C + 1)
    with runtime_of(model).reading(runtime_of(model).config, form):
        fast = ittt.fast_weights(read(model, ids))
    assert all(f.S is None and f.left is not None for f in fast.values())
    assert_same(measure(model, fast), brute_force(model, ids))


@pytest.mark.parametrize("chunks", [3, 4, 5, 6])
def test_truncated_state(chunks):
    """What the newest chunk met is unknown once a truncation has mixed its update with the rest."""
    model, ids = adapted("llama"), tokens(1, chunks * C)
    with runtime_of(model).reading(runtime_of(model).config, 6):
        fast = ittt.fast_weights(read(model, ids))
    got, mixed = measure(model, fast), chunks % 2 == 0  # pairs held: 4, 8, 12, the best 6 of 16, 10, the best 6 of 14
    exact = brute_force(model, ids)
    for d, e in zip(got, exact, strict=True):
        S = fast[d.layer].dense()[0]
        W = runtime_of(model).sites[d.layer // 2].projection().weight.detach()
        assert d.relative_norm == pytest.approx(float(LR * S.norm() / W.norm()))
        assert d.effective_rank <= fast[d.layer].count[0]
        assert d.update_norm == pytest.approx(e.update_norm, rel=0.2)
        assert (d.key_overlap is None) == (d.output_change is None) == mixed


def test_a_state_that_is_not_finite_is_unknown():
    model = adapted("llama")
    fast = ittt.fast_weights(read(model, tokens(1, 3 * C)))
    fast[0].S[0, 0, 0] = math.nan
    broken, fine = measure(model, fast)
    assert broken.relative_norm is broken.output_change is broken.effective_rank is broken.key_overlap is None
    assert fine.effective_rank is not None


def test_measuring_changes_nothing():
    model, ids = adapted("llama", decay=0.1), tokens(1, 5 * C + 1)
    watched, alone = DynamicCache(), DynamicCache()
    for part in ids.split(3, 1):
        with torch.no_grad():
            a = model(part, past_key_values=watched).logits
            b = model(part, past_key_values=alone).logits
        measure(model, ittt.fast_weights(watched))
        assert torch.equal(a, b)


# -- timeline ----------------------------------------------------------------------------------------------------------


def layer(number=0, **values):
    return LayerDiagnostics(
        number, 3, 12, **(dict.fromkeys(NAMES, 0.5) | {"largest_rank": 32, "clipped": None} | values)
    )


NAMES = ("relative_norm", "output_change", "effective_rank", "key_overlap", "update_norm")


def timeline(worse, every=100, tokens=None):
    """Probes whose loss with updates on is 3 + worse, without them 3."""
    t = Timeline(every)
    for i, w in enumerate(worse):
        t.append(every * (i + 1) if tokens is None else tokens[i], [layer()], 3.0 + w, 3.0)
    return t


def test_due():
    t = Timeline(100)
    assert [t.due(n) for n in (0, 99, 100, 250)] == [False, False, True, True]
    t.append(130, [], 3.0)
    assert [t.due(n) for n in (229, 230)] == [False, True]


@pytest.mark.parametrize("limit", [8, 9, 256])
def test_memory_is_bounded_and_the_samples_stay_even(limit):
    t = Timeline(10, limit)
    for n in range(1, 5001):
        if t.due(n):
            t.append(n, [layer()], float(n), float(n))
        assert len(t.samples) <= limit
    assert len(t.samples) > limit // 2 - 1
    assert t.every == 10 * 2 ** round(math.log2(t.every / 10))
    assert t.every * limit >= 5000 - t.every
    gaps = np.diff(t.tokens)
    assert gaps.max() <= t.every
    assert gaps.min() >= t.every / 2
    assert t.tokens[0] == 10


def test_thinning_keeps_the_newest_sample_and_the_probes():
    for parity in (0, 1):
        t = Timeline(10, 8)
        for i in range(9):
            t.append(10 * (i + 1), [], 3.0, 2.9 if i % 2 == parity else None)
        assert t.every == 20
        assert t.tokens[-1] == 90
        assert (~np.isnan(t.loss_off)).sum() == 4 + (parity == 0)


def test_samples_come_in_order():
    t = timeline([0.0, 0.1])
    with pytest.raises(ValueError, match="in order"):
        t.append(200, [], 3.0)


def test_json_round_trip():
    t = timeline([0.0, 0.1])
    t.append(300, [layer(2, relative_norm=None, clipped=True), layer(5)], math.inf)
    text = json.dumps(t.to_list(), allow_nan=False)
    back = Timeline.from_list(json.loads(text), every=100)
    assert back.samples[:2] == t.samples[:2]
    assert back.samples[2].layers == t.samples[2].layers
    assert math.isnan(back.samples[2].loss_on)
    assert np.isnan(t.loss_on[2])
    assert back.samples[2].loss_off is None
    assert (back.to_list(), back.every, back.due(399), back.due(400)) == (t.to_list(), 100, False, True)


def test_series():
    t = timeline([0.1, -0.2])
    t.append(300, [layer(4, key_overlap=0.7)], 3.0)
    assert t.layers == [0, 4]
    np.testing.assert_array_equal(t.tokens, [100, 200, 300])
    np.testing.assert_allclose(t.gain, [-0.1, 0.2, math.nan])
    np.testing.assert_array_equal(t.series("key_overlap", 0), [0.5, 0.5, math.nan])
    np.testing.assert_array_equal(t.series("key_overlap", 4), [math.nan, math.nan, 0.7])


# -- harm --------------------------------------------------------------------------------------------------------------


def alarms(worse):
    """Probes after which there is a warning."""
    t, found = Timeline(1, limit=1000), []
    for i, w in enumerate(worse, 1):
        t.append(i, [layer()], 3.0 + w, 3.0)
        if harm(t):
            found.append(i)
    return found


@pytest.mark.parametrize("noise", [0.01, 0.05])
@pytest.mark.parametrize("mean", [0.0, -0.02])
def test_noise_raises_no_alarm(mean, noise):
    rng = np.random.default_rng(0)
    assert sum(bool(alarms(rng.normal(mean, noise, 120))) for _ in range(15)) == 0


@pytest.mark.parametrize("noise", [0.005, 0.02])
def test_harm_raises_one_and_says_since_when(noise):
    worse = np.random.default_rng(1).normal(np.repeat([-0.05, 0.05], [10, 16]), noise)
    found = alarms(worse)
    assert found[0] >= 12
    assert found == list(range(found[0], 27))
    said = harm(timeline(worse))
    assert "\n" not in said
    assert f"{worse[-16:].mean():.3f} nats per token higher" in said
    assert "last 16 probes" in said
    assert "since about token 1,100;" in said
    assert "layer 0 changed most, by 0.5 of its weight (effective rank 0 of 32, key overlap 0.50)" in said


def test_harm_from_the_start():
    assert harm(timeline([0.051, 0.05, 0.049])) is None
    assert "over the last 4 probes the loss with them is 0.050" in harm(timeline([0.051, 0.05, 0.049, 0.05]))


def test_growing_harm_does_not_hide_behind_its_own_spread():
    """Losses of the shipped model at four times its lr, without decay."""
    worse = -np.array([0.061, 0.157, 0.226, 0.218, 0.138, -0.376, -0.743, -1.307, -1.879, -2.537, -2.884])
    assert alarms(worse)[0] <= 9


def test_small_harm_and_harm_that_is_over_are_not_worth_saying():
    assert harm(timeline([0.0049] * 40)) is None
    assert harm(timeline([0.0051] * 40))
    assert "last 4 probes the loss with them is 0.006" in harm(timeline([0.003] * 28 + [0.0055] * 4))
    assert harm(timeline([0.1] * 40))
    assert harm(timeline([0.1] * 36 + [0.0] * 4)) is None


def test_samples_without_probe_do_not_count():
    t = Timeline(100)
    for i in range(1, 20):
        t.append(100 * i, [layer()], 3.1, 3.0 if i % 4 == 0 else None)
        assert (harm(t) is None) == (i < 16)
    assert harm(Timeline()) is None


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_harm(loss):
    t = timeline([-0.1, -0.1])
    t.append(300, [layer()], loss)
    assert "after 300 tokens the loss with updates on is not finite" in harm(t)
    assert harm(Timeline.from_list(t.to_list()))


def test_fast_weights_that_are_not_finite_are_harm():
    t = timeline([-0.1])
    t.append(200, [layer(), layer(6, effective_rank=None, relative_norm=None)], 3.0)
    assert "fast weights of layer 6 are not finite" in harm(t)


def test_advice_names_values():
    t = Timeline(100)
    for i in range(8):
        t.append(100 * (i + 1), [layer(update_norm=u) for u in (0.02, 0.03, 0.04)], 3.1, 3.0)
    said = harm(t, {"lr": 0.1, "decay": 0.0, "clip": None})
    assert "Try decay=0.01 (now 0), lr=0.05 (now 0.1), clip=0.15 with clip_relative=True" in said
    said = harm(t, {"lr": 0.1, "decay": 0.01, "clip": 0.4})
    assert "Try decay=0.02 (now 0.01), lr=0.05 (now 0.1), clip=0.2 (now 0.4), or a reset." in said
    said = harm(t, {"lr": 1.0, "decay": 0.0, "clip": None, "update_size": 0.002})
    assert 'Try decay=0.01 (now 0), update_size=0.001 (now 0.002), update_size="auto", or a reset.' in said
    assert harm(t, ittt.fast_settings(adapted("llama")))


# -- picture and table -------------------------------------------------------------------------------------------------


def pixels(path, colour):
    image = (imread(path)[:, :, :3] * 255).round().astype(int)
    return np.argwhere(np.abs(image - [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).max(2) < 8)


def reading(gain, layers=3):
    t = Timeline(100)
    for i in range(1, 120):  # more than get a marker each
        shown = [layer(j, relative_norm=0.1 * (j + 1), effective_rank=9.0 + j) for j in range(layers)]
        t.append(100 * i, shown, 3.0 - gain * (i > 10), 3.0 if i % 2 else None)
    return t


@pytest.mark.parametrize("gain", [0.5, -0.5])
def test_picture(tmp_path, gain):
    path = tmp_path / "new" / "p.png"
    save_diagnostics(path, reading(gain), "title")
    height, width = imread(path).shape[:2]
    assert width == 1200
    lines = [pixels(path, colour) for colour in ("#c2410c", "#64748b")]
    on, off = (p[(p[:, 0] > 0.685 * height) & (np.abs(p[:, 1] - 0.4 * width) < 50), 0].mean() for p in lines)
    assert abs(on - off) > 50
    assert (on > off) == (gain > 0)  # a lower loss is lower in the picture
    shallow, deep = pixels(path, FEW[0]), pixels(path, FEW[len(reading(gain).layers) - 1])
    first = (0.45, 0.33)  # right half of the first panel
    a, b = (
        p[(p[:, 1] < first[0] * width) & (p[:, 1] > 0.2 * width) & (p[:, 0] < first[1] * height)]
        for p in (shallow, deep)
    )
    assert a[:, 0].mean() > b[:, 0].mean()  # the deepest layer was given the largest norm


@pytest.mark.parametrize("suffix", [".pdf", ".svg"])
def test_other_formats(tmp_path, suffix):
    save_diagnostics(tmp_path / f"p{suffix}", reading(0.1, layers=20), "title")
    assert (tmp_path / f"p{suffix}").stat().st_size > 5000


def test_pictures_of_next_to_nothing(tmp_path, recwarn):
    one = Timeline()
    one.append(100, [layer(relative_norm=None)], 3.0)
    for i, t in enumerate((Timeline(), one)):
        save_diagnostics(tmp_path / f"{i}.png", t, "title")
        assert (tmp_path / f"{i}.png").stat().st_size > 5000
    assert not recwarn.list


def test_table():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(diagnostics_table([layer(4, clipped=True), layer(5, relative_norm=None, effective_rank=None)]))
    rows = [line.split("│")[1:-1] for line in console.export_text().splitlines() if "│" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["4", "3", "0.5", "0.5", "0/32", "50%", "0.5"],
        ["", "", "", "", "", "", "(clipped)"],
        ["5", "3", "?", "0.5", "?", "50%", "0.5"],
    ]


def test_share_of_clipped_chunks():
    ids = torch.randint(1, 97, (900,), generator=torch.Generator().manual_seed(0)).tolist()

    def session(clip):
        s = ittt.Session(adapted("llama"), clip=clip, window=60, probe_every=300)
        s.read(ids)
        return s

    for clip, share in ((1e-9, 1.0), (None, None), (1e9, 0.0)):
        s = session(clip)
        assert len(s.timeline.samples) == 2
        assert [s.timeline.clipped_share(layer) for layer in s.timeline.layers] == [share, share]
        headings = [str(column.header) for column in diagnostics_table(s.diagnostics(), s.timeline).columns]
        assert ("chunks clipped" in headings) == (clip is not None)
    norms = sorted(d.update_norm for x in s.timeline.samples for d in x.layers if d.layer == 0)
    weight = torch.linalg.vector_norm(adapted("llama").model.layers[0].mlp.down_proj.weight.detach())
    between = float(sum(norms) / 2 * weight / 0.03)  # update_norm is relative to W0 and times lr
    assert session(between).timeline.clipped_share(0) == 0.5

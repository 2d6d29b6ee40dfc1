"""Peers of In-Place TTT: what they compute, documents in a row, pieces, their size, and training by a recipe."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from locations import ROOT
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import inplace_ttt as ittt
from inplace_ttt.errors import UserError

sys.path.insert(0, str(ROOT / "benchmarks"))

import measure_trained
import peer_gradients
import peers
import runs
from peers import MIXERS, PeerConfig, PeerForCausalLM
from session.models import tokenizer

TOKEN_BY_TOKEN = {"ttt_linear": peers.ttt_linear_reference, "lact": peers.lact_reference}
OPTIONS: dict[str, dict[str, Any]] = {
    "mamba2": {"head": 8, "state": 6}, "ttt_linear": {"batch": 8}, "lact": {"chunk": 8, "inner": 5, "lr": 0.3},
}  # fmt: skip


def model(mixer: str, layers: str = ":", **changes: Any) -> PeerForCausalLM:
    torch.manual_seed(0)
    values = {
        "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 6, "tie_word_embeddings": True,
        "initializer_range": 0.3, "mixer": mixer, "mixer_layers": layers, "mixer_options": OPTIONS.get(mixer),
    }  # fmt: skip
    return PeerForCausalLM(PeerConfig(**(values | changes))).double().eval()


def logits(made: Any, ids: Tensor, **given: Any) -> Tensor:
    found: Tensor = made(ids, **given).logits
    return found


def ids(tokens: int, rows: int = 2) -> Tensor:
    return torch.randint(50, (rows, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mixer", MIXERS)
def test_documents_of_a_row_do_not_see_each_other(mixer: str) -> None:
    made, row = model(mixer), ids(40, 1)
    positions = torch.cat([torch.arange(n) for n in (13, 3, 24)])[None]
    packed = logits(made, row, position_ids=positions, use_cache=False)
    apart = [logits(made, part, use_cache=False) for part in row.split([13, 3, 24], 1)]
    if mixer in TOKEN_BY_TOKEN:  # their chunks are those of the row: compare with a row whose other documents differ
        other = row.clone()
        other[:, 13:16] = (other[:, 13:16] + 1) % 50
        changed = logits(made, other, position_ids=positions, use_cache=False)
        assert torch.equal(packed[:, 16:], changed[:, 16:])
        assert torch.equal(packed[:, :13], apart[0])
        assert not torch.allclose(packed[:, 13:16], changed[:, 13:16])
    else:
        torch.testing.assert_close(packed, torch.cat(apart, 1))
    assert not torch.allclose(packed[:, 16:], logits(made, row, use_cache=False)[:, 16:])


@pytest.mark.parametrize("layers", [":", "0::2"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_pieces_through_a_cache_are_read_as_one(mixer: str, layers: str) -> None:
    made, row = model(mixer, layers), ids(37)
    whole, cache, found = logits(made, row, use_cache=False), None, []
    with torch.no_grad():
        for piece in row.split([5, 1, 1, 14, 3, 13], 1):
            name = "cache" if "cache" in made.forward.__code__.co_varnames else "past_key_values"
            out = made(piece, use_cache=True, **({name: cache} if cache is not None else {}))
            cache = getattr(out, name)
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_token_changes_nothing_before_it_and_something_far_behind_the_window(mixer: str) -> None:
    made, row = model(mixer, "0::2"), ids(60)
    other = row.clone()
    other[:, 20] = (other[:, 20] + 1) % 50
    before, after = logits(made, row, use_cache=False), logits(made, other, use_cache=False)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 45:], after[:, 45:])


class Replay(torch.autograd.Function):
    """What a CUDA graph of a function computes: gradients of its arguments alone."""

    @staticmethod
    def forward(ctx: Any, steps: Any, *given: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.given = [x.detach().requires_grad_(x.requires_grad) for x in given]
            ctx.out = steps(*ctx.given)
        return cast(Tensor, ctx.out.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        found = iter(torch.autograd.grad(ctx.out, [x for x in ctx.given if x.requires_grad], gradient))
        return None, *(next(found) if x.requires_grad else None for x in ctx.given)


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("mixer", TOKEN_BY_TOKEN)
def test_chunks_equal_token_by_token_with_all_gradients(
    mixer: str, replayed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of documents of 13, 3 and 8 tokens; gradients by autograd through autograd's."""
    if replayed:
        monkeypatch.setattr(peers.Mixer, "is_replayed", lambda self, q, state, size: not q.shape[2] % size)
        monkeypatch.setattr(peers.Mixer, "replayed", lambda self, steps, *given: Replay.apply(steps, *given))
        monkeypatch.setattr(peers, "compiled_steps", peers.ttt_steps)
        monkeypatch.setattr(peers, "STEPS_AT_ONCE", 1)
    torch.manual_seed(0)
    layer = MIXERS[mixer](model(mixer).config, 0, **OPTIONS[mixer]).double()
    H, K, T = layer.heads, layer.K, 24
    for x in layer.parameters():
        x.data += 0.1 * torch.randn_like(x)
    q, k, v = (torch.randn(1, H, T, K, dtype=torch.double).requires_grad_() for _ in range(3))
    shape = (3, 1, H, T, 1) if mixer == "lact" else (1, H, T, 1)
    eta = torch.rand(shape, dtype=torch.double).requires_grad_()
    new = torch.zeros(1, T, dtype=torch.bool)
    new[0, [0, 13, 16]] = True
    found = layer.learn(q, k, v, eta, new, {})[0]
    expected = TOKEN_BY_TOKEN[mixer](layer, q, k, v, eta if mixer == "lact" else eta[..., 0], new)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    learned = ("W", "b", "scale", "shift", "W1", "W2", "W3")
    given = [q, k, v, eta, *(x for name, x in layer.named_parameters() if name in learned)]
    gradients = [torch.autograd.grad((x * weights).sum(), given, retain_graph=True) for x in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().max() > 1e-3


def test_rotary_embeddings_in_place_change_no_queries_that_both_parts_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Liger's kernels turn them, in the memory of what the projections gave."""
    from transformers.models.mistral import modeling_mistral

    made, row, own = model("lact"), ids(20), modeling_mistral.apply_rotary_pos_emb
    expected = logits(made, row, use_cache=False)

    def in_place(q: Tensor, k: Tensor, *given: Any, **named: Any) -> tuple[Tensor, Tensor]:
        for x, turned in zip((q, k), own(q, k, *given, **named), strict=True):
            x.data.copy_(turned)
        return q, k

    monkeypatch.setattr(modeling_mistral, "apply_rotary_pos_emb", in_place)
    torch.testing.assert_close(logits(made, row, use_cache=False), expected)


@pytest.mark.parametrize("mixer", TOKEN_BY_TOKEN)
def test_padding_before_a_prompt_and_what_follows_it(mixer: str) -> None:
    """Padding counts as documents of one token; the prompt's last chunk ends in the next call."""
    torch.manual_seed(0)
    layer = MIXERS[mixer](model(mixer).config, 0, **OPTIONS[mixer]).double()
    q, k, v = (torch.randn(1, layer.heads, 30, layer.K, dtype=torch.double) for _ in range(3))
    eta = torch.rand(3, 1, layer.heads, 30, 1, dtype=torch.double)
    new = torch.zeros(1, 30, dtype=torch.bool)
    new[0, :4] = True
    part = (
        (lambda x, at: x[..., at, :])
        if mixer == "lact"
        else (lambda x, at: x[0][..., at, :] if x is eta else x[..., at, :])
    )
    whole = slice(None)
    expected, _ = layer.learn(*(part(x, whole) for x in (q, k, v, eta)), new, {})
    found, state = [], dict[str, Any]()
    for at in (slice(0, 11), slice(11, 12), slice(12, 30)):
        out, state = layer.learn(*(part(x, at) for x in (q, k, v, eta)), new[:, at], state)
        found.append(out)
    torch.testing.assert_close(torch.cat(found, 2), expected)


@pytest.mark.parametrize("mixer", MIXERS)
def test_prompts_side_by_side_are_answered_as_alone(mixer: str) -> None:
    """Where chunks are those of the row, padding moves them: then the answers are those of a row padded alike."""
    made = model(mixer, "0::2", vocab_size=len(tokenizer()), initializer_range=1.0)
    ends = {2: "sea", 5: "moon and 7", 9: "def whale"}
    batch = [{"prompt": "The whale and the ship " * n + end, "tokens": 6} for n, end in ends.items()]
    together = measure_trained.generate(made, tokenizer(), batch)
    assert len(set(together)) > 1
    if mixer in TOKEN_BY_TOKEN:
        assert together[-1] == measure_trained.generate(made, tokenizer(), batch[-1:])[0]
        assert together[1:] == measure_trained.generate(made, tokenizer(), batch[1:])
    else:
        assert together == [measure_trained.generate(made, tokenizer(), [line])[0] for line in batch]


# -- the kernels' surroundings, with token-by-token ones in their place ------------------------------------------------


@pytest.mark.parametrize("kind", ["gla", "mamba2", "deltanet", "gated_deltanet"])
@pytest.mark.parametrize("packed", [True, False])
def test_what_surrounds_the_kernels(kind: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are flattened, documents named by their bounds, and the last state is that of each row's last document."""
    calls: list[str] = []

    def kernel(name: str) -> Any:
        def run(q: Tensor, k: Tensor, v: Tensor, *, scale: float, initial_state: Any, output_final_state: bool,
                g: Any = None, beta: Any = None, cu_seqlens: Any = None) -> Any:  # fmt: skip
            calls.append(name)
            assert scale == 1.0
            assert output_final_state
            assert {x.dtype for x in (q, k, v)} == {torch.bfloat16}
            if cu_seqlens is None:
                new = torch.zeros(q.shape[:2], dtype=torch.bool)
                return peers.recurrence(q, k, v, g, beta, initial_state, new)
            assert len(q) == 1
            found = []
            for low, high in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
                part = [None if x is None else x[:, low:high] for x in (q, k, v, g, beta)]
                found.append(peers.recurrence(*part, None, torch.zeros(1, high - low, dtype=torch.bool)))  # type: ignore[arg-type]
            return torch.cat([out for out, _ in found], 1), torch.cat([last for _, last in found])

        return run

    for module, name in (
        ("delta_rule", "chunk_delta_rule"), ("gated_delta_rule", "chunk_gated_delta_rule"), ("gla", "chunk_gla"),
        ("simple_gla", "chunk_simple_gla"),
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, f"fla.ops.{module}", SimpleNamespace(**{name: kernel(name)}))
    for parent in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, parent, SimpleNamespace())
    errors = peer_gradients.compare(kind, 48, packed, "cpu")
    assert max(errors.values()) < 0.005
    assert {"dq", "dk", "dv"} <= errors.keys()
    expected = {"gla": "chunk_gla", "mamba2": "chunk_simple_gla", "deltanet": "chunk_delta_rule"}
    assert calls == [expected.get(kind, "chunk_gated_delta_rule")]


@pytest.mark.parametrize("mixer", TOKEN_BY_TOKEN)
def test_mixers_that_learn_are_compared_too(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(peer_gradients.compare_learned(mixer, "cpu").values()) < 1e-4
    where, wrong = {"ttt_linear": (peers, "ttt_gradient"), "lact": (MIXERS["lact"], "update")}[mixer]
    own = getattr(where, wrong)
    monkeypatch.setattr(where, wrong, lambda *given: turned(own(*given)))
    assert max(peer_gradients.compare_learned(mixer, "cpu").values()) > peer_gradients.LIMIT


def turned(value: Any) -> Any:
    return tuple(map(turned, value)) if isinstance(value, tuple) else value.roll(1, -1)


def test_without_the_kernels_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(UserError, match=r"pip install '\.\[peers\]'"):
        peer_gradients.compare("gla", 48, False, "cpu")


# -- the table ---------------------------------------------------------------------------------------------------------

MORE_FLOPS = {"full": 3.80, "in-place-ttt": 1.11, "window-wide": 1.11}
"""Over those of the sliding window."""


def replica(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("INPLACE_TTT_DATA", str(shared / "data"))
    monkeypatch.setenv("INPLACE_TTT_CODE", str(tmp_path))
    (tmp_path / "train.jsonl").touch()
    return {run.name: run.checked(tmp_path) for run in runs.read_table(ROOT / "benchmarks" / "replica.yaml")}


def test_parameters_and_flops_are_alike(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for name, recipe in replica(shared, tmp_path, monkeypatch).items():
        if name.endswith("-seed2"):  # peers have three seeds, ablations one
            with torch.device("meta"):
                values = dict(recipe.model.config)
                made = AutoModelForCausalLM.from_config(
                    AutoConfig.for_model(values.pop("model_type"), vocab_size=8192, **values)
                )
                if recipe.ttt is not None:
                    ittt.attach(made, recipe.ttt_config())
            found[name.removesuffix("-seed2")] = peers.cost(made, recipe.sequence_length)
    assert len(found) == 15
    parameters, flops = found["window"]
    for name, (size, speed) in found.items():
        assert size == pytest.approx(parameters, rel=0.03), name
        assert speed / flops == pytest.approx(MORE_FLOPS.get(name, 1), rel=0.03), name
    assert found["window-wide"][1] == pytest.approx(found["in-place-ttt"][1], rel=0.01)


def test_all_read_the_same_rows(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = replica(shared, tmp_path, monkeypatch)
    first = found["window-seed0"]
    assert len({name for name in found if name.endswith("-seed0")}) > 35
    for name, recipe in found.items():
        assert (recipe.data, recipe.tokenizer, recipe.steps) == (first.data, first.tokenizer, first.steps)
        assert (recipe.sequence_length, recipe.batch_size, recipe.cut_multiple) == (16384, 8, 1)
        assert str(recipe.seed) == name[-1]
    known: dict[str, float] = {}
    assert runs.cost(found["full-seed0"], known) > runs.cost(found["window-gla-seed0"], known) > 0


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_peer_is_trained_saved_and_measured(mixer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("inplace_ttt.train.run.plot_losses", lambda *_: None)
    text = "".join(json.dumps({"text": f"{i} " + "a whale and a ship " * 300}) + "\n" for i in range(3))
    (tmp_path / "train.jsonl").write_text(text, encoding="utf-8")
    config = {**json.loads(model(mixer).config.to_json_string()), "max_position_embeddings": 256}
    kept = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    shape = {name: config[name] for name in kept} | {"model_type": "peer", "mixer": mixer, "mixer_layers": "0::2"}
    recipe = {
        "name": mixer, "output": str(tmp_path / "unused"), "sequence_length": 64, "steps": 3, "batch_size": 2,
        "model": {"config": shape | {"mixer_options": OPTIONS.get(mixer), "sliding_window": 16}},
        "tokenizer": "src/inplace_ttt/models/books-and-code", "optimizer": {"lr": 1e-3}, "log_every": 1,
        "data": {"train": {"text": f"jsonl:{tmp_path / 'train.jsonl'}"}, "cache": str(tmp_path.parent / "tokens")},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    evaluation = {
        "tokens": 48,
        "documents": 1,
        "speed": 40,
        "needle": None,
        "mqar": {"lengths": [48], "pairs": [2], "trials": 1},
    }
    run = runs.Run(str(tmp_path / "recipe.yaml"), evaluation=evaluation, name=mixer)
    assert runs.do(run, tmp_path / "out", tmp_path / "scratch")
    record = json.loads((tmp_path / "out" / mixer / "run.json").read_text())
    losses = [entry["loss"] for entry in record["curve"]]
    assert losses[-1] < losses[0]
    assert record["evaluation"]["losses"]["code"]["on"] > 5
    assert record["evaluation"]["failed"] == {}
    assert record["evaluation"]["speed"]["decode_seconds"] > 0
    keys = 4 * 2 * 8 * 15  # of the one layer of attention: float32 keys and values, one head of 8, a window less one
    assert record["evaluation"]["speed"]["cache_bytes"] > keys

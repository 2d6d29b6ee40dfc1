"""The loss by pieces of tokens: the numbers of whole logits, without whole logits."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, TrainerCallback

sys.path.append(str(Path(__file__).resolve().parents[1] / "contract"))

from families import BUILDERS, adapted, plain

from inplace_ttt import from_pretrained, updates_off
from inplace_ttt.hf.attach import runtime_of
from inplace_ttt.train import loss as module
from inplace_ttt.train.loss import loss_in_pieces, reason_for_whole_logits, tokens_at_once
from inplace_ttt.train.packing import IGNORED
from inplace_ttt.train.prepare import prepare
from inplace_ttt.train.recipe import make_recipe
from inplace_ttt.train.run import build_trainer, run

V, T, PIECE = 97, 29, 7
WHOLE = dict.fromkeys(("cohere", "cohere2", "gemma2", "granite"), "changes its logits before the loss")
WHOLE["llama4_text"] = "keeps its head or its base model elsewhere"
"""Families that need whole logits (most of them scale or cap them), and why."""


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_TOKENS", PIECE)
    monkeypatch.setattr(module, "NUMBERS_AT_ONCE", 1)


def llama(dtype: torch.dtype = torch.float32, *, tied: bool = False, bias: bool = False) -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, tie_word_embeddings=tied, initializer_range=0.3, **shape))
    if bias:
        model.lm_head.bias = nn.Parameter(torch.randn(V))
    return model.to(dtype)


def packed() -> dict[str, Tensor]:
    """Two rows of several documents; labels of their first tokens and some others are ignored."""
    ids = torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(11), torch.arange(T - 11)]).expand(2, T)
    labels = ids.masked_fill(positions == 0, IGNORED)
    labels[1, :16] = IGNORED  # two whole pieces
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def numbers(model: PreTrainedModel, batch: dict[str, Any], pieces: bool, **extra: Any) -> list[Tensor]:
    """The loss and every parameter's gradient."""
    lines: list[str] = []
    model.zero_grad()
    if pieces:
        with loss_in_pieces(model, lines.append):
            loss = model(**batch, **extra, use_cache=False).loss
            loss.backward()
    else:
        loss = model(**batch, **extra, use_cache=False).loss
        loss.backward()
    assert not lines
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_alike(model: PreTrainedModel, batch: dict[str, Any], **extra: Any) -> None:
    whole, pieces = (numbers(model, batch, by_pieces, **extra) for by_pieces in (False, True))
    assert len(whole) == len(pieces) > 1
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=2e-7 * max(1.0, float(a.abs().max())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [None, 53, torch.tensor(17.5)])
@pytest.mark.parametrize("kind", ["untied", "tied", "bias"])
def test_loss_and_gradients_are_those_of_whole_logits(kind: str, count: Any, dtype: torch.dtype) -> None:
    extra = {} if count is None else {"num_items_in_batch": count}
    assert_alike(llama(dtype, tied=kind == "tied", bias=kind == "bias"), packed(), **extra)


def test_labels_that_are_shifted_already() -> None:
    batch = packed()
    batch["labels"] = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    assert_alike(llama(), batch, shift_labels=batch["labels"], num_items_in_batch=torch.tensor(40))


def test_rows_without_labels_give_what_whole_logits_give() -> None:
    batch = packed()
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    assert numbers(llama(), batch, True)[0].isnan()
    assert numbers(llama(), batch, True, num_items_in_batch=3)[0] == 0


@pytest.mark.parametrize("frozen", ["lm_head", "model"])
def test_frozen_weights(frozen: str) -> None:
    model = llama()
    model.get_submodule(frozen).requires_grad_(False)
    assert_alike(model, packed())


def test_activation_checkpointing() -> None:
    model = llama().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_alike(model, packed())


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_every_family(family: str) -> None:
    model = adapted(family)
    if family in WHOLE:
        assert WHOLE[family] in str(reason_for_whole_logits(model))
    else:
        assert_alike(model, packed())


def test_in_half_precision_gradients_are_no_further_from_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights in bf16 (as FSDP2 gathers them) and under autocast; sums in bf16 would be."""
    monkeypatch.setattr(module, "LEAST_TOKENS", 1)
    batch, exact, half = packed(), llama(), llama(torch.bfloat16)
    exact.load_state_dict(half.state_dict())
    names = [n for n, _ in exact.named_parameters()]
    (truth,) = [g for n, g in zip(names, numbers(exact, batch, False)[1:], strict=True) if n == "lm_head.weight"]

    def error(model: Any, pieces: bool) -> float:
        gradient = numbers(model, batch, pieces)[1 + names.index("lm_head.weight")]
        return float((gradient.float() - truth).norm() / truth.norm())

    assert error(half, True) < 1.1 * error(half, False)
    with torch.autocast("cpu", torch.bfloat16):
        assert error(exact, True) < 1.1 * error(exact, False)


# -- memory ------------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most numbers in one tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = (x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(out) if isinstance(x, Tensor))
        self.numbers = max(self.numbers, *made, 0)
        return out


@pytest.mark.parametrize("autocast", [False, True])
def test_whole_logits_are_never_made(autocast: bool) -> None:
    found = []
    for pieces in (False, True):
        with Largest() as largest, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            numbers(llama(), packed(), pieces)
        found.append(largest.numbers)
    whole, pieces_only = found
    assert whole == 2 * T * V
    assert pieces_only < T * V, "not of one row alone"


def test_no_piece_keeps_its_logits_for_the_backward() -> None:
    kept: list[torch.Size] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        numbers(llama(), packed(), False)
        assert (2 * T, V) in kept
        kept.clear()
        numbers(llama(), packed(), True)
    assert kept
    assert not [shape for shape in kept if shape[-1:] == (V,)]


def test_pieces_of_real_vocabularies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert tokens_at_once(151_936) == 1766
    assert tokens_at_once(2**24) == 256


# -- which models ------------------------------------------------------------------------------------------------------


def scaled(model: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The model, of a class whose forward does something to the logits before its loss."""

    class Changed(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, labels: Tensor, **keywords: Any) -> Any:
            logits = change(self.lm_head(self.model(input_ids, **keywords).last_hidden_state))
            return {"loss": self.loss_function(logits, labels, self.config.vocab_size)}

    model.__class__ = Changed
    return model


@pytest.mark.parametrize(
    "change",
    [lambda x: x * 1.0, lambda x: x.mul_(1.0), lambda x: x.float(), lambda x: x[:, :, :50], lambda x: x.tanh()],
)
def test_changed_logits_are_seen(change: Callable[[Tensor], Tensor]) -> None:
    """Even where the numbers are the same by chance."""
    assert reason_for_whole_logits(scaled(llama(), lambda x: x)) is None
    assert "changes its logits" in str(reason_for_whole_logits(scaled(llama(), change)))


def _capped() -> Any:
    return plain("gemma3_text", changes={"final_logit_softcapping": 5.0})


def _own_loss() -> Any:
    model = llama()
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    return model


def _hooked() -> Any:
    model = llama()
    model.lm_head.register_forward_hook(lambda module, args, out: 2 * out)
    return model


def _failing() -> Any:
    def fail(x: Tensor) -> Tensor:
        raise KeyError

    return scaled(llama(), fail)


def _split() -> Any:
    model = llama()
    model._tp_size = 2
    return model


@pytest.mark.parametrize("make", [_capped, _own_loss, _hooked, _failing, _split])
def test_other_models_keep_whole_logits_and_say_so(make: Callable[[], Any]) -> None:
    model, lines = make(), []
    before = dict(model.__dict__)
    with loss_in_pieces(model, lines.append):
        assert "forward" not in model.lm_head.__dict__
        assert model.__dict__ == before
    assert len(lines) == 1
    assert "whole logits" in lines[0]
    assert "\n" not in lines[0]


def test_the_look_changes_nothing_and_needs_no_weights() -> None:
    model = llama()
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert reason_for_whole_logits(model) is None
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.device("meta"):
        assert reason_for_whole_logits(LlamaForCausalLM(model.config)) is None


def test_models_are_themselves_again_afterwards() -> None:
    model, batch = llama(), packed()
    logits = model(**batch).logits
    del batch["labels"]
    with loss_in_pieces(model):
        assert model(**batch).logits.shape == (2, T, 16)
    assert torch.equal(model(**batch).logits, logits)
    with pytest.raises(KeyError), loss_in_pieces(model):
        raise KeyError
    assert torch.equal(model(**batch).logits, logits)
    assert not {"_loss_function"} & set(model.__dict__)
    assert "forward" not in model.lm_head.__dict__


# -- runs --------------------------------------------------------------------------------------------------------------


def test_compiled() -> None:
    whole = numbers(llama(), packed(), False)
    model = llama()
    with loss_in_pieces(model):
        loss = torch.compile(model, backend="aot_eager")(**packed(), use_cache=False).loss
        loss.backward()
    for a, b in zip(whole, [loss.detach(), *(p.grad for p in model.parameters())], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


RUNS: dict[str, dict[str, Any]] = {
    "packed": {"batch_size": 2, "gradient_accumulation": 2, "sequence_length": 1000, "steps": 4},
    "fast": {"ttt": {"layers": "0::1", "chunk_size": 16, "lr": 1.0}, "activation_checkpointing": True},
    "bf16": {"precision": "bf16"},
    "placed": {"parallel": {}},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_logs_the_same_losses(
    values: dict[str, Any], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training and validation; the model that is saved and evaluated is whole again."""
    curves, seen = [], []
    monkeypatch.setattr(module, "LEAST_TOKENS", 50)
    real = module.loss_of_hidden
    monkeypatch.setattr(module, "loss_of_hidden", lambda *a, **k: seen.append(torch.is_grad_enabled()) or real(*a, **k))
    for kind in ("pieces", "whole"):
        if kind == "whole":
            assert {True, False} == set(seen), "training and validation both came from pieces"
            monkeypatch.setattr(module, "reason_for_whole_logits", lambda model: "for this test")
        count = len(seen)
        recipe = make_recipe(values | RUNS[name] | {"output": str(tmp_path / kind), "eval_every": 4})
        output = run(recipe, console=Console(quiet=True))
        assert (len(seen) > count) == (kind == "pieces")
        record = json.loads((output / "run.json").read_text())
        names = ("loss", "grad_norm", "eval_text")
        curves.append([entry[name] for entry in record["curve"] for name in names if name in entry])
    assert curves[0] == pytest.approx(curves[1], rel=2e-2 if name == "bf16" else 1e-4)


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
def test_a_run_says_once_where_it_needs_whole_logits(values: dict[str, Any], family: str) -> None:
    values["model"]["config"]["model_type"] = family
    values["attn_implementation"] = "eager"
    console = Console(record=True, width=200, file=io.StringIO())
    run(make_recipe(values | {"steps": 3}), console=console)
    assert console.export_text().count("the loss needs whole logits") == (1 if family in WHOLE else 0)


def test_a_model_is_trained_for_reading_by_the_loss(values: dict[str, Any]) -> None:
    """The gradient of a step is that of the model's own call, whose chunks learn from its logits; then a whole run."""
    ttt = {"layers": "0::1", "chunk_size": 16, "objective": "loss", "first_order": True, "update_size": 0.02}
    values |= {"ttt": ttt, "steps": 4, "eval_every": 2, "optimizer": {"lr": 5e-3, "max_grad_norm": 0.0}}
    recipe = make_recipe(values)
    trainer, rows = build_trainer(recipe, prepare(recipe), Path(values["output"]))
    model: Any = trainer.model
    batch = {name: torch.stack([rows[0][name], rows[1][name]]) for name in rows[0]}
    model.train()(**batch, use_cache=False).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    with updates_off(model):
        model.zero_grad()
        model(**batch, use_cache=False).loss.backward()
    assert (model.lm_head.weight.grad - want["model.embed_tokens.weight"]).abs().max() > 1e-4, "updates count"
    model.zero_grad()
    found: dict[str, Tensor] = {}

    def keep(*_: Any, **__: Any) -> None:
        if not found:
            found.update({name: p.grad.clone() for name, p in model.named_parameters()})

    trainer.add_callback(type("Keep", (TrainerCallback,), {"on_pre_optimizer_step": keep})())
    trainer.train()
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient)
    output = run(recipe, console=Console(quiet=True))
    record = json.loads((output / "run.json").read_text())
    assert record["evaluation"]["text"]["on"] != record["evaluation"]["text"]["off"]
    assert "text_off" in str(record["curve"])
    assert runtime_of(from_pretrained(output / "model")).config.objective == "loss"

"""Teaching by the loss: the gradients of one backward pass are those of two naive ones, in float64."""

import copy
import math
from typing import Any

import pytest
import torch
from naive_rules import C, K, naive_target
from rich.console import Console
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import inplace_ttt as ittt
from inplace_ttt.core import Target
from inplace_ttt.hf.attach import runtime_of
from inplace_ttt.hf.cache import cache_name
from inplace_ttt.train.prepare import prepare
from inplace_ttt.train.recipe import make_recipe
from inplace_ttt.train.run import build_trainer, run
from inplace_ttt.train.trainer import taught

WEIGHT = 0.7
CASES: dict[str, dict[str, Any]] = {
    "learned": {},
    "learned, hidden states, sized": {"target": "hidden_states", "update_size": 0.3},
    "next_error, gates": {"objective": "next_error", "objective_options": {"gates": True}},
    "next_token, ridge": {"objective": "next_token", "objective_options": {"ridge": 0.3}, "target": "hidden_states"},
    "norm_preserving": {"rule": "norm_preserving"},
}


def model(case: str = "learned", dtype: torch.dtype = torch.float64, std: float = 0.3) -> Any:
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2}
    made = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50)).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    settings = {"layers": "0::2", "chunk_size": C, "conv_kernel": K, "lookahead": 1, "lr": 0.3} | CASES[case]
    ittt.attach(made, ittt.InPlaceTTTConfig(**settings))
    for name, parameter in made.named_parameters():
        if ".ttt_" in name:
            torch.nn.init.normal_(parameter, std=std)
    return made


def batch(packed: bool) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Rows, and the starts of the chunks that update: complete, and with a later token in their document."""
    if not packed:
        ids = torch.randint(50, (2, 3 * C + 2))
        return {"input_ids": ids, "labels": ids}, [[0, C, 2 * C]] * 2
    sizes = (2 * C + 1, C, C + 3)
    ids, positions = torch.randint(50, (1, sum(sizes))), torch.cat([torch.arange(n) for n in sizes])[None]
    return {"input_ids": ids, "labels": ids, "position_ids": positions}, [[0, C, 3 * C + 1]]


def gradients(reader: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    reader.zero_grad(set_to_none=True)
    reader(**given, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in reader.named_parameters() if p.grad is not None}


def two_passes(reader: Any, given: dict[str, Tensor], chunks: list[list[int]]) -> tuple[dict[str, Tensor], float]:
    """The loss's gradients, those of the auxiliary losses added in a second pass; the mean cosine."""
    outputs: dict[int, Tensor] = {}
    sources: dict[int, Tensor] = {}
    hooks = []
    for site in runtime_of(reader).sites:

        def keep(module: Any, args: Any, out: Tensor, site: Any = site) -> None:
            out.retain_grad()
            outputs[site.index], sources[site.index] = out, site.source(site.context, site.context.call).detach()

        hooks.append(site.projection().register_forward_hook(keep))
    found = gradients(reader, given)
    for hook in hooks:
        hook.remove()
    reader.zero_grad(set_to_none=True)
    cosines = []
    for site in runtime_of(reader).sites:
        target = copy.copy(site.bound_target())
        target.ridge, g = None, outputs[site.index].grad
        assert g is not None
        for b, starts in enumerate(chunks):
            pairs = []
            for start in starts:
                v, beta, gamma = naive_target(target, sources[site.index][b, start : start + C], None)
                for t in range(C):
                    factor = 1.0 if beta is None else beta[t] * gamma[t + 1 :].prod()
                    pairs.append((factor * v[t], -g[b, start + t]))
            losses = [
                v.detach().norm() * (1 - v @ w / (v.norm() * w.norm())) if v.any() else -v @ w / w.norm()
                for v, w in pairs
            ]
            (WEIGHT * torch.stack(losses).mean() / len(chunks)).backward(retain_graph=True)
            cosines += [float((v @ w / (v.norm() * w.norm())).detach()) for v, w in pairs if v.any() and w.any()]
    for name, parameter in reader.named_parameters():
        if parameter.grad is not None:
            assert ".ttt_" in name
            found[name] = found[name] + parameter.grad
    return found, sum(cosines) / max(len(cosines), 1)


def figure(reader: Any) -> float:
    totals = [site.teacher.total.tolist() for site in runtime_of(reader).sites]
    return sum(x for x, _ in totals) / sum(n for _, n in totals)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_one_pass_equals_two(case: str, packed: bool, checkpointing: bool) -> None:
    reader, (given, chunks) = model(case).train(), batch(packed)
    want, cosine = two_passes(reader, given, chunks)
    plain = gradients(reader, given)
    if checkpointing:
        reader.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with taught(reader, WEIGHT, is_alone=False):
        for site in runtime_of(reader).sites:
            site.teacher.measures = True
        got = gradients(reader, given)
        assert figure(reader) == pytest.approx(cosine, abs=1e-9)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-10, rtol=1e-8)
    for name in [name for name in want if ".ttt_" in name]:
        change = float((got[name] - plain[name]).abs().max())
        assert change < 1e-9 if ".ttt_gate." in name else change > 1e-3, name  # gates size v, teaching turns it
    again = gradients(reader, given)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("case", ["next_error, gates", "norm_preserving"])
def test_a_target_that_is_zero_is_taught(case: str) -> None:
    """As it is at the start, where a cosine has no gradient."""
    reader, (given, chunks) = model(case), batch(packed=True)
    with torch.no_grad():
        for name, parameter in reader.named_parameters():
            if "proj.weight" in name and ".ttt_" in name:
                parameter.zero_()
    want, _ = two_passes(reader, given, chunks)
    plain = gradients(reader, given)
    with taught(reader, WEIGHT, is_alone=False):
        got = gradients(reader, given)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-10, rtol=1e-8)
        if "proj.weight" in name and ".ttt_" in name:
            assert 1e-2 < (got[name] - plain[name]).norm() < 10


def test_measuring_alone_changes_no_gradient() -> None:
    reader, (given, chunks) = model(), batch(packed=True)
    _, cosine = two_passes(reader, given, chunks)
    want = gradients(reader, given)
    with taught(reader, 0.0, is_alone=False):
        for site in runtime_of(reader).sites:
            site.teacher.measures = True
        got = gradients(reader, given)
        assert figure(reader) == pytest.approx(cosine, abs=1e-9)
    assert all(torch.equal(got[name], gradient) for name, gradient in want.items())


class Constant(Target):
    """Values that are given."""

    def __init__(self, v: Tensor) -> None:
        super().__init__(v.shape[-1])
        self.v = v

    def forward(self, u: Tensor, z: Tensor | None) -> Tensor:
        return self.v


@pytest.mark.parametrize("case", ["learned", "norm_preserving"])
def test_a_target_that_learns_from_teaching_alone(case: str) -> None:
    """The loss takes its values as constants: the target has the auxiliary gradient, the others that of constants."""
    reader, (given, chunks) = model(case), batch(packed=False)
    both, _ = two_passes(reader, given, chunks)
    loss = gradients(reader, given)
    values: dict[int, Tensor] = {}
    for site in runtime_of(reader).sites:
        target = site.bound_target()
        forward = target.forward

        def keep(u: Tensor, z: Tensor | None, site: Any = site, forward: Any = forward) -> Tensor:
            values[site.index] = forward(u, z)
            return values[site.index]

        target.forward = keep
    with torch.no_grad():
        reader(given["input_ids"], use_cache=False)
    for site in runtime_of(reader).sites:
        del site.target.forward
    with taught(reader, WEIGHT, is_alone=True):
        got = gradients(reader, given)
    for site in runtime_of(reader).sites:
        site.target, site.names = Constant(values[site.index].detach()), ()
    constant = gradients(reader, given)
    for name, gradient in got.items():
        want = both[name] - loss[name] if ".ttt_" in name else constant[name]
        torch.testing.assert_close(gradient, want, atol=1e-10, rtol=1e-8)
    assert any((loss[name] - constant[name]).abs().max() > 1e-4 for name in constant)


def test_autocast_teaches_alike() -> None:
    """Also while cosines are measured: autocast's copies of the parameters keep their graph."""
    reader, (given, _) = model("next_token, ridge", torch.float32), batch(packed=False)
    for weight, is_alone in ((WEIGHT, False), (WEIGHT, True), (0.0, False)):
        found = []
        for enabled in (False, True):
            with taught(reader, weight, is_alone), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                for site in runtime_of(reader).sites:
                    site.teacher.measures = True
                found.append(gradients(reader, given))
        exact, rounded = found
        for name, gradient in exact.items():
            if ".ttt_" in name:
                cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), rounded[name].flatten(), dim=0)
                assert float(cosine) > 0.99, (name, weight, is_alone)
                assert float(rounded[name].norm() / gradient.norm()) == pytest.approx(1, abs=0.1)


def test_pieces_behind_a_cache_teach_their_own_tokens() -> None:
    """A pending token's output belongs to an earlier call and takes no part."""
    reader, (given, _) = model(), batch(packed=False)
    with taught(reader, WEIGHT, is_alone=True):
        first = reader(given["input_ids"][:, : C + 1], use_cache=True)
        ids = given["input_ids"][:, C + 1 : 2 * C + 1]
        reader.zero_grad(set_to_none=True)
        ittt.detach_cache(first.past_key_values)
        reader(ids, labels=ids, **{cache_name(reader): first.past_key_values}).loss.backward()
        with_cache = reader.model.layers[2].mlp.ttt_proj.weight.grad
    assert with_cache is not None
    assert with_cache.isfinite().all()
    assert with_cache.abs().max() > 1e-4


# -- in a recipe -------------------------------------------------------------------------------------------------------

TTT = {"layers": "0::1", "chunk_size": 16, "lr": 1.0}


def train(values: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    recipe = make_recipe(values)
    trainer, _ = build_trainer(recipe, prepare(recipe), values["output"])
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_accumulated_batches_teach_as_one(values: dict[str, Any]) -> None:
    """Also where the rows differ."""
    curves: list[Any] = []
    plan: Any = None
    for rows, accumulated in ((2, 1), (1, 2)):
        changes = {"ttt": TTT, "teach": 5.0, "batch_size": rows, "gradient_accumulation": accumulated, "steps": 3}
        changes["optimizer"] = {"lr": 5e-3}
        recipe = make_recipe(values | changes)
        trainer, packed = build_trainer(recipe, prepare(recipe), values["output"])
        plan = packed.plan = plan or packed.plan
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert "ttt_cosine" not in logged[0], "v is zero before the first step"
        curves.append([[entry[k] for k in ("loss", "grad_norm", "ttt_cosine") if k in entry] for entry in logged])
    for a, b in zip(*curves, strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_teaching_turns_the_values_towards_the_gradient(values: dict[str, Any]) -> None:
    """Which they are not without it, in as many steps; measuring it changes nothing in training."""
    ttt = TTT | {"objective": "next_error", "lr": 1e-3}
    optimizer = {"lr": 1e-3, "ttt_lr": 0.02}
    values |= {"ttt": ttt, "steps": 30, "optimizer": optimizer}
    without, by_loss = train(values), train(values | {"teach": 1.0})
    assert by_loss[-1]["ttt_cosine"] > 0.15
    assert by_loss[-1]["ttt_cosine"] > without[-1]["ttt_cosine"] + 0.1
    assert "ttt_cosine" not in by_loss[0]
    assert all(math.isfinite(entry["loss"]) for entry in by_loss)
    quiet = train(values | {"log_every": 30})
    assert quiet[-1]["grad_norm"] == without[-1]["grad_norm"]
    assert quiet[-1]["ttt_cosine"] == without[-1]["ttt_cosine"]


def test_a_taught_run_saves(values: dict[str, Any]) -> None:
    values |= {"ttt": TTT, "teach": 1.0, "teach_alone": True, "activation_checkpointing": True}
    output = run(make_recipe(values), console=Console(quiet=True))
    again = ittt.from_pretrained(output / "model")
    assert ittt.is_trained(again)

"""Whole runs of a tiny model on the CPU: they learn, resume exactly, and leave everything behind."""

import importlib.util
import io
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import inplace_ttt
from inplace_ttt.errors import UserError
from inplace_ttt.eval.nll import token_losses
from inplace_ttt.hf.convert import convert
from inplace_ttt.train.parallel import start
from inplace_ttt.train.prepare import prepare
from inplace_ttt.train.recipe import make_recipe
from inplace_ttt.train.run import run

TTT = {"layers": "0::1", "chunk_size": 16, "lr": 1.0}


def train(values: dict[str, Any], **options: Any) -> tuple[dict[str, Any], Path]:
    output = run(make_recipe(values), **{"console": Console(quiet=True), **options})
    return json.loads((output / "run.json").read_text()), output


def weights(output: Path) -> dict[str, torch.Tensor]:
    files = sorted((output / "model").rglob("*.safetensors"))
    assert files
    return {f"{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.pictures
def test_plain_run_leaves_model_record_and_picture(values: dict[str, Any]) -> None:
    values |= {"eval_every": 4, "steps": 40}
    record, output = train(values)
    losses = [entry["loss"] for entry in record["curve"]]
    assert len(losses) == 40
    assert losses[0] > 5.5, "an untrained model knows nothing"
    assert losses[-1] < losses[0] - 1, "it learns"
    assert record["tokens_seen"] == 40 * 2 * 128
    assert record["curve"][-1]["tokens"] == record["tokens_seen"]
    assert record["tokens_per_second"] > 0
    assert [entry["step"] for entry in record["curve"] if "eval_text" in entry] == list(range(4, 41, 4))
    assert all(entry["grad_norm"] > 0 for entry in record["curve"])
    assert record["recipe"] == json.loads(json.dumps(values))
    assert record["versions"]["torch"] == torch.__version__
    assert record["data"]["train"]["text"]["documents"] == 6
    assert record["peak_memory_bytes"] > 1e7
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not (output / "checkpoints").exists() or not list((output / "checkpoints").iterdir())

    model = AutoModelForCausalLM.from_pretrained(output / "model")
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    assert model.dtype == torch.bfloat16
    assert model.config.use_cache is True, "the Trainer's setting does not stay in the saved model"
    assert "inplace_ttt" not in (output / "model" / "config.json").read_text()
    held = json.loads(Path(values["data"]["test"]["text"].removeprefix("jsonl:")).read_text().splitlines()[0])["text"]
    ids = torch.tensor([tokenizer(held)["input_ids"][:128]])
    loss = float(token_losses(model.float(), ids).mean())
    assert loss == pytest.approx(record["evaluation"]["text"]["on"], abs=0.2)


OWN_LR = {"optimizer": {"lr": 5e-3, "ttt_lr": 0.05, "warmup_steps": 2}, "teach": 1.0}


@pytest.mark.parametrize("more", [{}, OWN_LR, OWN_LR | {"parallel": {}}], ids=["", "taught", "taught, parallel"])
def test_resumed_run_equals_the_uninterrupted_one(values: dict[str, Any], tmp_path: Path, more: dict[str, Any]) -> None:
    values |= {"save_every": 4, "eval_every": 3, "ttt": TTT, "ttt_lr_warmup_steps": 6, "gradient_accumulation": 2}
    values |= more
    whole, output = train(values)
    interrupted = tmp_path / "interrupted"
    shutil.copytree(output / "checkpoints" / "checkpoint-4", interrupted / "checkpoints" / "checkpoint-4")
    shutil.copy(output / "recipe.json", interrupted)
    (interrupted / "checkpoints" / "checkpoint-6").mkdir()  # half-written: without its mark it does not count
    resumed, _ = train(values | {"output": str(interrupted)}, resume=True)
    keys = ("step", "loss", "grad_norm", "learning_rate", "ttt_learning_rate", "ttt_cosine", "eval_text")
    keys += ("eval_text_off",)
    assert ("ttt_learning_rate" in whole["curve"][0]) == bool(more)
    curves = [[{k: e[k] for k in keys if k in e} for e in record["curve"]] for record in (whole, resumed)]
    assert len(curves[0]) == 8
    assert curves[0] == curves[1]
    for (name, a), (other, b) in zip(weights(output).items(), weights(interrupted).items(), strict=True):
        assert name == other
        assert torch.equal(a, b), name


def test_resuming_is_refused_where_it_would_mix_runs(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="nothing to resume"):
        train(values, resume=True)
    values["save_every"] = 8
    train(values)
    with pytest.raises(UserError, match="holds a run already: add --resume"):
        train(values)
    with pytest.raises(UserError, match="cannot resume: optimizer changed"):
        train(values | {"optimizer": {"lr": 1e-3}}, resume=True)
    (Path(values["output"]) / "recipe.json").unlink()
    with pytest.raises(UserError, match=r"cannot resume: .*recipe\.json, the recipe .* is missing: put it back"):
        train(values, resume=True)


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (None, {}, "were written without parallel: leave parallel out"),
        ({}, None, "were written with parallel: set parallel={} for one process"),
    ],
)
def test_checkpoints_of_the_other_kind_are_refused_with_the_fix(
    values: dict[str, Any], first: Any, then: Any, message: str
) -> None:
    values |= {"save_every": 8}
    train(values | {"parallel": first})
    with pytest.raises(UserError, match=message):
        train(values | {"parallel": then}, resume=True)


def test_ttt_run_trains_saves_and_evaluates_fast_weights(values: dict[str, Any]) -> None:
    values |= {"ttt": TTT, "eval_every": 30, "steps": 30}
    record, output = train(values)
    (entry,) = [entry for entry in record["curve"] if "eval_text" in entry]
    assert entry["eval_text"] != entry["eval_text_off"]
    test = record["evaluation"]["text"]
    assert test["gain"] == pytest.approx(test["off"] - test["on"])
    assert json.loads((output / "evaluation.json").read_text())["text"]["position_off"]
    model = inplace_ttt.from_pretrained(output / "model")
    assert inplace_ttt.is_attached(model)
    kappa = [p for n, p in model.named_parameters() if "ttt_conv" in n]
    assert len(kappa) == 2
    assert all(p.abs().max() > 0 for p in kappa), "the convolution starts at zero and learns"


def test_a_checkpoint_on_the_way_becomes_a_model(values: dict[str, Any], tmp_path: Path) -> None:
    """Of several processes' kind, with nothing but the checkpoint at hand, as after a run that never ended."""
    _, output = train(values | {"ttt": TTT, "parallel": {}, "save_every": 8})
    checkpoint = (output / "checkpoints" / "checkpoint-8").rename(tmp_path / "checkpoint-8")
    convert(checkpoint, tmp_path / "model", "model")
    expected, got = (inplace_ttt.from_pretrained(folder) for folder in (output / "model", tmp_path / "model"))
    assert inplace_ttt.fast_settings(got) == inplace_ttt.fast_settings(expected)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(got.state_dict()[name].to(tensor.dtype), tensor), name


def test_base_model_goes_on_training(values: dict[str, Any], tmp_path: Path) -> None:
    _, output = train(values)
    more = values | {
        "output": str(tmp_path / "more"),
        "model": {"base": str(output / "model")},
        "tokenizer": {},
        "ttt": TTT,
        "optimizer": {"lr": 1e-9},
    }
    record, _ = train(more)
    first = json.loads((output / "run.json").read_text())
    assert record["evaluation"]["text"]["off"] == pytest.approx(first["evaluation"]["text"]["on"], abs=0.01)


def test_decay_spares_vectors_and_embeddings(values: dict[str, Any]) -> None:
    from inplace_ttt.train.run import build_trainer

    values |= {"ttt": TTT, "optimizer": {"lr": 1e-3, "decay_embeddings": False, "weight_decay": 0.3}}
    recipe = make_recipe(values)
    trainer, _ = build_trainer(recipe, prepare(recipe), Path(values["output"]))
    trainer.create_optimizer()
    assert trainer.optimizer is not None
    assert trainer.model is not None
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    decayed = {names[id(p)] for g in trainer.optimizer.param_groups if g["weight_decay"] == 0.3 for p in g["params"]}
    spared = {names[id(p)] for g in trainer.optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    assert decayed | spared == set(names.values())
    assert spared == {n for n in names.values() if "norm" in n or "embed" in n}


@pytest.mark.parametrize("parallel", [None, {}])
@pytest.mark.parametrize("trainable", ["all", "adapter_and_projections"])
def test_the_target_has_a_learning_rate_of_its_own(values: dict[str, Any], parallel: Any, trainable: str) -> None:
    """With the others' warm-up, schedule and decay; without one, the groups are the Trainer's."""
    from inplace_ttt.train.run import build_trainer

    values |= {"ttt": TTT | {"objective_options": {"gates": True}}, "parallel": parallel, "seed": 1}
    values["optimizer"] = {"lr": 2e-3, "ttt_lr": 0.02, "warmup_steps": 4, "weight_decay": 0.3}
    recipe = make_recipe(values)
    rank = None if parallel is None else start(recipe.parallel)
    trainer: Any = build_trainer(recipe, prepare(recipe), Path(values["output"]), rank)[0]
    if trainable != "all":
        for name, parameter in trainer.model.named_parameters():
            parameter.requires_grad_(".ttt_" in name or "down_proj" in name)
    names = {id(p): n for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.create_optimizer()
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert found.keys() == set(names.values())
    for name, (lr, decay) in found.items():
        assert lr == (0.02 if ".ttt_" in name else 2e-3), name
        assert (decay == 0) == name.endswith(("norm.weight", "bias")), name
    trainer.optimizer = None
    trainer.train()
    rates = [(e["learning_rate"], e["ttt_learning_rate"]) for e in trainer.state.log_history if "loss" in e]
    assert [own for _, own in rates] == pytest.approx([10 * lr for lr, _ in rates])
    assert rates[4][0] == 2e-3
    assert 0 < rates[-1][0] < 2e-3
    values["optimizer"].pop("ttt_lr")
    recipe = make_recipe(values)
    plain: Any = build_trainer(recipe, prepare(recipe), Path(values["output"]), rank)[0]
    plain.create_optimizer()
    assert {group["lr"] for group in plain.optimizer.param_groups} == {2e-3}
    assert "ttt_learning_rate" not in train(values)[0]["curve"][0]


def test_a_warm_up_of_eta_shrinks_sized_and_capped_writes(values: dict[str, Any]) -> None:
    """What is read is eta S, so the size of S does not undo it."""
    for name, writes in {
        "sized": {"update_size": 0.05},
        "capped": {"rule_options": {"soft_cap": 0.05}},
        "norms": {"rule": "norm_preserving"},
    }.items():
        values |= {"ttt": TTT | writes | {"init_std": 0.5}, "steps": 3, "optimizer": {"lr": 1e-2}}
        effects = []
        for steps in (0, 2):
            output = f"{values['output']}-{name}{steps}"
            record, _ = train(values | {"output": output, "ttt_lr_warmup_steps": steps, "eval_every": 1})
            (entry, *_) = [entry for entry in record["curve"] if "eval_text" in entry]
            effects.append(abs(entry["eval_text"] - entry["eval_text_off"]))
        assert 0.2 < effects[1] / effects[0] < 0.8, (name, effects)


def test_log_of_sized_writes_has_their_size(values: dict[str, Any]) -> None:
    """Not that of the sums before they were scaled."""
    record, _ = train(values | {"ttt": TTT | {"update_size": 0.05, "lr": 0.5}, "steps": 4})
    assert record["curve"][-1]["update_norm/layer_0"] == pytest.approx(0.025, rel=1e-3)
    assert record["warnings"] == []


@pytest.mark.parametrize(
    "ttt",
    [
        {"objective": "next_token", "target": "hidden_states", "lr": 0.01},
        {"objective": "next_error", "lr": 0.01},
        {"objective_options": {"start": "next_token"}},
        {"rule": "norm_preserving"},
    ],
)
def test_an_adapter_learns_a_target_that_starts_at_zero(
    values: dict[str, Any], tmp_path: Path, trained: Path, ttt: Any
) -> None:
    """The base stays; from recipe to saved adapter, whose updates gain what the record says; no false warning."""
    more = values | {"output": str(tmp_path / "more"), "model": {"base": str(trained / "model")}, "tokenizer": {}}
    more |= {"ttt": TTT | ttt, "trainable": "adapter", "steps": 40, "optimizer": {"lr": 1e-2}, "teach": 0.1}
    record, adapter = train(more)
    assert record["warnings"] == []
    assert record["trained_parameters"] < record["parameters"] / 4
    assert record["evaluation"]["text"]["gain"] != 0
    again = inplace_ttt.from_pretrained(adapter / "model")
    assert inplace_ttt.is_trained(again)
    base = AutoModelForCausalLM.from_pretrained(trained / "model")
    for name, parameter in base.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], parameter), name
    assert record["curve"][-1]["ttt_cosine"] > 0


def test_test_windows_that_no_document_fills_are_told_before_training(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"evaluation\.length: no document of data\.test\.text has 100000 tokens"):
        train(values | {"evaluation": {"length": 100_000}})
    assert not Path(values["output"]).exists()


@pytest.mark.parametrize("tokenise", ["before", "while_training"])
def test_documents_shorter_than_a_chunk_are_told_before_training(values: dict[str, Any], tokenise: str) -> None:
    text = Path(values["data"]["train"]["text"].removeprefix("jsonl:")).read_text().splitlines()
    short = Path(values["output"]).parent / "short.jsonl"
    short.write_text("\n".join(json.dumps({"text": json.loads(line)["text"][:20]}) for line in text * 20))
    values["data"] |= {"train": {"text": f"jsonl:{short}"}, "tokenise": tokenise}
    values |= {"ttt": TTT | {"chunk_size": 64}, "output": str(Path(values["output"]).parent / tokenise)}
    said = io.StringIO()
    if tokenise == "before":
        with pytest.raises(
            UserError, match=r"no document in the training rows has more than .* no token sees an update"
        ):
            train(values, console=Console(file=said, width=400))
        assert not (Path(values["output"]) / "model").exists()
    else:
        train(values, console=Console(file=said, width=400))
        assert re.search(
            r"no document in the first \d+ has more than \d+ tokens, so with ttt.chunk_size 64", said.getvalue()
        )


def test_a_run_says_how_many_tokens_see_an_update(values: dict[str, Any]) -> None:
    said = io.StringIO()
    train(values | {"ttt": TTT}, console=Console(file=said, width=400))
    assert re.search(r"\d+\.\d% of the tokens see an update", said.getvalue())


def test_rows_are_read_in_the_planned_order(values: dict[str, Any]) -> None:
    """Not shuffled once more: batches stay of one kind, and a longer run begins like a shorter one."""
    from inplace_ttt.train.run import build_trainer

    recipe = make_recipe(values)
    trainer, rows = build_trainer(recipe, prepare(recipe), Path(values["output"]))
    batches = [batch["input_ids"] for batch in trainer.get_train_dataloader()]
    assert torch.equal(torch.cat(batches), torch.stack([rows[i]["input_ids"] for i in range(len(rows))]))
    assert len(rows) == recipe.steps * recipe.batch_size


@pytest.mark.parametrize(("changes", "cut"), [({}, 16), ({"cut_multiple": 32}, 32), ({"ttt": None}, 1)])
def test_long_documents_are_cut_at_the_recipe_s_chunks(
    values: dict[str, Any], changes: dict[str, Any], cut: int
) -> None:
    from inplace_ttt.train.run import build_trainer

    recipe = make_recipe(values | {"ttt": TTT, "steps": 40} | changes)
    prepared = prepare(recipe)
    (store,) = prepared.stores("train").values()
    _, rows = build_trainer(recipe, prepared, Path(values["output"]))
    starts = [piece.start for row in rows.plan for piece in row]
    inside = [start - max(store.offsets[store.offsets <= start].tolist()) for start in starts]
    assert math.gcd(*inside) == cut


def test_inner_lr_warms_up(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr("inplace_ttt.train.trainer.set_lr", lambda model, lr: seen.append(lr))
    train(values | {"ttt": TTT | {"lr": 2.0}, "ttt_lr_warmup_steps": 4, "steps": 6})
    assert seen == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]  # the last when training ends


def test_diverging_run_stops_with_a_reason(values: dict[str, Any]) -> None:
    values |= {"ttt": TTT | {"lr": 1e30}, "steps": 30, "optimizer": {"lr": 0.9, "max_grad_norm": 0}}
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step \d+: lower"):
        train(values)


def test_bf16_run(values: dict[str, Any]) -> None:
    record, _ = train(values | {"precision": "bf16", "ttt": TTT})
    exact, _ = train(values | {"output": values["output"] + "32", "ttt": TTT})
    for rounded, full in zip(record["curve"], exact["curve"], strict=True):
        assert rounded["loss"] == pytest.approx(full["loss"], abs=0.02)
    assert record["curve"] != exact["curve"]


def test_tokens_are_made_once(values: dict[str, Any], tmp_path: Path) -> None:
    said: list[str] = []
    values["data"]["cache"] = str(tmp_path / "cache")
    directory = run(make_recipe(values), prepare_only=True, console=Console(quiet=True))
    assert directory.parent == tmp_path / "cache"
    assert not Path(values["output"]).exists()
    prepared = prepare(make_recipe(values | {"ttt": TTT, "steps": 9}), said.append)
    assert prepared.directory == directory, "a run that differs in other settings shares them"
    assert said == [f"tokens: {directory}"]
    values["tokenizer"] = {"train": {"vocab_size": 299}}
    assert prepare(make_recipe(values)).directory != directory
    assert len(list((tmp_path / "cache").iterdir())) == 2, "no unfinished directory stays"


def test_max_bytes_takes_part_of_a_domain(values: dict[str, Any]) -> None:
    source = values["data"]["train"]["text"]
    values["data"]["train"]["text"] = {"sources": [source], "max_bytes": 40_000}
    summary = prepare(make_recipe(values)).summary["train"]["text"]
    assert 1 < summary["documents"] < 6
    assert summary["bytes"] == 40_000


def test_accelerate_is_asked_for_plainly(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else find(name))
    with pytest.raises(UserError, match="training needs accelerate: pip install accelerate"):
        train(values)


def test_attention_that_a_cpu_cannot_train_is_refused(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="attn_implementation: flex_attention trains on CUDA devices only"):
        train(values | {"attn_implementation": "flex_attention"})


def test_liger_needs_a_gpu_and_its_package(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="liger: its kernels run on CUDA devices only"):
        train(values | {"liger": True})
    find = importlib.util.find_spec
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "liger_kernel" else find(name))
    with pytest.raises(UserError, match="liger: needs a package, pip install liger-kernel"):
        train(values | {"liger": True})


def test_torchrun_is_refused(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="does not say how they share the run"):
        train(values)

"""Training at scale, at tiny size: every shipped recipe, adapters, accumulation, packed documents."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import inplace_ttt
from inplace_ttt.errors import UserError
from inplace_ttt.train.model import build_model
from inplace_ttt.train.parallel import start
from inplace_ttt.train.prepare import prepare
from inplace_ttt.train.recipe import load_recipe, make_recipe
from inplace_ttt.train.run import build_trainer, run
from inplace_ttt.train.sizes import choose_lr, update_sizes

RECIPES = Path(__file__).parents[2] / "recipes"
TTT = {"layers": "0::1", "chunk_size": 16, "lr": 1.0}
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}


def train(recipe: Any, **options: Any) -> dict[str, Any]:
    output = run(recipe, console=Console(quiet=True), **options)
    return dict(json.loads((output / "run.json").read_text()))


def curve(record: dict[str, Any]) -> list[tuple[float, float]]:
    return [(entry["loss"], entry["grad_norm"]) for entry in record["curve"]]


def tiny_base(kind: str, folder: Path, tokenizer: Any) -> Path:
    config, model = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }[kind]
    model(config(**SHAPE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipe_trains(
    path: Path, values: dict[str, Any], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model size, text, length and number of steps are replaced; every other setting is the recipe's."""
    for name in ("INPLACE_TTT_DATA", "INPLACE_TTT_CODE"):
        monkeypatch.setenv(name, str(corpus))
    cache = f"data.cache={values['data']['cache']}"
    text = [f"data.{s}={{text: 'jsonl:{corpus}/{n}.jsonl'}}" for s, n in (("train", "train"), ("validation", "held"))]
    raw = yaml.safe_load(path.read_text())
    small = [f"output={tmp_path / 'run'}", cache, *text, "data.test={}", "steps=3", "sequence_length=128"]
    small += ["batch_size=1", "gradient_accumulation=1", "log_every=1", "eval_every=3", "evaluation={rows: 1}"]
    small += ["optimizer.warmup_steps=1", "attn_implementation=sdpa", "save_every=0"]
    if raw["ttt"] is not None:
        small += ["ttt.chunk_size=16", "ttt.layers=[0]"]
    if "ttt_lr_warmup_steps" in raw:
        small += ["ttt_lr_warmup_steps=2"]
    if "config" in raw["model"]:
        small += [f"model.config.{name}={value}" for name, value in SHAPE.items() if name != "vocab_size"]
        small += ["model.config.head_dim=16", "model.config.sliding_window=16", "tokenizer={train: {vocab_size: 300}}"]
    else:
        tokenizer = prepare(make_recipe(values)).tokenizer
        kind = next((kind for kind in ("qwen3", "llama") if kind in path.stem), "mistral")
        base = tiny_base(kind, tmp_path / "base", tokenizer)
        if path.stem.endswith("128k"):  # goes on from a model that has fast weights and an inner lr of its own
            model: Any = {"qwen3": Qwen3ForCausalLM, "llama": LlamaForCausalLM}[kind].from_pretrained(base)
            inplace_ttt.attach(model, inplace_ttt.InPlaceTTTConfig(layers=(0,), chunk_size=16, lr=0.07))
            inplace_ttt.save_pretrained(model, tmp_path / "stage1", tokenizer=tokenizer)
            base = tmp_path / "stage1"
        small += [f"model.base={base}", "tokenizer={}"]
    recipe = load_recipe(path, small)
    assert recipe.optimizer.lr == float(raw["optimizer"]["lr"])
    record = train(recipe)
    assert len(record["curve"]) == 3
    assert all(entry["loss"] > 0 for entry in record["curve"])
    saved = tmp_path / "run" / "model"
    if raw["ttt"] is not None:
        trained = inplace_ttt.from_pretrained(saved)
        settings = inplace_ttt.fast_settings(trained)
        assert settings["lr"] == 0.07 if path.stem.endswith("128k") else settings["lr"] > 0
        if path.stem.endswith("128k"):
            assert trained.config.rope_parameters["rope_type"] == "yarn"


@pytest.mark.parametrize(
    "settings", [{"max_position_embeddings": "many"}, {"sliding_windw": 8}, {"rope_parameters": {"rope_type": "yarn"}}]
)
def test_settings_that_a_base_refuses_are_told_in_one_line(
    values: dict[str, Any], tmp_path: Path, settings: dict[str, Any]
) -> None:
    base = tiny_base("mistral", tmp_path / "base", prepare(make_recipe(values)).tokenizer)
    values |= {"model": {"base": str(base), "settings": settings}, "tokenizer": {}}
    with pytest.raises(UserError, match=r"model\.base: cannot load .*(max_position|sliding_windw|factor)") as error:
        train(make_recipe(values))
    assert "\n" not in str(error.value)


def test_heads_that_cannot_be_split_are_told_before_loading(values: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = prepare(make_recipe(values)).tokenizer
    base = tiny_base("mistral", tmp_path / "base", tokenizer)
    recipe = make_recipe(values | {"model": {"base": str(base)}, "tokenizer": {}, "parallel": {"tensor": 4}})
    with pytest.raises(UserError, match=r"parallel\.tensor: 4 does not divide num_attention_heads of .* \(2\)"):
        build_model(recipe, tokenizer, "sdpa")


@pytest.mark.parametrize("trainable", ["adapter", "adapter_and_projections"])
def test_adapter_only_leaves_the_base_alone(values: dict[str, Any], tmp_path: Path, trainable: str) -> None:
    base = tiny_base("mistral", tmp_path / "base", prepare(make_recipe(values)).tokenizer)
    values |= {"model": {"base": str(base)}, "tokenizer": {}, "ttt": TTT | {"layers": [0]}, "trainable": trainable}
    recipe = make_recipe(values)
    trainer, _ = build_trainer(recipe, prepare(recipe), tmp_path / "c")
    model: Any = trainer.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    added = {"model.layers.0.mlp.ttt_conv.weight", "model.layers.0.mlp.ttt_proj.weight"}
    assert changed == added | ({"model.layers.0.mlp.down_proj.weight"} if trainable != "adapter" else set())


@pytest.mark.parametrize("trainable", ["adapter", "adapter_and_projections"])
@pytest.mark.parametrize("begins", ["plain", "whole", "adapter with projections"])
def test_a_run_on_a_frozen_base_saves_the_adapter_alone(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainable: str, begins: str
) -> None:
    """It names its base, and loads in any directory."""
    monkeypatch.chdir(tmp_path)
    tokenizer = prepare(make_recipe(values)).tokenizer
    base: Any = tiny_base("mistral", Path("base"), tokenizer)
    if begins != "plain":
        model = AutoModelForCausalLM.from_pretrained(base)
        inplace_ttt.attach(model, inplace_ttt.InPlaceTTTConfig(**TTT | {"layers": [0]}))
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
        is_adapter = begins != "whole"
        inplace_ttt.save_pretrained(model, "begun", tokenizer, adapter_only=is_adapter, projections=is_adapter)
    given = str(base) if begins == "plain" else "begun"
    values |= {"model": {"base": given}, "tokenizer": {}, "ttt": TTT | {"layers": [0]}, "trainable": trainable}
    values["output"] = "run"
    saved = run(make_recipe(values)) / "model"
    assert not (saved / "base").exists()
    named = json.loads((saved / "inplace_ttt.json").read_text())["base"]["name"]
    assert named == str((tmp_path / ("begun/base" if begins == "whole" else "base")).resolve())
    card = (saved / "README.md").read_text()
    assert f"an adapter for `{named}`" in card
    assert "| text | " in card  # the test losses, by domain
    own = {name.split(".mlp.")[1] for name in load_file(saved / "inplace_ttt.safetensors")}
    trained = trainable == "adapter_and_projections" or begins == "adapter with projections"
    assert own == {"ttt_conv.weight", "ttt_proj.weight"} | ({"down_proj.weight"} if trained else set())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = inplace_ttt.from_pretrained(tmp_path / saved)
    assert [layer.index for layer in inplace_ttt.adapting_layers(again)] == [0]
    assert AutoTokenizer.from_pretrained(tmp_path / saved).get_vocab() == tokenizer.get_vocab()


def test_accumulated_steps_equal_one_large_batch(values: dict[str, Any], tmp_path: Path) -> None:
    """With packed rows, whose numbers of predicted tokens differ."""
    losses, order = [], None
    for batch, accumulated in ((4, 1), (1, 4)):
        changes = {"batch_size": batch, "gradient_accumulation": accumulated, "steps": 3, "ttt": TTT}
        recipe = make_recipe(values | changes | {"sequence_length": 1000})
        trainer, rows = build_trainer(recipe, prepare(recipe), tmp_path / str(batch))
        rows.plan = order = order or rows.plan
        trainer.train()
        losses.append([(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e])
    assert order is not None
    assert any(len(row) > 1 for row in order), "some rows hold several documents"
    for a, b in zip(*losses, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_equals_separate_with_gradients(implementation: str) -> None:
    model = MistralForCausalLM._from_config(MistralConfig(**SHAPE), attn_implementation=implementation).double()
    inplace_ttt.attach(model, inplace_ttt.InPlaceTTTConfig(**TTT))
    for name, parameter in model.named_parameters():
        if "ttt_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    lengths = (50, 33, 16)
    ids = torch.randint(0, 300, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]

    def total(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")

    def losses(packed: bool) -> torch.Tensor:
        loss, at = torch.zeros((), dtype=torch.float64), 0
        logits = model(ids, position_ids=positions, use_cache=False).logits[0] if packed else None
        for n in lengths:
            part = ids[:, at : at + n]
            out = logits[at : at + n] if logits is not None else model(part, use_cache=False).logits[0]
            loss = loss + total(out, part[0])
            at += n
        return loss

    results = [losses(packed) for packed in (True, False)]
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in results]
    torch.testing.assert_close(*results)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("chunk_size", [16, 64])
@pytest.mark.parametrize("width", [32, 96])
@pytest.mark.parametrize("target", ["input_embed", "hidden_states"])
def test_one_relative_update_fits_every_target_width_and_chunk(target: str, width: int, chunk_size: int) -> None:
    model = MistralForCausalLM(MistralConfig(**SHAPE | {"hidden_size": width, "intermediate_size": 2 * width}))
    config = inplace_ttt.InPlaceTTTConfig(layers="0::1", chunk_size=chunk_size, target=target)
    inplace_ttt.attach(model, config)
    row = {"input_ids": torch.randint(0, 300, (1, 200))}
    lr = choose_lr(model, row, 3e-3)
    with torch.no_grad():  # what the probe stands for, as the model itself then sees it
        for layer in model.model.layers:
            layer.mlp.ttt_conv.weight.fill_(1 / 5)
    sizes = [lr * size for size in update_sizes(model, row).values()]
    assert (sizes[0] * sizes[1]) ** 0.5 == pytest.approx(3e-3, rel=0.06)


def test_a_run_that_goes_on_keeps_the_inner_lr_that_it_chose(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    values |= {"ttt": {k: v for k, v in TTT.items() if k != "lr"}, "ttt_relative_update": 3e-3, "save_every": 8}
    train(make_recipe(values))
    chosen = inplace_ttt.fast_settings(inplace_ttt.from_pretrained(Path(values["output"]) / "model"))["lr"]
    monkeypatch.setattr("inplace_ttt.train.run.choose_lr", lambda *_: pytest.fail("measured again"))
    train(make_recipe(values), resume=True)
    again = inplace_ttt.fast_settings(inplace_ttt.from_pretrained(Path(values["output"]) / "model"))["lr"]
    assert again == chosen


def test_a_run_stopped_while_its_inner_lr_warms_up_resumes_with_the_same_losses(values: dict[str, Any]) -> None:
    """A checkpoint's configuration holds the lr of that step, not the one that was chosen."""
    values |= {"ttt": {k: v for k, v in TTT.items() if k != "lr"}, "ttt_relative_update": 3e-3}
    values |= {"save_every": 4, "ttt_lr_warmup_steps": 7}
    whole, output = curve(train(make_recipe(values))), Path(values["output"])
    shutil.rmtree(output / "checkpoints" / "checkpoint-8")
    (output / "run.json").unlink()
    assert curve(train(make_recipe(values), resume=True)) == whole


@pytest.mark.parametrize(
    "where", ["train.trainer.PackedTrainer.training_step", "train.run.build_trainer", "train.run.evaluate"]
)
def test_out_of_memory_is_said_plainly(values: dict[str, Any], where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While training; and before, where the model is put on the device; and after."""

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(f"inplace_ttt.{where}", full)
    advice = (
        "evaluation.batch_size below 2"
        if "evaluate" in where
        else "activation_checkpointing: true, or batch_size below 2"
    )
    with pytest.raises(UserError, match=f"out of memory.*: set {advice}"):
        train(make_recipe(values))


def test_activation_checkpointing_and_tensorboard(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    plain = train(make_recipe(values | {"ttt": TTT}))
    changes = {"output": str(tmp_path / "b"), "ttt": TTT, "activation_checkpointing": True}
    checkpointed = train(make_recipe(values | changes | {"report_to": ["tensorboard"]}))
    for a, b in zip(curve(plain), curve(checkpointed), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert list((tmp_path / "b").rglob("events.out.tfevents*"))
    assert not list(Path(values["output"]).rglob("events.out.tfevents*")), "off by default"


@pytest.mark.parametrize("parallel", [None, {}])
def test_activation_checkpointing_computes_layers_again(
    values: dict[str, Any], tmp_path: Path, parallel: dict[str, int] | None
) -> None:
    counts = []
    for again in (False, True):
        recipe = make_recipe(values | {"steps": 3, "activation_checkpointing": again, "parallel": parallel})
        rank = None if recipe.parallel is None else start(recipe.parallel)
        trainer, _ = build_trainer(recipe, prepare(recipe), tmp_path / str(again), rank)
        seen: list[Any] = []
        model: Any = trainer.model
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *given, seen=seen: seen.append(given))
        trainer.train()
        counts.append(len(seen))
    assert counts == [3, 6]


def test_trl_trains_packed_rows_whose_documents_are_apart(tmp_path: Path, values: dict[str, Any], corpus: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizer = prepare(make_recipe(values)).tokenizer
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    inplace_ttt.attach(model, inplace_ttt.InPlaceTTTConfig(**TTT))
    lines = (corpus / "train.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"][:length] for line in lines for length in (600, 120, 250)]
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=2, max_length=128, packing=True,
        report_to="none", use_cpu=True, bf16=False, logging_steps=1, learning_rate=5e-3, save_strategy="no",
    )  # fmt: skip
    data = datasets.Dataset.from_dict({"text": texts})
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    given: list[dict[str, Any]] = []
    watch = model.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs), with_kwargs=True)
    trainer.train()
    watch.remove()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(layer.mlp.ttt_conv.weight.abs().max() > 0 for layer in model.model.layers)
    names = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    batch = max(given, key=lambda kwargs: len(kwargs["cu_seq_lens_q"]))
    bounds, ids = batch["cu_seq_lens_q"].tolist(), batch["input_ids"]
    assert len(bounds) > 1 + 2, "more documents than rows"
    with torch.no_grad():
        packed = model(ids, **{name: batch[name] for name in names}, use_cache=False).logits
        parts = [model(ids[:, a:b], use_cache=False).logits for a, b in pairwise(bounds)]
    torch.testing.assert_close(packed, torch.cat(parts, 1))

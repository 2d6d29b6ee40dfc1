"""Recipes: checked before anything loads, one plain line for every mistake."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

from inplace_ttt.train.recipe import apply_override, load_recipe, make_recipe
from inplace_ttt.train.schema import RecipeError, load_yaml

RECIPES = Path(__file__).parents[2] / "recipes"


def test_values_and_defaults(values: dict[str, Any]) -> None:
    recipe = make_recipe(values)
    assert recipe.data.train["text"].sources == (values["data"]["train"]["text"],)
    assert recipe.optimizer.lr == 5e-3
    assert recipe.optimizer.schedule == "cosine"
    assert recipe.ttt is None
    assert recipe.ttt_config() is None
    assert recipe.evaluation_length == 128
    assert recipe.raw == values


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.lr=1e-3", "optimiser: no such setting, did you mean optimizer"),
        ("optimizer.learning_rate=1e-3", "optimizer.learning_rate: no such setting"),
        ("optimizer.lr=fast", "optimizer.lr: expected a number, got 'fast'"),
        ("optimizer.lr=3", "optimizer.lr: 3.0 must lie between"),
        ("optimizer.schedule=step", "optimizer.schedule: 'step' is not one of cosine"),
        ("optimizer.warmup_steps=8", "optimizer.warmup_steps: 8 must be below steps"),
        ("optimizer={lr: 0.1, schedule: linear, min_lr_ratio: 0.1}", "only the cosine schedule"),
        ("optimizer.min_lr_ratio=2", "optimizer.min_lr_ratio: 2.0 must be at most 1"),
        ("optimizer.beta1=1", "optimizer.beta1: 1.0 must be at least 0 and below 1"),
        ("seed=-1", "seed: -1 is too small"),
        ("steps=0", "steps: 0 is too small"),
        ("steps=1.5", "steps: expected a whole number"),
        ("steps=true", "steps: expected a whole number"),
        ("name=3", "name: expected text, got 3"),
        ("name=null", "name: expected text, got nothing"),
        ("sequence_length=1", "sequence_length"),
        ("cut_multiple=129", r"cut_multiple: 129 must lie between 1 and sequence_length \(128\)"),
        ("model.base=org/model", "model: give either base .* or config"),
        ("model={}", "model: give either base .* or config"),
        ("model={base: ./nowhere}", "tokenizer.train: a base model keeps its own"),
        ("model.config.model_type=t5", "'t5' is not a causal language model"),
        ("model.config.hidden_sise=64", "mistral has no such setting, did you mean hidden_size"),
        ("model.config.hidden_size=wide", "model.config: .*hidden_size"),
        ("model.config.num_key_value_heads=3", r"num_key_value_heads: 3 must divide num_attention_heads \(2\)"),
        ("model.config.rope_parameters={rope_type: yarm}", "rope_parameters.rope_type: 'yarm' is not one of default, "),
        ("model.config.vocab_size=9", "vocab_size: comes from the tokenizer"),
        ("tokenizer={}", "tokenizer: missing"),
        ("tokenizer=./nowhere", "tokenizer.path: there is no directory ./nowhere"),
        ("tokenizer={path: recipes}", "tokenizer.path: there is no tokenizer in recipes"),
        ("tokenizer.path=x", "tokenizer: give either path or train"),
        ("output=README.md", "output: README.md is a file, name a directory"),
        ("data.cache=README.md", "data.cache: README.md is a file"),
        ("data.train={}", "data.train: give at least one domain"),
        ("data.train.text=[]", "data.train.text: no sources"),
        ("data.train.text=jsonl:/nowhere/*.jsonl", "data.train.text: .*no such file"),
        ("data.train.text=/nowhere", "data.train.text: .*is not a document source"),
        ("data.train.text=library:test", "belongs to another split, write library:train"),
        ("data.train.text={sources: [], bytes: 3}", "data.train.text.bytes: no such setting"),
        ("data={train: {'a/b': 'text:x'}}", "data.train.a/b: a domain's name"),
        ("evaluation.edges=[64, 32]", "evaluation.edges: must rise"),
        ("ttt_lr_warmup_steps=5", "there is no ttt"),
        ("ttt={chunk: 8}", "ttt.chunk: no such setting, did you mean chunk_size"),
        ("ttt={chunk_size: 0}", "ttt: chunk_size must be at least 1"),
        ("ttt={chunk_size: big}", "ttt.chunk_size: expected a whole number"),
        ("ttt={chunk_size: 128, layers: '0::1'}", "128 tokens never see an update"),
        ("ttt={chunk_size: 32, layers: [5]}", "ttt: no layer 5: the model has 2 layers"),
        ("ttt_relative_update=0.1", "ttt_relative_update: there is no ttt"),
        ("trainable=adapter", "trainable: adapter needs ttt"),
        ("trainable=some", "trainable: 'some' is not one of all, adapter"),
        ("optimizer.ttt_lr=1e-3", "optimizer.ttt_lr: there is no ttt"),
        ("teach=1", "teach: there is no ttt"),
        ("teach_alone=true", "teach_alone: the target would learn from nothing"),
        ("teach=-1", "teach: -1.0 is too small"),
        ("report_to=[mlflow]", r"report_to\[0\]: 'mlflow' is not one of tensorboard, wandb"),
        ("report_to=wandb", "report_to: wandb is not installed: pip install wandb"),
        ("model.settings={a: 1}", "model.settings: only a base has settings"),
        ("nonsense", "write key=value"),
        ("a b=3", "write key=value"),
        ("steps=[", "the value is not YAML"),
    ],
)
def test_mistakes(values: dict[str, Any], override: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parent)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))

    def read() -> None:
        apply_override(values, override)
        make_recipe(values)

    with pytest.raises(RecipeError, match=message) as error:
        read()
    assert "\n" not in str(error.value)


OWN_LR = {"lr": 1e-3, "ttt_lr": 0.1}
BY_LOSS = {"layers": "0::1", "chunk_size": 16, "objective": "loss", "first_order": True, "update_size": 0.01}
LEARNS = {"ttt": {"layers": "0::1", "chunk_size": 16}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"lr": 1e-3, "ttt_lr": 2}}, "optimizer.ttt_lr: 2.0 must lie between 0 and 1"),
        (
            {
                "optimizer": OWN_LR,
                "trainable": "adapter",
                "model": {"base": "a/b"},
                "tokenizer": {},
            },
            "optimizer.ttt_lr: with trainable: adapter nothing else is trained",
        ),
        (
            {"optimizer": OWN_LR, "ttt": BY_LOSS},
            "optimizer.ttt_lr: objective 'loss'",
        ),
        ({"ttt": {"objective": "loss"}}, "ttt.objective: the loss needs no training; .* set ttt.first_order: true"),
        (
            {"ttt": BY_LOSS, "trainable": "adapter", "model": {"base": "a/b"}, "tokenizer": {}},
            "trainable: the loss as objective has no parameters",
        ),
        ({"ttt": BY_LOSS, "activation_checkpointing": True}, "activation_checkpointing: not supported with ttt.obj"),
        ({"ttt": BY_LOSS, "compile": True}, "compile: not supported with ttt.objective: loss"),
        ({"ttt": BY_LOSS, "liger": True}, "liger: not supported with ttt.objective: loss"),
        ({"ttt": BY_LOSS, "parallel": {"shard": 2}}, "parallel: not supported with ttt.objective: loss"),
        ({"ttt": BY_LOSS, "ttt_relative_update": 0.01}, "ttt_relative_update: not supported with|leave one of them"),
        ({"teach": 1, "ttt": {"objective": "next_token", "projection": False}}, "teach: objective 'next_token' has no"),
        ({"teach_alone": True}, "teach_alone: the target would learn from nothing: give teach"),
        (
            {"teach": 1, "teach_alone": True, "ttt": {"objective_options": {"gates": True}}},
            "teach_alone: teaching turns values and does not size them, so gates",
        ),
        (
            {"liger": True, "parallel": {"context": 2}, "align_documents": True},
            "liger: not supported together with parallel",
        ),
        ({"teach": 1, "compile": True}, "teach: not supported together with compile"),
        (
            {"teach": 1, "parallel": {"context": 2}, "align_documents": True},
            "teach: not supported together with parallel.context",
        ),
        ({"teach": 1, "parallel": {"tensor": 2}}, "teach: not supported together with parallel.tensor"),
        ({"ttt": {"objective_options": {"start": "kappa"}}}, "ttt: start must be"),
        (
            {"ttt": {"objective_options": {"start": "next_token"}, "lookahead": 0}},
            "ttt: start=.next_token. needs a tap",
        ),
        (
            {"ttt": {"objective_options": {"start": "next_token"}, "init_std": 0.1}},
            "ttt.init_std: with start: next_token P begins at zero",
        ),
        ({"ttt": {"objective_options": {"ridge": 0}}}, "ttt: ridge must be positive"),
        (
            {"ttt_lr_warmup_steps": 2, "ttt": {"rule_options": {"lr": 0.1}}},
            "ttt_lr_warmup_steps: ttt.rule_options.lr",
        ),
        (
            {"ttt_relative_update": 0.01, "ttt": {"rule_options": {"lr": 0.1}}},
            "ttt_relative_update: ttt.rule_opt",
        ),
        ({"ttt_lr_warmup_steps": 2, "ttt": {"objective": "loss"}}, 'ttt_lr_warmup_steps: ttt.update_size "auto"'),
        (
            {"ttt_relative_update": 0.01, "ttt": {"objective": "next_error"}},
            "ttt_relative_update: this target begins with P at zero",
        ),
        (
            {"ttt_relative_update": 0.01, "ttt": {"update_size": 0.1}},
            "ttt_relative_update: ttt.update_size sets",
        ),
    ],
)
def test_mistakes_about_what_the_target_learns(values: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    make_recipe(values | LEARNS | {"teach": 1, "teach_alone": True, "optimizer": OWN_LR})
    ttt = LEARNS["ttt"] | changes.get("ttt", {})
    with pytest.raises(RecipeError, match=message) as error:
        make_recipe(values | changes | {"ttt": ttt})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"base": "recipes"}, "model.base: there is no model in recipes"),
        ({"base": "out/a/b"}, "model.base: there is no directory out/a/b"),
        ({"base": "{model}"}, "tokenizer: there is no tokenizer in .*model"),
        ({"base": "a/b", "settings": {"rope_parameters": {"rope_type": "yarm"}}}, "model.settings.rope_parameters"),
    ],
)
def test_mistakes_about_a_base(
    values: dict[str, Any], model: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(RECIPES.parent)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    model["base"] = model["base"].format(model=tmp_path / "model")
    with pytest.raises(RecipeError, match=message):
        make_recipe(values | {"model": model, "tokenizer": {}})


def test_a_family_without_a_known_projection_is_refused(values: dict[str, Any]) -> None:
    values |= {"model": {"config": {"model_type": "mamba"}}, "ttt": {"chunk_size": 16}}
    with pytest.raises(RecipeError, match="ttt: mamba is not in the table of families"):
        make_recipe(values)
    make_recipe(values | {"ttt": {"chunk_size": 16, "layers_path": "layers", "projection_path": "mlp.down"}})


def test_needs_validation_data_to_validate(values: dict[str, Any]) -> None:
    values["eval_every"] = 4
    make_recipe(values)
    del values["data"]["validation"]
    with pytest.raises(RecipeError, match=r"eval_every: needs data\.validation"):
        make_recipe(values)


@pytest.mark.parametrize("key", ["name", "model", "data", "optimizer", "steps"])
def test_missing_settings(values: dict[str, Any], key: str) -> None:
    del values[key]
    with pytest.raises(RecipeError, match=f"{key}: missing"):
        make_recipe(values)


def test_ttt_fields_reach_the_library(values: dict[str, Any]) -> None:
    values["ttt"] = {"layers": [0, 1], "chunk_size": 32, "lr": 1, "clip": None}
    config = make_recipe(values).ttt_config()
    assert config is not None
    assert (config.layers, config.chunk_size, config.lr, config.clip) == ((0, 1), 32, 1.0, None)


def test_overrides_take_yaml_values() -> None:
    values: dict[str, Any] = {"a": {"b": 1}}
    for override in ("a.b=2e-3", "a.c=[1, x]", "d.e.f=null"):
        apply_override(values, override)
    assert values == {"a": {"b": 2e-3, "c": [1, "x"]}, "d": {"e": {"f": None}}}


def test_numbers_without_a_dot() -> None:
    assert load_yaml("[1e6, 2E-3, -1e-2, 1.5e3, 12, 1e, e5, '1e6']") == [1e6, 2e-3, -1e-2, 1.5e3, 12, "1e", "e5", "1e6"]


def test_variables(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, corpus: Path) -> None:
    values["data"]["train"]["text"] = "jsonl:${SOME_CORPUS}/train.jsonl"
    before = copy.deepcopy(values)
    monkeypatch.delenv("SOME_CORPUS", raising=False)
    with pytest.raises(RecipeError, match=r"data\.train\.text: the environment variable SOME_CORPUS is not set"):
        make_recipe(values)
    monkeypatch.setenv("SOME_CORPUS", str(corpus))
    recipe = make_recipe(values)
    assert recipe.data.train["text"].sources == (f"jsonl:{corpus}/train.jsonl",)
    assert recipe.raw == before, "the record keeps the variable, not this machine's path"


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [\n")
    (tmp_path / "list.yaml").write_text("- a\n")
    for name, message in (("none", "No such file"), ("bad", "not YAML"), ("list", "expected settings")):
        with pytest.raises(RecipeError, match=message) as error:
            load_recipe(tmp_path / f"{name}.yaml")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INPLACE_TTT_DATA", str(shared / "data"))
    monkeypatch.setenv("INPLACE_TTT_CODE", str(tmp_path))
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").touch()
    monkeypatch.chdir(RECIPES.parent)
    overrides = ["model.base=owner/stage-1"] if path.stem.endswith("-128k") else []  # stage 1's model is not there
    assert load_recipe(path, overrides).name == path.stem


def test_baseline_differs_from_ttt_in_ttt_alone() -> None:
    with_ttt, without = (
        yaml.safe_load((RECIPES / f"books-and-code-{kind}.yaml").read_text()) for kind in ("ttt", "window")
    )
    differing = {key for key in with_ttt.keys() | without.keys() if with_ttt.get(key) != without.get(key)}
    assert differing == {"name", "output", "ttt"}
    assert without["ttt"] is None


def shipped(name: str) -> Any:
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text())


@pytest.mark.parametrize(
    ("name", "shape", "lr", "tokens", "batch"),
    [
        ("scratch-500m", (1024, 3072, 24, 8, 2048), 5e-4, 20e9, 2**21),
        ("scratch-1.5b", (2048, 6144, 24, 16, 4096), 3e-4, 60e9, 2**22),
    ],
)
def test_from_scratch_recipes_have_the_papers_settings(
    name: str, shape: tuple[int, ...], lr: float, tokens: float, batch: int
) -> None:
    """Its Table 3."""
    recipe = shipped(name)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "sliding_window")
    assert tuple(recipe["model"]["config"][key] for key in names) == shape
    assert recipe["model"]["config"]["rope_theta"] == 1e6
    assert recipe["tokenizer"]["train"]["vocab_size"] == 32_000
    assert recipe["sequence_length"] == 32_768
    assert recipe["batch_size"] * recipe["gradient_accumulation"] * recipe["sequence_length"] == batch
    assert recipe["steps"] * batch == pytest.approx(tokens, rel=1e-3)
    optimizer = recipe["optimizer"]
    assert (optimizer["lr"], optimizer["weight_decay"], optimizer["max_grad_norm"]) == (lr, 0.1, 1.0)
    assert optimizer["warmup_steps"] == 1024


@pytest.mark.parametrize(("stage", "length", "tokens"), [("32k", 32_768, 20e9), ("128k", 131_072, 15e9)])
@pytest.mark.parametrize("base", ["qwen3-4b", "qwen3-14b", "llama-3.1-8b"])
def test_continual_recipes_have_the_papers_settings(base: str, stage: str, length: int, tokens: float) -> None:
    recipe = shipped(f"continual-{base}-{stage}")
    optimizer, steps = recipe["optimizer"], recipe["steps"]
    assert recipe["sequence_length"] == length
    rows = recipe["batch_size"] * recipe["gradient_accumulation"]
    assert steps * rows * length == pytest.approx(tokens, rel=1e-3)
    assert (optimizer["lr"], optimizer["schedule"], optimizer["weight_decay"]) == (5e-6, "cosine", 0.1)
    assert optimizer["max_grad_norm"] == 1.0
    assert optimizer["warmup_steps"] == pytest.approx(0.02 * steps, abs=1)
    assert recipe["ttt"]["layers"] == "0::6"
    if stage == "128k":
        rope = recipe["model"]["settings"]["rope_parameters"]
        assert rope["rope_type"] == "yarn"
        assert rope["factor"] * rope["original_max_position_embeddings"] == length
        assert recipe["model"]["base"] == f"{shipped(f'continual-{base}-32k')['output']}/model"

"""Loaded again by name: other libraries get the whole model, or an error, never the plain base."""

import contextlib
import json
import sys

import pytest
import torch
from contract.families import C, adapted, logits, plain, randomise, tokens
from forked import run_fresh
from session.models import tokenizer
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

import inplace_ttt as ittt
from inplace_ttt.cli.preview import preview
from inplace_ttt.hf.attach import runtime_of
from inplace_ttt.hf.auto import base_config
from inplace_ttt.hf.checkpoint import has_fast_weights
from inplace_ttt.hf.directory import SETTINGS

IDS = tokens(2, 2 * C + 3)


@pytest.fixture
def whole(tmp_path):
    """A saved model whose fast weights matter, with the shipped model's tokenizer."""
    model = adapted("llama", torch.float32, {"vocab_size": len(tokenizer()), "max_position_embeddings": 512})
    ittt.save_pretrained(model, tmp_path / "whole", tokenizer())
    return tmp_path / "whole"


@pytest.fixture
def in_memory(tmp_path):
    """A plain model loaded by name and attached, with weights that make it another model."""
    plain("llama", torch.float32, {"vocab_size": len(tokenizer())}).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    ittt.attach(model, ittt.InPlaceTTTConfig(layers="0::2", chunk_size=C, lr=0.03))
    randomise(model)
    return model


def load(path):
    return ittt.from_pretrained(path, dtype=torch.float32).eval()


# -- transformers -----------------------------------------------------------------------------------------------------


def test_auto_classes_load_the_whole_model(whole):
    """Keywords reach the model, and none of them the directory's own configuration."""
    want = logits(load(whole), IDS)
    again = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32, attn_implementation="eager").eval()
    assert ittt.is_attached(again)
    assert again.config._attn_implementation == "eager"
    assert again.config.model_type == "llama"
    assert_close(logits(again, IDS), want, atol=1e-5, rtol=0)
    half = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.bfloat16, use_cache=False)
    assert (half.dtype, half.config.use_cache) == (torch.bfloat16, False)
    model, report = AutoModelForCausalLM.from_pretrained(whole, output_loading_info=True)
    assert ittt.is_attached(model)
    assert not report["missing_keys"]
    config = AutoConfig.from_pretrained(whole)
    assert AutoModelForCausalLM.from_pretrained(whole, config=config).config.model_type == "llama"


def test_what_the_auto_classes_cannot_give_whole_they_refuse(whole):
    with pytest.raises(ValueError, match="FastWeightsConfig"):
        AutoModel.from_pretrained(whole)
    with pytest.raises(ittt.UserError, match=r"holds a LlamaForCausalLM: load it with inplace_ttt.from_pretrained"):
        AutoModelForSequenceClassification.from_pretrained(whole)
    with pytest.raises(ittt.UserError, match=r"call inplace_ttt.attach"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(whole))
    base = AutoModelForCausalLM.from_pretrained(whole / "base")  # the plain model, and says so
    assert not ittt.is_attached(base)


def test_a_program_without_this_library_refuses(whole, tmp_path):
    """Whole models, adapters and what a Trainer saves; all that loads is the plain model inside, which says so."""
    model = load(whole)
    ittt.save_pretrained(model, tmp_path / "adapter", adapter_only=True)
    model.save_pretrained(tmp_path / "trainer")
    folders = [whole, tmp_path / "adapter", tmp_path / "trainer", whole / "base"]
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "LlamaForCausalLM")

    def work():
        import transformers

        for name in names:
            for folder in folders:
                with contextlib.suppress(Exception):
                    getattr(transformers, name).from_pretrained(folder)
                    print(name, folder)
        print([name for name in sys.modules if name.startswith("inplace_ttt")])

    said = "".join(f"{name} {whole / 'base'}\n" for name in names)
    assert run_fresh(work, ["inplace_ttt", "transformers"]) == (0, f"{said}[]\n")


def test_a_tokenizer_by_the_model_s_name(whole, tmp_path):
    text = "def whale(self):"
    want = tokenizer()(text)["input_ids"]
    model = load(whole)
    ittt.save_pretrained(model, tmp_path / "bare")
    ittt.save_pretrained(model, tmp_path / "adapter", adapter_only=True, base=str(ittt.DEFAULT_MODEL))
    for place in (whole, tmp_path / "adapter"):
        assert AutoTokenizer.from_pretrained(place)(text)["input_ids"] == want
        assert AutoProcessor.from_pretrained(place)(text)["input_ids"] == want
    tokenizer().save_pretrained(tmp_path / "bare" / "base")
    assert AutoTokenizer.from_pretrained(tmp_path / "bare")(text)["input_ids"] == want


def test_what_the_trainer_saves(whole, tmp_path):
    """Weights where it looks for them when it resumes; by name the whole model again."""
    model = load(whole)
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=1e-2
    )
    data = [{"input_ids": row, "labels": row} for row in IDS]
    Trainer(model, arguments, train_dataset=data).train()
    want = logits(model.eval(), IDS)
    for loaded in (
        load(tmp_path / "run" / "checkpoint-2"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2"),
    ):
        assert ittt.is_attached(loaded)
        assert_close(logits(loaded.eval(), IDS), want, atol=1e-5, rtol=0)
    again = load(whole)
    Trainer(again, arguments, train_dataset=data).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert_close(logits(again.eval(), IDS), want, atol=1e-5, rtol=0)


def test_what_transformers_wrote_before_there_was_a_model_type(whole, tmp_path):
    model = load(whole)
    type(model).save_pretrained(model, tmp_path / "old")
    assert json.loads((tmp_path / "old" / "config.json").read_text())["model_type"] == "llama"
    assert_close(logits(load(tmp_path / "old"), IDS), logits(model, IDS), atol=1e-6, rtol=0)


def test_a_classification_head(tmp_path):
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(plain("llama").config).float().eval()
    ittt.attach(model, ittt.InPlaceTTTConfig(layers=":", chunk_size=C))
    randomise(model)
    with torch.no_grad():
        want = model(IDS).logits
    ittt.save_pretrained(model, tmp_path / "whole")
    model.save_pretrained(tmp_path / "trainer")
    for loader in (ittt, AutoModelForSequenceClassification):
        for place in ("whole", "trainer"):
            again = loader.from_pretrained(tmp_path / place, dtype=torch.float32).eval()
            assert ittt.is_attached(again)
            with torch.no_grad():
                assert_close(again(IDS).logits, want, atol=1e-6, rtol=0)
    with pytest.raises(ittt.UserError, match="holds a LlamaForSequenceClassification"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "whole")


# -- reference models -------------------------------------------------------------------------------------------------


def trainer_of(kind, model, folder, **changes):
    """A trl trainer that makes its own reference model."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    common = {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "max_steps": 1, "beta": 0.1}
    rows = {
        "DPO": {"prompt": ["ab"], "chosen": ["cd"], "rejected": ["ef"]},
        "KTO": {"prompt": ["ab", "ab"], "completion": ["cd", "ef"], "label": [True, False]},
        "GRPO": {"prompt": ["ab"]},
        "RLOO": {"prompt": ["ab"]},
    }[kind]
    config = getattr(trl, f"{kind}Config")(str(folder), **common)
    if kind in ("GRPO", "RLOO"):
        changes["reward_funcs"] = lambda completions, **_: [0.0] * len(completions)
    return getattr(trl, f"{kind}Trainer")(
        model=model, args=config, train_dataset=datasets.Dataset.from_dict(rows), **changes
    )


@pytest.mark.parametrize("kind", ["DPO", "KTO", "GRPO", "RLOO"])
def test_trl_s_reference_models_are_whole(kind, whole, tmp_path):
    model = load(whole)
    trainer = trainer_of(kind, model, tmp_path / "out")  # the tokenizer by name, too
    reference = trainer.ref_model.eval()
    assert runtime_of(reference).config == runtime_of(model).config
    assert reference is not model
    assert_close(logits(reference, IDS), logits(model.eval(), IDS), atol=1e-5, rtol=0)
    with ittt.updates_off(model):
        assert float((logits(model, IDS) - logits(reference, IDS)).abs().max()) > 1e-2  # another model than the base


@pytest.mark.parametrize("kind", ["DPO", "GRPO"])
def test_a_model_that_is_in_memory_alone_has_no_reference_by_name(kind, in_memory, tmp_path):
    """Its tokenizer is its base's; saved and loaded again it works."""
    with pytest.raises(ittt.UserError, match=r"given fast weights in memory.*save_pretrained.*from_pretrained first"):
        trainer_of(kind, in_memory, tmp_path / "out")
    ittt.save_pretrained(in_memory, tmp_path / "saved", tokenizer())
    assert trainer_of(kind, load(tmp_path / "saved"), tmp_path / "out").ref_model is not None


def test_peft_finds_the_whole_model(whole, in_memory, tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    lora = peft.get_peft_model(load(whole), settings).eval()
    lora.save_pretrained(tmp_path / "lora")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora", dtype=torch.float32).eval()
    assert_close(again(input_ids=IDS).logits, lora(input_ids=IDS).logits, atol=1e-5, rtol=0)
    peft.get_peft_model(in_memory, settings).save_pretrained(tmp_path / "unsaved")
    with pytest.raises(ittt.UserError, match="given fast weights in memory"):
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "unsaved")


# -- names ------------------------------------------------------------------------------------------------------------


def test_the_base_s_name_comes_back_when_detached(in_memory, whole, tmp_path):
    ittt.detach(in_memory)
    assert in_memory.config._name_or_path == in_memory.name_or_path == str(tmp_path / "base")
    assert "save_pretrained" not in in_memory.__dict__
    model = load(whole)
    assert model.config._name_or_path == model.name_or_path == str(whole)
    ittt.detach(model)
    assert model.config._name_or_path == str(whole / "base")


def test_an_adapter_names_its_base_for_any_directory(in_memory, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    ittt.attach(relative, ittt.InPlaceTTTConfig(layers="0::2", chunk_size=C))
    ittt.save_pretrained(relative, "adapter", adapter_only=True)
    ittt.save_pretrained(load(whole), "of-whole", adapter_only=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert ittt.is_attached(load(tmp_path / "adapter"))
    assert_close(logits(load("../of-whole"), IDS), logits(load(whole), IDS), atol=1e-6, rtol=0)
    again = load(tmp_path / "adapter")  # an adapter of an adapter's model names the same base
    ittt.save_pretrained(again, "second", adapter_only=True)
    name = json.loads((tmp_path / "adapter" / SETTINGS).read_text())["base"]["name"]
    assert json.loads((tmp_path / "elsewhere" / "second" / SETTINGS).read_text())["base"]["name"] == name
    settings = json.loads((tmp_path / "adapter" / SETTINGS).read_text())
    settings["base"]["name"] = "../base"  # relative to the adapter
    (tmp_path / "adapter" / SETTINGS).write_text(json.dumps(settings))
    (tmp_path / "elsewhere" / "a").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere" / "a")
    assert ittt.is_attached(load(tmp_path / "adapter"))


def test_running_settings_are_saved(whole, tmp_path):
    """What ``fast_settings`` shows is what a saved model reads with, in every format."""
    model = load(whole)
    ittt.configure(model, chunk_size=2 * C, decay=0.25, lr=0.1, clip=0.125)
    ittt.set_lr(model, 0.5)
    ittt.save_pretrained(model, tmp_path / "saved")
    ittt.save_pretrained(model, tmp_path / "adapter", adapter_only=True)
    model.save_pretrained(tmp_path / "trainer")
    for place in ("saved", "adapter", "trainer"):
        again = load(tmp_path / place)
        assert ittt.fast_settings(again) == ittt.fast_settings(model)
        assert_close(logits(again, IDS), logits(model, IDS), atol=1e-6, rtol=0)


def test_saving_over_another_model(in_memory, whole, tmp_path):
    """Never over the base; over what was saved there before, in either format, the newer one counts."""
    for keywords in ({}, {"adapter_only": True}):
        with pytest.raises(ittt.UserError, match="base holds another model: choose another directory"):
            ittt.save_pretrained(in_memory, tmp_path / "base", **keywords)
    assert not ittt.is_attached(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model = load(whole)
    for number, is_trainer_s in enumerate((False, True, False)):
        ittt.configure(model, lr=0.1 + number)
        model.save_pretrained(whole) if is_trainer_s else ittt.save_pretrained(model, whole)
        assert ittt.fast_settings(load(whole))["lr"] == 0.1 + number


@pytest.mark.parametrize("kind", ["whole", "adapter", "trainer", "old"])
def test_the_base_s_shape_without_weights(kind, whole, tmp_path):
    """What ``adapting_layers`` and a plan look at, in every format."""
    model = load(whole)
    ittt.save_pretrained(model, tmp_path / "adapter", adapter_only=True)
    model.save_pretrained(tmp_path / "trainer")
    type(model).save_pretrained(model, tmp_path / "old")
    config, _ = base_config(str(tmp_path / kind))
    assert (config.model_type, config.hidden_size) == ("llama", 32)
    found = preview(str(tmp_path / kind), {})
    assert (found.attached, found.model_type) == (True, "llama")
    assert [layer.index for layer in found.layers] == [0, 2]
    assert has_fast_weights(tmp_path / kind)
    assert not has_fast_weights(whole / "base")


def test_an_adapter_without_a_base_has_no_shape(tmp_path):
    ittt.save_pretrained(adapted("llama"), tmp_path, adapter_only=True)
    with pytest.raises(ittt.UserError, match="is an adapter without its base model's name"):
        base_config(str(tmp_path))
    with pytest.raises(ittt.UserError, match="an adapter without its base model's name: pass model="):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_pipelines_by_name(whole):
    want = load(whole)
    ids = tokenizer()("def whale(self):", return_tensors="pt")
    written = want.generate(**ids, max_new_tokens=9, do_sample=False)[0, ids.input_ids.shape[1] :]
    pipe = pipeline("text-generation", model=str(whole), dtype=torch.float32)
    (found,) = pipe("def whale(self):", max_new_tokens=9, do_sample=False, return_full_text=False)
    assert ittt.is_attached(pipe.model)
    assert found["generated_text"] == tokenizer().decode(written)

"""convert: there and back through every format, tensor for tensor."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import inplace_ttt
from inplace_ttt.cli import app
from inplace_ttt.errors import UserError
from inplace_ttt.hf.convert import convert


@pytest.fixture
def model(tmp_path: Path) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    inplace_ttt.attach(model, inplace_ttt.InPlaceTTTConfig(layers=(1,), chunk_size=8, lr=0.3))
    torch.nn.init.normal_(model.model.layers[1].mlp.ttt_conv.weight)
    inplace_ttt.save_pretrained(model, tmp_path / "model")
    return model


@pytest.mark.parametrize("to", ["adapter", "release", "sharded", "model"])
def test_there_and_back(model: LlamaForCausalLM, tmp_path: Path, to: str) -> None:
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "model"), str(tmp_path / "x"), "--to", to])
    assert result.exit_code == 0, result.exception
    assert result.output.splitlines() == [f"done: {tmp_path / 'x'}"]
    convert(tmp_path / "x", tmp_path / "back", "model", base=str(tmp_path / "base") if to == "adapter" else None)
    back = inplace_ttt.from_pretrained(tmp_path / "back")
    assert inplace_ttt.fast_settings(back) == inplace_ttt.fast_settings(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_shards_as_accelerate_lays_them_out_need_a_shape(model: LlamaForCausalLM, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    inside = tmp_path / "checkpoint-3" / "pytorch_model_fsdp_0"
    dcp.save({"model": model.state_dict()}, checkpoint_id=str(inside), no_dist=True)
    with pytest.raises(UserError, match="tensors only: name a saved model"):
        convert(tmp_path / "checkpoint-3", tmp_path / "x", "model")
    assert not (tmp_path / "x").exists()
    convert(tmp_path / "checkpoint-3", tmp_path / "x", "model", config=tmp_path / "model")
    back = inplace_ttt.from_pretrained(tmp_path / "x")
    assert torch.equal(back.model.layers[1].mlp.ttt_conv.weight, model.model.layers[1].mlp.ttt_conv.weight)


@pytest.mark.parametrize("to", ["adapter", "release", "sharded", "model"])
def test_the_tokenizer_and_its_template_go_along(model: LlamaForCausalLM, tmp_path: Path, to: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(inplace_ttt.DEFAULT_MODEL)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    for place in (tmp_path / "model", tmp_path / "model" / "base"):  # beside the model, and beside its base
        tokenizer.save_pretrained(place)
        convert(tmp_path / "model", tmp_path / "x", to)
        found = AutoTokenizer.from_pretrained(tmp_path / "x")
        assert found.chat_template == tokenizer.chat_template
        assert found("def f():")["input_ids"] == tokenizer("def f():")["input_ids"]
        back = tmp_path / "back" if to != "release" else tmp_path / "x"
        convert(tmp_path / "x", tmp_path / "back", "model", base=str(tmp_path / "base") if to == "adapter" else None)
        assert AutoTokenizer.from_pretrained(back).chat_template == tokenizer.chat_template
        for file in [*place.glob("*token*"), *place.glob("chat_template*"), tmp_path / "x", tmp_path / "back"]:
            shutil.rmtree(file) if file.is_dir() else file.unlink()

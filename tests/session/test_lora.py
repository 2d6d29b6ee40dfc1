"""What a session learned, served by peft on the plain base model."""

import json
import math
import warnings

import pytest
import torch
from contract.families import adapted, plain
from safetensors.torch import load_file, save_file

from inplace_ttt import Session, UserError, from_pretrained, is_attached, save_pretrained
from inplace_ttt.session.lora import factor

peft = pytest.importorskip("peft")

IDS = torch.randint(1, 97, (90,), generator=torch.Generator().manual_seed(5)).tolist()


def learned(family: str, **options) -> Session:
    s = Session(adapted(family, torch.float64), decay=0.02, **options)
    s.read(IDS[:88])  # whole chunks: nothing pending
    s.drop_context()
    return s


def served(family: str, path, question) -> torch.Tensor:
    base = peft.PeftModel.from_pretrained(plain(family, torch.float64), str(path)).double().eval()
    with torch.no_grad():
        logits: torch.Tensor = base(input_ids=torch.tensor([question])).logits[0, -1]
    return logits


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "glm", "gpt2", "phi3"])
def test_exact_when_the_rank_suffices(family, tmp_path):
    s = learned(family)
    layers = s.export_lora(tmp_path)
    assert all(layer.error == 0 and layer.rank == layer.full_rank for layer in layers)
    question = IDS[5:8]  # shorter than a chunk: the session itself learns nothing from it
    s.read(question)
    expected = s.next_logits
    torch.testing.assert_close(served(family, tmp_path, question), expected, rtol=1e-4, atol=1e-5)  # float32 files
    plain_logits = plain(family, torch.float64)(input_ids=torch.tensor([question])).logits[0, -1]
    assert (plain_logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_that_keep_their_norms_are_a_dora_adapter(family, tmp_path):
    """With the magnitude that peft computes itself."""
    s = Session(adapted(family, torch.float64, rule="norm_preserving", lr=0.3), decay=0.02)
    s.read(IDS[:88])
    s.drop_context()
    assert all(layer.error == 0 for layer in s.export_lora(tmp_path))
    question = IDS[5:8]
    s.read(question)
    got = served(family, tmp_path, question)
    torch.testing.assert_close(got, s.next_logits, rtol=1e-4, atol=1e-5)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["use_dora"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": False}))
    assert (served(family, tmp_path, question) - got).abs().max() > 1e-3
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if "magnitude" not in k}, tmp_path / "adapter_model.safetensors")
    torch.testing.assert_close(served(family, tmp_path, question), got, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:this LoRA adapter is an approximation")
def test_within_the_printed_error_otherwise(tmp_path):
    s = learned("llama")
    for layer in s.export_lora(tmp_path, rank=5):
        assert layer.rank == 5
        change = s._reader.config.lr * s.fast_weights[layer.layer].S[0]
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        A, B = (tensors[f"base_model.model.{layer.module}.lora_{x}.weight"].double() for x in "AB")
        error = float(torch.linalg.vector_norm(change - B @ A) / torch.linalg.vector_norm(change))
        assert error == pytest.approx(layer.error, rel=1e-4)
        assert 0 < error < 1
    question = IDS[5:8]
    s.read(question)
    assert (served("llama", tmp_path, question) - s.next_logits).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:this LoRA adapter is an approximation")
def test_different_ranks_by_layer(tmp_path):
    s = learned("llama")
    S = s.fast_weights[0].S
    U, values, Vh = torch.linalg.svd(S[0], full_matrices=False)
    s.fast_weights[0].tensors["S"] = (U[:, :3] * values[:3] @ Vh[:3])[None]
    layers = s.export_lora(tmp_path, rank=7)
    assert [layer.rank for layer in layers] == [3, 7]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] == {layers[0].module: 3}
    question = IDS[5:8]
    served("llama", tmp_path, question)


def test_the_default_rank_can_be_served_and_its_error_is_said(tmp_path):
    wide = {"hidden_size": 96, "intermediate_size": 128}
    s = Session(adapted("llama", torch.float64, wide), decay=0)
    for _ in range(8):
        s.read(torch.randint(1, 97, (88,)).tolist())
    with pytest.warns(UserWarning, match=r"approximation \(layer 0: rank 64 of \d+, relative error \d+\.\d%; layer 2"):
        layers = s.export_lora(tmp_path / "default")
    assert all(layer.rank == 64 < layer.full_rank for layer in layers)
    assert json.loads((tmp_path / "default" / "adapter_config.json").read_text())["r"] == 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(layer.rank > 64 and layer.error == 0 for layer in s.export_lora(tmp_path / "whole", rank=None))


def test_it_names_the_plain_base(tmp_path):
    save_pretrained(adapted("llama", torch.float64), tmp_path / "model")
    s = Session(from_pretrained(tmp_path / "model"), decay=0)
    s.read(IDS)
    s.export_lora(tmp_path / "lora")
    named = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"]
    served = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
    assert named == str(tmp_path / "model" / "base")
    assert not is_attached(served.get_base_model())


def test_a_state_of_rank_r(tmp_path):
    s = learned("llama", state=6)
    assert all(layer.full_rank <= 6 + 8 for layer in s.export_lora(tmp_path))


def test_factor():
    x = torch.randn(9, 14, dtype=torch.float64)
    A, B, full, error = factor(x, None)
    torch.testing.assert_close(B @ A, x)
    assert (full, error) == (9, 0.0)
    A, B, full, error = factor(x, 4)
    values = torch.linalg.svdvals(x)
    assert error == pytest.approx(math.sqrt(float((values[4:] ** 2).sum() / (values**2).sum())))


def test_refused(tmp_path):
    s = Session(adapted("llama"))
    s.read(IDS[:3])
    with pytest.raises(UserError, match="nothing was learned"):
        s.export_lora(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    s.read(IDS)
    with pytest.raises(UserError, match="rank"):
        s.export_lora(tmp_path / "a", rank=0)
    with pytest.raises(UserError, match="rank"):
        s.export_lora(tmp_path / "a", rank=1.5)

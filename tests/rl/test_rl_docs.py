"""The example of docs/rl.md runs, on a tiny model."""

import re

import pytest
import torch
from locations import ROOT
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import inplace_ttt as ittt
from inplace_ttt.rl.baselines import BASELINES, LONE_TAILS

PAGE = (ROOT / "docs" / "rl.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    tokenizer = AutoTokenizer.from_pretrained(ittt.DEFAULT_MODEL)
    tokenizer.save_pretrained(tmp_path / "model")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    code = code.replace("Qwen/Qwen3-0.6B-Base", "model").replace("chunk_size=256", "chunk_size=4")
    code = code.replace("max_steps=10", 'max_steps=1, use_cpu=True, bf16=False, report_to="none"')
    code = code.replace("max_completion_length=64", "max_completion_length=6")
    exec(compile(code, "docs/rl.md", "exec"), {})
    assert ittt.is_attached(ittt.from_pretrained(tmp_path / "out" / "model", dtype=torch.float32))


def test_names_are_the_code_s():
    table = re.findall(r"^\| `(\w+)` \|", PAGE.split("| `baseline` |")[1], re.MULTILINE)
    assert tuple(table) == BASELINES
    assert all(f"`{name}`" in PAGE for name in LONE_TAILS)

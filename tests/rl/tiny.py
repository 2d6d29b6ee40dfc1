"""A trainer on a tiny random model: what a test does not say is the same everywhere."""

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # trl would otherwise announce itself

import pytest
import torch
from contract.families import adapted, plain
from locations import ROOT

sys.path.append(str(ROOT / "examples"))
from running_sums import ALPHABET, END_ID, PAD_ID, make_tokenizer

pytest.importorskip("trl")
Dataset = pytest.importorskip("datasets").Dataset

PROMPTS = ["3+8=", "1+2+3+4=", "9+9+9=", "5+5+5+5+5="]
TOKENS = 9
"""Of a completion at most: two boundaries of chunks of 4 lie inside."""
WORDS = {"vocab_size": len(ALPHABET), "eos_token_id": END_ID, "pad_token_id": PAD_ID, "bos_token_id": None}


def tiny_model(attached: bool = True, family: str = "llama") -> Any:
    """A float32 model over the alphabet of running sums."""
    return adapted(family, torch.float32, WORDS) if attached else plain(family, torch.float32, WORDS)


def count_digits(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that differs between completions of any model."""
    return [sum(2 <= i < 12 for i in ids) / 4 for ids in completion_ids]


def config(folder: Path, **changes: Any) -> Any:
    """Two micro-batches of four, two prompts with four completions each, one generation per step."""
    values: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": TOKENS,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "gradient_checkpointing": False,
    }
    from inplace_ttt.rl import OTBConfig

    return OTBConfig(str(folder), **(values | changes))


def trainer(folder: Path, model: Any = None, reward: Any = count_digits, **changes: Any) -> Any:
    """The trainer, with settings of `config` or of trl's trainer."""
    others = {name: changes.pop(name) for name in ("peft_config", "rollout_func", "eval_dataset") if name in changes}
    from inplace_ttt.rl import OTBTrainer

    return OTBTrainer(
        tiny_model() if model is None else model,
        reward,
        config(folder, **changes),
        Dataset.from_dict({"prompt": PROMPTS * 4}),
        processing_class=make_tokenizer(),
        **others,
    )


def rollout(made: Any) -> dict[str, Any]:
    """What one generation of the first two prompts becomes, as the training loop would ask for it."""
    made.model.train()
    return made._generate_and_score_completions([{"prompt": p} for p in PROMPTS[:2] for _ in range(4)])

"""What a process of test_rl_ranks.py does. Completions do not depend on random numbers, so that two equal one."""

import os
from pathlib import Path
from typing import Any

from rl.tiny import config, count_digits, make_tokenizer, tiny_model
from torch import Tensor

PROMPTS = ["3+8=", "1+2+3+4=", "9+9+9=", "5+5+5+5+5="]


def completions(prompts: list[str], made: Any) -> dict[str, Any]:
    """Completions of different lengths that follow from the step and the row's place among those of all processes."""
    first = made.accelerator.process_index * len(prompts)
    rows = []
    for i in range(first, first + len(prompts)):
        length = 2 + (5 * i + made.state.global_step) % 7
        rows.append([2 + (i * 7 + 3 * k + made.state.global_step) % 14 for k in range(length)])
    ids = [made._tokenizer(p)["input_ids"] for p in prompts]
    return {"prompt_ids": ids, "completion_ids": rows, "logprobs": None}


def train(folder: str, processes: int, attached: bool) -> tuple[dict[str, Tensor], list[dict[str, Any]], list[float]]:
    """Parameters, the log, and the advantages that were logged last, after two steps on eight rows each."""
    from datasets import Dataset

    from inplace_ttt.rl import OTBTrainer

    arguments = config(
        Path(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4 // processes,
        noise_every=1,
        beta=0.1 if attached else 0.0,
        seed=5,
        shuffle_dataset=False,
    )
    made = OTBTrainer(
        tiny_model(attached),
        count_digits,
        arguments,
        Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=make_tokenizer(),
        rollout_func=completions,
    )
    made.train()
    assert made.accelerator.num_processes == processes
    log = [entry for entry in made.state.log_history if "reward" in entry]
    parameters = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    return parameters, log, list(made._logs["advantages"])


def run(folder: str, attached: bool) -> Any:
    """`train` as one of two processes; accelerate starts the group."""
    import torch.distributed as dist

    os.environ["ACCELERATE_USE_CPU"] = "true"
    found = train(f"{folder}/{os.environ['RANK']}", 2, attached)
    dist.destroy_process_group()
    return found


run.starts_itself = True  # type: ignore[attr-defined]

"""Reinforcement learning with the Optimal Token Baseline, end to end on a CPU: a model learns running sums.

    pip install -e '.[rl]'   # in a clone
    python examples/rl_running_sums.py                       # fast weights, two baselines, a few minutes
    python examples/rl_running_sums.py --plain --baselines otb

A tiny Llama with fast weights sees worked answers ("3+8+5=" -> "3,11,16;16$") until it solves some problems, then
learns from the reward of its final answers alone. Writes ``running-sums.png``: success by step, one curve per baseline.
"""

import argparse
import copy
import random
import tempfile
from itertools import cycle
from pathlib import Path
from typing import Any

import running_sums as task
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

import inplace_ttt as ittt
from inplace_ttt.plots import OTHERS, add_legend, add_title, running_mean, save, styled
from inplace_ttt.rl import OTBConfig, OTBTrainer

MOST = 3  # terms of a problem
ANSWER = 3 * MOST + 3  # tokens of an answer at most


def make_model(attached: bool) -> Any:
    config = LlamaConfig(
        vocab_size=len(task.ALPHABET),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=task.PAD_ID,
        eos_token_id=task.END_ID,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    return ittt.attach(model, ittt.InPlaceTTTConfig(layers=":", chunk_size=8, lr=1.0)) if attached else model


def supervise(model: Any, tokenizer: Any, steps: int) -> None:
    """Train on worked answers."""
    optimizer, problems = torch.optim.AdamW(model.parameters(), lr=5e-3), random.Random(0)
    for step in range(steps):
        prompts = [task.make_prompt(problems, MOST) for _ in range(32)]
        batch = tokenizer([p + task.solve(p) for p in prompts], return_tensors="pt", padding=True)
        answers = torch.tensor([len(task.solve(p)) for p in prompts])[:, None]
        length = batch.input_ids.shape[1]
        labels = batch.input_ids.masked_fill(torch.arange(length) < length - answers, -100)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}
        loss = model(**inputs, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 24:
            print(f"worked answers, step {step + 1}: loss {loss.item():.2f}", flush=True)


def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Return 1.0 for every completion whose final answer is right."""
    return [task.reward(p, task.decode(ids)) for p, ids in zip(prompts, completion_ids, strict=True)]


def reinforce(model: Any, tokenizer: Any, baseline: str, steps: int, folder: str) -> list[float]:
    """Train with a baseline; return the success of each step's completions."""
    settings = OTBConfig(
        folder,
        baseline=baseline,
        max_steps=steps,
        num_generations=8,
        per_device_train_batch_size=128,
        max_completion_length=ANSWER,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    problems = random.Random(1)
    data = Dataset.from_dict({"prompt": [task.make_prompt(problems, MOST) for _ in range(16 * steps)]})
    trainer = OTBTrainer(model, reward, settings, data, processing_class=tokenizer)
    trainer.train()
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


def draw(curves: dict[str, list[float]], path: Path) -> None:
    import numpy as np

    figure, ((axes,),) = styled(6.0, 3.6)
    for colour, (baseline, curve) in zip(cycle(OTHERS), curves.items(), strict=False):
        axes.plot(np.arange(1, len(curve) + 1), running_mean(np.array(curve), 9), color=colour, label=baseline)
    axes.set(xlabel="step", ylabel="success (mean of 9 steps)", ylim=(0, 1))
    add_title(axes, "Running sums, groups of 8, n = 1 run each")
    add_legend(figure)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true", help="no fast weights")
    parser.add_argument("--baselines", nargs="+", default=["otb", "mean"])
    parser.add_argument("--supervised-steps", type=int, default=150)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("running-sums.png"))
    arguments = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = task.make_tokenizer()
    start = make_model(attached=not arguments.plain)
    supervise(start, tokenizer, arguments.supervised_steps)
    curves = {}
    with tempfile.TemporaryDirectory() as folder:
        for baseline in arguments.baselines:
            curves[baseline] = reinforce(copy.deepcopy(start), tokenizer, baseline, arguments.steps, folder)
    draw(curves, arguments.out)
    for baseline, curve in curves.items():
        first, last = (sum(part) / len(part) for part in (curve[:10], curve[-10:]))
        print(f"{baseline}: success {first:.0%} in the first ten steps, {last:.0%} in the last ten")
    print(f"picture: {arguments.out}")


if __name__ == "__main__":
    main()

"""The parts of rl_running_sums.py: each returns what its record says."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rl_policy import (
    Size,
    build,
    group_gradients,
    linear_layers,
    make_prompts,
    roll_out,
    success,
    supervised_loss,
)
from torch import Tensor

from inplace_ttt import updates_off
from inplace_ttt.rl.baselines import BASELINES, realised_energy, token_advantages

VARIANTS: dict[str, dict[str, Any]] = {
    "rloo": {"baseline": "mean", "leave_one_out": True},
    "otb": {"baseline": "otb"},
    "otb-loo": {"baseline": "otb", "leave_one_out": True},
    "rloo-scaled": {"baseline": "mean", "leave_one_out": True, "scaled": True},
    "mean": {"baseline": "mean"},
    "none": {"baseline": "none"},
    "instant": {"baseline": "instant"},
}
ATTACHED_VARIANTS = ("rloo", "otb", "rloo-scaled")
RATES = (1e-5, 3e-5, 1e-4, 3e-4)
"""Learning rates that ``tune`` tries."""
MIDDLE = 1  # the level that learning starts from


def job_name(part: str, *words: Any) -> str:
    """Return the name of a job, of its output and of its messages."""
    return "-".join([part, *map(str, words)])


def checkpoint(work: Path, kind: str, level: float) -> Path:
    """Return where a policy of a level is saved."""
    return work / f"{kind}-{level}.pt"


def load(work: Path, kind: str, level: float, size: Size, device: str) -> Any:
    """Return the policy that was saved at a level of success."""
    model = build(kind, size, 0, device)
    model.load_state_dict(torch.load(checkpoint(work, kind, level), map_location=device, weights_only=True))
    return model


def supervised(work: Path, size: Size, device: str, kind: str) -> dict[str, Any]:
    """Train on worked answers; save where success first reaches each level, or at the end."""
    lr, steps, rows, every = size.supervised
    model, prompts = build(kind, size, 0, device), random.Random(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=device == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    left, curve, levels = list(size.levels), [], {}
    for step in range(1, steps + 1):
        loss = supervised_loss(model, make_prompts(prompts, rows, size), size, device)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % every and step < steps:
            continue
        solved = success(model, 512, size, step, device)
        curve.append({"step": step, "loss": loss.item(), "success": solved})
        while left and (solved >= left[0] or step == steps):
            level = left.pop(0)
            solved = success(model, size.final, size, 10_000, device)
            levels[str(level)] = {"step": step, "success": solved} | effect_of_updates(model, kind, size, device)
            path = checkpoint(work, kind, level)
            torch.save(model.state_dict(), path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)  # whole or not at all: other jobs wait for it
        if not left:
            break
    return {"parameters": sum(p.numel() for p in model.parameters()), "levels": levels, "curve": curve}


@torch.no_grad()
def effect_of_updates(model: Any, kind: str, size: Size, device: str) -> dict[str, float]:
    """Return the loss of worked answers; for attached models with updates off, too."""
    prompts = make_prompts(random.Random(7), 512, size)
    found = {"loss": supervised_loss(model, prompts, size, device).item()}
    if kind == "attached":
        with updates_off(model):
            found["loss_off"] = supervised_loss(model, prompts, size, device).item()
    return found


def noise(work: Path, size: Size, device: str, kind: str, level: float) -> dict[str, Any]:
    """Measure gradients of groups of n for every baseline on the same completions."""
    prompts, n_rows, per_chunk = size.noise
    model = load(work, kind, level, size, device)
    names, generator = random.Random(11), torch.Generator(device).manual_seed(11)
    settings = [
        (b, loo, n) for n in size.sizes for b in BASELINES for loo in (False, True) if (b, loo) != ("none", True)
    ]
    means: list[list[Tensor]] = [[] for _ in settings]  # per chunk
    squares: list[list[tuple[float, float]]] = [[] for _ in settings]  # of groups, of means over a prompt's groups
    solved = []
    for _ in range(prompts // per_chunk):
        rolled = roll_out(model, make_prompts(names, per_chunk, size), n_rows, size, generator)
        solved.append(rolled.rewards.mean().item())
        with linear_layers(model) as layers:
            log_probs, w = rolled.score(model)
        for k, (baseline, loo, n) in enumerate(settings):
            found = token_advantages(
                rolled.rewards, rolled.completion_mask, w, group_size=n, baseline=baseline, leave_one_out=loo
            )
            flat, of_groups, of_prompts = [], 0.0, 0.0
            for _, g in group_gradients((found.values * log_probs).sum() / n, layers, n):
                flat.append(g.mean(0).flatten())
                of_groups += g.square().sum() / len(g)
                by_prompt = g.view(per_chunk, -1, *g.shape[1:]).mean(1)
                of_prompts += by_prompt.square().sum() / per_chunk
            means[k].append(torch.cat(flat))
            squares[k].append((float(of_groups), float(of_prompts)))
    results = []
    for k, (baseline, loo, n) in enumerate(settings):
        own, unbiased = (torch.stack(means[i]) for i in (k, settings.index(("mean", True, n))))
        grams = [(a @ b.mT).double().cpu() for a, b in ((own, own), (own, unbiased), (unbiased, unbiased))]
        estimates = jackknife(grams, squares[k], n_rows // n)
        results.append({"baseline": baseline, "leave_one_out": loo, "n": n} | estimates)
    return {"success": sum(solved) / len(solved), "prompts": prompts, "rows_of_a_prompt": n_rows, "results": results}


def jackknife(grams: list[Tensor], squares: list[tuple[float, float]], groups: int) -> dict[str, float | None]:
    """Return estimates with standard errors (``..._se``) from leaving out one chunk of prompts at a time.

    ``grams`` [C, C]: products of chunks' mean gradients, own x own, own x unbiased, unbiased x unbiased. Products of
    different chunks estimate squared norms of expectations without bias. ``groups``: of one prompt.
    """

    def estimates(kept: list[int]) -> dict[str, float]:
        off = ~torch.eye(len(kept), dtype=torch.bool)
        signal, cross, unbiased = (gram[kept][:, kept][off].mean().item() for gram in grams)
        of_groups, of_prompts = (sum(squares[i][j] for i in kept) / len(kept) for j in (0, 1))
        found = {
            "signal_sq": signal,
            "noise": of_groups
            - signal,  # trace of the covariance of one group's gradient, over prompts and completions
            "noise_to_signal": (of_groups - signal) / signal if signal > 0 else math.nan,
            "shrinkage": cross / unbiased if unbiased > 0 else math.nan,
        }
        if groups > 1:  # the part that comes from sampling completions, not from sampling prompts
            found["noise_within_prompts"] = (of_groups - of_prompts) * groups / (groups - 1)
        return found

    count = len(squares)
    whole = estimates(list(range(count)))
    parts = [estimates([i for i in range(count) if i != left]) for left in range(count)]
    found: dict[str, float | None] = {}
    for name, value in whole.items():
        each = torch.tensor([part[name] for part in parts], dtype=torch.float64)
        found[name] = value if math.isfinite(value) else None
        error = math.sqrt((count - 1) / count * float((each - each.mean()).square().sum()))
        found[f"{name}_se"] = error if math.isfinite(error) else None
    return found


def proxy(work: Path, size: Size, device: str, kind: str, level: float) -> dict[str, Any]:
    """Compare w and W with squared norms of log-probabilities' true gradients, over all parameters."""
    model = load(work, kind, level, size, device)
    names, generator = random.Random(13), torch.Generator(device).manual_seed(13)
    rolled = roll_out(model, make_prompts(names, size.samples, size), 1, size, generator)
    parameters = list(model.parameters())
    rows = []
    for i in range(size.samples):
        log_probs, w = rolled.without_padding(i).score(model)
        total, norms = [torch.zeros_like(p) for p in parameters], []
        for t in range(log_probs.shape[1]):
            gradients = torch.autograd.grad(log_probs[0, t], parameters, retain_graph=True, materialize_grads=True)
            torch._foreach_add_(total, gradients)
            norms.append(torch.stack([squared_norm(gradients), squared_norm(total)]))
        own, cumulative = torch.stack(norms, 1).tolist()
        W = realised_energy(w, torch.ones_like(w))
        rows.append({"w": w[0].tolist(), "own": own, "W": W[0].tolist(), "cumulative": cumulative})
    pooled = {name: [x for row in rows for x in row[name]] for name in ("w", "own", "W", "cumulative")}

    def within(a: str, b: str) -> float:
        each = [spearman(row[a], row[b]) for row in rows if len(row[a]) >= 4]
        return sum(each) / len(each)

    return {
        "samples": len(rows),
        "tokens": len(pooled["w"]),
        "w_with_own_norm": spearman(pooled["w"], pooled["own"]),
        "w_with_own_norm_within_rows": within("w", "own"),
        "W_with_cumulative_norm": spearman(pooled["W"], pooled["cumulative"]),
        "W_with_cumulative_norm_within_rows": within("W", "cumulative"),
        "W_with_cumulative_norm_at_ends": spearman([r["W"][-1] for r in rows], [r["cumulative"][-1] for r in rows]),
        "points": {name: [float(f"{x:.4g}") for x in values[:400]] for name, values in pooled.items()},
    }


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of all squares."""
    return torch.stack(torch._foreach_norm(tensors)).square().sum()


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the rank correlation, equal values sharing their mean rank."""

    def ranks(values: Sequence[float]) -> Tensor:
        x = torch.tensor(values, dtype=torch.float64)
        _, place, count = x.unique(return_inverse=True, return_counts=True)
        ends = count.cumsum(0).double()
        rank = (ends - (count - 1) / 2)[place]
        return rank - rank.mean()

    x, y = ranks(a), ranks(b)
    return float((x @ y) / (x.norm() * y.norm()).clamp(min=1e-12))


def tune(work: Path, size: Size, device: str, kind: str, lr: float) -> dict[str, Any]:
    """Reinforce with leave-one-out means and a learning rate, in the smallest groups, half as long as ``learning``."""
    run = reinforce(work, size, device, kind, "rloo", min(size.sizes), lr, size.learning[0] // 2, seed=1000)
    last = run["success"][-max(len(run["success"]) // 4, 1) :]
    return {"lr": lr, "last_quarter": sum(last) / len(last), "run": run}


def learning(work: Path, size: Size, device: str, kind: str, variant: str, n: int, steps: int) -> dict[str, Any]:
    """Reinforce from the middle level, one run per seed, with the learning rate that suits leave-one-out means best."""
    tuned = [json.loads((work / f"{job_name('tune', kind, lr)}.json").read_text()) for lr in RATES]
    lr = max(tuned, key=lambda found: found["last_quarter"])["lr"]
    if "scaled" in VARIANTS[variant]:
        measured = json.loads((work / f"{job_name('noise', kind, size.levels[MIDDLE])}.json").read_text())
        asked = {"baseline": "otb", "leave_one_out": False, "n": n}
        (found,) = [r for r in measured["results"] if asked.items() <= r.items()]
        if found["shrinkage"] is None:
            raise SystemExit("the shrinkage was lost in noise, so there is no rate to scale by")
        lr *= found["shrinkage"]
    runs = [reinforce(work, size, device, kind, variant, n, lr, steps, seed) for seed in range(size.learning[2])]
    return {"learning_rate": lr, "steps": steps, "prompts_of_a_step": size.learning[1], "runs": runs}


def reinforce(
    work: Path, size: Size, device: str, kind: str, variant: str, n: int, lr: float, steps: int, seed: int
) -> dict[str, Any]:
    """Run on-policy policy gradients from the middle level; success is that of the completions learned from."""
    settings = {name: value for name, value in VARIANTS[variant].items() if name != "scaled"}
    model = load(work, kind, size.levels[MIDDLE], size, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=device == "cuda")
    names, generator = random.Random(100 + seed), torch.Generator(device).manual_seed(100 + seed)
    solved, norms, tokens = [], [], []
    for _ in range(steps):
        rolled = roll_out(model, make_prompts(names, size.learning[1], size), n, size, generator)
        log_probs, w = rolled.score(model)
        found = token_advantages(rolled.rewards, rolled.completion_mask, w, group_size=n, **settings)
        loss = -(found.values * log_probs).sum() / found.values.numel()
        optimizer.zero_grad()
        loss.backward()
        norms.append(squared_norm([p.grad for p in model.parameters() if p.grad is not None]).sqrt())
        optimizer.step()
        solved.append(rolled.rewards.mean())
        tokens.append(rolled.completion_mask.sum())
    return {
        "seed": seed,
        "success": [round(x, 5) for x in torch.stack(solved).tolist()],
        "gradient_norm": [float(f"{x:.4g}") for x in torch.stack(norms).tolist()],
        "tokens": torch.stack(tokens).tolist(),
        "final_success": success(model, size.final, size, 20_000, device),
    }

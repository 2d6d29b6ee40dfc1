"""Small policies for running sums: build, sample, score, a supervised start, and gradients by group. Needs no trl.

R rows, P and T the longest prompt and answer; prompts are padded on the left, completions on the right.
"""

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import inplace_ttt as ittt
from inplace_ttt.rl.baselines import energy_proxy, log_sum_of_squares

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
import running_sums

KINDS = ("plain", "attached")


@dataclass(frozen=True)
class Size:
    """The model, the task's longest problem, and how long the parts of the experiment are."""

    width: int
    inner: int
    layers: int
    heads: int
    most: int  # terms of a problem
    supervised: tuple[float, int, int, int]  # learning rate, steps at most, rows of a step, steps between checks
    noise: tuple[int, int, int]  # prompts, rows of a prompt, prompts of a chunk
    samples: int  # completions whose tokens' gradients are taken one by one
    learning: tuple[int, int, int]  # steps, prompts of a step, seeds
    final: int  # problems of the last check
    sizes: tuple[int, ...] = (4, 8, 32)  # completions of a group
    levels: tuple[float, ...] = (0.1, 0.4, 0.8)


SIZES = {
    "full": Size(256, 704, 4, 4, running_sums.MOST, (1e-3, 2000, 256, 20), (256, 32, 16), 96, (120, 32, 3), 2048),
    "tiny": Size(48, 96, 2, 2, 3, (5e-3, 100, 32, 25), (16, 8, 4), 4, (4, 4, 2), 128, (4, 8)),
}
TTT = {"layers": "0::2", "chunk_size": 8, "lr": 1.0}


def build(kind: str, size: Size, seed: int, device: str) -> Any:
    """Return a random float32 policy, with fast weights when ``kind`` is "attached"."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(running_sums.ALPHABET),
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=running_sums.PAD_ID,
        eos_token_id=running_sums.END_ID,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    if kind == "attached":
        ittt.attach(model, ittt.InPlaceTTTConfig(**TTT))
    return model.to(device).eval()  # no dropout anywhere


# -- rows --------------------------------------------------------------------------------------------------------------


def make_prompts(generator: random.Random, count: int, size: Size) -> list[str]:
    """Return ``count`` fresh problems."""
    return [running_sums.make_prompt(generator, size.most) for _ in range(count)]


def padded(texts: Sequence[str], length: int, side: str, device: Any) -> tuple[Tensor, Tensor]:
    """Return ids and mask [R, length] of texts, padded on the ``side``."""
    justified = [
        getattr(text, "rjust" if side == "left" else "ljust")(length, running_sums.ALPHABET[0]) for text in texts
    ]
    ids = torch.tensor([running_sums.encode(text) for text in justified], device=device)
    return ids, (ids != running_sums.PAD_ID).long()


def encode_prompts(prompts: Sequence[str], size: Size, device: Any) -> tuple[Tensor, Tensor]:
    """Return ids and mask [R, P]."""
    return padded(prompts, 2 * size.most, "left", device)


def positions_of(mask: Tensor) -> Tensor:
    """Return each token's place behind the padding."""
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def sample(model: Any, ids: Tensor, mask: Tensor, size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return sampled completions and their mask [R, T], the end included, at temperature 1."""
    tokens = 3 * size.most + 3
    cache = DynamicCache(config=model.config)
    found = torch.full((len(ids), tokens), running_sums.PAD_ID, device=ids.device)
    alive = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    completion_mask = torch.zeros_like(found)
    step, positions = ids, positions_of(mask)
    for t in range(tokens):
        out = model(
            input_ids=step,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        token = torch.multinomial(out.logits[:, -1].softmax(-1), 1, generator=generator)[:, 0]
        found[:, t] = torch.where(alive, token, running_sums.PAD_ID)
        completion_mask[:, t] = alive
        alive = alive & (token != running_sums.END_ID)
        if t % 4 == 3 and not alive.any():
            break
        step, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return found, completion_mask


def score(model: Any, ids: Tensor, mask: Tensor, completions: Tensor, completion_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities, with gradients, and the energy w [R, T] of completions."""
    whole = torch.cat([mask, completion_mask], 1)
    out = model(
        input_ids=torch.cat([ids, completions], 1),
        attention_mask=whole,
        position_ids=positions_of(whole),
        use_cache=False,
        logits_to_keep=completions.shape[1] + 1,
    )
    logits = out.logits[:, :-1]
    log_probs = logits.log_softmax(-1).gather(-1, completions[..., None])[..., 0]
    return log_probs, energy_proxy(log_probs.detach(), log_sum_of_squares(logits.detach()))


def rewards_of(prompts: Sequence[str], completions: Tensor) -> Tensor:
    """Return the reward [R] of each completion, 0.0 or 1.0."""
    texts = [running_sums.decode(row) for row in completions.tolist()]
    found = [running_sums.reward(p, text) for p, text in zip(prompts, texts, strict=True)]
    return torch.tensor(found, device=completions.device)


@dataclass(frozen=True)
class Rollout:
    """Completions of prompts, ``n`` rows each and next to each other, with their rewards [R]."""

    ids: Tensor
    mask: Tensor
    completions: Tensor
    completion_mask: Tensor
    rewards: Tensor

    def score(self, model: Any) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and w [R, T]."""
        return score(model, self.ids, self.mask, self.completions, self.completion_mask)

    def without_padding(self, row: int) -> "Rollout":
        """Return one row, its padding left out."""
        prompt, sampled = self.mask[row].bool(), self.completion_mask[row].bool()
        return Rollout(
            self.ids[row][prompt][None],
            self.mask[row][prompt][None],
            self.completions[row][sampled][None],
            self.completion_mask[row][sampled][None],
            self.rewards[row][None],
        )


def roll_out(model: Any, prompts: Sequence[str], n: int, size: Size, generator: torch.Generator) -> Rollout:
    """Return ``n`` completions of every prompt."""
    repeated = [p for p in prompts for _ in range(n)]
    ids, mask = (x.repeat_interleave(n, 0) for x in encode_prompts(prompts, size, generator.device))
    completions, completion_mask = sample(model, ids, mask, size, generator)
    return Rollout(ids, mask, completions, completion_mask, rewards_of(repeated, completions))


def success(model: Any, count: int, size: Size, seed: int, device: str) -> float:
    """Return the share of ``count`` problems that are solved, one sample each."""
    generator = torch.Generator(device).manual_seed(seed)
    prompts = make_prompts(random.Random(seed), count, size)
    return roll_out(model, prompts, 1, size, generator).rewards.mean().item()


def supervised_loss(model: Any, prompts: Sequence[str], size: Size, device: str) -> Tensor:
    """Return the mean loss per token of the worked answers, in nats."""
    ids, mask = encode_prompts(prompts, size, device)
    answers = [running_sums.solve(p) for p in prompts]
    completions, completion_mask = padded(answers, 3 * size.most + 3, "right", device)
    log_probs, _ = score(model, ids, mask, completions, completion_mask)
    return -(log_probs * completion_mask).sum() / completion_mask.sum()


# -- gradients by group ------------------------------------------------------------------------------------------------


@contextmanager
def linear_layers(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Inside, forwards leave inputs [R, T', F] and outputs [R, T', D] of all linear layers in the dictionary."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            found[name] = (args[0].detach(), output)

        return hook

    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_hook(keep(name)) for name, module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def group_gradients(loss: Tensor, layers: dict[str, tuple[Tensor, Tensor]], n: int) -> Iterator[tuple[str, Tensor]]:
    """Yield each linear layer's name and the gradient [R / n, D, F] of its (slow) weight for every ``n`` rows.

    Rows are independent, so that one backward pass gives what the outputs of each row contribute: the sum over a
    group's tokens of gradient times input. The graph stays.
    """
    gradients = torch.autograd.grad(loss, [output for _, output in layers.values()], retain_graph=True)
    for (name, (x, _)), g in zip(layers.items(), gradients, strict=True):
        groups = len(g) // n
        yield name, g.reshape(groups, -1, g.shape[-1]).mT @ x.reshape(groups, -1, x.shape[-1])

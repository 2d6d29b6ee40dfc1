"""What the processes of test_first_ranks.py do: models built by the first process, against those that each builds."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from inplace_ttt import is_attached
from inplace_ttt.errors import UserError
from inplace_ttt.hf.attach import fast_settings
from inplace_ttt.hf.sharding import whole
from inplace_ttt.train.model import build_model, recompute_activations
from inplace_ttt.train.parallel import Rank
from inplace_ttt.train.recipe import make_recipe

VOCAB = 97


@dataclass
class Words:
    """What ``build_model`` asks of a tokenizer."""

    bos_token_id: int = 1
    eos_token_id: int = 2

    def __len__(self) -> int:
        return VOCAB


def builds(recipes: dict[str, dict[str, Any]], device: str = "cpu") -> dict[str, Any]:
    """By recipe: bytes of whole parameters held before sharding, and what is as if each process had built the model."""
    return {name: _build(values, device) for name, values in recipes.items()}


def _build(values: dict[str, Any], device: str) -> Any:
    recipe, tokenizer = make_recipe(values), Words()
    assert recipe.parallel is not None
    rank = Rank(recipe.parallel, device)
    try:
        torch.manual_seed(123)
        model: Any = rank.build(lambda: build_model(recipe, tokenizer, "sdpa"))  # type: ignore[arg-type]
        random = torch.rand(3)
        held = sum(p.nbytes for p in model.parameters() if not p.is_meta)
        expected: Any = build_model(recipe, tokenizer, "sdpa")  # type: ignore[arg-type]
    except UserError as error:
        return str(error)
    same = {"random state": torch.equal(random, torch.rand(3))}
    recompute_activations(model)
    rank.shard(model, None)
    sharded = [isinstance(p, DTensor) and not p.to_local().is_meta for p in model.parameters()]
    same["sharded"] = all(sharded)
    for what in (nn.Module.named_parameters, nn.Module.named_buffers):
        same[what.__name__] = _equal(dict(what(model)), dict(what(expected)))
    recompute_activations(expected)
    rank.shard(expected, None)
    same |= {name: value == _traits(expected)[name] for name, value in _traits(model).items()}
    same["step"] = _equal(_step(model, device), _step(expected, device))
    return {"held": held, "different": [name for name, equal in same.items() if not equal]}


def _traits(model: Any) -> dict[str, Any]:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return {
        "tied": head.weight is embedding.weight,
        "trained": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "mode": model.training,
        "configuration": (model.config.to_dict(), model.config._attn_implementation),
        "fast weights": fast_settings(model) if is_attached(model) else None,
        "modules": [(name, type(module).__name__) for name, module in model.named_modules()],
    }


def _step(model: Any, device: str) -> dict[str, Tensor]:
    """The loss and, where they come out the same twice, its gradients."""
    torch.manual_seed(0)  # for dropout
    ids = torch.arange(48, device=device)[None] % VOCAB
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and device == "cpu"}
    return gradients | {"loss": loss}


def _equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    if got.keys() != expected.keys():
        return False
    pairs = [(whole(tensor), whole(expected[name])) for name, tensor in got.items()]
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)

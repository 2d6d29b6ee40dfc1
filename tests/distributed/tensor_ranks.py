"""What the processes of test_tensor_ranks.py do: a model split over F by transformers, with fast weights."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor.debug import CommDebugMode
from transformers.distributed.configuration_utils import DistributedConfig

sys.path.append(str(Path(__file__).resolve().parents[1] / "contract"))

from families import VOCAB, C, adapted, padded, plain, randomise, tokens

import inplace_ttt as ittt
from inplace_ttt.hf.sharding import whole

SETTINGS: dict[str, Any] = {"layers": "0::2", "chunk_size": C, "lr": 0.03, "decay": 0.1}


def changes() -> dict[str, int]:
    """So that every process gets whole heads and as many words."""
    return {"vocab_size": VOCAB + 3, "num_key_value_heads": dist.get_world_size()}


def everything(folder: str, families: list[str]) -> dict[str, Any]:
    return {name: one(f"{folder}/{name}-{{}}", name) for name in families}


def one(folder: str, family: str) -> dict[str, Any]:
    target = "hidden_states" if family == "starcoder2" else "input_embed"
    settings = SETTINGS | {"target": target}
    alone = adapted(family, changes=changes(), **settings)
    base, attached = folder.format("base"), folder.format("attached")
    if dist.get_rank() == 0:
        plain(family, changes=changes()).save_pretrained(base)
        ittt.save_pretrained(alone, attached)
    dist.barrier()
    split = {"distributed_config": DistributedConfig(tp_plan="auto"), "dtype": torch.float64}
    model = transformers.AutoModelForCausalLM.from_pretrained(base, **split).eval()
    before = model(tokens(2, 9)).logits.detach()
    ittt.attach(model, ittt.InPlaceTTTConfig(**settings))
    found: dict[str, Any] = {"identity": float((model(tokens(2, 9)).logits - before).abs().max())}
    found["initial"] = _agree(model)
    randomise(model)
    loaded = ittt.from_pretrained(attached, **split)

    ids = tokens(2, 5 * C + 3)
    prompt = padded([tokens(1, 2 * C + 1), tokens(1, 4 * C, 1)], "left")
    rules: dict[str, Any] = {"do_sample": False, "max_new_tokens": 2 * C + 1}
    with torch.no_grad():
        expected = alone(ids, use_cache=False).logits
        found["logits"] = float((model(ids, use_cache=False).logits - expected).abs().max())
        found["loaded"] = float((loaded(ids, use_cache=False).logits - expected).abs().max())
        with ittt.updates_off(alone):
            found["updates"] = float((alone(ids, use_cache=False).logits - expected).abs().max())
        cache = model(ids).past_key_values
        state = ittt.fast_weights(cache)[0]
        found["state"] = [list(state.S.shape), list(ittt.fast_weights(alone(ids).past_key_values)[0].S.shape)]
        found["generated"] = bool((model.generate(**prompt, **rules) == alone.generate(**prompt, **rules)).all())
        beams = {"num_beams": 2, **rules}
        found["beams"] = bool((model.generate(**prompt, **beams) == alone.generate(**prompt, **beams)).all())

    found["communications"] = [_communications(model, ids, training) for training in (False, True)]
    for each in (alone, model):
        each.train()
        each(ids, labels=ids, use_cache=False).loss.backward()
    expected = {n: p.grad for n, p in alone.named_parameters()}
    got = {n: whole(p.grad) for n, p in model.named_parameters()}
    assert set(got) == set(expected)
    found["gradients"] = {n: float((got[n] - g).abs().max() / g.abs().max()) for n, g in expected.items()}

    ittt.save_pretrained(model, folder.format("again"))
    again = ittt.from_pretrained(folder.format("again"), dtype=torch.float64)
    saved = dict(alone.named_parameters())
    found["saved"] = max(float((p - saved[n]).abs().max()) for n, p in again.named_parameters())
    found["session"] = _message(lambda: ittt.Session(model, None))
    found["clip"] = _message(lambda: ittt.configure(model, clip=1.0) or model(ids, use_cache=False))
    ittt.configure(model, clip=None)
    ittt.detach(model)
    found["detached"] = float((model(tokens(2, 9)).logits - before).abs().max())
    clipped = ittt.InPlaceTTTConfig(**settings, clip=1.0)
    found["clip at attach"] = _message(lambda: ittt.attach(model, clipped))
    return found


def _agree(model: Any) -> bool:
    """Whether the added parameters are the same on all ranks."""
    flat = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if ".ttt_" in n])
    both = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(both, flat)
    return bool((both[0] == both[1]).all()) and bool((flat != 0).any())


def _communications(model: Any, ids: torch.Tensor, training: bool) -> list[int]:
    """How often a forward sends, with updates and without; transformers has one way for training and another."""
    counts = []
    for context in (nullcontext(), ittt.updates_off(model)):
        with torch.set_grad_enabled(training), context, CommDebugMode() as sent:
            model(ids, use_cache=False)
        counts.append(sent.get_total_counts())
    return counts


def _message(attempt: Any) -> str:
    try:
        attempt()
    except ittt.UserError as error:
        return str(error)
    return ""

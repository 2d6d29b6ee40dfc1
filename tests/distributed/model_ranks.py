"""What the processes of test_model_ranks.py do: whole models on slices and shards against one process."""

import copy
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

sys.path.append(str(Path(__file__).resolve().parents[1] / "contract"))

from families import VOCAB, C, adapted, tokens  # noqa: E402

import inplace_ttt as ittt  # noqa: E402
from inplace_ttt.hf.parallel import disable_context_parallel, enable_context_parallel  # noqa: E402
from inplace_ttt.hf.sharding import shard_layers, whole  # noqa: E402

T = 16 * C

CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-contiguous": {"head_tail": False},
    "llama-packed": {"documents": ([13, 3, 20, 28], [T // 2, T // 2])},
    "llama-checkpointing": {"checkpointing": True},
    "mistral-window": {"model": "mistral", "documents": ([T], [T // 4] * 4)},
    "gemma3-hidden-clip-decay": {
        "model": "gemma3_text",
        "settings": {"target": "hidden_states", "clip": 0.5, "clip_relative": True, "decay": 0.1},
    },
    "gpt2-conv1d": {"model": "gpt2"},
    "qwen3-off": {"model": "qwen3", "off": True},
    "llama-padded": {"padding": 7},
}


def batch(documents: Any = None, padding: int = 0) -> dict[str, Tensor]:
    ids = tokens(2, T)
    labels = ids.clone()
    labels[0, 3:9] = -100
    made = {"input_ids": ids, "labels": labels}
    if documents:
        rows = [torch.cat([torch.arange(n) for n in row]) for row in documents]
        made["position_ids"] = torch.stack(rows)
        labels[made["position_ids"] == 0] = -100
    if padding:
        made["attention_mask"] = torch.ones_like(ids)
        made["attention_mask"][1, -padding:] = 0
        labels[1, -padding:] = -100
    return made


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def step(model: Any, inputs: dict[str, Any], off: bool = False) -> Tensor:
    """The loss in float64 (transformers takes it in float32, and must agree that far), and its gradients."""
    model.zero_grad()
    with ittt.updates_off(model) if off else nullcontext():
        out = model(**inputs, use_cache=False)
    shifted = inputs.get("shift_labels")
    if shifted is None:
        shifted = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    total = nn.functional.cross_entropy(out.logits.flatten(0, 1), shifted.flatten(), reduction="sum")
    loss: Tensor = total / inputs.get("num_items_in_batch", (shifted != -100).sum())
    loss.backward()
    assert (loss - out.loss).abs() < 1e-4
    return loss.detach()


def build(case: dict[str, Any]) -> Any:
    model = adapted(case.get("model", "llama"), **case.get("settings", {}))
    model.train()
    if case.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def difference(model: Any, expected: dict[str, Tensor]) -> float:
    """Largest error of a gradient, relative to the largest entry of that gradient."""
    got = gradients(model)
    assert set(got) == set(expected)
    return max(float((got[n] - g).abs().max() / g.abs().max().clamp(min=1e-6)) for n, g in expected.items())


def context(names: list[str]) -> dict[str, Any]:
    """Loss and gradient errors of context parallelism, and the loss without updates across slices."""
    found = {}
    for name in names:
        case = CASES[name]
        inputs = batch(case.get("documents"), case.get("padding", 0))
        model = build(case)
        alone = step(model, inputs, case.get("off", False))
        expected = gradients(model)
        parallel = enable_context_parallel(model, None, head_tail=case.get("head_tail", True))
        loss = step(model, parallel.cut(inputs), case.get("off", False))
        for parameter in model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        dist.all_reduce(loss)
        disable_context_parallel(model)
        again = step(copy.deepcopy(model), inputs, case.get("off", False))
        with ittt.updates_off(model), torch.no_grad():
            off = model(**inputs, use_cache=False).loss
        found[name] = {
            "loss": float((loss / dist.get_world_size() - alone).abs()),
            "gradients": difference_of(model, expected),
            "after": float((again - alone).abs()),
            "updates": float((off - alone).abs()),
        }
    return found


def difference_of(model: Any, expected: dict[str, Tensor]) -> float:
    return difference(model, expected)


def refusals() -> dict[str, str]:
    """Messages of what context parallelism cannot do; each on every rank."""
    model = build({})
    parallel = enable_context_parallel(model)
    inputs = parallel.cut(batch())
    short = {name: x[:, : 2 * parallel.slices.pieces * (C + 1)] for name, x in batch().items()}
    attempts: dict[str, Any] = {
        "cache": lambda: model(inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=True),
        "positions": lambda: model(inputs["input_ids"]),
        "generate": lambda: model.generate(inputs["input_ids"], max_new_tokens=2),
        "uncut": lambda: model(batch()["input_ids"], position_ids=torch.arange(3, T + 3)[None]),
        "length": lambda: parallel.cut({"input_ids": tokens(1, T + 1)}),
        "unknown": lambda: parallel.cut({**batch(), "cu_seq_lens_q": torch.tensor([0, T])}),
        "chunk": lambda: model(**parallel.cut({n: x[:, : parallel.slices.pieces * (C + 1)] for n, x in short.items()})),
        "twice": lambda: enable_context_parallel(model),
        "recurrent": lambda: enable_context_parallel(_recurrent()),
    }
    messages = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            messages[name] = ""
        except ittt.UserError as error:
            messages[name] = str(error)
    return messages


def _recurrent() -> Any:
    import transformers

    config = transformers.Qwen3_5TextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def everything(names: list[str], sharded: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"context": context(names), "refusals": refusals()}
    _ = sharded, init_device_mesh, shard_layers
    return found

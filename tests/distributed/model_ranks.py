"""What the processes of test_model_ranks.py do: whole models on slices and shards against one process."""

import copy
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "contract"))

from families import VOCAB, C, adapted, tokens

import inplace_ttt as ittt
from inplace_ttt.hf.parallel import disable_context_parallel, enable_context_parallel
from inplace_ttt.hf.sharding import load_sharded, make_meshes, save_sharded, shard_layers, whole, whole_state

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
    """The loss in float64, and the gradients of this one call."""
    model.zero_grad()
    return micro_batch(model, inputs, off)


def micro_batch(model: Any, inputs: dict[str, Any], off: bool = False) -> Tensor:
    """Adds the gradients of a loss taken in float64 (transformers takes it in float32, and must agree that far)."""
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
            "gradients": difference(model, expected),
            "after": float((again - alone).abs()),
            "updates": float((off - alone).abs()),
        }
    return found


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
        "torch's own": lambda: _inside_torch(build({})),
        "torch": lambda: enable_context_parallel(build({}), attention="torch"),
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


def _inside_torch(model: Any) -> None:
    """A call in PyTorch's own context, without ours."""
    from torch.distributed.tensor.experimental import context_parallel

    ids = tokens(1, T)
    mesh = make_meshes("cpu", context=2).slices
    with context_parallel(mesh, buffers=[ids], buffer_seq_dims=[1]):
        model(ids, use_cache=False)


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


def rows_of(inputs: dict[str, Tensor], row_group: int, row_groups: int) -> dict[str, Tensor]:
    return {name: x.chunk(row_groups)[row_group] for name, x in inputs.items()}


def part(inputs: dict[str, Tensor], meshes: Any, parallel: Any) -> dict[str, Any]:
    """What this rank reads of a batch of whole rows, with the loss's normaliser for gradients that are means."""
    mine = rows_of(inputs, meshes.row_group, meshes.row_groups)
    count = (inputs["labels"][:, 1:] != -100).sum() / dist.get_world_size()
    mine = parallel.cut(mine) if parallel else mine
    return {**mine, "num_items_in_batch": count}


def mean(loss: Tensor) -> Tensor:
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


LAYOUTS: dict[int, dict[str, dict[str, int]]] = {
    2: {"shard": {"shard": 2}, "context": {"context": 2}},
    4: {"shard-context": {"shard": 2, "context": 2}, "data-context": {"data": 2, "context": 2}},
}


TRAINED: dict[str, Any] = {"settings": {"decay": 0.1}, "checkpointing": True}


def train_alone() -> tuple[list[Tensor], list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Two optimizer steps of two micro-batches in one process: losses and parameters after each, and the batches."""
    batches = [batch(([13, 3, 20, 28], [T // 2, T // 2])), batch()]
    alone = build(TRAINED)
    optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-2)
    losses, expected = [], []
    for _ in range(2):
        losses.append(train_step(alone, optimizer, batches, lambda inputs: inputs))
        expected.append({name: whole(p).clone() for name, p in alone.named_parameters()})
    return losses, expected, batches


def layouts(folder: str, losses: list[Tensor], expected: list[dict[str, Tensor]], batches: Any) -> dict[str, Any]:
    """Every layout: the same two steps, whole saves, sharded checkpoints."""
    found: dict[str, Any] = {}
    for name, sizes in LAYOUTS[dist.get_world_size()].items():
        meshes = make_meshes("cpu", **sizes)
        model = build(TRAINED)
        shard_layers(model, meshes.parameters)
        parallel = enable_context_parallel(model, meshes.slices) if meshes.context > 1 else None
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        worst: dict[str, Any] = {"loss": [], "parameters": []}
        for step_ in range(2):
            loss = train_step(model, optimizer, batches, lambda inputs, m=meshes, p=parallel: part(inputs, m, p))
            worst["loss"].append(float((mean(loss) - losses[step_]).abs()))
            worst["parameters"].append(parameter_difference(model, expected[step_]))
            if step_ == 0:
                save_sharded(f"{folder}/{name}", model, optimizer)
        worst["sharded"] = sum(hasattr(p, "full_tensor") for p in model.parameters()) / len(list(model.parameters()))
        worst["kept"] = len(whole_state(model))
        ittt.save_pretrained(model, f"{folder}/{name}-whole")
        parameters = {n: whole(p) for n, p in model.named_parameters()}
        if dist.get_rank() == 0:
            saved = ittt.from_pretrained(f"{folder}/{name}-whole", dtype=torch.float64)
            worst["saved"] = parameter_difference(saved, parameters)
        found[name] = worst
    return found


def resume(folder: str, names: list[str], expected: dict[str, Tensor], batches: Any) -> dict[str, float]:
    """Each checkpoint of one step, continued for a second one on this world's first layout."""
    found = {}
    sizes = next(iter(LAYOUTS[dist.get_world_size()].values()))
    for name in names:
        meshes = make_meshes("cpu", **sizes)
        model = build(TRAINED)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        shard_layers(model, meshes.parameters)
        parallel = enable_context_parallel(model, meshes.slices) if meshes.context > 1 else None
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        load_sharded(f"{folder}/{name}", model, optimizer)
        train_step(model, optimizer, batches, lambda inputs, m=meshes, p=parallel: part(inputs, m, p))
        found[name] = parameter_difference(model, expected)
    return found


def train_step(model: Any, optimizer: Any, batches: list[dict[str, Tensor]], prepare: Any) -> Tensor:
    """One optimizer step over several micro-batches; the sum of their losses."""
    optimizer.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for inputs in batches:
        total += micro_batch(model, prepare(inputs))
    optimizer.step()
    return total


def parameter_difference(model: Any, expected: dict[str, Tensor]) -> float:
    got = {name: whole(p) for name, p in model.named_parameters()}
    assert set(got) == set(expected)
    return max(float((got[n] - p).abs().max()) for n, p in expected.items())


def bf16() -> dict[str, dict[str, float]]:
    """FSDP2's mixed precision against one process whose parameters are rounded to bfloat16."""
    inputs = batch()
    model = adapted("llama", torch.float32).train()
    alone = copy.deepcopy(model)
    for parameter in alone.parameters():
        parameter.data = parameter.data.bfloat16()
    expected_loss = alone(**inputs, use_cache=False).loss
    expected_loss.backward()
    expected = {n: p.grad.float() for n, p in alone.named_parameters()}
    found = {}
    for layout in ("shard", "context"):
        meshes, each = make_meshes("cpu", **{layout: 2}), copy.deepcopy(model)
        shard_layers(each, meshes.parameters, precision=torch.bfloat16)
        parallel = enable_context_parallel(each, meshes.slices) if layout == "context" else None
        loss = each(**part(inputs, meshes, parallel), use_cache=False).loss
        loss.backward()
        got = {n: whole(p.grad) for n, p in each.named_parameters()}
        dtypes = {p.grad.dtype for p in each.parameters()} | {p.dtype for p in each.parameters()}
        assert dtypes == {torch.float32}
        worst = max(float((got[n] - g).norm() / g.norm()) for n, g in expected.items())
        found[layout] = {"loss": float((mean(loss.detach()) - expected_loss).abs()), "gradients": worst}
    return found


def replicas() -> dict[str, float]:
    """DistributedDataParallel, one row a process."""
    inputs = batch()
    alone = build({})
    ittt.set_lr(alone, 0.05)
    loss = step(alone, inputs)
    model = nn.parallel.DistributedDataParallel(build({}))
    ittt.set_lr(model, 0.05)
    own = step(model, part(inputs, make_meshes("cpu", data=2), None))
    return {"loss": float((mean(own) - loss).abs()), "gradients": difference(model.module, gradients(alone))}


def everything(names: list[str], folder: str, others: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"context": context(names)}
    if dist.get_world_size() == 2:
        found |= {"refusals": refusals(), "bf16": bf16(), "replicas": replicas()}
    losses, expected, batches = train_alone()
    found["layouts"] = layouts(folder, losses, expected, batches)
    found["resume"] = resume(folder, others, expected[1], batches)
    return found

"""FSDP2 and context parallelism on several GPUs against one: losses, tokens per second, memory, the scan's share.

    python benchmarks/distributed.py                          # two GPUs, all runs, about four minutes
    python benchmarks/distributed.py --runs one-long cp-long  # some of them
    python benchmarks/distributed.py --cpu                    # a tiny model on gloo: does the script work?

A model of Qwen3-0.6B's shape with random weights, bf16 with float32 master weights, activation checkpointing, AdamW.
Two workloads: ``rows`` (short rows, data parallel by FSDP2) and ``long`` (one row of 65,536 tokens, context parallel).
Each run is a group of processes of its own with a time limit; a table line is printed after each, the records go to
``benchmarks/results/distributed/``. One GPU runs the same code on a mesh of one process.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

OUT = Path(__file__).parent / "results" / "distributed"

RUNS: dict[str, dict[str, Any]] = {
    "one-rows": {"processes": 1, "work": "rows"},
    "fsdp-rows": {"processes": 2, "work": "rows", "meshes": {"shard": 2}, "against": "one-rows"},
    "one-long": {"processes": 1, "work": "long"},
    "cp-long": {"processes": 2, "work": "long", "meshes": {"context": 2}, "against": "one-long"},
    "cp-torch-long": {
        "processes": 2,
        "work": "long",
        "meshes": {"context": 2},
        "attention": "torch",
        "against": "one-long",
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "cuda": {
        "model": {
            "vocab_size": 151_936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
            "max_position_embeddings": 65_536,
        },
        "ttt": {"layers": "0::6", "chunk_size": 1024, "lr": 0.1},
        "rows": (4, 8192),
        "long": (1, 65_536),
    },
    "cpu": {
        "model": {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "tie_word_embeddings": True,
            "max_position_embeddings": 512,
        },
        "ttt": {"layers": "0::2", "chunk_size": 32, "lr": 0.1},
        "rows": (4, 128),
        "long": (1, 512),
    },
}


# -- one process of a run ----------------------------------------------------------------------------------------------


def chunked_loss(model: Any, vocabulary_chunk: int = 8192) -> None:
    """The loss from hidden states, some tokens at a time: 65,536 x 151,936 logits would not fit with their gradient."""

    def part(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")

    def loss(logits: Tensor, shift_labels: Tensor, num_items_in_batch: Tensor, **_: Any) -> Tensor:
        weight, total = model.lm_head.weight, logits.new_zeros((), dtype=torch.float32)
        hidden, labels = logits.flatten(0, 1), shift_labels.flatten()
        for h, y in zip(hidden.split(vocabulary_chunk), labels.split(vocabulary_chunk), strict=True):
            total = total + checkpoint(part, h, weight, y, use_reentrant=False)
        return total / num_items_in_batch

    model.lm_head.forward = lambda hidden: hidden
    model.loss_function = loss


def build(shape: dict[str, Any], device: torch.device) -> Any:
    import transformers

    import inplace_ttt as ittt

    torch.manual_seed(0)
    with device:
        config = transformers.Qwen3Config(**shape["model"])
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        ittt.attach(model, ittt.InPlaceTTTConfig(**shape["ttt"]))
        generator = torch.Generator(device).manual_seed(1)
        with torch.no_grad():  # as if trained: the updates change the loss
            for name, parameter in model.named_parameters():
                if ".ttt_conv." in name:
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator, device=device))
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


class Stopwatch:
    """Time spent in the scan's exchanges, by CUDA events (waiting for the other ranks included)."""

    def __init__(self, device: torch.device) -> None:
        from inplace_ttt.core import ranks

        self.cuda, self.spans, self.sent = device.type == "cuda", [], 0
        original = ranks.exchange

        def timed(x: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
            start = self.mark()
            out = original(x, sent, received, group)
            self.spans.append((start, self.mark()))
            self.sent += (x.numel() - sent[dist.get_rank(group)]) * x.element_size()
            return out

        ranks.exchange = timed

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> tuple[float, int]:
        """Seconds and bytes sent since the last call."""
        if self.cuda:
            torch.cuda.synchronize()
            seconds = sum(a.elapsed_time(b) for a, b in self.spans) / 1000
        else:
            seconds = sum(b - a for a, b in self.spans)
        sent, self.sent = self.sent, 0
        self.spans.clear()
        return seconds, sent


def worker(run: str, kind: str, steps: int, out: Path) -> None:
    from inplace_ttt.hf.parallel import enable_context_parallel
    from inplace_ttt.hf.parallel_attention import choose_methods
    from inplace_ttt.hf.sharding import make_meshes, shard_layers

    rank, spec, shape = int(os.environ["RANK"]), RUNS[run], SHAPES[kind]
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(seconds=100))

    def say(line: str) -> None:
        if rank == 0:
            print(f"  {run}: {line}", flush=True)

    meshes = make_meshes(kind, **spec.get("meshes", {}))
    model = build(shape, device)
    parameters = sum(p.numel() for p in model.parameters())
    chunked_loss(model)
    shard_layers(model, meshes.parameters, precision=torch.bfloat16)
    context = None
    if meshes.context > 1:
        context = enable_context_parallel(model, meshes.slices, attention=spec.get("attention", "gather"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=kind == "cuda")
    watch = Stopwatch(device)
    name = torch.cuda.get_device_name(0) if kind == "cuda" else "CPU"
    say(f"{parameters / 1e6:.0f}M parameters on {dist.get_world_size()} x {name}")

    rows, tokens = shape[spec["work"]]
    generator = torch.Generator().manual_seed(2)
    # Runs that repeat themselves give the updates something to do.
    runs = torch.randint(0, shape["model"]["vocab_size"], (rows, tokens // 4), generator=generator).repeat(1, 4)
    records = []
    for step in range(steps):
        ids = runs.roll(step, 1).to(device)
        mine = ids.chunk(meshes.row_groups)[meshes.row_group]
        shifted = nn.functional.pad(mine[:, 1:], (0, 1), value=-100)
        inputs = {"input_ids": mine, "shift_labels": shifted}
        inputs = inputs | {"labels": shifted} if context is None else context.cut(inputs)
        inputs["num_items_in_batch"] = torch.tensor(rows * (tokens - 1) / dist.get_world_size(), device=device)
        dist.barrier()
        watch.take()
        if kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        started = time.perf_counter()
        with nullcontext() if context is None else context.step():
            loss = model(**inputs, use_cache=False).loss
            loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        if kind == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        exchanged, sent = watch.take()
        records.append(
            {
                "loss": float(total) / dist.get_world_size(),
                "gradient_norm": float(norm),
                "seconds": seconds,
                "exchange_seconds": exchanged,
                "exchange_bytes": sent,
            }
        )
        say(f"step {step}: loss {records[-1]['loss']:.5f}, {seconds:.3f} s, {rows * tokens / seconds:,.0f} tokens/s")
    peak = torch.tensor(torch.cuda.max_memory_allocated() if kind == "cuda" else 0, device=device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    method = None
    if context is not None and context.mesh is None:
        heads = [shape["model"][name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")]
        methods = choose_methods(kind, *heads)
        method = "gather, " + methods.get((torch.bfloat16, True), "mask")
    if rank == 0:
        steady = sorted(r["seconds"] for r in records[1:])[len(records[1:]) // 2]  # the first step warms up
        shares = [r["exchange_seconds"] / r["seconds"] for r in records[1:]]
        record = {
            "run": run,
            "processes": dist.get_world_size(),
            "rows": rows,
            "tokens": tokens,
            "parameters": parameters,
            "attention": method or spec.get("attention", "sdpa"),
            "steps": records,
            "seconds_per_step": steady,
            "tokens_per_second": rows * tokens / steady,
            "peak_bytes": int(peak),
            "exchange_share": max(shares),
            "exchange_bytes_per_step": records[-1]["exchange_bytes"],
            "shape": shape,
        }
        out.write_text(json.dumps(record))
    dist.barrier()
    dist.destroy_process_group()


# -- all runs ----------------------------------------------------------------------------------------------------------


def launch(run: str, kind: str, steps: int, limit: float, out: Path) -> str | None:
    """Runs the processes of one run; None when all went well, else what went wrong."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    count = RUNS[run]["processes"]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    if kind == "cpu":
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, "--worker", run, "--kind", kind, "--steps", str(steps), "--to", str(out)]
    processes = [
        subprocess.Popen(command, env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(count)
    ]
    end = time.monotonic() + limit
    failed = None
    while any(p.poll() is None for p in processes) and failed is None:
        if time.monotonic() > end:
            failed = f"took over {limit:.0f} s"
        elif any(p.poll() for p in processes):
            failed = "a process failed (its message is above)"
        time.sleep(0.1)
    failed = failed or ("a process failed (its message is above)" if any(p.poll() for p in processes) else None)
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=tuple(RUNS), help="left out: all (--cpu: all that a CPU can do)")
    parser.add_argument("--steps", type=int, default=4, help="of each run; the first warms up")
    parser.add_argument("--limit", type=float, default=80, help="seconds for one run")
    parser.add_argument("--cpu", action="store_true", help="a tiny model on the CPU, no records")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.kind, arguments.steps, arguments.to)
        return

    import tempfile

    from inplace_ttt.records import about, write_json

    kind = "cpu" if arguments.cpu else "cuda"
    if kind == "cuda" and torch.cuda.device_count() < 2:
        parser.error(f"needs two GPUs, found {torch.cuda.device_count()} (--cpu tries the script without)")
    runs = arguments.runs or [r for r, spec in RUNS.items() if kind == "cuda" or spec.get("attention") != "torch"]
    console, records = Console(), dict[str, dict[str, Any]]()
    origin = about()
    with tempfile.TemporaryDirectory() as folder:
        for run in runs:
            started, to = time.monotonic(), Path(folder) / f"{run}.json"
            console.print(f"{run} (at most {arguments.limit:.0f} s)")
            problem = launch(run, kind, arguments.steps, arguments.limit, to)
            if problem is None:
                records[run] = origin | json.loads(to.read_text())
                compare(records, run)
                console.print(line(records[run]) + f"  [{time.monotonic() - started:.0f} s in all]", highlight=False)
            else:
                console.print(f"[red]{run}: {problem}[/red]")
            if problem is None and kind == "cuda":
                write_json(arguments.out / f"{run}.json", records[run])
    console.print(table(records))
    print(json.dumps({run: {k: v for k, v in r.items() if k in KEPT} for run, r in records.items()}), flush=True)
    sys.exit(0 if len(records) == len(runs) else 1)


KEPT = (
    "tokens_per_second",
    "speedup",
    "efficiency",
    "peak_bytes",
    "exchange_share",
    "exchange_bytes_per_step",
    "largest_loss_difference",
    "attention",
)


def compare(records: dict[str, dict[str, Any]], run: str) -> None:
    """Adds what a run on several processes is against one."""
    against = records.get(RUNS[run].get("against", ""))
    if against is None:
        return
    record = records[run]
    pairs = list(zip(record["steps"], against["steps"], strict=True))
    record["against"] = against["run"]
    record["speedup"] = record["tokens_per_second"] / against["tokens_per_second"]
    record["efficiency"] = record["speedup"] / record["processes"]
    record["memory"] = record["peak_bytes"] / max(against["peak_bytes"], 1)
    record["largest_loss_difference"] = max(abs(a["loss"] - b["loss"]) for a, b in pairs)


def line(record: dict[str, Any]) -> str:
    text = (
        f"{record['run']}: {record['tokens_per_second']:,.0f} tokens/s, {record['peak_bytes'] / 2**30:.1f} GiB, "
        f"exchange {record['exchange_share']:.2%}"
    )
    if "efficiency" in record:
        text += f", {record['speedup']:.2f} x one GPU ({record['efficiency']:.0%} of ideal)"
        text += f", loss differs by {record['largest_loss_difference']:.1e}"
    return text


def table(records: dict[str, dict[str, Any]]) -> Table:
    made = Table(title="tokens per second over all processes; memory of the fullest one")
    for name in ("run", "tokens/s", "of ideal", "GiB", "scan's exchange", "MiB sent", "last loss", "loss difference"):
        made.add_column(name, justify="left" if name == "run" else "right")
    for r in records.values():
        many = "efficiency" in r
        made.add_row(
            r["run"],
            f"{r['tokens_per_second']:,.0f}",
            f"{r['efficiency']:.0%}" if many else "",
            f"{r['peak_bytes'] / 2**30:.1f}",
            f"{r['exchange_share']:.2%}",
            f"{r['exchange_bytes_per_step'] / 2**20:.1f}",
            f"{r['steps'][-1]['loss']:.5f}",
            f"{r['largest_loss_difference']:.1e}" if many else "",
        )
    return made


if __name__ == "__main__":
    main()

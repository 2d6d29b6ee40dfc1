"""A recipe from beginning to end: tokens, model, training, the saved model, its evaluation, the record."""

import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from inplace_ttt.errors import UserError
from inplace_ttt.hf.attach import configure, fast_settings, is_attached
from inplace_ttt.hf.checkpoint import add_results
from inplace_ttt.hf.load import load_baseline
from inplace_ttt.hf.names import base_of, keep_base
from inplace_ttt.records import write_json
from inplace_ttt.train.attention import choose_attention
from inplace_ttt.train.model import build_model, recompute_activations, save_model
from inplace_ttt.train.packing import Layout, PackedRows, TokenStore, first_rows, updates_seen
from inplace_ttt.train.parallel import ParallelTrainer, Rank, save_whole, start
from inplace_ttt.train.plan import flops_per_token, peak_flops
from inplace_ttt.train.prepare import Prepared, documents_of, prepare
from inplace_ttt.train.recipe import start_from
from inplace_ttt.train.report import evaluate, headline, loss_curve, plot_losses, run_record
from inplace_ttt.train.sizes import FastWeightMonitor, choose_lr, two_digits
from inplace_ttt.train.specs import Recipe
from inplace_ttt.train.stream import StreamedRows
from inplace_ttt.train.trainer import (
    InnerLrWarmup,
    MarkComplete,
    PackedTrainer,
    ProgressLines,
    training_arguments,
)


def run(recipe: Recipe, *, resume: bool = False, prepare_only: bool = False, console: Console | None = None) -> Path:
    """Train, evaluate and save; return the output directory.

    It then holds ``model/`` (weights in bf16, of a frozen base the adapter alone; tokenizer), ``run.json``,
    ``evaluation.json`` (test windows), ``loss.png``, and ``checkpoints/``. With ``prepare_only`` only the tokens are
    made. Raises UserError for everything that the user can fix.
    """
    console = console or Console()
    say: Callable[[str], None] = partial(console.print, highlight=False, soft_wrap=True)
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if prepare_only:
        return prepare(recipe, say).directory

    _check_machine(recipe)
    output = Path(recipe.output)
    checkpoints, saved = output / "checkpoints", output / "model"
    last = start_from(recipe, resume)
    rank = start(recipe.parallel)
    console.quiet = console.quiet or not rank.is_main
    prepared = rank.on_main_first(lambda: prepare(recipe, say))
    _check_windows(prepared, recipe.evaluation_length)

    started = datetime.now(UTC)
    if rank.is_main:
        write_json(output / "recipe.json", recipe.raw)
    try:
        trainer, rows = build_trainer(recipe, prepared, checkpoints, rank, say, last)
        ProgressLines(trainer, console)
        model: Any = trainer.model
        attached, device, parameters = is_attached(model), trainer.args.device, model.num_parameters()
        trained_parameters = model.num_parameters(only_trainable=True)
        what = f"{parameters / 1e6:.2f}M parameters on {device}, {model.config._attn_implementation}"
        say(f"{recipe.name}: {what}; {rows.describe()}")
        trainer.train(resume_from_checkpoint=last)
    except torch.OutOfMemoryError:
        raise UserError(out_of_memory(recipe)) from None
    curve = loss_curve(trainer.state.log_history)
    warnings = [] if trainer.monitor is None else trainer.monitor.warnings
    if rank.is_main:
        plot_losses(curve, output / "loss.png", recipe.name)

    # The Trainer leaves autocast around forward; so evaluate the saved copy, which users load.
    model.config.use_cache = True
    if recipe.parallel is not None:  # together they write all weights, the main process reads them
        base, whole = base_of(model), output / "whole"
        save_whole(model, whole)
        rank.end()
        if not rank.is_main:
            return output
        model = load_baseline(whole, "cpu")
        if attached:
            keep_base(model, base)
        shutil.rmtree(whole)
    save_model(model, prepared.tokenizer, saved, recipe.trainable, recipe.model.base)
    say(f"saved {saved} ({_size(saved) / 1e6:.1f} MB)")
    del trainer, model
    try:
        results = evaluate(saved, prepared.stores("test"), recipe.evaluation, recipe.evaluation_length, device, console)
    except torch.OutOfMemoryError:
        raise UserError(
            f"the device is out of memory evaluating {saved}: set evaluation.batch_size below "
            f"{recipe.evaluation.batch_size} or evaluation.piece below {recipe.evaluation.piece}, with --resume"
        ) from None
    losses = headline(results)
    if attached and results:
        add_results(saved, losses)
    write_json(output / "evaluation.json", {domain: result.to_dict() for domain, result in results.items()})
    record = run_record(
        recipe.raw, curve, started, parameters=parameters, trained_parameters=trained_parameters,
        tokens_seen=recipe.steps * recipe.tokens_per_step, **rows.record(), data=prepared.summary, warnings=warnings,
        model_bytes=_size(saved), evaluation=losses,
    )  # fmt: skip
    write_json(output / "run.json", record)
    for domain, values in losses.items():
        say(f"test {domain}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
    return output


# -- before training ---------------------------------------------------------------------------------------------------


def _check_machine(recipe: Recipe) -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("training needs accelerate: pip install accelerate")
    if recipe.attn_implementation == "flex_attention" and not torch.cuda.is_available():
        raise UserError("attn_implementation: flex_attention trains on CUDA devices only, leave it out (auto)")
    if recipe.liger and not torch.cuda.is_available():
        raise UserError("liger: its kernels run on CUDA devices only, leave it out")
    if recipe.liger and importlib.util.find_spec("liger_kernel") is None:
        raise UserError("liger: needs a package, pip install liger-kernel, or leave it out")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and recipe.parallel is None:
        raise UserError(
            f"{started} processes were started, and the recipe does not say how they share the run: add "
            f"parallel.shard={started} (or data, context, tensor)"
        )
    if torch.cuda.device_count() > 1 and started == 1:
        raise UserError("one process uses one GPU: choose it with CUDA_VISIBLE_DEVICES=0, or use torchrun and parallel")


def _check_windows(prepared: Prepared, length: int) -> None:
    """Refuse what the evaluation at the end would refuse, before anything is trained."""
    for domain, store in prepared.stores("test").items():
        if (longest := store.lengths.max(initial=0)) < length:
            raise UserError(
                f"evaluation.length: no document of data.test.{domain} has {length} tokens: make it {longest} or "
                "less, or leave data.test out"
            )


def build_trainer(
    recipe: Recipe,
    prepared: Prepared,
    checkpoints: Path,
    rank: Rank | None = None,
    say: Callable[[str], None] = lambda line: None,
    last: str | None = None,
) -> tuple[PackedTrainer, PackedRows | StreamedRows]:
    """Build rows, model and Trainer. ``rank``: this process among several; ``last``: the checkpoint to resume."""
    rank = rank or start(recipe.parallel)
    kind: Any = PackedTrainer if recipe.parallel is None else partial(ParallelTrainer, rank=rank)
    arguments = training_arguments(recipe, checkpoints, rank.row_groups, autocast=rank.is_alone)
    torch.set_float32_matmul_precision("high")
    attention = choose_attention(recipe.attn_implementation, arguments.device)
    model: Any = rank.build(partial(build_model, recipe, prepared.tokenizer, attention))
    rows = _rows(recipe, prepared)
    if (config := recipe.ttt_config()) is not None:
        say(updates_seen(rows.plan, config.chunk_size, is_all=isinstance(rows, PackedRows)))
    validation = {
        domain: first_rows(store, recipe.evaluation.rows, rows.layout)
        for domain, store in prepared.stores("validation").items()
    }
    flops = sum(flops_per_token(model, recipe.sequence_length, is_frozen=recipe.trainable != "all"))
    peak = peak_flops(recipe.peak_tflops, recipe.precision)
    if recipe.activation_checkpointing:
        recompute_activations(model)
    rank.shard(model, torch.bfloat16 if recipe.precision == "bf16" else None)
    if recipe.ttt_relative_update is not None:  # where the model is trained: a CPU would take hours for a large one
        if last is not None and Path(last, "config.json").is_file():
            lr = _kept_lr(Path(last), recipe.ttt_lr_warmup_steps)
        else:
            lr = choose_lr(model, {n: value[None] for n, value in rows[0].items()}, recipe.ttt_relative_update)
        configure(model, lr=lr)
    rank.cut_rows(model)
    attached = is_attached(model)
    # Compiled layers call no hooks; the loss as objective has no updates before its calls end.
    is_measured = config is not None and config.objective != "loss" and not recipe.compile
    trainer: PackedTrainer = kind(
        model=model,
        args=arguments,
        train_dataset=rows,
        validation=validation if recipe.eval_every else None,
        flops_per_token=flops,
        peak_flops=peak and peak * rank.spec.processes,
        monitor=FastWeightMonitor(model, recipe.log_every, say) if is_measured else None,
        say=say,
    )
    trainer.add_callback(MarkComplete())
    if attached and recipe.ttt_lr_warmup_steps:
        trainer.add_callback(InnerLrWarmup(model, fast_settings(model)["lr"], recipe.ttt_lr_warmup_steps))
    return trainer, rows


def _rows(recipe: Recipe, prepared: Prepared) -> PackedRows | StreamedRows:
    tokenizer, config = prepared.tokenizer, recipe.ttt_config()
    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    chunk = 1 if config is None else config.chunk_size
    layout = Layout(recipe.sequence_length, recipe.seed, pad, recipe.batch_size, cut=recipe.cut_multiple or chunk)
    layout = replace(layout, align=chunk if recipe.align_documents else 1)
    count = recipe.steps * recipe.batch_size * recipe.gradient_accumulation
    if recipe.data.tokenise == "before":
        return PackedRows(TokenStore.join(list(prepared.stores("train").values())), count, layout)
    domains = documents_of(recipe.data.train)
    streamed = StreamedRows(domains, tokenizer, count, layout, prepared.directory / "windows")
    streamed[0]  # report unreadable sources before training
    return streamed


def _kept_lr(checkpoint: Path, warmup_steps: int) -> float:
    """Return the inner learning rate that a checkpoint's run chose; its configuration holds the one of its step."""
    now = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["inplace_ttt"]["lr"]
    share = min(1.0, int(checkpoint.name.rpartition("-")[2]) / warmup_steps) if warmup_steps else 1.0
    return two_digits(now / share)


def out_of_memory(recipe: Recipe) -> str:
    """Say in one line what to change."""
    advice = {
        "activation_checkpointing: true": not recipe.activation_checkpointing,
        f"batch_size below {recipe.batch_size} (raise gradient_accumulation as much)": recipe.batch_size > 1,
        "precision: bf16": recipe.precision != "bf16",
        f"sequence_length below {recipe.sequence_length}": True,
        "trainable: adapter": recipe.ttt is not None and recipe.trainable == "all",
    }
    return f"the device is out of memory: set {', or '.join(line for line, helps in advice.items() if helps)}"


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())

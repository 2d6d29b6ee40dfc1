"""A recipe from beginning to end: tokens, model, training, the saved model, its evaluation, the record."""

import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from inplace_ttt.errors import UserError
from inplace_ttt.eval.nll import DomainResult, Text, evaluate_documents
from inplace_ttt.hf.attach import configure, fast_settings, is_attached
from inplace_ttt.hf.checkpoint import add_results
from inplace_ttt.records import write_json
from inplace_ttt.train.arguments import training_arguments
from inplace_ttt.train.attention import choose_attention
from inplace_ttt.train.flops import flops_per_token, peak_flops
from inplace_ttt.train.inner_lr import fitting_lr
from inplace_ttt.train.model import build_model, count_parameters, load_saved, save_model
from inplace_ttt.train.monitor import FastWeightMonitor
from inplace_ttt.train.packing import PackedRows, TokenStore, first_rows, updates_seen
from inplace_ttt.train.prepare import Prepared, prepare, training_documents
from inplace_ttt.train.report import loss_curve, plot_losses, run_record
from inplace_ttt.train.specs import Recipe
from inplace_ttt.train.stream import Layout, StreamedRows
from inplace_ttt.train.trainer import COMPLETE, InnerLrWarmup, MarkComplete, PackedTrainer, quiet

if TYPE_CHECKING:
    from inplace_ttt.train.parallel import Place

# What may differ between a run and its continuation.
_FREE_ON_RESUME = (
    "activation_checkpointing",
    "name",
    "output",
    "peak_tflops",
    "log_every",
    "eval_every",
    "save_every",
    "evaluation",
    "parallel",
)


def run(recipe: Recipe, *, resume: bool = False, prepare_only: bool = False, console: Console | None = None) -> Path:
    """Trains, evaluates and saves; returns the output directory.

    It then holds ``model/`` (weights in bf16, of a frozen base the adapter alone; tokenizer), ``run.json``,
    ``evaluation.json`` (test windows), ``packages.json`` (the distributions trained on), ``loss.png``, and
    ``checkpoints/``. With ``prepare_only`` only the tokens are made. Raises UserError for everything the user can mend.
    """
    console = console or Console()

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if not prepare_only:
        _check_machine(recipe)
    output = Path(recipe.output)
    checkpoints = output / "checkpoints"
    last = None if prepare_only else _start_from(recipe, checkpoints, resume)
    place = None
    if recipe.parallel is not None and not prepare_only:
        from inplace_ttt.train.parallel import start

        place = start(recipe.parallel)
    main = place is None or place.main
    console.quiet = console.quiet or not main
    prepared = prepare(recipe, say) if place is None else place.first(lambda: prepare(recipe, say))
    if prepare_only:
        return prepared.directory
    _check_windows(recipe, prepared)

    started = datetime.now(UTC)
    if main:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "recipe.json", recipe.raw)
        (output / "packages.json").write_bytes((prepared.directory / "packages.json").read_bytes())
    try:
        trainer, rows = _trainer(recipe, prepared, checkpoints, place, say, last)
        quiet(trainer, console)
        model = trainer.model
        assert isinstance(model, PreTrainedModel)
        say(
            f"{recipe.name}: {count_parameters(model) / 1e6:.2f}M parameters on {trainer.args.device}, "
            f"{model.config._attn_implementation}; {rows.describe()}"
        )
        trainer.train(resume_from_checkpoint=last)
    except torch.OutOfMemoryError:
        raise UserError(out_of_memory(recipe)) from None
    curve = loss_curve(trainer.state.log_history)
    if main:
        plot_losses(curve, output / "loss.png", recipe.name)

    # The Trainer leaves autocast around forward; the saved copy is what people load, so that copy is evaluated.
    model.config.use_cache = True
    attached, parameters, device = is_attached(model), count_parameters(model), trainer.args.device
    trained = count_parameters(model, trainable=True)
    if place is None:
        save_model(model, prepared.tokenizer, output / "model", torch.bfloat16, recipe)
    else:
        from inplace_ttt.hf.names import base_of, keep_base
        from inplace_ttt.train.parallel import save_whole

        base = base_of(model)
        save_whole(model, output / "whole")
        place.end()
        if not main:
            return output
        whole = load_saved(output / "whole", attached)
        keep_base(whole, base)
        save_model(whole, prepared.tokenizer, output / "model", torch.bfloat16, recipe)
        shutil.rmtree(output / "whole")
        del whole
    say(f"saved {output / 'model'} ({_size(output / 'model') / 1e6:.1f} MB)")
    warnings = [] if trainer.monitor is None else trainer.monitor.warnings
    del trainer, model
    try:
        results = _evaluate(recipe, prepared, output / "model", attached, device, console)
    except torch.OutOfMemoryError:
        raise UserError(
            f"the device is out of memory evaluating {output / 'model'}: set evaluation.batch_size below "
            f"{recipe.evaluation.batch_size} or evaluation.piece below {recipe.evaluation.piece}, with --resume"
        ) from None
    if attached and results:
        add_results(output / "model", _headline(results))
    write_json(output / "evaluation.json", {domain: result.to_dict() for domain, result in results.items()})
    record = run_record(
        recipe.raw,
        curve,
        started,
        parameters=parameters,
        trained_parameters=trained,
        tokens_seen=recipe.steps * _tokens_per_step(recipe),
        **rows.record(),
        data=prepared.summary,
        packages="packages.json",
        warnings=warnings,
        model_bytes=_size(output / "model"),
        evaluation=_headline(results),
    )
    write_json(output / "run.json", record)
    for domain, values in _headline(results).items():
        say(f"test {domain}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
    return output


def _check_machine(recipe: Recipe) -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("training needs accelerate: pip install accelerate")
    if recipe.attn_implementation == "flex_attention" and not torch.cuda.is_available():
        raise UserError("attn_implementation: flex_attention trains on CUDA devices only, leave it out (auto)")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and recipe.parallel is None:
        raise UserError(
            f"{started} processes were started, and the recipe does not say how they share the run: add "
            f"parallel.shard={started} (or data, context, tensor)"
        )
    if torch.cuda.device_count() > 1 and started == 1:
        raise UserError("one process uses one GPU: choose it with CUDA_VISIBLE_DEVICES=0, or use torchrun and parallel")


def _check_windows(recipe: Recipe, prepared: Prepared) -> None:
    """What the evaluation at the end would refuse, before anything is trained."""
    for domain, store in prepared.stores("test").items():
        if store.lengths.max(initial=0) < recipe.evaluation_length:
            raise UserError(
                f"evaluation.length: no document of data.test.{domain} has {recipe.evaluation_length} tokens: "
                f"make it {store.lengths.max(initial=0)} or less, or leave data.test out"
            )


def out_of_memory(recipe: Recipe) -> str:
    """What to change, in one line."""
    advice = []
    if not recipe.activation_checkpointing:
        advice.append("activation_checkpointing: true")
    if recipe.batch_size > 1:
        advice.append(f"batch_size below {recipe.batch_size} (raise gradient_accumulation as much)")
    if recipe.precision != "bf16":
        advice.append("precision: bf16")
    advice.append(f"sequence_length below {recipe.sequence_length}")
    if recipe.ttt is not None and recipe.trainable == "all":
        advice.append("trainable: adapter")
    return f"the device is out of memory: set {', or '.join(advice)}"


def _start_from(recipe: Recipe, checkpoints: Path, resume: bool) -> str | None:
    """The checkpoint to go on from, None for a fresh start. Raises UserError rather than overwrite or mix runs."""
    last = last_complete(checkpoints)
    if not resume:
        if last is not None or (checkpoints.parent / "run.json").exists():
            raise UserError(f"{checkpoints.parent} holds a run already: add --resume, or choose another output=...")
        return None
    if last is None and not (checkpoints.parent / "recipe.json").exists():
        raise UserError(f"nothing to resume: there is no checkpoint in {checkpoints} (save_every sets how often)")
    before = json.loads((checkpoints.parent / "recipe.json").read_text(encoding="utf-8"))
    now = json.loads(json.dumps(recipe.raw, default=str))
    changed = [k for k in before.keys() | now.keys() if before.get(k) != now.get(k) and k not in _FREE_ON_RESUME]
    if changed:
        raise UserError(f"cannot resume: {', '.join(sorted(changed))} changed since the run in {checkpoints.parent}")
    if last is not None and (Path(last) / "sharded").exists() != (recipe.parallel is not None):
        fix = "leave parallel out" if recipe.parallel is not None else "set parallel={} for one process"
        kind = "without" if recipe.parallel is not None else "with"
        raise UserError(f"cannot resume: the checkpoints in {checkpoints} were written {kind} parallel: {fix}")
    return last


def last_complete(checkpoints: Path) -> str | None:
    """The newest checkpoint that was written to its end: one that a killed process left half-written has no mark."""
    marked = [path.parent for path in checkpoints.glob(f"checkpoint-*/{COMPLETE}")]
    return str(max(marked, key=lambda path: int(path.name.rpartition("-")[2]))) if marked else None


def _trainer(
    recipe: Recipe,
    prepared: Prepared,
    checkpoints: Path,
    place: "Place | None" = None,
    say: Callable[[str], None] = lambda line: None,
    last: str | None = None,
) -> tuple[PackedTrainer, PackedRows | StreamedRows]:
    tokenizer, length = prepared.tokenizer, recipe.sequence_length
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    assert isinstance(pad, int)
    arguments = training_arguments(recipe, checkpoints, place)
    torch.set_float32_matmul_precision("high")
    attention = choose_attention(recipe.attn_implementation, arguments.device, recipe.compile)
    build = partial(build_model, recipe, tokenizer, attention)
    model = build() if place is None else place.build(build)
    rows, align, cut = _rows(recipe, prepared, pad), recipe.alignment, recipe.cut
    if recipe.ttt is not None and (ttt := recipe.ttt_config()) is not None:
        say(updates_seen(rows.plan, ttt.chunk_size, is_all=isinstance(rows, PackedRows)))
    validation = {
        domain: first_rows(store, length, recipe.evaluation.rows, pad, align, cut)
        for domain, store in prepared.stores("validation").items()
    }
    flops, peak = flops_per_token(recipe, model, recomputed=False), peak_flops(recipe)
    devices = 1 if recipe.parallel is None else recipe.parallel.processes
    kind: Any = PackedTrainer
    if place is None:
        model.to(arguments.device)  # type: ignore[arg-type]
    else:
        from inplace_ttt.train.parallel import ParallelTrainer

        model = place.shard(
            model, torch.bfloat16 if recipe.precision == "bf16" else None, recipe.activation_checkpointing
        )
        kind = partial(ParallelTrainer, place=place, rows_per_batch=recipe.batch_size)
    if recipe.ttt_relative_update is not None:  # where the model is trained: a CPU would take hours for a large one
        configure(model, lr=_chosen_lr(recipe, model, rows, last))
    if place is not None:
        place.cut_rows(model)
    warm_up = is_attached(model) and recipe.ttt_lr_warmup_steps > 0
    inner_lr = fast_settings(model)["lr"] if warm_up else 0.0
    watched = is_attached(model) and not recipe.compile  # compiled layers call no hooks
    trainer: PackedTrainer = kind(
        model=model,
        args=arguments,
        train_dataset=rows,
        validation=validation if recipe.eval_every else None,
        tokens_per_step=_tokens_per_step(recipe),
        decay_embeddings=recipe.optimizer.decay_embeddings,
        flops_per_token=flops,
        peak_flops=peak and peak * devices,
        monitor=FastWeightMonitor(model, recipe.log_every, say) if watched else None,
        say=say,
    )
    trainer.add_callback(MarkComplete())
    if warm_up:
        trainer.add_callback(InnerLrWarmup(model, inner_lr, recipe.ttt_lr_warmup_steps))
    return trainer, rows


def _chosen_lr(
    recipe: Recipe, model: PreTrainedModel, rows: PackedRows | StreamedRows, checkpoint: str | None
) -> float:
    """The inner learning rate by measurement on the first row; a run that goes on keeps the one that it has."""
    if checkpoint is not None and (found := Path(checkpoint) / "config.json").is_file():
        return float(json.loads(found.read_text(encoding="utf-8"))["inplace_ttt"]["lr"])
    assert recipe.ttt_relative_update is not None
    return fitting_lr(model, {name: value[None] for name, value in rows[0].items()}, recipe.ttt_relative_update)


def _rows(recipe: Recipe, prepared: Prepared, pad: int) -> PackedRows | StreamedRows:
    length, count = recipe.sequence_length, recipe.steps * recipe.batch_size * recipe.gradient_accumulation
    layout = Layout(length, recipe.seed, pad, recipe.batch_size, recipe.alignment, recipe.cut)
    if recipe.data.tokenise == "while_training":
        notes = prepared.directory / "windows"
        rows = StreamedRows(training_documents(recipe), prepared.tokenizer, count, layout, notes)
        rows[0]  # what cannot be read is told before anything is trained
        return rows
    store = TokenStore.join(list(prepared.stores("train").values()))
    return PackedRows(
        store, length, count, seed=recipe.seed, pad_id=pad, group=layout.group, align=layout.align, cut=layout.cut
    )


def _evaluate(
    recipe: Recipe, prepared: Prepared, directory: Path, attached: bool, device: torch.device, console: Console
) -> dict[str, DomainResult]:
    """The saved model on the test windows, in float32; nothing when there is no test split."""
    documents = {domain: texts(store) for domain, store in prepared.stores("test").items()}
    if not documents:
        return {}
    model = load_saved(directory, attached).to(device)  # type: ignore[arg-type]
    spec, length = recipe.evaluation, recipe.evaluation_length
    inner = [edge for edge in spec.edges if 0 < edge < length]
    return evaluate_documents(
        model,
        documents,
        length,
        spec.windows,
        piece=spec.piece,
        edges=[0, *inner, length] if inner else None,
        batch_size=spec.batch_size,
        console=console,
    )


def texts(store: TokenStore) -> list[Text]:
    """A store's documents for the evaluation."""
    return [Text(name, store[i]) for i, name in enumerate(store.names)]


def _headline(results: Mapping[str, DomainResult]) -> dict[str, dict[str, float]]:
    return {
        domain: {
            name: mean.value
            for name, mean in (("on", result.on), ("off", result.off), ("gain", result.gain))
            if mean is not None
        }
        for domain, result in results.items()
    }


def _tokens_per_step(recipe: Recipe) -> int:
    return recipe.batch_size * recipe.gradient_accumulation * recipe.sequence_length


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())

"""Hugging Face's Trainer on packed rows: fixed row order, token throughput, validation with updates on and off."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from inplace_ttt.core import Teacher
from inplace_ttt.errors import UserError
from inplace_ttt.hf.attach import is_attached, runtime_of, set_lr, updates_off
from inplace_ttt.hf.checkpoint import is_added
from inplace_ttt.records import peak_memory
from inplace_ttt.train.loss import loss_in_pieces
from inplace_ttt.train.packing import IGNORED, PackedRows
from inplace_ttt.train.recipe import COMPLETE
from inplace_ttt.train.sizes import FastWeightMonitor
from inplace_ttt.train.specs import Recipe
from inplace_ttt.train.stream import StreamedRows


@dataclass
class PackedArguments(TrainingArguments):
    """Arguments of a `PackedTrainer`, whose model is where it belongs already.

    ``tokens_per_step``: what one optimizer step reads. ``ttt_lr``: learning rate of the target's parameters; None:
    that of the others. ``decay_embeddings``, ``teach``, ``teach_alone``: the recipe's.
    """

    tokens_per_step: int = 0
    decay_embeddings: bool = True
    ttt_lr: float | None = None
    teach: float = 0.0
    teach_alone: bool = False

    @property
    def place_model_on_device(self) -> bool | None:
        return False


def training_arguments(recipe: Recipe, checkpoints: Path, row_groups: int, autocast: bool) -> PackedArguments:
    """Build the Trainer's arguments from a recipe; it writes to ``checkpoints``.

    ``row_groups``: groups of processes that share a batch's rows. ``autocast``: False where sharding has a mixed
    precision of its own.
    """
    optimizer, has_cuda = recipe.optimizer, torch.cuda.is_available()
    schedules = {
        "constant": "constant_with_warmup",
        "cosine": "cosine_with_min_lr" if optimizer.min_lr_ratio else "cosine",
    }
    return PackedArguments(
        output_dir=str(checkpoints),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size // row_groups,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=optimizer.lr,
        lr_scheduler_type=schedules.get(optimizer.schedule, optimizer.schedule),
        lr_scheduler_kwargs={"min_lr_rate": optimizer.min_lr_ratio} if optimizer.min_lr_ratio else None,
        warmup_steps=optimizer.warmup_steps,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        max_grad_norm=optimizer.max_grad_norm,
        optim="adamw_torch_fused" if has_cuda else "adamw_torch",
        bf16=recipe.precision == "bf16" and autocast,
        average_tokens_across_devices=False,
        torch_compile=recipe.compile,
        use_liger_kernel=recipe.liger,
        # The loss is computed in pieces, see `inplace_ttt.train.loss`.
        liger_kernel_config={"cross_entropy": False, "fused_linear_cross_entropy": False} if recipe.liger else None,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,  # it would synchronise in every step; the log's own check stops the run
        eval_strategy="steps" if recipe.eval_every else "no",
        eval_steps=recipe.eval_every or None,
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or 500,
        save_total_limit=2,
        seed=recipe.seed,
        use_cpu=not has_cuda,
        dataloader_num_workers=(1 if recipe.data.tokenise == "while_training" else 2) if has_cuda else 0,
        dataloader_pin_memory=has_cuda,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        report_to=list(recipe.report_to) or "none",
        tokens_per_step=recipe.tokens_per_step,
        decay_embeddings=optimizer.decay_embeddings,
        ttt_lr=optimizer.ttt_lr,
        teach=recipe.teach,
        teach_alone=recipe.teach_alone,
    )


class PackedTrainer(Trainer):
    """``validation`` maps domains to rows.

    ``flops_per_token``, ``peak_flops`` (FLOP/s of all devices together; None: unknown): for the log's MFU. ``monitor``:
    measures the fast weights for the log. ``say`` gets a line where the loss needs whole logits (`loss_in_pieces`).
    """

    args: PackedArguments

    def __init__(
        self,
        *,
        validation: Mapping[str, Sequence[dict[str, Tensor]]] | None = None,
        flops_per_token: float = 0.0,
        peak_flops: float | None = None,
        monitor: FastWeightMonitor | None = None,
        say: Callable[[str], None] = lambda line: None,
        **arguments: Any,
    ) -> None:
        self.validation = dict(validation or {})
        self.flops_per_token, self.peak_flops, self.monitor, self.say = flops_per_token, peak_flops, monitor, say
        self._clock: tuple[int, float] | None = None  # step and time of the last line of the log
        self._paused = 0.0  # seconds spent on validation since then
        super().__init__(eval_dataset=[] if validation else None, **arguments)
        if monitor is not None:
            self.add_callback(monitor)

    def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
        """Read the rows in their order, they are shuffled: a resumed run then skips exactly the rows it has read."""
        assert isinstance(self.train_dataset, PackedRows | StreamedRows)
        return SequentialSampler(self.train_dataset)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Name matrices, convolutions, and embeddings if asked for; never norms, biases or other vectors."""
        embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim >= 2 and (self.args.decay_embeddings or id(parameter) not in embeddings)
        ]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Put the target's parameters into groups of their own, last, where they have a learning rate of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.args.ttt_lr is not None:
            assert isinstance(self.model, nn.Module)
            added = {id(p) for name, p in self.model.named_parameters() if is_added(name)}
            groups = split_groups(optimizer, lambda p: id(p) in added)
            own = [group | {"lr": self.args.ttt_lr} for is_own, group in groups if is_own]
            optimizer.param_groups[:] = [group for is_own, group in groups if not is_own] + own
        return optimizer

    def floating_point_ops(self, inputs: Any) -> int:
        """Count nothing: it would walk over all modules in every step."""
        return 0

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute it without a cache: with one, transformers would let packed documents see each other."""
        return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to training's lines tokens seen, tokens per second (validation not counted), MFU, memory, sizes."""
        if "loss" in logs:
            now, step = time.perf_counter(), self.state.global_step
            logs["tokens"] = step * self.args.tokens_per_step
            if self._clock is not None and step > self._clock[0]:
                elapsed = now - self._clock[1] - self._paused
                logs["tokens_per_second"] = (step - self._clock[0]) * self.args.tokens_per_step / max(elapsed, 1e-9)
                if self.peak_flops:
                    logs["mfu"] = logs["tokens_per_second"] * self.flops_per_token / self.peak_flops
            if memory := peak_memory():
                logs["peak_memory_gib"] = memory / 2**30
            logs |= {} if self.monitor is None else self.monitor.entries()
            if self.args.ttt_lr is not None and "learning_rate" in logs:  # one schedule for both
                logs["ttt_learning_rate"] = logs["learning_rate"] * self.args.ttt_lr / self.args.learning_rate
            self._clock, self._paused = (step, now), 0.0
            if not math.isfinite(logs["loss"]):
                advice = "lower optimizer.lr or ttt.lr, or set ttt_lr_warmup_steps"
                raise UserError(f"the loss is {logs['loss']} at step {step}: {advice}")
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Start the clock of the throughput. Losses come from pieces of the tokens, until training ends."""
        self._clock = None
        assert isinstance(self.model, PreTrainedModel)
        # A step's gradient is the sum over its batches, each of which teaches by the mean over its own tokens.
        weight = self.args.teach / self.args.gradient_accumulation_steps
        with loss_in_pieces(self.model, self.say), taught(self.model, weight, self.args.teach_alone):
            return super().train(*args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return mean validation loss by domain: ``eval_DOMAIN``, and ``eval_DOMAIN_off`` with updates switched off."""
        started = time.perf_counter()
        model = self.model
        assert isinstance(model, nn.Module)
        metrics: dict[str, float] = {}
        model.eval()
        for domain, rows in self.validation.items():
            metrics[f"{metric_key_prefix}_{domain}"] = self._mean_loss(model, rows)
            if is_attached(model):
                with updates_off(model):
                    metrics[f"{metric_key_prefix}_{domain}_off"] = self._mean_loss(model, rows)
        model.train()
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._paused += time.perf_counter() - started
        return metrics

    @torch.no_grad()
    def _mean_loss(self, model: nn.Module, rows: Sequence[dict[str, Tensor]]) -> float:
        """Return the loss per predicted token over ``rows``, in nats."""
        total, tokens = torch.zeros((), dtype=torch.float64, device=self.args.device), 0
        for batch in DataLoader(rows, batch_size=self.args.per_device_eval_batch_size):  # type: ignore[arg-type]
            count = int((batch["labels"][:, 1:] != IGNORED).sum())
            batch = {name: value.to(self.args.device) for name, value in batch.items()}
            total += self.batch_loss(model, batch).double() * count
            tokens += count
        return float(total) / max(tokens, 1)

    def batch_loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean loss of a validation batch."""
        loss: Tensor = model(**batch, use_cache=False).loss
        return loss


def split_groups(optimizer: Any, kind: Callable[[nn.Parameter], Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Split an optimizer's groups by the kinds of their parameters; return each with its kind."""
    found: list[tuple[Any, dict[str, Any]]] = []
    for group in optimizer.param_groups:
        kinds: dict[Any, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            kinds.setdefault(kind(parameter), []).append(parameter)
        found += [(value, group | {"params": parameters}) for value, parameters in kinds.items()]
    return found


@contextmanager
def taught(model: nn.Module, weight: float, is_alone: bool) -> Iterator[None]:
    """Let the targets learn from the loss's gradient at their layer's output (`inplace_ttt.core.teaching`)."""
    sites = runtime_of(model).sites if is_attached(model) else []
    for site in sites:
        site.teacher = Teacher(weight, is_alone)
    try:
        yield
    finally:
        for site in sites:
            site.teacher = None


class InnerLrWarmup(TrainerCallback):
    """A callback that raises the fast weights' learning rate linearly to ``lr`` over the first ``steps`` steps."""

    def __init__(self, model: nn.Module, lr: float, steps: int) -> None:
        self.model, self.lr, self.steps = model, lr, steps

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.global_step <= self.steps:
            set_lr(self.model, self.lr * min(1.0, (state.global_step + 1) / self.steps))

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        set_lr(self.model, self.lr)


class MarkComplete(TrainerCallback):
    """A callback that marks checkpoints that are complete on disk, so that no run resumes from half of one."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # every rank has written its part
        if args.should_save:
            (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


class ProgressLines(TrainerCallback):
    """A progress bar, and a line for every entry of the log, in place of the Trainer's own printing."""

    def __init__(self, trainer: Trainer, console: Console) -> None:
        self.console = console
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console, transient=True)
        self.task = self.progress.add_task("training", start=False)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.progress.update(self.task, total=state.max_steps, completed=state.global_step)
        self.progress.start_task(self.task)
        self.progress.start()

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.progress.stop()

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        self.progress.update(self.task, completed=state.global_step)
        if line := log_line(logs or {}):
            self.console.print(f"step {state.global_step:>6}  {line}", highlight=False, soft_wrap=True)


def log_line(logs: Mapping[str, float]) -> str:
    """Write one entry of the log for people; "" for entries that are not about loss."""
    parts = []
    if "loss" in logs:
        known = {
            "grad_norm": "gradient {:.3f}", "learning_rate": "lr {:.2e}", "tokens_per_second": "{:,.0f} tokens/s",
            "mfu": "MFU {:.1%}", "peak_memory_gib": "{:.1f} GiB",
        }  # fmt: skip
        parts.append(f"loss {logs['loss']:.4f}")
        parts += [form.format(logs[name]) for name, form in known.items() if name in logs]
        for name, what in (("update_norm/", "update"), ("state_norm/", "S")):
            if sizes := [value for key, value in logs.items() if key.startswith(name)]:
                parts.append(f"{what}/W0 {max(sizes):.1e}")
        if "ttt_cosine" in logs:
            parts.append(f"cosine {logs['ttt_cosine']:.3f}")
    parts += [f"{name.removeprefix('eval_')} {value:.4f}" for name, value in logs.items() if name.startswith("eval_")]
    return "  ".join(parts)

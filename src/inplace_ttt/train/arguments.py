"""What a recipe says in the words of Hugging Face's Trainer."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from inplace_ttt.train.specs import Recipe

if TYPE_CHECKING:
    from inplace_ttt.train.parallel import Place


def training_arguments(recipe: Recipe, checkpoints: Path, place: "Place | None" = None) -> TrainingArguments:
    """The Trainer's arguments; it writes to ``checkpoints``. ``place``: this process among several."""
    optimizer, cuda = recipe.optimizer, torch.cuda.is_available()
    schedule: dict[str, Any] = {"lr_scheduler_type": optimizer.schedule}
    if optimizer.schedule == "constant":
        schedule = {"lr_scheduler_type": "constant_with_warmup"}
    elif optimizer.min_lr_ratio:
        schedule = {
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": optimizer.min_lr_ratio},
        }
    kind, share = TrainingArguments, 1
    if place is not None and not place.alone:
        from inplace_ttt.train.parallel import PlacedArguments

        kind, share = PlacedArguments, place.readers
    return kind(
        output_dir=str(checkpoints),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size // share,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=optimizer.lr,
        warmup_steps=optimizer.warmup_steps,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        max_grad_norm=optimizer.max_grad_norm,
        optim="adamw_torch_fused" if cuda else "adamw_torch",
        bf16=recipe.precision == "bf16" and (place is None or place.alone),  # else sharding's own
        average_tokens_across_devices=False,
        torch_compile=recipe.compile,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,  # it would wait for the device in every step; the log's own check stops the run
        eval_strategy="steps" if recipe.eval_every else "no",
        eval_steps=recipe.eval_every or None,
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or 500,
        save_total_limit=2,
        seed=recipe.seed,
        use_cpu=not cuda,
        dataloader_num_workers=(1 if recipe.data.tokenise == "while_training" else 2) if cuda else 0,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        report_to=list(recipe.report_to) or "none",
        **({} if place is not None else _checkpointing(recipe)),
        **schedule,
    )


def _checkpointing(recipe: Recipe) -> dict[str, Any]:
    """Under the name that this version of transformers gives it."""
    if not recipe.activation_checkpointing:
        return {}
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}

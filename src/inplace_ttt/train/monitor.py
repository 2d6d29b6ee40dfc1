"""What the log says of the fast weights while a model trains, and a warning when their updates have an odd size."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from inplace_ttt.hf.attach import runtime_of
from inplace_ttt.train.sizes import Sizes, measuring

FIRST_STEPS = 20
"""Steps whose updates are checked."""
TOO_LARGE = 2.0
"""||lr dW|| / ||W0|| of a chunk: between what trained well (up to 0.9) and what diverged (19), see docs/training.md."""
TOO_SMALL = 1e-5
"""Below it, a hundred chunks change the weight by less than a thousandth: the updates do next to nothing."""


class FastWeightMonitor(TrainerCallback):
    """Measures the first row of every step that is logged, and of the first `FIRST_STEPS`.

    ``entries()`` are the log's: ``update_norm/layer_N``, ||lr dW|| / ||W0|| of the median chunk, and
    ``state_norm/layer_N``, the largest ||lr S|| / ||W0|| in the row. ``say`` gets one line if the first updates are out
    of range; the first step counts a fresh model's convolution (zero) as the average tap, and ``ttt.lr`` in full.
    """

    def __init__(self, model: nn.Module, log_every: int, say: Callable[[str], None]) -> None:
        self.model, self.log_every, self.say = model, log_every, say
        self.lr = runtime_of(model).config.lr  # in full: a warm-up lowers it for a while
        self.warnings: list[str] = []
        self._adapted = False
        self._watching = ExitStack()
        self._sizes: dict[int, Sizes] = {}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step + 1
        self._sizes = {}
        if step % self.log_every == 0 or step <= FIRST_STEPS:
            self._sizes = self._watching.enter_context(measuring(self.model, probe=step == 1))

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._watching.close()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._watching.close()
        self._adapted = self._adapted or bool(self._sizes)
        if state.global_step == FIRST_STEPS and not self._adapted:
            self.warnings.append(
                f"no document of the rows looked at in the first {FIRST_STEPS} steps reached chunk_size tokens, so no "
                "updates were made and nothing of the fast weights is trained: make ttt.chunk_size smaller"
            )
            self.say(f"warning: {self.warnings[-1]}")
        if self._sizes and state.global_step <= FIRST_STEPS and not self.warnings:
            warning = self._size_warning(first=state.global_step == 1)
            if warning:
                self.warnings.append(warning)
                self.say(f"warning: {warning}")

    def entries(self) -> dict[str, float]:
        """Of the step that just ended; nothing when it was not watched."""
        found: dict[str, float] = {}
        for layer, sizes in sorted(self._sizes.items()):
            lr = 0.0 if sizes.probed else sizes.lr  # the log tells of what happened, the probe is for the check alone
            found[f"update_norm/layer_{layer}"] = lr * float(sizes.updates.median())
            if sizes.state is not None:
                found[f"state_norm/layer_{layer}"] = lr * float(sizes.state)
        return found

    def _size_warning(self, first: bool) -> str | None:
        lr = self.lr
        sizes = {layer: lr * size for layer, size in self._medians().items()}
        layer = max(sizes, key=lambda n: sizes[n])
        if sizes[layer] > TOO_LARGE:
            return (
                f"one chunk's update of layer {layer} is {sizes[layer]:.2g} of its slow weight (||lr dW|| / ||W0||, "
                f"more than {TOO_LARGE:g}): training may diverge, lower ttt.lr ({lr:g}) or set ttt_relative_update"
            )
        layer = min(sizes, key=lambda n: sizes[n])
        if first and lr and sizes[layer] < TOO_SMALL:
            return (
                f"one chunk's update of layer {layer} is {sizes[layer]:.2g} of its slow weight (||lr dW|| / ||W0||, "
                f"less than {TOO_SMALL:g}): it will do next to nothing, raise ttt.lr ({lr:g}) or set "
                "ttt_relative_update"
            )
        return None

    def _medians(self) -> dict[int, float]:
        values = torch.stack([sizes.updates.median() for sizes in self._sizes.values()]).tolist()
        return dict(zip(self._sizes, values, strict=True))

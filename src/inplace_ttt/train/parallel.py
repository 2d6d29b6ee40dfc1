"""A recipe's run on several processes (docs/parallel.md): Hugging Face's Trainer around PyTorch's FSDP2 and our slices.

The model is sharded before the Trainer sees it and marked as prepared, so accelerate leaves it as it is: the same code
runs on GPUs (NCCL) and on CPUs (gloo), where accelerate refuses FSDP2 and context parallelism. With any layout a
step reads the same rows: a recipe's ``batch_size`` is that of all processes together.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel

from inplace_ttt.errors import UserError
from inplace_ttt.hf.attach import is_attached
from inplace_ttt.hf.checkpoint import save_base, save_pretrained
from inplace_ttt.hf.parallel import ContextParallel, enable_context_parallel
from inplace_ttt.hf.sharding import (
    Meshes,
    broadcast_and_shard,
    broadcast_structure,
    is_sharded,
    load_sharded,
    make_meshes,
    save_sharded,
    whole_state,
)
from inplace_ttt.train.packing import IGNORED
from inplace_ttt.train.specs import ParallelSpec
from inplace_ttt.train.trainer import PackedTrainer, split_groups

T = TypeVar("T")
SHARDED, SCHEDULER = "sharded", "scheduler.pt"


class Rank:
    """A process among those of a run."""

    def __init__(self, spec: ParallelSpec, device: str) -> None:
        self.spec, self.device = spec, device
        self.is_alone = spec.processes == 1
        self.is_main = self.is_alone or dist.get_rank() == 0
        """True on the process that writes and prints."""
        self.meshes: Meshes | None = None
        if not self.is_alone and spec.tensor == 1:
            self.meshes = make_meshes(device, data=spec.data, shard=spec.shard, context=spec.context)
        self.context: ContextParallel | None = None

        self.row_groups = 1 if self.meshes is None else self.meshes.row_groups
        """Groups of processes that read different rows."""

    def on_main_first(self, work: Callable[[], T]) -> T:
        """Call ``work`` on the main process, then on the others; they raise the UserError that it raised there."""
        done: list[T] = []
        refusal: list[str | None] = [None]
        if self.is_main:
            try:
                done.append(work())
            except UserError as error:
                refusal[0] = str(error)
        if not self.is_alone:
            dist.broadcast_object_list(refusal)
        if refusal[0] is not None:
            raise UserError(refusal[0])
        return done[0] if done else work()

    def build(self, work: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """Call ``work``, for ``shard``: on the main process alone where that gives the others their parts of it."""
        if self.meshes is None:
            return work()
        return broadcast_structure(self.on_main_first(lambda: work() if self.is_main else None))

    def shard(self, model: PreTrainedModel, precision: torch.dtype | None) -> None:
        """Shard a built model, which still reads whole rows; or put it on the device of a process alone."""
        if self.meshes is not None:
            broadcast_and_shard(model, self.meshes.parameters, precision=precision)
        elif self.is_alone:
            model.to(self.device)  # type: ignore[arg-type]
        model.__dict__["_is_accelerate_prepared"] = not self.is_alone
        model.__dict__["_is_distributed_loading_by_transformers"] = False  # checkpoints are written here

    def cut_rows(self, model: PreTrainedModel) -> None:
        """Make the model read slices from now on, where the settings say so."""
        if self.meshes is not None and self.meshes.context > 1:
            is_head_tail, attention = self.spec.slices == "head_tail", self.spec.attention
            self.context = enable_context_parallel(
                model, self.meshes.slices, head_tail=is_head_tail, attention=attention
            )

    def end(self) -> None:
        """End the communication: each process continues by itself."""
        if not self.is_alone:
            dist.barrier()
            dist.destroy_process_group()


def start(spec: ParallelSpec | None) -> Rank:
    """Join the run's other processes (None: there are none). UserError when torchrun started another number of them."""
    spec = spec or ParallelSpec()
    started, has_cuda = int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.is_available()
    if started != spec.processes:
        raise UserError(
            f"the recipe's parallel settings need {spec.processes} processes, {started} were started: "
            f"torchrun --nproc_per_node {spec.processes} -m inplace_ttt train RECIPE"
        )
    if started > 1:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if has_cuda and local >= torch.cuda.device_count():
            raise UserError(f"process {local} of this machine has no GPU: it has {torch.cuda.device_count()}")
        if has_cuda:
            torch.cuda.set_device(local)
        # The timeout covers tokenising on the first process.
        dist.init_process_group("nccl" if has_cuda else "gloo", timeout=timedelta(hours=1))
    return Rank(spec, "cuda" if has_cuda else "cpu")


class ParallelTrainer(PackedTrainer):
    """``PackedTrainer`` on several processes: each reads its rows or slices, checkpoints are written by all of them."""

    def __init__(self, *, rank: Rank, **arguments: Any) -> None:
        self.rank = rank
        super().__init__(**arguments)

    def create_accelerator_and_postprocess(self) -> None:
        """Create it without a parallelism configuration for a split model: accelerate has none on CPUs."""
        model: Any = self.model
        size = getattr(model, "_tp_size", None)
        if size is not None:
            model._tp_size = None
        try:
            super().create_accelerator_and_postprocess()
        finally:
            if size is not None:
                model._tp_size = size

    # -- rows -----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Give this process its rows of every batch, in the order of one process."""
        rows: Any = self.train_dataset
        own = self.args.per_device_train_batch_size
        first = 0 if self.rank.meshes is None else self.rank.meshes.row_group * own
        together = own * self.rank.row_groups
        batches = range(0, len(rows) // together * together, together)
        workers = self.args.dataloader_num_workers
        return DataLoader(
            Subset(rows, [batch + first + i for batch in batches for i in range(own)]),
            batch_size=own,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=workers > 0,
        )

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Count a whole step's labels over all processes, divided by those that gradients are averaged over."""
        count = sum(((b["labels"][:, 1:] != IGNORED).sum() for b in batch_samples), torch.zeros((), dtype=torch.int64))
        count = count.to(device)
        if self.rank.meshes is None:
            return count
        dist.all_reduce(count)
        return count / self.rank.meshes.context / dist.get_world_size()  # each slice of a row counted it

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with nullcontext() if self.rank.context is None else self.rank.context.step():
            return super().training_step(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Sum this process's losses over ``num_items_in_batch``: its mean over the processes is the step's."""
        return super().compute_loss(model, self._cut(inputs), *args, **kwargs)

    def _cut(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return dict(inputs) if self.rank.context is None else self.rank.context.cut(inputs)

    def batch_loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean loss of a validation batch; all processes read the same one."""
        context = self.rank.context
        with nullcontext() if context is None else context.step():
            loss = super().batch_loss(model, self._cut(batch))
        if context is not None:
            dist.all_reduce(loss, group=context.group)
            loss = loss / context.slices.ranks
        return loss

    # -- optimizer and checkpoints --------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Put parameters of one kind of tensor in each group: fused and foreach steps cannot mix them."""
        for module in self.model.modules():  # type: ignore[union-attr]
            if isinstance(module, FSDPModule):
                module.reshard()  # after a forward the root module holds unsharded parameters
        optimizer = super().create_optimizer(*args, **kwargs)
        groups = split_groups(optimizer, lambda p: getattr(p, "device_mesh", None))
        optimizer.param_groups[:] = [group for _, group in groups]
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a checkpoint's shape, for ``convert``; ``_save_optimizer_and_scheduler`` writes the tensors."""
        model: Any = self.model
        if self.rank.is_main:
            model.config.save_pretrained(output_dir)
        if not self.rank.is_alone:
            dist.barrier()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        model, scheduler, optimizer = self._parts()
        save_sharded(Path(output_dir) / SHARDED, model, optimizer)
        if self.rank.is_main:
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load nothing yet: the model comes with the optimizer, once that is there."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        model, scheduler, optimizer = self._parts()
        load_sharded(Path(checkpoint) / SHARDED, model, optimizer)
        state = torch.load(Path(checkpoint) / SCHEDULER, weights_only=True)
        given = [group["lr"] for group in optimizer.param_groups]  # another layout may have had fewer groups
        state |= {k: v[:1] * len(given) for k, v in state.items() if isinstance(v, list)}
        scheduler.load_state_dict(state | {"base_lrs": scheduler.base_lrs, "_last_lr": given})

    def _parts(self) -> tuple[Any, Any, Any]:
        """Return model, scheduler and the optimizer inside accelerate's."""
        return self.model, self.lr_scheduler, getattr(self.optimizer, "optimizer", self.optimizer)


def save_whole(model: PreTrainedModel, directory: Path) -> None:
    """Write the whole model as one process would, in the parameters' dtype; all processes call it, one writes."""
    if is_attached(model):
        save_pretrained(model, directory)
        return
    has_parts = is_sharded(model)
    state = whole_state(model) if has_parts else dict(model.state_dict())
    if not has_parts or dist.get_rank() == 0:
        save_base(model, directory, state, has_parts, {})

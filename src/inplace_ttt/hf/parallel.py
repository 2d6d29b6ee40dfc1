"""Context parallelism: each rank of a group reads its slice of every row (docs/parallel.md).

    context = enable_context_parallel(model, group)
    with context.step():
        model(**context.cut(batch), use_cache=False).loss.backward()      # a batch of whole rows, alike on all ranks

A pre-hook on the base model computes, once per call and identically on all ranks, the documents of the whole row, and
passes them as one keyword argument to attention (``parallel_attention.py``) and the adapting projections. Because it is
an argument of the call, a recomputation under activation checkpointing sees it too.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core import document_ids
from ..core.layer import written
from ..core.targets import values_of
from ..errors import UserError
from ..fast.ranks import Group, Slices, SliceTable, scan_slice
from .attach import is_attached, runtime_of, unwrap
from .calls import CALL
from .context import rows_are_cut
from .parallel_attention import GATHER, RowSlices, choose_methods
from .settings import Settings

IGNORED = -100
STATE = "_inplace_ttt_context_parallel"
_LAYER_TYPES = {"full_attention", "sliding_attention"}


class ContextParallel:
    """A split of a model's rows over the ranks of ``group``; made by ``enable_context_parallel``."""

    def __init__(self, model: PreTrainedModel, group: Group, head_tail: bool, mesh: Any = None) -> None:
        self.model, self.group, self.mesh = model, group, mesh
        self.slices = Slices(dist.get_world_size(group), dist.get_rank(group), head_tail)
        self.parameters = list(inspect.signature(model.base_model.forward).parameters)
        self.attention: str = model.config._attn_implementation
        self.calls: list[RowSlices] = []
        self.handles = [
            model.base_model.register_forward_pre_hook(self.before_model, with_kwargs=True, prepend=True),
            model.base_model.register_forward_hook(self.after_model, always_call=True),
        ]

    def cut(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return this rank's part of a batch of whole rows, ready for ``model(**part, use_cache=False)``.

        ``batch``: input_ids [B, T] and, optionally, labels [B, T], position_ids [B, T] or [1, T], seq_idx [B, T]; the
        same on all ranks of the group. Labels are shifted before the cut (the next token may lie on another rank).

        The part's loss is ``ranks * (sum over its own labels) / (labels of the whole batch)``: its mean over the
        group's ranks is the loss of the whole batch, so gradients averaged over them (FSDP2, DDP) are correct. With
        other rows on other processes or several batches a step, put (labels of all of them) / (processes that
        gradients are averaged over) in ``num_items_in_batch``. Raises UserError for rows that cannot be cut and for
        inputs that are not listed here.
        """
        known = {"input_ids", "labels", "position_ids", "seq_idx", "attention_mask", "shift_labels"}
        if unknown := sorted(set(batch) - known):
            raise UserError(f"context parallelism does not know how to cut {', '.join(unknown)}: leave it out")
        ids = batch["input_ids"]
        B, T = ids.shape
        if T % self.slices.pieces:
            raise UserError(
                f"rows of {T:,} tokens cannot be cut into {self.slices.pieces} equal pieces: use a multiple of "
                f"{self.slices.pieces} x chunk_size"
            )
        positions = batch.get("position_ids")
        if positions is None:
            positions = torch.arange(T, device=ids.device)
        whole = {"input_ids": ids, "position_ids": positions.expand(B, T)}
        for name in ("seq_idx", "attention_mask"):
            if batch.get(name) is not None:
                whole[name] = batch[name].expand(B, T)
        shifted = batch.get("shift_labels")
        if shifted is None and batch.get("labels") is not None:
            shifted = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        count = None
        if shifted is not None:
            whole["shift_labels"] = shifted
            count = (shifted != IGNORED).sum()
        part: dict[str, Any] = {name: self.slices.cut(x).contiguous() for name, x in whole.items()}
        if count is not None:
            part["labels"] = part["shift_labels"]  # transformers computes a loss only where labels are given
            part["num_items_in_batch"] = count / self.slices.ranks
        return part

    @contextmanager
    def step(self) -> Iterator[None]:
        """Wrap forward and backward of one or more calls. Needed for ``attention="torch"``, a no-op otherwise."""
        if self.mesh is None:
            yield
            return
        from torch.distributed.tensor.experimental import context_parallel

        # It needs a tensor to cut; calls get their parts from ``cut``, in the same order.
        unused = torch.zeros(2 * self.slices.pieces, device=self.mesh.device_type)
        with context_parallel(self.mesh, buffers=[unused], buffer_seq_dims=[0], no_restore_buffers={unused}):
            yield

    # -- hook -----------------------------------------------------------------------------------------------------

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        if any(given.get(name) is not None for name in ("past_key_values", "cache")) or given.get("use_cache"):
            raise UserError(
                "context parallelism is for training and scoring whole rows: leave the cache out (use_cache=False), or "
                "disable_context_parallel(model) to generate"
            )
        if given.get("cu_seq_lens_q") is not None:
            raise UserError("context parallelism reads documents from position_ids or seq_idx, not from cu_seq_lens_q")
        call = self.row_slices(given)
        if self.mesh is not None:
            if call.documents is not None:
                raise UserError('attention="torch" knows no documents or padding: use attention="gather"')
            if rows_are_cut() is None:
                raise UserError('attention="torch" works inside "with context.step():" only, backward included')
            call.native = True
        self.calls.append(call)
        return args, {**kwargs, "use_cache": False, "attention_mask": None, CALL: call}

    def after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        call = self.calls.pop() if self.calls else None
        if output is not None and call is not None and call.attended < self.model.config.num_hidden_layers:
            raise RuntimeError(
                f"{self.model.config.num_hidden_layers} layers, but attention saw other ranks' keys in "
                f"{call.attended}: this family's attention cannot be used with context parallelism"
            )

    def row_slices(self, given: dict[str, Any]) -> RowSlices:
        source = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if source is None:
            raise UserError("a call needs input_ids or inputs_embeds")
        rows, tokens = source.shape[:2]
        positions, numbers, mask = (given.get(n) for n in ("position_ids", "seq_idx", "attention_mask"))
        if positions is None:
            raise UserError("a slice of a row needs position_ids: ContextParallel.cut(batch) makes them")
        if mask is not None and mask.dim() != 2:
            raise UserError("context parallelism takes a 2-D attention_mask or none")
        whole_positions, whole_numbers, whole_mask = (
            None if x is None else self.gather(x.reshape(-1, tokens).expand(rows, tokens).to(torch.int64)).cpu()
            for x in (positions, numbers, mask)
        )
        total = tokens * self.slices.ranks
        documents = document_ids(
            whole_mask, None if whole_mask is not None else whole_positions, whole_numbers, rows=rows, tokens=total
        )
        if whole_numbers is None and whole_mask is None and whole_positions is not None:
            starts = torch.ones(rows, total, dtype=torch.bool)
            starts[:, 1:] = whole_positions.diff(dim=1) != 1
            if bool((starts & (whole_positions != 0)).any()):
                order = "head-tail" if self.slices.own == 2 else "contiguous"
                raise UserError(
                    f"the slices do not join to rows whose documents begin at position 0: cut them with "
                    f"ContextParallel.cut(batch) ({order} slices on {self.slices.ranks} ranks), or pass seq_idx"
                )
        call = RowSlices(self.slices, self.group, rows, total, documents)
        config = self.model.config
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        call.methods = choose_methods(source.device.type, heads, key_heads, width)
        if is_attached(self.model):
            call.begin = partial(SliceCall, call, rows, tokens)
            settings = runtime_of(self.model).settings
            settings.rule.need("additive", "a row cut over processes")
            try:
                call.table = SliceTable.build(
                    self.slices, rows, total, settings.config.chunk_size, documents=documents, keep=settings.rule.keep
                )
            except ValueError as error:
                raise UserError(str(error)) from None
        return call

    def gather(self, x_BT: Tensor) -> Tensor:
        """Gather the whole rows [B, ranks * T], in document order."""
        parts = x_BT.new_empty(self.slices.ranks * x_BT.shape[0], x_BT.shape[1])
        dist.all_gather_into_tensor(parts, x_BT.contiguous(), group=self.group)
        return self.slices.join(parts.chunk(self.slices.ranks))


class SliceCall:
    """A call in which every rank reads its slice: its pieces are separate rows with an initial state."""

    def __init__(self, slices: RowSlices, rows: int, tokens: int, settings: Settings) -> None:
        self.slices, self.rows, self.tokens, self.settings = slices, rows, tokens, settings

    def project(self, site: Any, module: Any, z_BTF: Tensor, u: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the output for this rank's slice, [B, T / ranks, D]."""
        if getattr(module, "split", False):
            raise UserError("context parallelism together with tensor parallelism is not supported")
        table, rule = self.slices.table_on(z_BTF.device), self.settings.rule
        R, length = table.table.rows, table.table.tokens
        z, u = z_BTF.reshape(R, length, z_BTF.shape[-1]), u.reshape(R, length, u.shape[-1])
        v, keep = values_of(site.bound_target(), u, z, table.table, (None, None))
        if keep is not None:
            raise UserError("gates do not pass from process to process: leave them out with context parallelism")
        if v is None:
            kept: Tensor = site.anchored(plain(z_BTF))
            return kept
        slow = site.slow_weight(module, rule)
        v = written(rule, z, v, table.table, None, slow) if rule.outer else v
        keywords: dict[str, Any] = {"rule": rule, "width": site.width, "slow": slow}
        if site.fuses(module):
            keywords["bias"] = None if module.bias is None else module.bias.to(z.dtype)
            out = scan_slice(z, v, table, self.slices.group, weight=module.weight.to(z.dtype), **keywords)
        else:
            out = plain(z_BTF).reshape(R, length, -1) + scan_slice(z, v, table, self.slices.group, **keywords)
        return out.reshape(*z_BTF.shape[:-1], out.shape[-1])


def enable_context_parallel(
    model: nn.Module, group: Group = None, *, head_tail: bool = True, attention: str = "gather"
) -> ContextParallel:
    """Make calls of ``model`` read slices of rows, one on each rank of ``group``; see ``ContextParallel``.

    ``group``: a process group, or a one-dimensional ``DeviceMesh``; None: all processes. ``head_tail``: two pieces a
    rank, from both ends of the row, so that causal attention costs every rank the same; False: contiguous slices.
    ``attention``: "gather" gathers keys and values (sliding windows and packed documents included); "torch" is
    PyTorch's own context-parallel attention (CUDA, head-tail, undivided rows without a window; ``group`` a mesh): then
    other code that cuts rows as PyTorch does (accelerate, for example) can replace ``cut`` and ``step``.
    Call it before or after ``attach`` and ``fully_shard``.

    Raises UserError for unsupported attention (recurrent layers, capped logits), and when it is on already.
    """
    root = unwrap(model)
    if STATE in root.__dict__:
        raise UserError("context parallelism is on already: disable_context_parallel(model) first")
    if root.config.get_text_config() is not root.config:
        raise UserError(f"context parallelism cuts rows of text models alone, not of {root.config.model_type} models")
    kinds = set(getattr(root.config, "layer_types", None) or ["full_attention"])
    if unknown := sorted(kinds - _LAYER_TYPES):
        raise UserError(
            f"context parallelism cannot cut {', '.join(unknown)} layers: their state would restart on every rank"
        )
    for name in ("attn_logit_softcapping", "attention_chunk_size"):
        if getattr(root.config, name, None):
            raise UserError(f"context parallelism has no rule for {name} of {root.config.model_type} models")
    if getattr(root.config, "_attn_implementation", None) is None:
        raise UserError(f"{type(root).__name__} does not let its attention be chosen: no context parallelism")
    mesh, group = (group, group.get_group()) if hasattr(group, "get_group") else (None, group)
    if attention not in ("gather", "torch"):
        raise UserError(f'attention must be "gather" or "torch", got {attention!r}')
    if attention == "torch":
        windows = "sliding_attention" in kinds or (len(kinds) == 1 and getattr(root.config, "sliding_window", None))
        if mesh is None or mesh.device_type != "cuda" or not head_tail or windows:
            raise UserError('attention="torch" needs a DeviceMesh of CUDA devices, head-tail slices and no window')
    context = ContextParallel(root, group, head_tail, mesh if attention == "torch" else None)
    root.set_attn_implementation(GATHER)
    root.__dict__[STATE] = context
    return context


def disable_context_parallel(model: nn.Module) -> None:
    """Restore whole rows on every rank, and the model's previous attention."""
    root = unwrap(model)
    context: ContextParallel | None = root.__dict__.pop(STATE, None)
    if context is None:
        raise UserError("context parallelism is not on")
    for handle in context.handles:
        handle.remove()
    root.set_attn_implementation(context.attention)

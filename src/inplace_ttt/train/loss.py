"""Training loss from hidden states, some tokens at a time, so that logits [B, T, V] are never in memory.

For one row of 131,072 tokens and Qwen3's vocabulary they and their gradient would take 200 GB. While a model trains its
head returns the hidden states unchanged, and its loss function applies the head's weight piece by piece, inside the
model's own forward, where FSDP2 has gathered the weight. A piece's gradients are made there as well, while its logits
are in memory, so that backward has nothing to compute again (as Liger's fused loss does, arXiv 2410.10989).

Shapes: B rows, T tokens, N = B T, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPast

from inplace_ttt.hf.attach import is_attached, runtime_of
from inplace_ttt.hf.parallel_attention import dtype_of
from inplace_ttt.train.packing import IGNORED

NUMBERS_AT_ONCE, LEAST_TOKENS = 2**28, 256


def tokens_at_once(vocabulary: int) -> int:
    """Return the tokens of a piece: as many as keep its logits at ``NUMBERS_AT_ONCE``, at least ``LEAST_TOKENS``."""
    return max(LEAST_TOKENS, NUMBERS_AT_ONCE // vocabulary)


@contextmanager
def loss_in_pieces(model: PreTrainedModel, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Make ``model(labels=...)`` compute its loss piece by piece; its "logits" are hidden states then.

    A model for which this would be wrong keeps whole logits; ``say`` then gets one line.
    """
    reason = reason_for_whole_logits(model)
    if reason is not None:
        say(f"the loss needs whole logits, tokens x vocabulary: {reason}")
        yield
        return
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    before = model.__dict__.get("_loss_function")
    head.forward = nn.Identity().forward
    model.loss_function = partial(loss_of_hidden, head=head)
    try:
        yield
    finally:
        del head.forward
        if before is None:
            del model._loss_function
        else:
            model.loss_function = before


def loss_of_hidden(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORED,
    shift_labels: Tensor | None = None,
    *,
    head: nn.Linear,
    **_: Any,
) -> Tensor:
    """Compute transformers' ``ForCausalLMLoss`` of ``head(logits)``: ``logits`` are hidden states [B, T, D].

    The products are in the dtype that the head itself would compute in, the loss and the sum over pieces in float32.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = pad(labels, (0, 1), value=ignore_index)[..., 1:]
    hidden_ND, labels_N = logits.flatten(0, -2), shift_labels.flatten().to(logits.device)
    total: Tensor = _Loss.apply(hidden_ND, head.weight, head.bias, labels_N, ignore_index)  # type: ignore[no-untyped-call]
    if num_items_in_batch is None:
        return total / (labels_N != ignore_index).sum()
    return total / (num_items_in_batch.to(total.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch)


class _Loss(torch.autograd.Function):
    """The sum of the labels' losses, of hidden states [N, D], a head's weight [V, D] and bias [V] or None, labels [N].

    Gradients of the weight and the bias are summed over pieces in float32: in bf16, over 74 pieces (128k tokens of
    Qwen3), the error would be six times that of one product, see docs/log.md.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight: Tensor, bias: Tensor | None, labels_N: Tensor, ignored: int
    ) -> Tensor:
        kind, exact = hidden_ND.device.type, torch.promote_types(weight.dtype, torch.float32)
        dtype = dtype_of(hidden_ND.device, hidden_ND.dtype)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        with torch.autocast(kind, enabled=False):
            head, shift = weight.to(dtype), None if bias is None else bias.to(dtype)
            total = hidden_ND.new_zeros((), dtype=torch.float32)
            d_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
            d_weight = torch.zeros_like(weight, dtype=exact) if needs_weight else None
            d_bias = torch.zeros_like(weight[:, 0], dtype=exact) if needs_bias else None
            at, size = 0, tokens_at_once(len(weight))
            for hidden, labels in zip(torch.split(hidden_ND, size), torch.split(labels_N, size), strict=True):
                counts, hidden = (labels != ignored)[:, None], hidden.to(dtype)
                logits = linear(hidden, head, shift)
                log_p = torch.log_softmax(logits, -1, dtype=torch.promote_types(dtype, torch.float32))
                del logits
                label = labels[:, None].where(counts, 0)
                own = log_p.gather(1, label)
                total = total - own.where(counts, 0).sum().float()
                if any(ctx.needs_input_grad[:3]):  # of a token's loss: p, less 1 at its label
                    gradient = log_p.exp_().scatter_(1, label, own.expm1()).to(dtype)
                    if d_hidden is not None:
                        d_hidden[at : at + len(labels)] = (gradient @ head).where(counts, 0)
                    if d_weight is not None:
                        d_weight += gradient.mT @ hidden.where(counts, 0)
                    if d_bias is not None:
                        d_bias += (counts.to(dtype).mT @ gradient)[0]
                at += len(labels)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> Any:
        d_hidden, *of_head = ctx.saved_tensors
        found = [None if x is None else (x * scale).to(ctx.dtype) for x in of_head]
        return None if d_hidden is None else d_hidden * scale.to(d_hidden.dtype), *found, None, None


def reason_for_whole_logits(model: PreTrainedModel) -> str | None:
    """Return why the loss of this model needs whole logits; None when it does not.

    The model's own forward is run between base model and loss, with stand-ins for both and for the head: what the head
    gave must be what the loss gets, unchanged. Nothing of the model is run or changed, so it may be anywhere: on
    "meta", sharded, compiled.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    name = type(model).__name__
    if is_attached(model) and runtime_of(model).loss_forward is not None:
        return "it is the objective of the fast weights, too"
    if (getattr(model, "_tp_size", None) or 1) > 1:
        return "tensor parallelism splits the head"
    if type(head) is not nn.Linear or "forward" in head.__dict__ or head._forward_hooks or head._forward_pre_hooks:
        return f"the head of {name} is not a linear layer alone"
    if model.loss_function is not ForCausalLMLoss:
        return f"{name} has a loss of its own"
    names = {module: child for child, module in model.named_children()}
    if head not in names or model.base_model_prefix not in names.values():
        return f"{name} keeps its head or its base model elsewhere"
    device, given = head.weight.device, list[tuple[Tensor, int]]()

    def base(*_: Any, **__: Any) -> BaseModelOutputWithPast:
        hidden = torch.zeros(1, 2, head.in_features, dtype=torch.bfloat16, device=device)  # to detect a cast as well
        return BaseModelOutputWithPast(last_hidden_state=hidden)

    def hand_on(hidden: Tensor) -> Tensor:
        given.append((hidden, hidden._version))  # the version detects in-place changes
        return hidden

    def loss(logits: Tensor, *_: Any, **__: Any) -> Tensor:
        if len(given) == 1 and logits is given[0][0] and logits._version == given[0][1]:
            raise _LogitsUnchanged  # the rest of the forward does not matter
        return logits.sum()

    stand_in: Any = object.__new__(type(model))
    modules = {**model._modules, model.base_model_prefix: base, names[head]: hand_on}
    stand_in.__dict__ = {**model.__dict__, "_modules": modules, "_loss_function": loss}
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    try:
        type(model).forward(stand_in, input_ids=ids, labels=ids, use_cache=False)
    except _LogitsUnchanged:
        return None
    except Exception:  # any failure: use whole logits
        return f"the forward of {name} cannot be followed from its head to its loss"
    return f"{name} changes its logits before the loss"


class _LogitsUnchanged(Exception):  # noqa: N818
    """A signal that the loss received the tensor that the head returned."""

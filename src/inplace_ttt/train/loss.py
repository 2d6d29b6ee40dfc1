"""Training loss from hidden states, some tokens at a time, so that logits [B, T, V] are never in memory.

For one row of 131,072 tokens and Qwen3's vocabulary they and their gradient would take 200 GB. While a model trains its
head returns the hidden states unchanged, and its loss function applies the head's weight piece by piece. Both happen
inside the model's own forward, where FSDP2 has gathered the weight; backward gathers it again before it recomputes a
piece's logits.

Shapes: B rows, T tokens, N = B T, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, pad
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPast

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
    reason = why_whole(model)
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
    kind = hidden_ND.device.type
    # Cast in each piece: autocast would share one cast, and sum the pieces' gradients in half precision.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_ND.dtype
    size = tokens_at_once(head.weight.shape[0])
    pieces = list(zip(torch.split(hidden_ND, size), torch.split(labels_N, size), strict=True))
    if len(pieces) == 1:
        total = _piece(*pieces[0], head.weight, head.bias, dtype, ignore_index)
    else:
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for (hidden, targets), weight in zip(pieces, _aliases(head.weight), strict=False):
            total = total + checkpoint(
                _piece, hidden, targets, weight, head.bias, dtype, ignore_index,
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
    if num_items_in_batch is None:
        return total / (labels_N != ignore_index).sum()
    return total / (num_items_in_batch.to(total.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch)


def _piece(
    hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, ignored: int
) -> Tensor:
    """Sum the labels' losses: hidden states [n, D], labels [n], weight [V, D], bias [V]."""
    logits = linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return cross_entropy(logits.float(), labels, ignore_index=ignored, reduction="sum")


def _aliases(weight: Tensor) -> Iterator[Tensor]:
    """Yield the weight for one piece after another; gradients of a half-precision one are summed in float32.

    Summed in bf16 over 74 pieces (128k tokens of Qwen3) its error is six times that of one product, see
    docs/log.md. A float32 copy of the weight would do, at 8 bytes more a number.
    """
    if weight.dtype.itemsize > 2 or not weight.requires_grad:
        yield from repeat(weight)
    total: list[Tensor] = []

    def collect(gradient: Tensor) -> Tensor:
        if total:
            total[0].add_(gradient)
        else:
            total.append(gradient.float())
        return gradient.new_zeros(()).expand_as(gradient)

    shared = weight.view_as(weight)
    shared.register_hook(lambda gradient: total.pop().to(gradient.dtype))  # type: ignore[no-untyped-call]
    while True:
        alias = shared.view_as(shared)
        alias.register_hook(collect)  # type: ignore[no-untyped-call]
        yield alias


def why_whole(model: PreTrainedModel) -> str | None:
    """Say why the loss of this model needs whole logits; None when it does not.

    The model's own forward is run between base model and loss, with stand-ins for both and for the head: what the head
    gave must be what the loss gets, unchanged. Nothing of the model is run or changed, so it may be anywhere: on
    "meta", sharded, compiled.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    name = type(model).__name__
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

"""Moving cached tokens to other positions, so that a text of any length is read at small position ids.

Rotary keys are rotated back by the distance moved. The dependence of a model's keys on position is measured, not looked
up in a table of families: the attention modules read the same hidden states at position 0 and at a later one.
"""

import copy
import inspect
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .attach import is_attached, unwrap, updates_off
from .cache import cache_name
from .families import ATTENTION_NAMES
from .window import empty_cache, plain_layers

TOKENS = 8
OFFSET = 61
HALF = (torch.bfloat16, torch.float16)
FAR = 2**24
"""A position beyond every model's training length, where frequencies that depend on the length have changed."""

Turns = dict[Any, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Angles:
    """A source of a layer's cosines and sines: the rotary module and its arguments after the positions."""

    rotary: nn.Module
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    def turn(self, by: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine [1, 1, R] of a rotation by ``by`` >= 0 positions, unscaled, in the dtype of ``x``.

        Only powers of two have exact phases in float32, so the rotation is a product of those.
        """
        powers = [1 << k for k in range(by.bit_length()) if by >> k & 1] or [0]
        cos, sin = self._at(self.rotary, torch.tensor([powers], device=x.device), x)
        turns = torch.complex(cos.cpu().double(), sin.cpu().double())
        turn = (turns / turns.abs()).prod(1, keepdim=True)
        return turn.real.to(x), turn.imag.to(x)

    def width(self, x: Tensor) -> int:
        """Return R, the number of dimensions that rotate, or half of it."""
        return int(self.turn(0, x)[0].shape[-1])

    def fixed(self, tokens: int, device: torch.device) -> bool:
        """Tell if the angles of the first ``tokens`` positions are the same in short and in long texts."""
        rotary = copy.deepcopy(self.rotary)  # a long text changes the module's stored frequencies
        x, near = torch.zeros(1, 1, 1, device=device), torch.arange(tokens, device=device)[None]
        short = self._at(rotary, near, x)
        long = self._at(rotary, torch.cat([near, torch.full_like(near[:, :1], FAR)], 1), x)
        return all(torch.allclose(a, b[:, :tokens], atol=1e-6, rtol=0) for a, b in zip(short, long, strict=True))

    def _at(self, rotary: nn.Module, positions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [1, T, R] at positions [1, T], with the model's scale."""
        with torch.no_grad():
            cos, sin = rotary(x, positions, *self.args, **dict(self.kwargs))
        return cos, sin


@dataclass(frozen=True)
class Rotation:
    """A rotation of one layer's cached keys."""

    angles: Angles
    apply: Callable[..., tuple[Tensor, Tensor]]
    """The model's own ``apply_rotary_pos_emb``, which defines the dimensions that rotate and their pairs."""
    width: int
    """Number of leading dimensions passed to it."""

    def back(self, keys_BHLD: Tensor, by: int, turns: Turns) -> Tensor:
        """Return the keys ``by`` positions earlier; ``turns`` caches the angles for other layers of one move."""
        dtype = torch.float64 if keys_BHLD.dtype == torch.float64 else torch.float32
        key = (self.angles, keys_BHLD.device, dtype)
        if key not in turns:
            turns[key] = self.angles.turn(abs(by), keys_BHLD.new_zeros(1, 1, 1, dtype=dtype))
        cos, sin = turns[key]
        part = keys_BHLD[..., : self.width].to(dtype)
        _, turned = self.apply(part[:, :, :0], part, cos, sin if by < 0 else -sin)
        turned = turned.to(keys_BHLD.dtype)
        rest = keys_BHLD[..., self.width :]
        return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


class Relocation:
    """A model's way to move cached tokens.

    ``reason``: message if that is not supported, else None. ``rotations`` has an entry for each layer, None for a
    layer whose keys do not depend on position.
    """

    def __init__(self, rotations: dict[int, Rotation | None], reason: str | None = None) -> None:
        self.rotations, self.reason = rotations, reason

    @property
    def supported(self) -> bool:
        return self.reason is None

    @classmethod
    def of(cls, model: nn.Module) -> "Relocation":
        """Measure it by reading a few random tokens twice, with updates off; the model is not changed."""
        root: Any = unwrap(model)
        training = [m for m in root.modules() if m.training]
        root.eval()
        try:
            with torch.no_grad(), updates_off(root) if is_attached(root) else nullcontext():
                return cls(_rotations(root))
        except _NotRelocatableError as error:
            return cls({}, str(error))
        finally:
            for module in training:
                module.training = True

    def move(self, cache: Cache, by: int, first: int = 0) -> None:
        """Move the cached tokens from positions p to p - by; a negative ``by`` moves them up.

        In full-attention layers the first ``first`` tokens stay where they are; in sliding layers all tokens move.
        Keys are rotated in float32 (float64 in float64) and rounded once to their own type, so each move of a bfloat16
        key adds one rounding error. NotImplementedError when the model or the cache does not allow it.
        """
        if self.reason is not None:
            raise NotImplementedError(f"the cached tokens of this model cannot be moved: {self.reason}")
        if first < 0:
            raise ValueError(f"first must not be negative, got {first}")
        turns: Turns = {}
        for i, layer in enumerate(plain_layers(cache)):
            rotation, stay = self.rotations[i], 0 if layer.is_sliding else first
            if rotation is None or by == 0 or layer.keys is None:
                continue
            moved = rotation.back(layer.keys[:, :, stay:], by, turns)
            layer.keys = torch.cat([layer.keys[:, :, :stay], moved], 2) if stay else moved


class _NotRelocatableError(Exception):
    """An error with the reason."""


@dataclass
class _Reading:
    """A record of the attention modules' inputs, outputs and cached keys in one call, by layer."""

    inputs: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    angles: dict[int, Angles] = field(default_factory=dict)


def _read(root: PreTrainedModel, attentions: dict[int, nn.Module], offset: int, given: dict[int, Tensor]) -> _Reading:
    """Read random tokens at ``offset``; the attention of layer i gets ``given[i]``, if present, in place of its input.

    So rounding errors of one layer do not reach the next, and the keys of any bfloat16 model can be compared.
    """
    weight: Any = root.get_input_embeddings().weight
    ids = torch.randint(weight.shape[0], (1, TOKENS), generator=torch.Generator().manual_seed(0)).to(weight.device)
    reading, cache = _Reading(), empty_cache(root.config)
    made: list[tuple[Tensor, Angles]] = []

    def after_rotary(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        rest = tuple((k, v) for k, v in kwargs.items() if k not in ("x", "position_ids"))
        made.append((output[0], Angles(module, args[2:], rest)))

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        i, pair = module.layer_idx, kwargs.get("position_embeddings", ())
        reading.inputs[i] = args[0] if args else kwargs["hidden_states"]
        for used in pair[:1]:
            for cos, angles in made:  # by value: models split over devices pass copies
                if torch.equal(cos.to(used.device), used):
                    reading.angles[i] = angles
        if i not in given:
            return None
        return ((given[i], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": given[i]})

    def after(module: Any, args: Any, output: Any) -> None:
        reading.outputs[module.layer_idx] = output[0]

    with ExitStack() as hooks:
        for module in root.base_model.modules():
            if "rotary" in type(module).__name__.lower():
                hooks.callback(module.register_forward_hook(after_rotary, with_kwargs=True).remove)
        for module in attentions.values():
            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after).remove)
        positions = offset + torch.arange(TOKENS, device=ids.device)[None]
        root.base_model(input_ids=ids, position_ids=positions, use_cache=True, **{cache_name(root.base_model): cache})
    for i, layer in enumerate(plain_layers(cache)):
        if layer.keys is not None:
            reading.keys[i], reading.values[i] = layer.keys, layer.values
    return reading


def _rotations(root: PreTrainedModel) -> dict[int, Rotation | None]:
    """Return the rotations by layer; _NotRelocatableError with the reason if there are none."""
    try:
        empty_cache(root.config)
    except NotImplementedError as error:
        raise _NotRelocatableError(str(error)) from None
    if "position_ids" not in inspect.signature(root.base_model.forward).parameters:
        raise _NotRelocatableError("its forward takes no position_ids")
    named: Any = root.base_model.named_modules()
    attentions = {
        m.layer_idx: m for name, m in named if name.rpartition(".")[2] in ATTENTION_NAMES and hasattr(m, "layer_idx")
    }
    longest = getattr(root.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**31
    offset = max(min(OFFSET, longest - TOKENS), 1)
    near = _read(root, attentions, 0, {})
    far = _read(root, attentions, offset, near.inputs)
    if set(near.inputs) != set(near.keys):
        raise _NotRelocatableError("its attention modules are not found")
    lowest = min(near.inputs)
    if _error(far.inputs[lowest], near.inputs[lowest]) > 1e-3:
        raise _NotRelocatableError(f"its position embeddings are absolute (it reads at most {longest} tokens)")
    rotations = {i: _rotation(attentions[i], near, far, offset) for i in sorted(near.keys)}
    for i, output in near.outputs.items():
        # Large key biases (Qwen2's) give scores of several hundred, whose rounding alone matters in half precision.
        if _error(far.outputs[i].flatten(), output.flatten()) > (0.5 if output.dtype in HALF else 0.01):
            raise _NotRelocatableError(f"the attention of layer {i} depends on more than the distance between tokens")
    return rotations


def _rotation(attention: Any, near: _Reading, far: _Reading, offset: int) -> Rotation | None:
    i = attention.layer_idx
    keys, moved = near.keys[i], far.keys[i]
    if _error(far.values[i], near.values[i]) > 0.01:
        raise _NotRelocatableError(f"the cached values of layer {i} depend on position")
    if torch.equal(moved, keys):
        return None
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    unknown = f"the keys of layer {i} depend on position, but not by a rotation known here"
    if i not in near.angles or apply is None:
        raise _NotRelocatableError(unknown)
    angles = near.angles[i]
    try:
        fixed = angles.fixed(TOKENS, keys.device)
    except IndexError:  # a table of fewer positions
        raise _NotRelocatableError(unknown) from None
    if not fixed:
        raise _NotRelocatableError("its rotary frequencies change with the length of the text")
    # Most of the rotation must be undone, too: it is small beside keys with large biases.
    limit = min(0.02 if keys.dtype in HALF else 1e-4, _error(moved, keys) / 2)
    for width in (keys.shape[-1], angles.width(keys)):  # some models pass only the dimensions that rotate
        rotation = Rotation(angles, apply, width)
        with suppress(RuntimeError):
            if _error(rotation.back(moved, offset, {}), keys) < limit:
                return rotation
    raise _NotRelocatableError(
        f"the keys of layer {i}, rotated back, are not those of earlier positions (what follows the rotation?)"
    )


def _error(got: Tensor, want: Tensor) -> float:
    """Return the largest relative error of the vectors in the last dimension; infinity where it is not a number."""
    got, want = got.double(), want.double()
    error = ((got - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-12)).max()
    return float(error.nan_to_num(torch.inf))

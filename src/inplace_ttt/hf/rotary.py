"""Rotation of rotary keys by a number of positions, with the model's own rotary code."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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

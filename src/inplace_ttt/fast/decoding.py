"""One token at a time: buffers at fixed addresses and one folded weight, so that every step runs the same kernels.

On the device only a counter depends on a token's place in its chunk, so a step can be compiled or captured in a CUDA
graph once and run for every token. Work per chunk (update, folding) is done between the steps.

Shapes: B rows, C tokens of a chunk, D output width, F width of z.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

Key = tuple[object, ...]


class StepBuffers:
    """A layer's buffers for steps: pending z [B, C, F] and u [B, C, D], and the folded weight [B, D, F]."""

    def __init__(self, owner: object, z_BCF: Tensor, u_BCD: Tensor) -> None:
        self._owner = id(owner)
        # Steps write into the flat tensors: compiled code copies a whole buffer where it must write through a view.
        self._flat = tuple(_fixed(x.flatten(0, 1).clone()) for x in (z_BCF, u_BCD))
        self.z, self.u = (flat.view_as(x) for flat, x in zip(self._flat, (z_BCF, u_BCD), strict=True))
        self.folded: Tensor | None = None
        """``W0 + lr * S``, or per row ``lr * S`` where the slow product is computed separately; None while S = 0."""
        self.fused = False
        """True if ``folded`` includes W0."""
        self._key: Key | None = None

    def fit(self, owner: object, z_BCF: Tensor, u_BCD: Tensor) -> bool:
        """Tell if the buffers fit these pending tokens; a copy of the owner needs its own buffers."""
        if self._owner != id(owner):
            return False
        pairs = ((self.z, z_BCF), (self.u, u_BCD))
        alike = all(a.shape == b.shape and a.dtype == b.dtype and a.device == b.device for a, b in pairs)
        return alike and not _frozen(self.z)

    def take(self, z_BCF: Tensor, u_BCD: Tensor) -> None:
        """Copy the pending tokens of another kind of call into the buffers."""
        self.z.copy_(z_BCF)
        self.u.copy_(u_BCD)
        self._key = None  # that call may have come with other weights

    def fold(
        self, S_BDF: Tensor | None, weight_DF: Tensor | None, lr: float, always: bool, width: int | None = None
    ) -> None:
        """Compute ``folded`` from S, W0 (None: separate) and lr if they changed; sums in S's precision, rounds once.

        ``always``: also while S = 0, so that a graph of the steps stays valid after the first update. ``width``: D;
        None: u's.
        """
        self.fused = weight_DF is not None
        if S_BDF is None and not always:
            self.folded, self._key = None, None
            return
        version = None if weight_DF is None or weight_DF.is_inference() else weight_DF._version
        # The key holds the tensors themselves, so that their addresses are not reused.
        key = (S_BDF, weight_DF, None if weight_DF is None else weight_DF.data_ptr(), version, lr)
        if self._key is not None and all(
            x is y or (not isinstance(x, Tensor) and x == y) for x, y in zip(self._key, key, strict=True)
        ):
            return
        shape = (len(self.z), width or self.u.shape[2], self.z.shape[2])
        if self.folded is None or _frozen(self.folded):
            self.folded = _fixed(self.z.new_empty(shape))
        for b, into in enumerate(self.folded):
            if S_BDF is None:
                into.zero_() if weight_DF is None else into.copy_(weight_DF)
            elif weight_DF is None:
                torch.mul(S_BDF[b], lr, out=into)
            else:
                torch.add(weight_DF, S_BDF[b], alpha=lr, out=into)
        self._key = key

    def step(
        self, z_B1F: Tensor, u_B1D: Tensor, where_B: Tensor, plain: Callable[[Tensor], Tensor], bias_D: Tensor | None
    ) -> Tensor:
        """Store one token of every row at flat positions ``where``, b * C + pending; return the output [B, 1, D].

        ``plain``: the slow product, bias included; ``bias`` is used where W0 is folded in.
        """
        for flat, x in zip(self._flat, (z_B1F, u_B1D), strict=True):
            flat.index_copy_(0, where_B, x[:, 0].to(flat.dtype))
        if self.folded is None:
            return plain(z_B1F)
        z = z_B1F.to(self.folded.dtype)
        if self.fused:  # the same product as without fast weights
            return linear(z, self.folded[0], bias_D)
        return plain(z_B1F) + torch.bmm(z, self.folded.mT)


class StepPositions:
    """Positions of the next token in every row's buffer: a copy on each device, and the host's record of it."""

    def __init__(self) -> None:
        self._at: tuple[int, ...] | None = None
        self._where: dict[torch.device, Tensor] = {}

    def set(self, pending: tuple[int, ...], C: int, devices: set[torch.device]) -> dict[torch.device, Tensor]:
        """Return flat positions [B] by device; copied there only if they differ from those after the last step."""
        at = tuple(b * C + n for b, n in enumerate(pending))
        stale = self._at != at
        for device in devices:
            held = self._where.get(device)
            if held is None or held.shape[0] != len(at) or _frozen(held):
                self._where[device] = _fixed(torch.tensor(at, device=device))
            elif stale:
                held.copy_(torch.tensor(at, device="cpu"))
        self._at = at
        return {device: self._where[device] for device in devices}

    def advance(self) -> None:
        """Advance by one token in every row."""
        if self._at is not None:
            self._at = tuple(n + 1 for n in self._at)
            for where in self._where.values():
                where.add_(1)


def _frozen(x: Tensor) -> bool:
    """Tell if the tensor was made in inference mode and cannot be modified here."""
    return x.is_inference() and not torch.is_inference_mode_enabled()


def _fixed(x: Tensor) -> Tensor:
    """Mark the tensor's address as static for compiled code, so that CUDA graphs may write into it."""
    torch._dynamo.mark_static_address(x)
    return x

"""Several processes that train one module: each reads its share of every batch, and gradients are added up.

Rule 1: all processes draw the same batch, so that what a step learns from does not depend on how many there are.
Rule 2: what is added up are sums, divided once by the count of all processes; averaging the means of unequal shares
would weigh a token by the company it is in.

The module is not wrapped: a loss may use it as it likes, and what is trained here is small beside the models that are
frozen, so that hiding the exchange behind the backward pass would bring little.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from jaxtyping import Shaped
from torch import Tensor

from kvferry.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Which one this is, and how many: as `torchrun`, or `accelerate launch` on GPUs, started them; else one."""

    rank: int = 0
    n: int = 1

    @classmethod
    def of(cls, device: torch.device) -> "Processes":
        """Those that this one belongs to; tensors on the CPU are exchanged by gloo, others by what fits the device."""
        state = PartialState(cpu=device.type == "cpu")
        return cls(state.process_index, state.num_processes)

    @property
    def is_first(self) -> bool:
        """The one that writes files and reports."""
        return self.rank == 0

    def pieces(self, batch: Sequence[T], n_pieces: int) -> list[Sequence[T]]:
        """What this process reads of a batch, in `n_pieces` parts; over all processes each row once.

        >>> Processes(rank=1, n=2).pieces("abcdefgh", n_pieces=2)
        ['cg', 'dh']
        """
        stride = self.n * n_pieces
        if len(batch) < stride:
            what = f"a batch of {len(batch)} for {self.n} processes that accumulate {n_pieces} pieces"
            raise UsageError(what, cure=f"Give batches of at least {stride}")
        return [batch[self.rank * n_pieces + i :: stride] for i in range(n_pieces)]

    def add_up(self, tensors: Sequence[Shaped[Tensor, "..."]]) -> None:
        """Replace each by its sum over all processes, in one exchange."""
        if self.n == 1:
            return
        _deal(reduce(_flat(tensors), "sum"), tensors)

    def agree(self, tensors: Sequence[Shaped[Tensor, "..."]]) -> None:
        """Replace each by what the first process holds."""
        if self.n == 1:
            return
        _deal(broadcast(_flat(tensors)), tensors)

    def agree_on(self, value: float, device: torch.device) -> float:
        """The number that the first process has."""
        if self.n == 1:
            return value
        held = torch.tensor([value], dtype=torch.float64, device=device)
        self.agree([held])
        return held.item()


def _flat(tensors: Sequence[Shaped[Tensor, "..."]]) -> Shaped[Tensor, " numbers"]:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _deal(exchanged: object, tensors: Sequence[Shaped[Tensor, "..."]]) -> None:
    """Accelerate promises a tensor for a tensor, but does not say so in its types."""
    flat = torch.as_tensor(exchanged)
    with torch.no_grad():
        for part, tensor in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True):
            tensor.copy_(part.view_as(tensor))

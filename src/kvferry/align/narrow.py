"""A map that goes through few numbers per token, straight and bent: a megabyte instead of five.

It starts as the reduced-rank ridge map (Izenman 1975) and is trained in whitened coordinates; folded, it holds neither
basis nor means, and its factors are fp16.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn
from torch.nn import functional

from kvferry.align.classwise import scaled
from kvferry.align.contract import Contract, require_positive
from kvferry.align.features import as_receiver
from kvferry.align.ridge import Sums, solve, standardise
from kvferry.align.runs import in_runs
from kvferry.align.whitening import Whitened
from kvferry.errors import UsageError
from kvferry.kv import KV

Weights = Float64[Tensor, "out out"]
_RARE = 0.005
"""Weight of the tokens of all places beside those of one place: enough for a place that is never met."""


class NarrowMLP(Whitened):
    """`receiver = h @ up[place] + gelu(h) @ bent + bias[place]` with `h = sender @ down + offset[place]`.

    A slot sees its own entry and those of the `neighbours - 1` runs before it, and `place` is how deep it lies in its
    own run, at most `places - 1` (`align.runs`): on the grid of a receiver of bytes, the letters of one token.
    """

    name: ClassVar[str] = "narrow"

    def __init__(
        self,
        contract: Contract,
        rank: int = 128,
        neighbours: int = 4,
        places: int = 1,
        folded: bool = False,
        seen: int | None = None,
    ) -> None:
        super().__init__(contract)
        require_positive("neighbours", neighbours)
        require_positive("places", places)
        self.rank, self.neighbours, self.places = rank, neighbours, places
        self.folded, self.seen = folded, seen
        n_in, n_out = neighbours * contract.sender.floats_per_token, contract.receiver.floats_per_token
        if not 1 <= rank <= n_in:
            raise UsageError(f"rank {rank} of {n_in} numbers", cure=f"Give a rank of 1 to {n_in}")
        dtype = torch.float16 if folded else torch.float32
        n_seen = n_in if seen is None else seen
        self.down = nn.Parameter(torch.zeros(n_seen, rank, dtype=dtype))
        self.up = nn.Parameter(torch.zeros(places, rank, n_out, dtype=dtype))
        self.bent = nn.Parameter(torch.zeros(rank, n_out, dtype=dtype))
        self.offset = nn.Parameter(torch.zeros(places, rank))
        self.bias = nn.Parameter(torch.zeros(places, n_out))
        if not folded:
            self.lay_out(n_in, n_seen, n_out)

    def options(self) -> dict[str, Any]:
        options = ("rank", "neighbours", "places", "folded", "seen")
        return {option: getattr(self, option) for option in options}

    def forward(self, kv: KV) -> KV:
        kv.require_space("content")
        return as_receiver(kv, self.map(*in_runs(kv, self.neighbours, self.places)), self.contract.receiver)

    def map(
        self, wide: Float[Tensor, "*batch features"], place: Int[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch out"]:
        """The receiver's features of sender features with their neighbours', and places in runs."""
        if self.folded:
            return self._inside(wide @ self.down.float(), place)
        # The factor is narrower than a batch has slots, so it is cheaper to take to plain coordinates than they to its.
        return self.y_mean + self.y_std * self._inside((wide - self.x_mean) @ (self.basis @ self.down), place)

    def _inside(
        self, narrow: Float[Tensor, "*batch rank"], place: Int[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch out"]:
        narrow = narrow + self.offset[place]
        made = self.bias[place] + functional.gelu(narrow) @ self.bent.float()
        for index in range(self.places):
            # Every factor sees every slot: no device is waited for.
            here = narrow if self.places == 1 else narrow * (place == index).unsqueeze(-1)
            made = made + here @ self.up[index].float()
        return made

    @torch.no_grad()
    def start_from(self, sums: Sequence[Sums], penalty: float) -> None:
        """Become the map of this rank nearest to the ridge maps of the places; not when folded.

        `sums` are over what `in_runs` gives, place by place.
        Raises `UsageError` for another number of places, and what `ridge.standardise` raises.
        """
        if len(sums) != self.places or self.folded:
            cure = f"Give {self.places}, to a map that is not folded"
            raise UsageError(f"sums of {len(sums)} places", cure=cure)
        total = sum(sums[1:], sums[0])
        std = standardise(total)
        back = self.whiten(std)
        maps, biases = zip(*(solve(one + scaled(total, _RARE), penalty) for one in sums), strict=True)
        inner = back @ torch.stack(maps).double() / std.y_std
        shifts = [bias + std.x_mean @ weight.double() for bias, weight in zip(biases, maps, strict=True)]
        self.bias.copy_((torch.stack(shifts) - std.y_mean) / std.y_std)
        self.bent.zero_()
        self.offset.zero_()
        if self.rank == len(back):
            self.down.copy_(torch.eye(self.rank))
            self.up.copy_(inner)
            return
        shares = torch.tensor([one.n / total.n for one in sums]).to(back)
        down = _leading(inner, self.rank, shares, std.y_std, None)
        self.down.copy_(down)
        self.up.copy_(down.T @ inner)

    @torch.no_grad()
    def cut(
        self, rank: int, seen: int, shares: Float[Tensor, " places"], weights: Weights | None = None
    ) -> "NarrowMLP":
        """A map that is neither folded nor bent through fewer numbers, with the least harm, to be trained.

        All places read the same numbers, the leading directions of their maps side by side; `shares` say how many
        tokens are of each place. Training may turn to the `seen` leading directions, a step is quick if they are few.
        `weights` say which errors matter: the second moments of a loss's gradient by the receiver's features. Without
        them, a standard deviation of each channel counts alike.
        """
        narrow = NarrowMLP(self.contract, rank, self.neighbours, self.places, seen=seen).to(self.down.device)
        for name in ("x_mean", "y_mean", "y_std", "bias"):
            getattr(narrow, name).copy_(getattr(self, name))
        inner = (self.down @ self.up).double()
        directions = _leading(inner, seen, shares.to(inner), self.y_std.double(), weights)
        narrow.basis.copy_(self.basis.double() @ directions)
        narrow.down.copy_(torch.eye(seen, rank))
        narrow.up.copy_(directions[:, :rank].T @ inner)
        return narrow

    @torch.no_grad()
    def fold(self) -> "NarrowMLP":
        """The same map in plain coordinates, its factors in fp16; no place to train from."""
        if self.folded:
            return self
        plain = NarrowMLP(self.contract, self.rank, self.neighbours, self.places, True).to(self.down.device)
        plain.down.copy_(self.basis.double() @ self.down.double())
        plain.up.copy_(self.up * self.y_std)
        plain.bent.copy_(self.bent * self.y_std)
        # From the rounded factor, so that what the mean cache maps to does not drift.
        plain.offset.copy_(self.offset - self.x_mean.double() @ plain.down.double())
        plain.bias.copy_(self.y_mean + self.y_std * self.bias)
        return plain


def _leading(
    maps: Float64[Tensor, "places features out"],
    rank: int,
    shares: Float64[Tensor, " places"],
    std: Float64[Tensor, " out"],
    weights: Weights | None,
) -> Float64[Tensor, "features rank"]:
    """The directions of whitened features that maps to standardised channels read most, orthonormal."""
    metric = torch.eye(len(std)).to(std) if weights is None else std[:, None] * weights.to(std) * std
    read = torch.einsum("p,pio,oq,pjq->ij", shares, maps, metric, maps)
    return torch.linalg.eigh(read)[1].flip(-1)[:, :rank]

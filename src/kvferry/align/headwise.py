"""A map that keeps heads apart: one projection of each head's channels, then a mixing of heads."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvferry.align.contract import Contract
from kvferry.align.parts import Layers, Parts
from kvferry.align.penalised import penalised
from kvferry.align.projector import Projector, correlations
from kvferry.align.ridge import Sums
from kvferry.align.shares import share_matrix
from kvferry.align.stacked import Modules

N_SWEEPS = 10
"""Enough for the error to settle to three digits on the caches tried."""


class HeadwiseProjector(Projector):
    """`receiver[g] = sum over heads h of mixing[g, h] * sender[h] @ dims[h]`, plus a bias.

    Of a part's dense map it has a small share of the parameters, and it cannot blend channels of different heads at
    will. It starts next to the identity: channels in their order, each head from the head at the same place.
    `share_dim_proj` gives all heads of a layer one projection.
    """

    name: ClassVar[str] = "headwise"

    def __init__(
        self,
        contract: Contract,
        sources: Layers | None = None,
        targets: Layers | None = None,
        neighbours: int = 1,
        share_dim_proj: bool = False,
    ) -> None:
        super().__init__(contract, sources, targets, neighbours)
        self.share_dim_proj = share_dim_proj
        self.heads = Modules(_Heads(parts, share_dim_proj) for parts in self.parts)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "share_dim_proj": self.share_dim_proj}

    def project(self, parts: list[Tensor]) -> list[Tensor]:
        return [heads(part) for heads, part in zip(self.heads, parts, strict=True)]

    @torch.no_grad()
    def start_from(self, sums: Sums, penalty: float) -> None:
        """Fit by alternating ridge: projections given the mixing, mixing given the projections, `N_SWEEPS` times.

        Each half is a closed form and neither can raise the penalised error, but what they end in is no global optimum.
        """
        std = self.fit_scale(sums)
        for parts, heads in zip(self.parts, self.heads, strict=True):
            heads.fit(*correlations(std, parts), penalty)


class _Heads(nn.Module):
    """For all parts of one shape. Layers of a part, and of the tokens before, count as further heads."""

    def __init__(self, parts: Parts, shared: bool) -> None:
        super().__init__()
        sent, held = parts.sent, parts.held
        self.n_back, self.shared = parts.n_back, shared
        self.n_heads = parts.n_back * sent.layers * sent.heads
        dims = torch.eye(sent.dim, held.dim).repeat(parts.n_parts, 1 if shared else self.n_heads, 1, 1)
        near = torch.kron(share_matrix(held.layers, sent.layers), share_matrix(held.heads, sent.heads))
        mixing = nn.functional.pad(near, (0, self.n_heads - near.shape[-1]))
        self.dims = nn.Parameter(dims)
        self.mixing = nn.Parameter(mixing.repeat(parts.n_parts, 1, 1))
        self.bias = nn.Parameter(torch.zeros(parts.n_parts, held.width))

    def forward(self, part: Float[Tensor, "*batch parts features"]) -> Float[Tensor, "*batch parts out"]:
        heads = part.unflatten(-1, (self.n_heads, self.dims.shape[-2]))
        made = torch.einsum("...phd,phde->...phe", heads, self.dims.expand(-1, self.n_heads, -1, -1))
        return torch.einsum("...phe,pgh->...pge", made, self.mixing).flatten(-2) + self.bias

    def fit(
        self,
        xx: Float[Tensor, "parts features features"],
        xy: Float[Tensor, "parts features out"],
        penalty: float,
    ) -> None:
        """Alternate from the mixing there is. `xx` and `xy` are correlations, as `projector.correlations` gives.

        The tokens before start with the mixing of the token itself: from zero, neither half would ever leave.
        """
        n_held, n_own = self.mixing.shape[1], self.n_heads // self.n_back
        xx = xx.unflatten(1, (self.n_heads, -1)).unflatten(3, (self.n_heads, -1))
        xy = xy.unflatten(1, (self.n_heads, -1)).unflatten(3, (n_held, -1))
        dims, mixing = self.dims.to(xx), self.mixing[..., :n_own].repeat(1, 1, self.n_back).to(xx)
        for _ in range(N_SWEEPS):
            dims = _dims(xx, xy, mixing, penalty, self.shared)
            mixing = _mixing(xx, xy, dims.expand(-1, self.n_heads, -1, -1), penalty)
        self.dims.copy_(dims)
        self.mixing.copy_(mixing)
        self.bias.zero_()


def _dims(xx: Tensor, xy: Tensor, mixing: Tensor, penalty: float, shared: bool) -> Tensor:
    """The best projections `[parts, heads, dim, out]` for a mixing; one for all heads where shared."""
    n_heads = xx.shape[1]
    own = xx * torch.einsum("pgh,pgk->phk", mixing, mixing)[:, :, None, :, None]
    cross = torch.einsum("pgh,phdge->phde", mixing, xy)
    if shared:
        return penalised(own.sum((1, 3)), cross.sum(1), penalty).unsqueeze(1)
    return penalised(own.flatten(3).flatten(1, 2), cross.flatten(1, 2), penalty).unflatten(1, (n_heads, -1))


def _mixing(xx: Tensor, xy: Tensor, dims: Tensor, penalty: float) -> Tensor:
    """The best mixing `[parts, out heads, heads]` for projections."""
    own = torch.einsum("phde,phdkf,pkfe->phk", dims, xx, dims)
    return penalised(own, torch.einsum("phde,phdge->phg", dims, xy), penalty).transpose(1, 2)

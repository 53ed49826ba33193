"""A map along the axes of a cache: layers, heads, channels, and time where segments are known."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvferry.align.contract import Contract
from kvferry.align.parts import Parts
from kvferry.align.projector import Projector
from kvferry.align.shares import share_matrix
from kvferry.align.stacked import Modules
from kvferry.align.time_warping import TimeWarping
from kvferry.kv import KV


class MapProjectionAligner(Projector):
    """Each layer of the receiver is a blend of the sender's layers, its heads one of heads, its channels a projection.

    Blends start at the layers and heads of the same place; with `init_uniform` at the mean of all, from where all
    layers begin alike. `share_dim_proj` gives all layers one projection of channels. Models whose layers differ in
    shape are taken as one layer of one head, which is a dense map.
    """

    name: ClassVar[str] = "map_projection"

    def __init__(self, contract: Contract, share_dim_proj: bool = False, init_uniform: bool = False) -> None:
        sender, receiver = contract.sender.n_layers, contract.receiver.n_layers
        super().__init__(contract, [[*range(sender)]], [[*range(receiver)]])
        self.share_dim_proj, self.init_uniform = share_dim_proj, init_uniform
        self.axes = Modules(_Axes(parts, share_dim_proj, init_uniform) for parts in self.parts)
        self.time = TimeWarping()

    def options(self) -> dict[str, Any]:
        return {"share_dim_proj": self.share_dim_proj, "init_uniform": self.init_uniform}

    def forward(
        self,
        kv: KV,
        sent: Int[Tensor, "batch tokens"] | None = None,
        held: Int[Tensor, "batch slots"] | None = None,
    ) -> KV:
        """With the segments of the tokens that are there and that there shall be, the cache is warped in time first."""
        return super().forward(kv if sent is None or held is None else self.time(kv, sent, held))

    def project(self, parts: list[Tensor]) -> list[Tensor]:
        return [axes(part) for axes, part in zip(self.axes, parts, strict=True)]

    def project_queries(
        self, queries: Float[Tensor, "layers batch queries tokens dim"] | None
    ) -> Float[Tensor, "held batch held_queries tokens held_dim"] | None:
        """Queries along the axes of the keys, without means and scales, which are the keys'; None stays None.

        Queries of one key/value head stay together.
        """
        if queries is None:
            return None
        keys = next(iter(self.axes))
        grouped = queries.unflatten(2, (keys.heads.shape[-1], -1)).permute(1, 3, 4, 0, 2, 5)
        grouped = grouped.unsqueeze(-4).expand(*[-1] * 3, len(keys.layers), *[-1] * 3)
        made = keys.blend(grouped)[..., 0, :, :, :]
        return made.permute(3, 0, 4, 1, 2, 5).flatten(2, 3)


class _Axes(nn.Module):
    """For all parts of one shape; `part` is keys or values."""

    def __init__(self, parts: Parts, shared: bool, uniform: bool) -> None:
        super().__init__()
        sent, held = parts.sent, parts.held
        self.shape = (sent.layers, sent.heads, sent.dim)
        first = _mean_matrix if uniform else share_matrix
        self.layers = nn.Parameter(first(held.layers, sent.layers).repeat(parts.n_parts, 1, 1))
        self.heads = nn.Parameter(first(held.heads, sent.heads).repeat(parts.n_parts, 1, 1))
        copies = 1 if shared else held.layers
        self.dims = nn.Parameter(torch.eye(sent.dim, held.dim).repeat(parts.n_parts, copies, 1, 1))
        self.bias = nn.Parameter(torch.zeros(parts.n_parts, held.width))

    def forward(self, part: Float[Tensor, "*batch parts features"]) -> Float[Tensor, "*batch parts out"]:
        return self.blend(part.unflatten(-1, self.shape)).flatten(-3) + self.bias

    def blend(
        self, part: Float[Tensor, "*batch parts layers heads dim"]
    ) -> Float[Tensor, "*batch parts held held_heads held_dim"]:
        made = torch.einsum("...plhd,pml->...pmhd", part, self.layers)
        dims = self.dims.expand(-1, made.shape[-3], -1, -1)
        return torch.einsum("...pmhd,pmde,pgh->...pmge", made, dims, self.heads)


def _mean_matrix(n_held: int, n_sent: int) -> Float[Tensor, "held sent"]:
    return torch.full((n_held, n_sent), 1 / n_sent)

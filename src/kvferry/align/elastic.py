"""A bottleneck whose width follows the sender's: normalise, narrow, widen."""

from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from kvferry.align.contract import Contract
from kvferry.align.parts import Layers
from kvferry.align.projector import Projector
from kvferry.align.stacked import StackedLinear, StackedNorm
from kvferry.errors import UsageError


class ElasticBottleneck(Projector):
    """`down(dropout(silu(up(norm(part)))))` with `mlp_ratio` hidden channels per channel that comes in.

    The normalisation takes each token's length from it; other than in the published form, what comes out is given that
    length back, and then the receiver's scale. With `sources` and `targets` of all layers at once it is that form: 28
    layers of 256 channels to 24 of 128 take 73,424,896 parameters each for keys and values; one part per layer, the
    default, takes 99,200 for each of the 24.
    """

    name: ClassVar[str] = "elastic"

    def __init__(
        self,
        contract: Contract,
        sources: Layers | None = None,
        targets: Layers | None = None,
        neighbours: int = 1,
        mlp_ratio: float = 1.0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(contract, sources, targets, neighbours)
        if not (mlp_ratio > 0 and 0 <= dropout < 1):
            cure = "Give a ratio above 0, and a dropout from 0 to below 1"
            raise UsageError(f"mlp_ratio {mlp_ratio} and dropout {dropout}", cure=cure)
        self.mlp_ratio, self.dropout = mlp_ratio, dropout
        self.bottlenecks = nn.ModuleList(
            _Bottleneck(p.n_parts, p.n_in, max(1, int(p.n_in * mlp_ratio)), p.n_out, dropout)
            for p in self.parts
        )

    def options(self) -> dict[str, Any]:
        return {**super().options(), "mlp_ratio": self.mlp_ratio, "dropout": self.dropout}

    def project(self, parts: list[Tensor]) -> list[Tensor]:
        return [bottleneck(part) for bottleneck, part in zip(self.bottlenecks, parts, strict=True)]


class _Bottleneck(nn.Module):
    """For all parts of one shape."""

    def __init__(self, n_parts: int, n_in: int, hidden: int, n_out: int, dropout: float) -> None:
        super().__init__()
        self.inside = nn.Sequential(
            StackedNorm(n_parts, n_in),
            StackedLinear(n_parts, n_in, hidden),
            nn.SiLU(),
            nn.Dropout(dropout),
            StackedLinear(n_parts, hidden, n_out),
        )

    def forward(self, part: Float[Tensor, "*batch parts features"]) -> Float[Tensor, "*batch parts out"]:
        mean_square = part.square().sum(-1, keepdim=True) / max(part.shape[-1], 1)  # no sources, no channels
        length = (mean_square + 1e-6).sqrt()
        return length * self.inside(part)

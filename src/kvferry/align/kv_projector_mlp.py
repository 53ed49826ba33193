"""A perceptron with one hidden layer per layer of the receiver, for keys and for values."""

from typing import Any, ClassVar

from torch import Tensor, nn

from kvferry.align.contract import Contract, require_positive
from kvferry.align.kv_projector import output_norms
from kvferry.align.parts import Layers
from kvferry.align.projector import Projector
from kvferry.align.stacked import StackedLinear


class KVCacheProjectorMLP(Projector):
    """`gelu(part @ up + ...) @ down + ...`. There is no closed form to start from: `fit_scale`, then train.

    The published form (512 to 1024 to 4096 channels) has 4,731,904 parameters with `output_norm`, which is off by
    default: it makes all tokens equally long, see `Projector`. What trains best is `ResidualMLP`.
    """

    name: ClassVar[str] = "kv_projector_mlp"

    def __init__(
        self,
        contract: Contract,
        sources: Layers | None = None,
        targets: Layers | None = None,
        neighbours: int = 1,
        hidden_dim: int = 1024,
        output_norm: bool = False,
    ) -> None:
        super().__init__(contract, sources, targets, neighbours)
        require_positive("hidden_dim", hidden_dim)
        self.hidden_dim, self.output_norm = hidden_dim, output_norm
        norms = output_norms(self, output_norm)
        self.mlp = nn.ModuleList(
            nn.Sequential(
                StackedLinear(parts.n_parts, parts.n_in, hidden_dim),
                nn.GELU(),
                StackedLinear(parts.n_parts, hidden_dim, parts.n_out),
                norm,
            )
            for parts, norm in zip(self.parts, norms, strict=True)
        )

    def options(self) -> dict[str, Any]:
        return {**super().options(), "hidden_dim": self.hidden_dim, "output_norm": self.output_norm}

    def project(self, parts: list[Tensor]) -> list[Tensor]:
        return [mlp(part) for mlp, part in zip(self.mlp, parts, strict=True)]

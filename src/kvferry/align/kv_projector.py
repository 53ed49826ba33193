"""One affine map per layer, for keys and for values: the plainest trained projector."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kvferry.align.contract import Contract
from kvferry.align.parts import Layers
from kvferry.align.penalised import penalised
from kvferry.align.projector import Projector, correlations
from kvferry.align.ridge import Sums
from kvferry.align.stacked import Modules, StackedLinear, StackedNorm


class KVCacheProjector(Projector):
    """`part @ weight + bias`, started as near to a copy as the widths allow, or at the ridge by `start_from`.

    `output_norm` adds the layer normalisation of the first published form (512 to 4096 channels: 2,109,440 parameters
    with it, not 2,101,248). It is off by default: it makes all tokens equally long, see `Projector`.
    """

    name: ClassVar[str] = "kv_projector"

    def __init__(
        self,
        contract: Contract,
        sources: Layers | None = None,
        targets: Layers | None = None,
        neighbours: int = 1,
        output_norm: bool = False,
    ) -> None:
        super().__init__(contract, sources, targets, neighbours)
        self.output_norm = output_norm
        self.linear = Modules(StackedLinear(p.n_parts, p.n_in, p.n_out) for p in self.parts)
        for linear in self.linear:
            linear.weight.data.copy_(torch.eye(*linear.weight.shape[-2:]))
        self.norm = output_norms(self, output_norm)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "output_norm": self.output_norm}

    def project(self, parts: list[Tensor]) -> list[Tensor]:
        return [norm(linear(part)) for linear, norm, part in zip(self.linear, self.norm, parts, strict=True)]

    @torch.no_grad()
    def start_from(self, sums: Sums, penalty: float) -> None:
        """Become the ridge map of every part; `penalty` as in `ridge.solve`. All parts are solved at once."""
        std = self.fit_scale(sums)
        for parts, linear in zip(self.parts, self.linear, strict=True):
            linear.weight.copy_(penalised(*correlations(std, parts), penalty))
            linear.bias.zero_()


def output_norms(projector: Projector, wanted: bool) -> Modules[nn.Module]:
    """A normalisation for what comes out of each of a projector's parts, or nothing in its place."""
    return Modules(
        StackedNorm(parts.n_parts, parts.n_out) if wanted else nn.Identity() for parts in projector.parts
    )

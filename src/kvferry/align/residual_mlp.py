"""The ridge map plus what it cannot express: a multilayer perceptron that starts at zero.

Both parts read the cache in whitened coordinates (`align.whitening`), where gradient steps are well conditioned.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvferry.align.contract import Aligner, Contract
from kvferry.align.features import as_receiver, with_neighbours
from kvferry.align.ridge import Sums, standardise
from kvferry.align.whitening import whitening
from kvferry.kv import KV


class ResidualMLP(Aligner):
    """`receiver = y_mean + y_std * (z @ inner + shift + mlp(z))` with `z = (sender - x_mean) @ basis`.

    A sender token comes with the `neighbours - 1` tokens before it. The last layer of the mlp starts at zero, so after
    `start_from` training sets out from the ridge map itself. `fold` gives the same map for the caches' own
    coordinates, without the basis, which is the larger part of a folder.
    """

    name: ClassVar[str] = "residual_mlp"
    basis: Tensor
    x_mean: Tensor
    y_mean: Tensor
    y_std: Tensor

    def __init__(
        self, contract: Contract, neighbours: int = 4, hidden: int = 256, folded: bool = False
    ) -> None:
        super().__init__(contract)
        self.neighbours, self.hidden, self.folded = neighbours, hidden, folded
        n_in, n_out = neighbours * contract.sender.floats_per_token, contract.receiver.floats_per_token
        self.inner = nn.Parameter(torch.zeros(n_in, n_out))
        self.shift = nn.Parameter(torch.zeros(n_out))
        self.up = nn.Linear(n_in, hidden)
        self.down = nn.Linear(hidden, n_out, bias=False)
        nn.init.zeros_(self.down.weight)
        if not folded:
            self.register_buffer("basis", torch.eye(n_in))
            self.register_buffer("x_mean", torch.zeros(n_in))
            self.register_buffer("y_mean", torch.zeros(n_out))
            self.register_buffer("y_std", torch.ones(n_out))

    def options(self) -> dict[str, Any]:
        return {"neighbours": self.neighbours, "hidden": self.hidden, "folded": self.folded}

    def forward(self, kv: KV) -> KV:
        kv.require_space("content")
        return as_receiver(kv, self.map(with_neighbours(kv, self.neighbours)), self.contract.receiver)

    def map(self, wide: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch out"]:
        """The receiver's features of sender features with their neighbours'."""
        if self.folded:
            return self._inside(wide)
        return self.y_mean + self.y_std * self._inside((wide - self.x_mean) @ self.basis)

    def _inside(self, z: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch out"]:
        return z @ self.inner + self.shift + self.down(nn.functional.gelu(self.up(z)))

    @torch.no_grad()
    def start_from(
        self, sums: Sums, weight: Float[Tensor, "features out"], bias: Float[Tensor, " out"]
    ) -> None:
        """Become the affine map `wide @ weight + bias` of `ridge.solve`, in coordinates fitted to `sums`.

        For a map that is not folded. `sums` are over features with `neighbours` tokens each.
        """
        std = standardise(sums)
        basis, inverse = whitening(std)
        weight, bias = weight.to(basis), bias.to(basis)
        self.basis.copy_(basis)
        self.x_mean.copy_(std.x_mean)
        self.y_mean.copy_(std.y_mean)
        self.y_std.copy_(std.y_std)
        self.inner.copy_(inverse @ weight / std.y_std)
        self.shift.copy_((bias + std.x_mean @ weight - std.y_mean) / std.y_std)
        self.down.weight.zero_()

    @torch.no_grad()
    def fold(self) -> "ResidualMLP":
        """The same map in plain coordinates: smaller and quicker, but no place to train from."""
        if self.folded:
            return self
        plain = ResidualMLP(self.contract, self.neighbours, self.hidden, folded=True).to(self.inner)
        basis, x_mean, y_std = self.basis.double(), self.x_mean.double(), self.y_std.double()
        inner, up = basis @ self.inner.double() * y_std, basis @ self.up.weight.double().T
        plain.inner.copy_(inner)
        plain.shift.copy_(self.y_mean + y_std * self.shift - x_mean @ inner)
        plain.up.weight.copy_(up.T)
        plain.up.bias.copy_(self.up.bias - x_mean @ up)
        plain.down.weight.copy_(y_std.unsqueeze(-1) * self.down.weight)
        return plain

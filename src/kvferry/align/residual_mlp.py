"""The ridge map plus what it cannot express: a multilayer perceptron that starts at zero.

Both parts read the cache in whitened coordinates (`align.whitening`), where gradient steps are well conditioned.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvferry.align.classwise import Classwise, by_class
from kvferry.align.contract import Contract, require_positive
from kvferry.align.features import as_receiver, with_neighbours
from kvferry.align.receiver_grid import N_CLASSES, classes_of
from kvferry.align.ridge import Sums, solve, standardise
from kvferry.align.whitening import Whitened
from kvferry.errors import GridMismatch
from kvferry.kv import KV


class ResidualMLP(Whitened):
    """`receiver = y_mean + y_std * (z @ inner + shift + mlp(z))` with `z = (sender - x_mean) @ basis`.

    A sender token comes with the `neighbours - 1` tokens before it. The last layer of the mlp starts at zero, so after
    `start_from` training sets out from the ridge map itself. `fold` gives the same map for the caches' own
    coordinates, without the basis, which is the larger part of a folder. With `classes` the affine part is one for each
    overlap class of the receiver's grid (`Classwise`): `inner` is then what they share.
    """

    name: ClassVar[str] = "residual_mlp"

    def __init__(
        self,
        contract: Contract,
        neighbours: int = 4,
        hidden: int = 256,
        folded: bool = False,
        classes: bool = False,
    ) -> None:
        super().__init__(contract)
        require_positive("neighbours", neighbours)
        require_positive("hidden", hidden)
        self.neighbours, self.hidden, self.folded, self.classes = neighbours, hidden, folded, classes
        n_in, n_out = neighbours * contract.sender.floats_per_token, contract.receiver.floats_per_token
        self.inner = nn.Parameter(torch.zeros(n_in, n_out))
        self.shift = nn.Parameter(torch.zeros(n_out))
        self.up = nn.Linear(n_in, hidden)
        self.down = nn.Linear(hidden, n_out, bias=False)
        nn.init.zeros_(self.down.weight)
        if classes:
            self.class_inner = nn.Parameter(torch.zeros(N_CLASSES, n_in, n_out))
            self.class_shift = nn.Parameter(torch.zeros(N_CLASSES, n_out))
        if not folded:
            self.lay_out(n_in, n_in, n_out)

    def options(self) -> dict[str, Any]:
        options = ("neighbours", "hidden", "folded", "classes")
        return {option: getattr(self, option) for option in options}

    def forward(self, kv: KV) -> KV:
        """Raises `GridMismatch` where the map has classes and the cache has none."""
        kv.require_space("content")
        wide = with_neighbours(kv, self.neighbours)
        mapped = self.map(wide, classes_of(kv) if self.classes else None)
        return as_receiver(kv, mapped, self.contract.receiver)

    def map(
        self,
        wide: Float[Tensor, "*batch features"],
        classes: Int[Tensor, "*batch"] | None = None,
    ) -> Float[Tensor, "*batch out"]:
        """The receiver's features of sender features with their neighbours', and overlap classes as the option says.

        Raises `GridMismatch` for classes that are missing or not wanted.
        """
        if (classes is not None) != self.classes:
            what = f"a map {'with' if self.classes else 'without'} classes, a cache on the other grid"
            raise GridMismatch(what, cure="Map caches of the grid that the map was fitted on")
        if self.folded:
            return self._inside(wide, classes)
        return self.y_mean + self.y_std * self._inside((wide - self.x_mean) @ self.basis, classes)

    def _inside(
        self, z: Float[Tensor, "*batch features"], classes: Int[Tensor, "*batch"] | None
    ) -> Float[Tensor, "*batch out"]:
        made = z @ self.inner + self.shift + self.down(nn.functional.gelu(self.up(z)))
        return made if classes is None else made + by_class(z, classes, self.class_inner, self.class_shift)

    @torch.no_grad()
    def start_from(
        self, sums: Sums, weight: Float[Tensor, "features out"], bias: Float[Tensor, " out"]
    ) -> None:
        """Become the affine map `wide @ weight + bias` of `ridge.solve`, in coordinates fitted to `sums`.

        For a map that is not folded. `sums` are over features with `neighbours` tokens each.
        """
        self.whiten(standardise(sums))
        inner, shift = self._in_coordinates(weight, bias)
        self.inner.copy_(inner)
        self.shift.copy_(shift)
        self.down.weight.zero_()

    @torch.no_grad()
    def start_from_classes(self, sums: Sequence[Sums], penalty: float) -> None:
        """Become the ridge maps of the classes, for a map with classes that is not folded."""
        total = sum(sums[1:], sums[0])
        self.start_from(total, *solve(total, penalty))
        apart = Classwise(self.contract, self.neighbours)
        apart.solve_from(sums, penalty)
        for index, (weight, bias) in enumerate(zip(apart.weight, apart.bias, strict=True)):
            inner, shift = self._in_coordinates(weight, bias)
            self.class_inner[index].copy_(inner - self.inner)
            self.class_shift[index].copy_(shift - self.shift)

    def _in_coordinates(
        self, weight: Float[Tensor, "features out"], bias: Float[Tensor, " out"]
    ) -> tuple[Float[Tensor, "features out"], Float[Tensor, " out"]]:
        """`inner` and `shift` of an affine map."""
        weight, bias = weight.to(self.basis).double(), bias.to(self.basis).double()
        y_mean, y_std = self.y_mean.double(), self.y_std.double()
        inner = torch.linalg.solve(self.basis.double(), weight) / y_std
        return inner, (bias + self.x_mean.double() @ weight - y_mean) / y_std

    @torch.no_grad()
    def fold(self) -> "ResidualMLP":
        """The same map in plain coordinates: smaller and quicker, but no place to train from."""
        if self.folded:
            return self
        plain = ResidualMLP(self.contract, self.neighbours, self.hidden, True, self.classes).to(self.inner)
        basis, x_mean, y_std = self.basis.double(), self.x_mean.double(), self.y_std.double()
        inner, up = basis @ self.inner.double() * y_std, basis @ self.up.weight.double().T
        plain.inner.copy_(inner)
        plain.shift.copy_(self.y_mean + y_std * self.shift - x_mean @ inner)
        plain.up.weight.copy_(up.T)
        plain.up.bias.copy_(self.up.bias - x_mean @ up)
        plain.down.weight.copy_(y_std.unsqueeze(-1) * self.down.weight)
        if self.classes:
            apart = basis @ self.class_inner.double() * y_std
            plain.class_inner.copy_(apart)
            plain.class_shift.copy_(y_std * self.class_shift - x_mean @ apart)
        return plain

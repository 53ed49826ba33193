"""Everything that a training consists of at one moment, and the same as named tensors and facts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, float32, nn, optim, zeros_like

from kvferry.errors import UnknownName, UsageError
from kvferry.train.candidates import Average, Best, Weights, copies, put
from kvferry.train.loop_recipe import LoopRecipe
from kvferry.train.tensor_file import Tensors

ADAM_KEYS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class TrainingState:
    """The module, Adam's moments, the average, what dev liked best, and how far it is.

    Gradients exist from the start, so that a weight that some process does not reach counts as zero there.
    """

    module: nn.Module
    names: list[str]
    weights: list[nn.Parameter]
    good: list[Tensor]
    """The weights that gave the last finite loss."""
    optimizer: optim.AdamW
    average: Average | None
    best: Best
    step: int = 0
    loss: float = math.nan

    @classmethod
    def start(cls, module: nn.Module, recipe: LoopRecipe) -> "TrainingState":
        """Raises `UsageError` for a module without weights to train, or with some that are not fp32."""
        named = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        _check(named, recipe)
        weights = list(named.values())
        for weight in weights:
            weight.grad = zeros_like(weight)
        average = Average(recipe.average, copies(weights)) if recipe.average else None
        return cls(module, list(named), weights, copies(weights), _adam(named, recipe), average, Best())

    def tensors(self) -> Tensors:
        """By name: of the module with its buffers, of Adam, of the average, of what dev liked best."""
        found = {f"module.{name}": tensor for name, tensor in self.module.state_dict().items()}
        for name, weight in zip(self.names, self.weights, strict=True):
            found |= {f"adam.{key}.{name}": moment for key, moment in self.optimizer.state[weight].items()}
        if self.average is not None:
            found |= self._named("average", self.average.weights)
        if self.best.weights:
            found |= self._named("best", self.best.weights)
        return found

    def facts(self) -> dict[str, Any]:
        best = {key: value for key, value in vars(self.best).items() if key != "weights"}
        n_averaged = self.average.n if self.average else 0
        return {"step": self.step, "loss": self.loss, "best": best, "n_averaged": n_averaged}

    def take(self, tensors: Tensors, facts: Mapping[str, Any]) -> None:
        """The inverse of `tensors` and `facts`. Raises `KeyError` or `RuntimeError` where they are another module's."""
        self.module.load_state_dict(_below("module.", tensors))
        for name, weight in zip(self.names, self.weights, strict=True):
            self.optimizer.state[weight] = {
                # Adam counts its steps in a scalar on the host, whatever the device of the weights.
                key: tensors[f"adam.{key}.{name}"].to(weight.device if key != "step" else "cpu", copy=True)
                for key in ADAM_KEYS
            }
        if self.average is not None:
            self.average.n = facts["n_averaged"]
            put(self._of("average", tensors), self.average.weights)
        held = any(name.startswith("best.") for name in tensors)
        self.best = Best(**facts["best"], weights=self._of("best", tensors) if held else [])
        self.step, self.loss = facts["step"], facts["loss"]
        put(self.weights, self.good)

    def _named(self, kind: str, weights: Weights) -> dict[str, Tensor]:
        return {f"{kind}.{name}": weight for name, weight in zip(self.names, weights, strict=True)}

    def _of(self, kind: str, tensors: Tensors) -> list[Tensor]:
        pairs = zip(self.names, self.weights, strict=True)
        return [tensors[f"{kind}.{name}"].to(weight.device, copy=True) for name, weight in pairs]


def _below(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _adam(named: Mapping[str, nn.Parameter], recipe: LoopRecipe) -> optim.AdamW:
    """A group for each share of the rate, matrices apart from the rest, which does not decay."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, weight in named.items():
        is_matrix = weight.ndim >= 2 and not name.endswith("bias")
        groups.setdefault((recipe.share(name), is_matrix), []).append(weight)
    rows = [
        {"params": weights, "share": share, "weight_decay": recipe.weight_decay * is_matrix}
        for (share, is_matrix), weights in groups.items()
    ]
    return optim.AdamW(rows, lr=recipe.learning_rate)


def _check(named: Mapping[str, nn.Parameter], recipe: LoopRecipe) -> None:
    if not named:
        raise UsageError(
            "the module has no weights to train", cure="Give one whose parameters require gradients"
        )
    for name, weight in named.items():
        if weight.dtype != float32:
            cure = "Train fp32 weights (module.float()); precision says how the forward pass runs"
            raise UsageError(f"{name} is {weight.dtype}", cure=cure)
    for prefix in recipe.shares:
        if not any(name.startswith(prefix) for name in named):
            raise UnknownName("parameter in shares", prefix, named)

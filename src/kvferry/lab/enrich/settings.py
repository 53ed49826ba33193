"""What the bench of enrichment measures, and how its fusers are trained."""

from dataclasses import dataclass, replace

from kvferry.errors import UnknownName, UsageError
from kvferry.train.both_read import Hears
from kvferry.train.fuser_fit import FuserRecipe
from kvferry.train.loop_recipe import LoopRecipe

KIND = "two_hop"
"""The zoo's one skill that some models have and others lack."""

RECIPES = {
    "gated_residual": FuserRecipe(),
    "c2c": FuserRecipe(
        fuser="c2c",
        options={"hidden": 64, "inner": 64},
        loop=LoopRecipe(learning_rate=1e-3),
    ),
}
"""Sizes for the zoo. Learning rates were chosen on dev."""


@dataclass(frozen=True)
class Settings:
    """`n_items` test items of `n_facts` facts for each of `seeds` trainings. The controls are the first fuser's.

    Raises `UnknownName` for a fuser without a recipe, `UsageError` for numbers out of range.
    """

    sender: str = "gemma3"
    receiver: str = "llama"
    fusers: tuple[str, ...] = ("gated_residual", "c2c")
    n_facts: int = 8
    n_items: int = 200
    seeds: int = 3
    steps: int = 600
    prompts: int = 3200

    def __post_init__(self) -> None:
        for name in self.fusers:
            if name not in RECIPES:
                raise UnknownName("fuser with a recipe", name, RECIPES)
        if min(self.seeds, self.steps, len(self.fusers)) < 1:
            what = f"{self.seeds} seeds, {self.steps} steps, {len(self.fusers)} fusers"
            raise UsageError(what, cure="Give at least one of each")

    @property
    def ours(self) -> str:
        return self.fusers[0]

    def recipe(self, fuser: str, seed: int, hears: Hears = "prompt") -> FuserRecipe:
        """One training."""
        base = RECIPES[fuser]
        loop = replace(base.loop, steps=self.steps, seed=seed)
        start = min(base.start, self.prompts)
        return replace(base, loop=loop, hears=hears, prompts=self.prompts, start=start)

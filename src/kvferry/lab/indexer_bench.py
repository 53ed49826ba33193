"""`kvferry bench indexer`: the attention that lightning's slots hold, beside scores that see no query."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import process_time

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvferry.kv import Geometry
from kvferry.lab.align.passages import pair_of
from kvferry.lab.point import Point
from kvferry.lab.wire.sheets import Sheet
from kvferry.lab.wire.texts import shared_models
from kvferry.models.load import Model, load, public_name
from kvferry.models.zoo.catalog import names as zoo_names
from kvferry.train.attended import Attended
from kvferry.train.examples import Source, Worlds
from kvferry.train.indexer_fit import DEFAULT_LOOP, IndexerRecipe, new_indexer, train_scorer, unseen_texts
from kvferry.train.mass_held import CONTROLS, WINDOW, Held, measure, of_indexer

KEY_STEPS = 150
"""A key's own score has converged by then: its KL moves by a thousandth from step 75 to step 150."""
_LEGEND = (
    "Share of the attention that each query's best slots hold: median over queries, then the worst layer (median over "
    f"layers). Right: the last {WINDOW} queries of a text together, worst layer. key linear: learned, sees no query."
)


@dataclass(frozen=True)
class IndexerSettings:
    """Whose indexers are fitted, and how."""

    models: tuple[str, ...]
    recipe: IndexerRecipe = field(default_factory=lambda: IndexerRecipe(max_tokens=256))


def indexer_settings_of(
    models: Sequence[str] | None, heads: int, dim: int, steps: int, seed: int
) -> IndexerSettings:
    """As the command line says it. Without models: those of the shared folder, and the zoo."""
    loop = replace(DEFAULT_LOOP, steps=steps, seed=seed)
    recipe = IndexerRecipe(heads, dim, max_tokens=256, loop=loop)
    return IndexerSettings(tuple(models or (*shared_models(), *zoo_names())), recipe)


class KeyScore(nn.Module):
    """A number for each slot, linear in the layer's normalised content keys: all that a key says without a query."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        widths = [layer.heads * layer.key_dim for layer in geometry.layers]
        self.layers = nn.ModuleList(nn.Linear(width, 1) for width in widths)

    def forward(self, seen: Attended, layer: int, n_last: int) -> Float[Tensor, "batch new tokens"]:
        keys = seen.content_keys(layer).transpose(1, 2).flatten(2)
        scores = self.layers[layer](nn.functional.layer_norm(keys, keys.shape[-1:]))
        return scores.transpose(1, 2).expand(-1, n_last, -1)


def run_indexers(
    settings: IndexerSettings, on_point: Callable[[Point], None] = lambda point: None
) -> list[Point]:
    """A point for each model, scorer and proportion."""
    points = []
    for name in settings.models:
        for point in _model_points(load(name), settings.recipe):
            points.append(point)
            on_point(point)
    return points


def _model_points(model: Model, recipe: IndexerRecipe) -> Iterator[Point]:
    source: Source = Worlds(n_alike=4) if model.name in zoo_names() else pair_of(model, model)
    start = process_time()
    indexer = new_indexer(model, recipe)
    train_scorer(indexer, of_indexer(indexer), model, source, recipe)
    seconds = process_time() - start
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.loop.seed)
        keys = KeyScore(model.geometry).to(model.device)
    short = replace(recipe, loop=replace(recipe.loop, steps=min(KEY_STEPS, recipe.loop.steps)))
    train_scorer(keys, keys, model, source, short)
    scorers = {"lightning": of_indexer(indexer), "key_linear": keys, **CONTROLS}
    point = partial(_point, model=model, task=source.name, recipe=recipe, seconds=seconds)
    yield from map(point, measure(scorers, unseen_texts(model, source, recipe)))


def _point(held: Held, model: Model, task: str, recipe: IndexerRecipe, seconds: float) -> Point:
    metrics: dict[str, float | None] = {
        "share_worst_layer": held.lowest,
        "share_median_layer": held.typical,
        "window_share_worst_layer": min(held.windows),
        **{f"share_layer_{layer}": share for layer, share in enumerate(held.queries)},
        **{f"window_share_layer_{layer}": share for layer, share in enumerate(held.windows)},
        "fit_cpu_seconds": seconds if held.name == "lightning" else None,
    }
    settings = (
        {"heads": recipe.heads, "dim": recipe.dim, "steps": recipe.loop.steps}
        if held.name == "lightning"
        else {}
    )
    name = public_name(model.name)
    return Point(
        arm=held.name,
        recipe={"proportion": f"{held.proportion:g}", "queries": held.n_queries, **settings},
        sender=name,
        receiver=name,
        task=task,
        split="test",
        n=recipe.n_test,
        seed=recipe.loop.seed,
        metrics=metrics,
    )


def indexer_line(point: Point) -> str:
    """One point while the bench runs."""
    kept = _proportion(point)
    worst, typical = (_n(point.metrics[f"share_{which}_layer"]) for which in ("worst", "median"))
    return f"{point.sender}: {point.arm}, {kept} of the slots: worst layer {worst}, median layer {typical}"


def indexer_sheet(points: Sequence[Point]) -> Sheet:
    """A row for each model and proportion, a column for each scorer."""
    arms = list(dict.fromkeys(point.arm for point in points))
    rows = {(point.sender, _proportion(point)): point for point in points}
    found = {(point.sender, _proportion(point), point.arm): point for point in points}
    cells = tuple(
        (
            model,
            kept,
            *(_cell(found[model, kept, arm]) for arm in arms),
            _windows(found[model, kept, "lightning"]),
        )
        for model, kept in rows
    )
    title = f"Attention held, {points[0].n} texts of a model"
    return Sheet(title, ("", "slots", *(arm.replace("_", " ") for arm in arms), "windows"), cells, _LEGEND)


def _proportion(point: Point) -> str:
    return f"{float(point.recipe['proportion']):.0%}" if isinstance(point.recipe, dict) else ""


def _cell(point: Point) -> str:
    return f"{_n(point.metrics['share_worst_layer'])} ({_n(point.metrics['share_median_layer'])})"


def _windows(point: Point) -> str:
    return _n(point.metrics["window_share_worst_layer"])


def _n(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"

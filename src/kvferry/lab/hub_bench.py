"""`kvferry bench pairs --hub`: three models found a hub, a fourth joins; recall from founders to it, and back."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from kvferry.align.hub import Hub
from kvferry.lab.arms import RAW
from kvferry.lab.hub_fit import CODED_WITH, HubRecipe, both_ways, founded, join, pair_between
from kvferry.lab.items import Worlds, right
from kvferry.lab.pairs import by_pair, cells, relayed
from kvferry.lab.pairs_fit import route_of
from kvferry.lab.point import Point
from kvferry.lab.wire.sheets import Sheet
from kvferry.metrics.paired import wilson
from kvferry.models.load import Model, load
from kvferry.train.fit import frozen

_LEGEND = (
    "Answers exactly right, with 95 % intervals (Wilson) for raw. Founders were frozen when the newcomer joined. "
    "MB: both halves of the newcomer, fp32; fit s: processor seconds on one core to join, closed form and training."
)


@dataclass(frozen=True)
class HubSettings:
    """Who founds, who joins, and by which recipe."""

    founders: tuple[str, ...] = ("llama", "qwen3", "qwen2")
    newcomer: str = "gemma3"
    n_items: int = 200
    seed: int = 0
    recipe: HubRecipe = field(default_factory=HubRecipe)


def hub_settings_of(n_items: int, steps: int | None, texts: int | None, seed: int) -> HubSettings:
    """As the command line says it; None stands for what the recipe has, `steps` for founding and for joining."""
    plain = HubRecipe()
    loops = {name: getattr(plain, name) for name in ("founding", "joining")}
    if steps is not None:
        loops = {name: replace(loop, steps=steps) for name, loop in loops.items()}
    recipe = replace(plain, n_texts=texts or plain.n_texts, **loops)
    return HubSettings(n_items=n_items, seed=seed, recipe=recipe)


def run_hub(settings: HubSettings, on_point: Callable[[Point], None] = lambda point: None) -> list[Point]:
    """Recall from every founder to the newcomer, and back. Raises `UnknownName` for a model that does not exist."""
    points = []
    newcomer, founders = load(settings.newcomer), [load(name) for name in settings.founders]
    with ExitStack() as stack:
        for model in (newcomer, *founders):
            stack.enter_context(frozen(model))
        hub = founded(founders, settings.recipe)
        start = time.process_time()
        join(hub, newcomer, founders, settings.recipe)
        cpu_seconds = time.process_time() - start
        for way in both_ways(newcomer, founders):
            for codec in CODED_WITH:
                points.append(_point(hub, way, codec, settings, cpu_seconds))
                on_point(points[-1])
    return points


def hub_sheet(points: Sequence[Point]) -> Sheet:
    """A row for each pair."""
    title = f"Over a hub: {points[0].task}, {points[0].n} items"
    rows = tuple(cells(arms, ("kv_raw", "kv_int8")) for arms in by_pair(points))
    return Sheet(title, ("", "raw", "int8", "MB", "fit s"), rows, _LEGEND)


def _point(
    hub: Hub, way: tuple[Model, Model], codec: str, settings: HubSettings, cpu_seconds: float
) -> Point:
    pair, route = pair_between(hub, way).eval(), route_of(*way)
    items = Worlds(("place",)).twins(settings.n_items, settings.seed)
    n_right = sum(int(right(relayed(route, pair, batch, codec), batch.answers).sum()) for batch in items)
    member = hub.member(settings.newcomer)
    return Point(
        arm="kv_raw" if codec == RAW else "kv_int8",
        recipe={
            "aligner": f"hub_pair(dim={hub.dim}, neighbours={pair.neighbours}, places={pair.places})",
            "newcomer": settings.newcomer,
            "grid": route.grid,
        },
        sender=way[0].name,
        receiver=way[1].name,
        task="place, 8 facts, over a hub",
        split="test",
        n=settings.n_items,
        seed=settings.seed,
        metrics={
            "accuracy": n_right / settings.n_items,
            "mb": sum(tensor.nbytes for tensor in member.state_dict().values()) / 1e6,
            "fit_cpu_seconds": cpu_seconds,
        },
        ci95={"accuracy": wilson(n_right, settings.n_items)},
    )

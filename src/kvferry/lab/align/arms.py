"""The arms of a pair: controls, closed forms, trained maps, and the same under the wire's noise."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from kvferry.align.contract import Aligner, Grid
from kvferry.codec import CODECS, roundtrip
from kvferry.kv import KV
from kvferry.lab.align.passages import Pair
from kvferry.train.auto import megabytes
from kvferry.train.cases import Way
from kvferry.train.fidelity import Fidelity, fidelity
from kvferry.train.fit import Material, Watch, closed_form, prepare, train
from kvferry.train.loop_recipe import LoopRecipe
from kvferry.train.recipe import DataRecipe, FitRecipe
from kvferry.train.route import Route
from kvferry.train.scores import mean_cache, other_contexts

NEIGHBOURS = 3
N_FIDELITY = 32
RAW = ("raw(dtype=float16, zstd=0)",)
CODED = ("int(bits=8)", "int(bits=4)", "int(bits=2)")
CONTROLS = ("mean_only", "token_table", "zero_pad", "truncate", "interpolate", "random_map")
CLOSED = (
    "procrustes(sources=nearest_depth)",
    "blockwise(sources='top_k_sources(k=2)')",
    "blockwise(sources=all, heads=ratio)",
    "low_rank(rank=64, neighbours=3)",
    "linear(neighbours=1)",
    "linear(neighbours=3)",
)
BEST_CLOSED: dict[Grid, str] = {"sender": "linear(neighbours=3)", "receiver": "classwise(neighbours=3)"}
BEST_TRAINED: dict[Grid, str] = {
    "sender": "residual_mlp(neighbours=3, hidden=256)",
    "receiver": "residual_mlp(neighbours=3, hidden=256, classes=True)",
}
OTHER_TRAINED = (
    "kv_projector(sources=all)",
    "kv_projector(sources=all, output_norm=True)",
    "kv_projector_mlp(sources=all)",
    "elastic(sources=all)",
    "headwise(sources=all)",
    "map_projection(sources=all)",
)


@dataclass(frozen=True)
class Settings:
    """How much is spent on a pair."""

    n: int = 240
    texts: int = 1000
    steps: int = 300
    seed: int = 0
    every_projector: bool = False

    def recipe(self, codecs: tuple[str, ...], grid: Grid) -> FitRecipe:
        """Distils the receiver's own reading; what is best on dev is kept."""
        loop = LoopRecipe(steps=self.steps, learning_rate=1e-3, warmup=20, evaluate_every=50, seed=self.seed)
        data = DataRecipe(texts=self.texts, batch_size=16)
        return FitRecipe(BEST_TRAINED[grid], codecs, data, grid, {"own_text": 1.0}, loop)


@dataclass(frozen=True)
class Arm:
    """A map on a grid and what stands before it. `seconds` are those of its fit, collecting included."""

    name: str
    grid: Grid
    aligner: Aligner
    codec: str
    trip: Callable[[KV], KV]
    kind: str
    seconds: float = 0.0
    near: Fidelity | None = field(default=None, compare=False)

    @property
    def mb(self) -> float:
        return megabytes(self.aligner)


def arms(pair: Pair, grid: Grid, settings: Settings) -> Iterator[Arm]:
    """Controls first; then every map on clean caches; then the best of both kinds, fitted under coarse codecs."""
    raw, seconds = _prepared(pair, grid, settings, RAW)
    for name in CONTROLS:
        yield Arm(name, grid, closed_form(raw, name)[0], RAW[0], _as_it_is, "control")
    for spec in (*CLOSED, *((BEST_CLOSED[grid],) if grid == "receiver" else ())):
        yield from _closed(raw, spec, seconds, controls=spec == BEST_CLOSED[grid])
    if settings.steps:
        for spec in (BEST_TRAINED[grid], *(OTHER_TRAINED if settings.every_projector else ())):
            yield from _trained(raw, spec, seconds, controls=spec == BEST_TRAINED[grid])
    yield from _coded(pair, grid, settings)


def _closed(material: Material, spec: str, seconds: float, *, controls: bool) -> Iterator[Arm]:
    start = time.perf_counter()
    aligner, _ = closed_form(material, spec)
    yield from _with_controls(
        material, spec, aligner, "closed", seconds + time.perf_counter() - start, controls
    )


def _trained(material: Material, spec: str, seconds: float, *, controls: bool) -> Iterator[Arm]:
    start = time.perf_counter()
    aligner, _ = train(material, closed_form(material, spec)[0], Watch())
    yield from _with_controls(
        material, spec, aligner, "trained", seconds + time.perf_counter() - start, controls
    )


def _with_controls(
    material: Material, spec: str, aligner: Aligner, kind: str, seconds: float, controls: bool
) -> Iterator[Arm]:
    grid = material.route.grid
    arm = Arm(
        spec, grid, aligner, material.recipe.codecs[0], _as_it_is, kind, seconds, _near(material, aligner)
    )
    yield arm
    if controls:
        yield replace(arm, trip=other_contexts, kind=f"{kind}, another passage", near=None)
        yield replace(arm, trip=mean_cache, kind=f"{kind}, mean cache", near=None)


def _coded(pair: Pair, grid: Grid, settings: Settings) -> Iterator[Arm]:
    """A closed form fitted behind each coarse codec alone; then one trained map for all, behind each in turn."""
    for codec in CODED:
        material, seconds = _prepared(pair, grid, settings, (codec,))
        start = time.perf_counter()
        aligner, _ = closed_form(material, BEST_CLOSED[grid])
        taken = seconds + time.perf_counter() - start
        yield from _behind(BEST_CLOSED[grid], material, aligner, "closed, coded", taken)
    if settings.steps:
        material, seconds = _prepared(pair, grid, settings, (*RAW, *CODED))
        start = time.perf_counter()
        aligner, _ = train(material, closed_form(material, BEST_TRAINED[grid])[0], Watch())
        taken = seconds + time.perf_counter() - start
        yield from _behind(BEST_TRAINED[grid], material, aligner, "trained, coded", taken)


def _behind(spec: str, material: Material, aligner: Aligner, kind: str, seconds: float) -> Iterator[Arm]:
    for codec in material.recipe.codecs:
        trip = partial(roundtrip, CODECS.parse(codec))
        yield Arm(spec, material.route.grid, aligner, codec, trip, kind, seconds)


def _prepared(pair: Pair, grid: Grid, settings: Settings, codecs: tuple[str, ...]) -> tuple[Material, float]:
    start = time.perf_counter()
    route = Route(pair.sender, pair.receiver, grid)
    material = prepare(route, pair, settings.recipe(codecs, grid), NEIGHBOURS)
    return material, time.perf_counter() - start


def _near(material: Material, aligner: Aligner) -> Fidelity:
    route = material.route
    way = Way(route.sender, route.receiver, aligner, material.codecs[0])
    return fidelity(way, material.take("test", N_FIDELITY))


def _as_it_is(kv: KV) -> KV:
    return kv

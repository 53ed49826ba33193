"""The arms of a pair: controls, closed forms, trained maps, and the same under the wire's noise."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from kvferry.align.contract import Aligner, Grid
from kvferry.codec import CODECS, roundtrip
from kvferry.lab.align.passages import Pair
from kvferry.train.auto import megabytes
from kvferry.train.cases import Way
from kvferry.train.fidelity import Fidelity, fidelity
from kvferry.train.fit import Material, Watch, closed_form, prepare, token_table, train
from kvferry.train.loop_recipe import LoopRecipe
from kvferry.train.recipe import DataRecipe, FitRecipe
from kvferry.train.route import Route
from kvferry.train.scores import Judged, mean_cache, other_contexts, through

NEIGHBOURS = 3
N_FIDELITY = 32
RAW = ("raw(dtype=float16, zstd=0)",)
CODED = ("int(bits=8)", "int(bits=4)", "int(bits=2)")
CONTROLS = (
    "mean_only",
    "token_table",
    "token_table_aligner",
    "zero_pad",
    "truncate",
    "interpolate",
    "random_map",
)
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
    "map_projection",
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
    judged: Judged
    codec: str
    kind: str
    mb: float | None = None
    seconds: float = 0.0
    near: Fidelity | None = None


def arms(pair: Pair, grid: Grid, settings: Settings) -> Iterator[Arm]:
    """Controls first; then every map on clean caches; then the best of both kinds, fitted under coarse codecs."""
    raw, seconds = _prepared(pair, grid, settings, RAW)
    for name in CONTROLS:
        yield _control(raw, name)
    for spec in (*CLOSED, *((BEST_CLOSED[grid],) if grid == "receiver" else ())):
        yield from _closed(raw, spec, seconds, controls=spec == BEST_CLOSED[grid])
    if settings.steps:
        for spec in (BEST_TRAINED[grid], *(OTHER_TRAINED if settings.every_projector else ())):
            yield from _trained(raw, spec, seconds, controls=spec == BEST_TRAINED[grid])
    yield from _coded(pair, grid, settings)


def _control(material: Material, name: str) -> Arm:
    """The table of tokens reads them from the text; `token_table_aligner` recognises them in what the sender sent."""
    grid = material.route.grid
    if name == "token_table":
        return Arm(name, grid, token_table(material), RAW[0], "control")
    aligner, _ = closed_form(material, name.removesuffix("_aligner"))
    return Arm(name, grid, through(name, aligner), RAW[0], "control", megabytes(aligner))


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
    arm = Arm(spec, material.route.grid, through(spec, aligner), RAW[0], kind, megabytes(aligner), seconds)
    yield replace(arm, near=_near(material, aligner))
    if controls:
        yield replace(arm, judged=through(spec, aligner, other_contexts), kind=f"{kind}, another passage")
        yield replace(arm, judged=through(spec, aligner, mean_cache), kind=f"{kind}, mean cache")


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
        judged = through(spec, aligner, partial(roundtrip, CODECS.parse(codec)))
        yield Arm(spec, material.route.grid, judged, codec, kind, megabytes(aligner), seconds)


def _prepared(pair: Pair, grid: Grid, settings: Settings, codecs: tuple[str, ...]) -> tuple[Material, float]:
    start = time.perf_counter()
    route = Route(pair.sender, pair.receiver, grid)
    material = prepare(route, pair, settings.recipe(codecs, grid), NEIGHBOURS)
    return material, time.perf_counter() - start


def _near(material: Material, aligner: Aligner) -> Fidelity:
    route = material.route
    way = Way(route.sender, route.receiver, aligner, material.codecs[0])
    return fidelity(way, material.take("test", N_FIDELITY))

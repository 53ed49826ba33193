"""`kvferry bench align`: every map on a pair of pretrained models, by how the receiver goes on behind it.

What is asked is nats per character; what is compared is the gap closed between no prefix and all of it as text. No
prefix is a bad zero, since a receiver without one expects a beginning: the mean entry and the table of tokens stand
beside every map, on the same passages.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvferry.errors import FolderError
from kvferry.lab.align.arms import RAW, Arm, Settings, arms
from kvferry.lab.align.ground import Ground, ground_of, plots_of
from kvferry.lab.align.passages import pair_of
from kvferry.lab.align.task import Nats
from kvferry.lab.point import Point
from kvferry.lab.wire.texts import SHARED, shared_folder
from kvferry.metrics.paired import Interval, bootstrap_mean, paired
from kvferry.models.load import load, public_name

PAIRS = (
    ("llama2xs", "stories260K"),
    ("stories260K", "tinystories656K"),
    ("babyllama105", "babyllama361"),
    ("stories260K", "llama2xs"),
)
_ZEROS = ("mean_only", "token_table")
"""The honest zeros: on each grid, with the same text beside them."""


def run_bench(
    pairs: tuple[tuple[str, str], ...], settings: Settings, on_point: Callable[[Point], None]
) -> list[Point]:
    """All arms of all pairs, on every grid that makes sense. Raises `FolderError` without the shared folder."""
    found = []
    for names in pairs:
        for point in _pair_points(names, settings):
            found.append(point)
            on_point(point)
    return found


def _pair_points(names: tuple[str, str], settings: Settings) -> Iterator[Point]:
    pair = pair_of(*(load(_folder(name)) for name in names))
    ground = ground_of(pair, settings.n)
    texts = {"nothing": ground.nothing, "whole text": ground.whole}
    texts |= {f"last {n} characters": nats for n, nats in ground.ends.items()}
    for name, nats in texts.items():
        yield _point(ground, {"aligner": name, "codec": "text", "grid": "none"}, nats, {}, settings)
    if pair.sender.geometry.tokenizer == pair.receiver.geometry.tokenizer:
        yield from _grid_points(ground, "sender", settings)
        return
    yield from _grid_points(ground, "receiver", settings)
    # Beside it, for comparison: closed forms say which grid is the better one.
    yield from _grid_points(ground, "sender", replace(settings, steps=0))


def _grid_points(ground: Ground, grid: str, settings: Settings) -> Iterator[Point]:
    plots = plots_of(ground, grid)  # type: ignore[arg-type]
    zeros: dict[tuple[str, bool], Nats] = {}
    for arm in arms(ground.pair, plots.grid, settings):
        for with_tail in (False, True) if arm.codec == RAW[0] else (False,):
            nats = plots.nats(ground, arm.judged, with_tail=with_tail)
            if arm.name in _ZEROS:
                zeros[arm.name, with_tail] = nats
            beside = {name: zeros[name, with_tail] for name in _ZEROS if (name, with_tail) in zeros}
            text_chars = ground.pair.tail_chars if with_tail else 0
            recipe: dict[str, str | int] = {
                "aligner": arm.name,
                "codec": arm.codec,
                "grid": grid,
                "kind": arm.kind,
            }
            yield _point(ground, {**recipe, "text_chars": text_chars}, nats, beside, settings, arm)


def _point(
    ground: Ground,
    recipe: dict[str, str | int],
    nats: Nats,
    zeros: dict[str, Nats],
    settings: Settings,
    arm: Arm | None = None,
) -> Point:
    metrics: dict[str, float | None] = {
        "nll_per_char": float(nats.mean()),
        "gap_closed": float(ground.nothing.mean() - nats.mean()) / ground.gap,
    }
    ci95: dict[str, Interval | None] = {
        "nll_per_char": bootstrap_mean(nats),
        "gap_closed": _ratio_ci95(ground.nothing - nats, ground),
    }
    for name, zero in zeros.items():
        short = name.replace("_only", "").replace("token_", "")
        left = float(zero.mean() - ground.whole.mean())
        metrics[f"over_{short}"] = float(zero.mean() - nats.mean()) / left if left > 0 else None
        metrics[f"nats_under_{short}"] = float(zero.mean() - nats.mean())
        ci95[f"nats_under_{short}"] = paired(zero, nats).ci95 if nats is not zero else (0.0, 0.0)
    pair = ground.pair
    return Point(
        arm=str(recipe["aligner"]),
        recipe=recipe,
        sender=public_name(pair.sender.name),
        receiver=public_name(pair.receiver.name),
        task="stories",
        split="test",
        n=len(nats),
        seed=settings.seed,
        metrics={**metrics, **_of_arm(arm)},
        ci95=ci95,
    )


def _of_arm(arm: Arm | None) -> dict[str, float | None]:
    if arm is None:
        return {}
    found: dict[str, float | None] = {"fit_seconds": arm.seconds, "mb": arm.mb}
    if arm.near is not None:
        found |= {"r2_k": float(np.mean(arm.near.r2_keys)), "r2_v": float(np.mean(arm.near.r2_values))}
        found |= {"attention_cosine": arm.near.attention_cosine, "attention_error": arm.near.attention_error}
    return found


def _ratio_ci95(closed: Nats, ground: Ground) -> tuple[float, float]:
    """Of the mean closed over the mean gap, over resampled passages."""
    generator = np.random.default_rng(0)
    rows = generator.integers(0, len(closed), (2000, len(closed)))
    gaps = (ground.nothing - ground.whole)[rows].mean(1)
    low, high = np.percentile(closed[rows].mean(1) / gaps, (2.5, 97.5))
    return float(low), float(high)


def _folder(name: str) -> str:
    """A model of the shared folder by name; anything else is for `load` to find."""
    if Path(name).is_dir() or "/" in name:
        return name
    folder = shared_folder()
    if folder is None:
        raise FolderError(
            "there is no shared folder", cure=f"Let ${SHARED} name it, or give folders of models"
        )
    return str(folder / "models" / name)


def pair_named(text: str) -> tuple[str, str]:
    """Sender and receiver of `A-to-B`; folders may be given so too."""
    sender, _, receiver = text.partition("-to-")
    return sender, receiver

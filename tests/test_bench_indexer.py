"""`kvferry bench indexer`: one point for each scorer and proportion, and the table made of them."""

import json
from pathlib import Path

import pytest
import torch

from kvferry.lab.indexer_bench import (
    IndexerSettings,
    KeyScore,
    indexer_line,
    indexer_settings_of,
    indexer_sheet,
    run_indexers,
)
from kvferry.lab.ledger import save_points
from kvferry.lab.point import Point
from kvferry.models.load import load
from kvferry.models.scores import scores_of
from kvferry.train.attended import attend
from kvferry.train.indexer_fit import IndexerRecipe
from kvferry.train.loop_recipe import LoopRecipe
from kvferry.train.mass_held import CONTROLS, PROPORTIONS

ARMS = {"lightning", "key_linear", *CONTROLS}
TINY = IndexerRecipe(heads=1, dim=8, max_tokens=40, n_dev=2, n_test=4, loop=LoopRecipe(steps=2))


@pytest.fixture(scope="module")
def points() -> list[Point]:
    told: list[Point] = []
    found = run_indexers(IndexerSettings(("llama",), TINY), told.append)
    assert told == found
    return found


def test_every_scorer_is_measured_on_the_same_queries(points: list[Point]):
    assert {(point.arm, point.recipe["proportion"]) for point in points} == {
        (arm, f"{proportion:g}") for arm in ARMS for proportion in PROPORTIONS
    }
    for proportion in PROPORTIONS:
        here = [point for point in points if point.recipe["proportion"] == f"{proportion:g}"]
        assert len({point.recipe["queries"] for point in here}) == 1
    shares = [
        value
        for point in points
        for name, value in point.metrics.items()
        if "share" in name and value is not None
    ]
    assert all(0 <= share <= 1.0001 for share in shares)


def test_the_worst_layer_is_the_least_of_all(points: list[Point]):
    for point in points:
        layers = [point.metrics[f"share_layer_{layer}"] for layer in range(4)]
        assert point.metrics["share_worst_layer"] == min(layers)
        assert point.metrics["share_median_layer"] == pytest.approx(sum(sorted(layers)[1:3]) / 2)


def test_the_table_has_a_row_for_each_proportion(points: list[Point], tmp_path: Path):
    sheet = indexer_sheet(points)
    assert [row[:2] for row in sheet.cells] == [("llama", "10%"), ("llama", "25%")]
    assert {name.replace(" ", "_") for name in sheet.columns[2:-1]} == ARMS
    lightning = next(point for point in points if point.arm == "lightning")
    assert f"{lightning.metrics['share_worst_layer']:.3f}" in sheet.cells[0][2]
    assert f"{lightning.metrics['share_worst_layer']:.3f}" in indexer_line(lightning)
    save_points(points, tmp_path / "points.json")
    rows = json.loads((tmp_path / "points.json").read_bytes())
    assert [row["arm"] for row in rows] == [point.arm for point in points]


def test_a_score_of_keys_alone_sees_no_query():
    model = load("qwen3")
    scores = KeyScore(model.geometry)
    seen = attend(model, ["Bob has the lamp. Eve has the coin."], scores_of(model), 20)
    with torch.no_grad():
        rows = scores(seen, 1, 5)[0]
        assert torch.equal(rows, rows[:1].expand(5, -1))
        assert rows[0].std().item() > 0


def test_the_command_line_says_models_and_recipe():
    settings = indexer_settings_of(["llama"], heads=2, dim=16, steps=7, seed=3)
    assert settings.models == ("llama",)
    assert (settings.recipe.heads, settings.recipe.dim) == (2, 16)
    assert (settings.recipe.loop.steps, settings.recipe.loop.seed) == (7, 3)
    assert "qwen3" in indexer_settings_of(None, 8, 64, 400, 0).models

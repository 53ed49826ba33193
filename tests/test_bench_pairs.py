"""The bench of all pairs: its caps hold, its controls know nothing, its command runs."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from kvferry.cli import app
from kvferry.errors import UsageError
from kvferry.lab.pairs import ARMS, Settings, pair_named, run_pairs, sheet
from kvferry.lab.pairs_fit import PairRecipe, fit_pair, rank_within, route_of
from kvferry.models.load import load
from kvferry.train.loop_recipe import LoopRecipe

QUICK = PairRecipe(n_texts=48, neighbours=2, max_mb=0.5, batch_size=4, loop=LoopRecipe(steps=2))
pytestmark = pytest.mark.timeout(600)  # a busy machine takes minutes for what needs seconds


def test_a_pair_of_other_tokenizers_goes_through_half_a_megabyte():
    points = run_pairs(Settings((("llama", "gemma3"),), n_items=32, recipe=QUICK))
    found = {point.arm: point for point in points}
    assert tuple(found) == ARMS
    assert found["kv_raw"].accuracy > 0.5 and found["text"].accuracy > 0.9
    assert max(found[arm].accuracy for arm in ("receiver_only", "mean_entry", "kv_twin")) < 0.3
    assert found["kv_raw"].metrics["mb"] <= 0.5  # type: ignore[operator]
    assert found["kv_raw"].recipe["tokenizer"] == "different"  # type: ignore[index]
    [row] = sheet(points).cells
    assert row[0] == "llama to gemma3" and len(row) == len(sheet(points).columns)


def test_a_receiver_of_bytes_gets_places_in_runs_and_the_cap_holds():
    quick = replace(QUICK, n_texts=8, neighbours=1)
    fitted = fit_pair(route_of(load("llama"), load("qwen2")), quick)
    assert fitted.aligner.places == QUICK.places and fitted.aligner.contract.grid == "receiver"
    assert 0.48 < fitted.mb <= 0.5 and fitted.cpu_seconds > 0


def test_the_largest_rank_within_a_cap():
    sender, receiver = load("llama").geometry, load("qwen2").geometry
    for max_mb in (0.1, 0.3, 1.0):
        rank = rank_within(max_mb, sender, receiver, 3, 6)
        n_bytes = [
            2 * one * (3 * sender.floats_per_token + 7 * receiver.floats_per_token)
            + 24 * (one + receiver.floats_per_token)
            for one in (rank, rank + 1)
        ]
        assert n_bytes[0] <= 1e6 * max_mb < n_bytes[1]


def test_pairs_are_named_in_words():
    assert pair_named("llama-to-qwen3") == ("llama", "qwen3")
    for wrong in ("llama", "llama-to-llama"):
        with pytest.raises(UsageError):
            pair_named(wrong)


def test_the_command_writes_what_it_shows(tmp_path):
    where = tmp_path / "pairs.json"
    options = {"pairs": "qwen3-to-gemma3", "items": 8, "steps": 0, "texts": 16, "max-mb": 0.3, "json": where}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = CliRunner().invoke(app, ["bench", "pairs", *words], catch_exceptions=False)
    assert done.exit_code == 0 and "qwen3 to gemma3" in done.stdout
    assert {point["arm"] for point in json.loads(where.read_text())} == set(ARMS)

"""Slots of a lightning indexer hold nine tenths of the attention that the best ones would, in every layer."""

import pytest

from kvferry.lab.indexer_bench import indexer_settings_of, run_indexers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

BAR = 0.9


def test_lightning_holds_nine_tenths_and_more_than_any_score_of_keys(shared_dir):
    names = [str(shared_dir / "models" / "tinystories656K")]
    points = run_indexers(indexer_settings_of(names, heads=8, dim=64, steps=400, seed=1))
    worst = {(point.arm, point.recipe["proportion"]): point.metrics["share_worst_layer"] for point in points}
    for proportion in ("0.1", "0.25"):
        assert worst["lightning", proportion] >= BAR
        for arm in ("key_linear", "knorm", "keydiff", "recent"):
            assert worst["lightning", proportion] > worst[arm, proportion]

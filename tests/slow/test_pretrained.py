"""Models that other people trained: the whole path, from fitting to answering."""

import pytest

from kvferry.models.load import load
from kvferry.session.receiver import Receiver
from kvferry.session.sender import Sender
from kvferry.train.examples import TextFile
from kvferry.train.fit import Recipe, fit

pytestmark = pytest.mark.slow

PAIRS = [("llama2xs", "stories260K"), ("stories260K", "tinystories656K")]


@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_a_fitted_map_lies_between_its_control_and_the_receivers_own_cache(shared_dir, left, right):
    sender, receiver = (load(str(shared_dir / "models" / name)) for name in (left, right))
    source = TextFile(shared_dir / "data" / "text" / "tinystories_cased_a.txt")
    fitted = fit(sender, receiver, source, Recipe(n_texts=192, steps=60, batch_size=8, neighbours=2))
    own, zero_pad, mean = fitted.controls
    for row in fitted.scores:
        assert own.loss < row.loss < min(mean.loss, zero_pad.loss)
    message = Sender(sender, fitted.recipe.codecs[1]).read("Once upon a time there was a little dog.")
    assert Receiver(receiver, fitted.aligner).answer(message, "Who?").ended_by

"""Models that other people trained: the whole path, from fitting to answering, on either grid."""

import pytest

from kvferry.models.load import load
from kvferry.session.receiver import Receiver
from kvferry.session.sender import Sender
from kvferry.train.examples import TextFile
from kvferry.train.fit import DEFAULT_CODECS, fit
from kvferry.train.loop_recipe import LoopRecipe
from kvferry.train.recipe import DataRecipe, FitRecipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CODECS = DEFAULT_CODECS[:3]

PAIRS = [
    ("llama2xs", "stories260K", "sender", "linear(neighbours=2)"),
    ("stories260K", "tinystories656K", "receiver", "classwise(neighbours=2)"),
]


@pytest.mark.parametrize(("left", "right", "grid", "aligner"), PAIRS)
def test_a_fitted_map_lies_between_its_controls_and_the_receivers_own_cache(
    shared_dir, left, right, grid, aligner
):
    sender, receiver = (load(str(shared_dir / "models" / name)) for name in (left, right))
    source = TextFile(shared_dir / "data" / "text" / "tinystories_cased_a.txt")
    data, loop = DataRecipe(texts=128, batch_size=8), LoopRecipe(steps=30)
    fitted = fit(sender, receiver, source, FitRecipe(aligner, CODECS, data, grid, loop=loop))
    losses = {control.name: control.loss for control in fitted.controls}
    own = losses["the receiver's own cache"]
    knows_nothing = min(losses[name] for name in ("cut or padded with zeros", "mean cache", "mean entry"))
    # Trained on answers, a map may tell a receiver more of these texts than its own reading does.
    for closed, trained in zip(fitted.closed_scores, fitted.scores, strict=True):
        assert own < closed.loss and trained.loss <= closed.loss < knows_nothing
    listener = Receiver(receiver, fitted.aligner)
    speaker = Sender(sender, CODECS[1], listener.onto)
    message = speaker.read("Once upon a time there was a little dog.")
    assert listener.answer(message, "Who?").ended_by

"""The bench of a hub: who founded it stays as it is, a receiver of bytes tells letters apart, the command runs."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from typer.testing import CliRunner

from kvferry.align.folder import load_aligner, save_aligner
from kvferry.cli import app
from kvferry.lab.hub_bench import HubSettings, hub_settings_of, hub_sheet, run_hub
from kvferry.lab.hub_fit import HubRecipe, founded, join
from kvferry.models.load import load
from kvferry.models.zoo.worlds import make_item
from kvferry.train.loop_recipe import LoopRecipe
from kvferry.train.route import Route

QUICK = HubRecipe(
    dim=48, neighbours=1, n_texts=16, batch_size=2, founding=LoopRecipe(steps=2), joining=LoopRecipe(steps=2)
)
NO_STEPS = LoopRecipe(steps=0)
CLOSED = replace(QUICK, dim=160, n_texts=64, founding=NO_STEPS, joining=NO_STEPS)
pytestmark = pytest.mark.timeout(600)  # a busy machine takes minutes for what needs seconds


@pytest.fixture(scope="module")
def founders():
    return [load(name) for name in ("llama", "qwen2")]


@pytest.fixture(scope="module")
def hub(founders):
    return founded(founders, QUICK)


def test_a_map_onto_bytes_out_of_a_folder_tells_the_letters_of_a_token_apart(founders, hub, tmp_path):
    sender, receiver = founders
    pair = hub.aligner(sender.name, receiver.name)
    save_aligner(pair, tmp_path / "pair", card="")
    sent = Route(sender, receiver, "receiver").sent([make_item(0).context])
    with torch.no_grad():
        made, again = (one(sent).layer(0)[1][0, 0] for one in (pair, load_aligner(tmp_path / "pair")))
    assert torch.equal(made, again)
    arrived = sent.layer(0)[1][0, 0]
    alike = (arrived[1:] == arrived[:-1]).all(-1)
    assert alike.sum() > 20 and not (made[1:] == made[:-1]).all(-1)[alike][:4].any()


def test_a_newcomer_changes_nothing_but_its_own_halves(founders, hub):
    before = {name: tensor.clone() for name, tensor in hub.state_dict().items()}
    join(hub, load("gemma3"), founders, QUICK)
    after = hub.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert hub.names == ["llama", "qwen2", "gemma3"] and len(after) > len(before)
    assert not any("parametrizations" in name for name in after)
    assert [hub.member(name).places for name in hub.names] == [1, QUICK.places, 1]


def test_recall_over_a_hub_in_closed_form():
    points = run_hub(HubSettings(("llama", "qwen3"), "gemma3", n_items=32, recipe=CLOSED))
    ways = {(point.sender, point.receiver) for point in points}
    assert ways == {way for way in permutations(("llama", "qwen3", "gemma3"), 2) if "gemma3" in way}
    assert min(point.accuracy for point in points if point.receiver == "gemma3") > 0.1  # alone: .005
    assert len(hub_sheet(points).cells) == 4


def test_settings_as_the_command_line_says_them():
    plain = hub_settings_of(200, None, None, 0)
    assert plain == HubSettings()
    few = hub_settings_of(8, 5, 16, 1)
    assert (few.recipe.founding.steps, few.recipe.joining.steps, few.recipe.n_texts) == (5, 5, 16)
    assert few.recipe.founding.learning_rate == plain.recipe.founding.learning_rate


def test_the_command_asks_for_a_hub_or_for_pairs():
    words = ["bench", "pairs", "--hub"]
    refused = CliRunner().invoke(app, [*words, "--pairs", "llama-to-qwen3"])
    assert refused.exit_code == 2 and "--pairs with --hub" in refused.output

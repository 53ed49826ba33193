"""The benches of messages that can stop anywhere: what they compare is what it says, and the commands run."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

import contract
from kvferry.cli import app
from kvferry.codec import roundtrip
from kvferry.codec.ecsq import Ecsq
from kvferry.codec.progressive import Progressive
from kvferry.errors import UsageError
from kvferry.lab.felt import felt_error
from kvferry.lab.progressive_bench import Curve, Settings, cut_curve, ecsq_curve, excess, run_progressive
from kvferry.lab.refine_bench import Answers, Outcome, choose, run_refine
from kvferry.lab.refine_bench import Settings as RefineSettings
from kvferry.lab.wire.subject import make_subject
from kvferry.models.load import load
from profiles import held_profile

KV = contract.cache(((2, 8, 8),) * 2, n_tokens=300, seed=4)


def test_an_error_is_counted_in_steps():
    """Uniform within cells, a twelfth of a squared step."""
    for step in (-256, -192):
        came = roundtrip(Ecsq(step), KV)
        assert felt_error(Ecsq(step), KV, came) == pytest.approx(4.0 ** (step / 64) / 12, rel=0.1)
    profiled = Ecsq(-192, profile=held_profile(KV.geometry).name)
    assert felt_error(profiled, KV, roundtrip(profiled, KV)) == pytest.approx(4.0**-3 / 12, rel=0.1)
    assert felt_error(Ecsq(), KV, KV) == 0


def test_bytes_between_points():
    curve = Curve((4000.0, 8000.0, 16000.0), {"felt": (0.16, 0.04, 0.01)})
    assert curve.bytes_for("felt", 0.04) == pytest.approx(8000)
    assert curve.bytes_for("felt", 0.08) == pytest.approx(4000 * 2**0.5)
    assert np.isnan(curve.bytes_for("felt", 0.2))
    other = Curve((5000.0, 9000.0), {"felt": (0.16, 0.005)})
    assert excess(other, curve) == {"felt": [(5000.0, pytest.approx(0.25))]}


def test_cut_messages_get_better_with_their_length():
    subject = make_subject(load("llama"), 40, 2)
    curve, reference = cut_curve(subject, Progressive(-96)), ecsq_curve(subject, Ecsq(-96), 352)
    for errors in curve.errors.values():
        assert errors[-1] == min(errors) < 0.5 * errors[0]
    pairs = [share for size, share in excess(curve, reference)["felt"] if size > 2000]
    assert len(pairs) > 3
    assert max(pairs) < 0.15


def test_all_kinds_are_measured():
    settings = Settings(("llama",), tokens=24, n_messages=1, n_layers=(2,), step=-200, profile_step=-200)
    points = run_progressive(settings)
    assert [(point.arm, point.recipe["weights"]) for point in points] == [
        (way, weights) for weights in ("own", "profile") for way in ("used", "cap")
    ]


ANSWERS = Answers(
    right=np.array([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 0]]),
    margin=np.array([[5.0, 6, 7, 8], [1, 6, 6, 6], [1, 1, 6, 6], [4, 4, 4, 4]]),
    n_bytes=np.array([[10.0, 20, 30, 50]] * 4),
)


def outcome(margin: float) -> tuple[list[int], list[int], list[float]]:
    one: Outcome = ANSWERS.under(margin)
    return one.rounds.tolist(), one.right.tolist(), one.n_bytes.tolist()


def test_a_rule_asks_for_more_below_its_margin():
    assert outcome(0.0) == ([0] * 4, [1, 0, 0, 1], [10.0] * 4)
    assert outcome(2.0) == ([0, 1, 2, 0], [1, 1, 1, 1], [10.0, 20.0, 30.0, 10.0])
    assert outcome(9.0) == ([2] * 4, [1, 1, 1, 0], [30.0] * 4)
    assert ANSWERS.everything.right.tolist() == [1, 1, 1, 0]


def test_the_margin_of_fewest_bytes_is_chosen_among_those_as_good_as_everything():
    assert 1 < choose(ANSWERS) <= 4
    hopeless = Answers(ANSWERS.right * [0, 0, 0, 1], ANSWERS.margin, ANSWERS.n_bytes)
    assert choose(hopeless) == float("inf")


def test_the_commands(tmp_path):
    runner, file = CliRunner(), tmp_path / "a.json"
    words = ["--tokens", "24", "--messages", "1", "--models", "llama", "--json", str(file)]
    done = runner.invoke(app, ["bench", "progressive", *words])
    assert done.exit_code == 0, done.output
    assert {point["arm"] for point in json.loads(file.read_text())} == {"used", "cap"}
    words = ["--items", "4", "--dev", "4", "--first-bytes", "2600", "--json", str(file)]
    done = runner.invoke(app, ["bench", "refine", *words, "--page", str(tmp_path / "a.md")])
    assert done.exit_code == 0, done.output
    arms = [point["arm"] for point in json.loads(file.read_text())]
    assert arms[0] == "first part"
    assert arms[-3:] == ["at once", "at once, ecsq", "everything"]
    assert "Refining, llama to itself" in (tmp_path / "a.md").read_text()


def test_a_first_part_without_a_chunk_is_refused_and_what_is_named_does():
    small = RefineSettings(n_items=2, n_dev=2, first_bytes=10)
    with pytest.raises(UsageError, match=r"first part of 10 bytes ends .*\. Give at least \d+$") as caught:
        run_refine(small)
    enough = int(caught.value.cure.split()[-1])
    with pytest.raises(UsageError, match=f"{enough - 1} bytes"):
        run_refine(replace(small, first_bytes=enough - 1))
    assert run_refine(replace(small, first_bytes=enough + 60))


def test_a_message_of_one_chunk_cannot_be_cut():
    subject = make_subject(load("llama"), 24, 1)
    with pytest.raises(UsageError, match="bytes"):
        cut_curve(subject, Progressive(n_layers=1))

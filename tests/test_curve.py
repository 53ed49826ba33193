"""The curve: specs and caps, forced choice, what a cap buys, crossings by hand, a run that is ended and goes on."""

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from kvferry.cli import app
from kvferry.errors import BadSpec, CodecNotCovered, FolderError, UnknownName, UsageError
from kvferry.lab.curve.arms import arms_of, question_text
from kvferry.lab.curve.caps import caps_of
from kvferry.lab.curve.choices import nats_of, words_of
from kvferry.lab.curve.crossing import BELOW, Items, draws, isotonic, items_of, ratio, read_off, sampled
from kvferry.lab.curve.exam import Recall, exam_of
from kvferry.lab.curve.ledger import Ledger
from kvferry.lab.curve.outcome import Outcome, measure
from kvferry.lab.curve.plot import draw
from kvferry.lab.curve.result import as_csv, cap_of, curves_of, written
from kvferry.lab.curve.road import Road, bands_of, pair_named, road_of
from kvferry.lab.curve.room import Room, room_of
from kvferry.lab.curve.run import Settings, forecast, jobs_of, require, run_curve
from kvferry.lab.curve.sheets import sheets
from kvferry.lab.curve.snippet import bm25, sentences, snippet
from kvferry.lab.curve.spec import Spec, specs_of
from kvferry.lab.curve.task import Task, task_of
from kvferry.lab.point import Point
from kvferry.models.load import load
from kvferry.models.state import empty, read
from kvferry.models.tokens import encode, join
from kvferry.select.importance import IMPORTANCES, Importance
from kvferry.session.message import text_message
from kvferry.session.receiver import Receiver
from source import ROOT

PLACE = task_of("place:2")
CAPS = caps_of("64,800,...,6400,full")
HALF = "back(proportion=0.5) | int(bits=8)"
SPECS = specs_of(["back | int(bits=4)", "front | int(bits=4)", "all | ecsq"])

pytestmark = pytest.mark.timeout(600)  # a busy machine takes minutes for what needs seconds


@pytest.fixture(scope="module")
def road() -> Road:
    return road_of(("llama", "llama"), None)


@pytest.fixture(scope="module")
def room(road: Road) -> Room:
    return room_of(road, PLACE, SPECS, 8, 0, "test")


# What is said


def test_specs_come_from_words_and_files_once_each(tmp_path: Path):
    file = tmp_path / "specs.txt"
    file.write_text("# ours\nall | ecsq\n\nback(sinks=2) | raw  # text\n")
    found = specs_of(["all|ecsq; front | raw"], file)
    assert [spec.name for spec in found] == ["all | ecsq", "front | raw", "back(sinks=2) | raw"]
    assert [Spec.parse(spec.identity) for spec in found] == list(found)


def test_families_are_who_competes():
    asked = Spec.parse("question | int(bits=4)")
    assert [spec.family for spec in SPECS] == ["tokens | int", "tokens | int", "tokens | ecsq"]
    assert asked.family == "question"
    assert Spec.parse("every_kth | raw").family == "every_kth | raw"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("ecsq", BadSpec),
        ("alll | raw", UnknownName),
        ("all | row", UnknownName),
        ("all | int(bits=9)", BadSpec),
    ],
)
def test_a_wrong_spec_is_refused(text: str, error: type[Exception]):
    with pytest.raises(error):
        Spec.parse(text)


@pytest.mark.parametrize("text", ["", "x", "0", "...,64", "64,...", "64,...,full", "-3", "6.5"])
def test_wrong_caps_are_refused(text: str):
    with pytest.raises(UsageError):
        caps_of(text)


@pytest.mark.parametrize("text", ["place:", "place:x", "continuation:3", "hop", "met:²"])
def test_wrong_tasks_are_refused(text: str):
    if text == "place:":
        assert task_of(text) == task_of("place:8")
        return
    with pytest.raises(UsageError):
        task_of(text)


def test_items_of_dev_and_test_differ_and_seeds_do_too():
    dev, test = (PLACE.items(8, 0, split) for split in ("dev", "test"))
    assert not {item.context for item in dev} & {item.context for item in test}
    assert not {item.context for item in test} & {item.context for item in PLACE.items(8, 1, "test")}
    assert all(one.question == two.question for one, two in zip(test[::2], test[1::2], strict=True))
    assert len(task_of("needle").items(2, 0, "test")[0].context) > 600
    assert task_of("two_hops").items(2, 0, "test")[0].kind == "two_hop"
    with pytest.raises(UsageError, match="even"):
        PLACE.items(7, 0, "test")


def test_pairs_and_models():
    assert pair_named("a-to-b") == ("a", "b")
    for wrong in ("llama", "-to-b", "a-to-"):
        with pytest.raises(UsageError):
            pair_named(wrong)


# Forced choice


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_likeliest_word_is_that_of_reading_every_word(name: str):
    """Read each word alone, in a fresh reading of the whole: the sum over its tokens is the oracle."""
    model = load(name)
    items = PLACE.items(4, 3, "test")
    words = [words_of(model, item.choices) for item in items]
    wanted = [item.choices.index(item.answer) for item in items]
    asked = model.questions([model.prompt.question(item.question) for item in items])
    before = join(model.contexts([item.context for item in items]), asked)
    with torch.no_grad():
        state = empty(model, len(items))
        logits = read(state, before)[:, -1]
        n_slots = state.positions.shape[1]
        found = nats_of(state, logits, words, wanted)
        assert state.positions.shape[1] == n_slots
        for row, item in enumerate(items):
            exact = [_nats(model, before.row(row)[0], word) for word in words[row]]
            best = int(np.argmin(exact))
            assert int(found[row].argmin()) == best
            assert found[row][[best, wanted[row]]] == pytest.approx(
                [exact[best], exact[wanted[row]]], abs=1e-3
            )
            assert (found[row] <= np.array(exact) + 1e-3).all(), item


def _nats(model, before: list[int], word: tuple[int, ...]) -> float:
    ids = torch.tensor([[*before, *word]])
    nats = -model.hf(ids).logits[0].double().log_softmax(-1)
    return float(sum(nats[len(before) - 1 + i, number] for i, number in enumerate(word)))


def test_words_that_begin_others_end_with_their_newline():
    model = load("qwen2")
    one, two = words_of(model, ("Al", "Alma"))
    newline = encode(model.tokenizer, ["\n"]).ids[0].tolist()
    assert one[-len(newline) :] == two[-len(newline) :] == tuple(newline)
    assert words_of(model, ("Bath", "Oslo"))[0][-1] != newline[0]


# Text


def test_a_snippet_finds_what_the_question_is_about():
    text = "Ann has tea in Oslo. Ben has salt in Rome. Cleo has jam in Bath."
    assert snippet(text, "Where is the salt?", 24) == "Ben has salt in Rome."
    assert snippet(text, "Where is the salt?", 10) is None
    assert snippet(text, "Where is the salt?", 1000) == text
    scores = bm25(sentences(text), "salt in")
    assert scores[1] > scores[0] == scores[2] > 0


def test_text_under_caps_counts_the_question_and_keeps_the_cap(room: Room):
    for cap in (90, 120, 160):
        sent = question_text(room, 0, cap)
        assert sent.request_bytes == len(text_message(room.exam.questions[0]))  # type: ignore[index]
        assert sent.message is None or len(sent.message) <= cap
    refused = question_text(room, 0, 90)
    assert refused.message is None
    assert question_text(room, 0, refused.smallest_bytes).message is not None


# Caps and outcomes


def test_a_cap_that_nothing_meets_names_one_that_all_meet(room: Room):
    [arm] = [arm for arm in arms_of(SPECS[:1], questions=True) if arm.spec]
    refused = measure(room, arm, 64)
    assert (refused.error, refused.n_sent, sum(refused.score)) == ("BudgetTooSmall", 0, 0.0)
    met = measure(room, arm, refused.smallest_cap)
    assert met.error is None and met.n_sent == room.n
    assert max(size or 0 for size in met.message_bytes) <= refused.smallest_cap  # type: ignore[operator]


def test_items_that_do_not_fit_are_wrong_and_pay_their_cap(room: Room):
    [arm] = [arm for arm in arms_of(specs_of(["all | int(bits=4)"]), questions=True) if arm.spec]
    sizes = sorted(size or 0 for size in measure(room, arm, None).message_bytes)
    cap = sizes[3]
    some = measure(room, arm, cap)
    assert 0 < some.n_sent < room.n
    assert all(some.score[i] == 0 for i, size in enumerate(some.message_bytes) if size is None)
    assert (some.charged(cap) <= cap).all()
    assert [x for x, size in zip(some.charged(cap), some.message_bytes, strict=True) if size is None] == [
        cap
    ] * (room.n - some.n_sent)
    whole, alone = measure(room, arm, None), room.exam.told([""] * room.n, slice(0, room.n))
    for i, size in enumerate(some.message_bytes):
        want = alone.nll[i] if size is None else whole.nll[i]
        assert some.nll[i] == pytest.approx(want, abs=1e-3)


def test_use_of_a_cap_by_hand():
    outcome = Outcome([1.0] * 4, [1.0] * 4, [0.0] * 4, [100, 99, 50, None], [10] * 4, [None, None, None, 130])
    assert outcome.use_of(100) == {"slack_median": 1.0, "share_at_cap": pytest.approx(2 / 3)}
    assert outcome.mean_bytes() == {"message": 83.0, "request": 10.0, "link": (249 + 40) / 4}
    assert outcome.charged(100).tolist() == [110, 109, 60, 110]
    assert outcome.smallest_cap == 130
    refused = replace(outcome, message_bytes=[None] * 4)
    assert refused.error == "BudgetTooSmall"
    assert replace(refused, smallest_bytes=[None] * 4).error == "CodecNotCovered"


def test_what_was_kept_is_told(room: Room):
    arms = {arm.family: arm for arm in arms_of(specs_of([HALF]), questions=True)}
    half, text = arms["tokens | int"], arms["text"]
    outcome = measure(room, half, None)
    slots = [sight.kv.n_tokens for sight in room.sights]
    assert outcome.kept == [math.ceil(n / 2) / n for n in slots]
    assert outcome.selected()["kept_min"] == min(outcome.kept)
    assert outcome.latency_ms()["encode"] > 0
    assert measure(room, text, None).selected() == dict.fromkeys(("kept_mean", "kept_min", "kept_max"))
    assert measure(room, text, None).latency_ms() == {}


def test_a_cache_is_marked_as_a_session_answers(room: Room, road: Road):
    """The receiver's own greedy answer from the same bytes is the word that forced choice finds."""
    [arm] = [arm for arm in arms_of(specs_of(["all | int(bits=8)"]), questions=True) if arm.spec]
    sent = [arm.send(room, index, None).message for index in range(room.n)]
    assert isinstance(room.exam, Recall)
    replies = Receiver(road.receiver).answer_batch(sent, room.exam.questions)  # type: ignore[arg-type]
    answered = [
        float(reply.text == item.answer) for reply, item in zip(replies, room.exam.items, strict=True)
    ]
    assert measure(room, arm, None).score == answered
    assert sum(answered) >= 6


# Crossings


def _items(quality: list[float], n_bytes: list[float], n: int = 40) -> Items:
    """Every block alike in bytes; in score the share `quality` of blocks is right."""
    score = np.array([[1.0] * round(q * n) + [0.0] * (n - round(q * n)) for q in quality])
    sizes = np.repeat(np.array(n_bytes)[:, None], n, 1)
    return Items(sizes, score, np.ones_like(score), np.zeros(n, np.int64), 1)


SIZES = [100.0 * 2**power for power in range(8)]


def test_a_crossing_by_hand():
    quality = [0.0, 0.1, 0.3, 0.2, 0.8, 1.0, 1.0, 1.0]
    found = sampled(_items(quality, SIZES), 0.9).crossing
    assert found.n_bytes == pytest.approx(np.sqrt(1600 * 3200))  # half way between .8 and 1, in log bytes
    assert found.ci95 is not None and found.ci95[0] < found.n_bytes < found.ci95[1]
    assert read_off([SIZES], [quality], 0.25)[0] == pytest.approx(400)  # .3 and .2 are pooled to .25


def test_isotonic_is_the_nearest_monotone_sequence():
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = rng.normal(size=6)
        found = isotonic([values])[0]
        assert (np.diff(found) >= -1e-12).all() and found.sum() == pytest.approx(values.sum(), abs=1e-9)
        for _ in range(50):
            other = np.sort(found + rng.normal(size=6) * 0.1)
            assert np.square(found - values).sum() <= np.square(other - values).sum() + 1e-12


def test_curves_are_never_extended():
    low, high = (sampled(_items([q] * 8, SIZES), 0.9) for q in (0.5, 0.95))
    assert (low.crossing.n_bytes, high.crossing.why) == (None, BELOW)
    assert "8 are needed" in sampled(_items([0, 1.0], SIZES[:2]), 0.9).crossing.why
    assert ratio("a", low, "b", high).verdict == "undecided"


def test_a_ratio_is_exact_where_curves_are_shifted():
    quality = [0.0, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.0]
    one, other = (sampled(_items(quality, [k * size for size in SIZES]), 0.9) for k in (1, 2))
    found = ratio("a", one, "b", other)
    assert (found.ratio, found.verdict) == (pytest.approx(0.5), "fewer bytes")
    assert found.ci95 == (pytest.approx(0.5), pytest.approx(0.5))
    assert ratio("b", other, "a", one).verdict == "more bytes"
    assert ratio("a", one, "a", one).verdict == "undecided"


def test_draws_resample_seeds_and_blocks():
    seeds = np.array([0, 0, 0, 1, 1])
    counts = draws(seeds, 0)
    by_seed = np.stack([counts[:, seeds == seed].sum(1) for seed in (0, 1)], 1)
    assert set(map(tuple, by_seed.tolist())) == {(6.0, 0.0), (3.0, 2.0), (0.0, 4.0)}
    assert counts.mean(0) == pytest.approx(np.ones(5), abs=0.1)


# A run


def test_a_folder_that_is_fitted_anew_is_another_way_of_sending(tmp_path: Path):
    geometry = load("llama").geometry
    spec = Spec.parse(f"lagrangian(importance='{tmp_path / 'i'}') | ecsq")
    names = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        IMPORTANCES.save(Importance(geometry), geometry, {"grid": "sender"}, tmp_path / "i", "card")
        names.add(spec.identity)
    assert len(names) == 2


def test_a_look_into_a_ledger_leaves_no_file(road: Road, tmp_path: Path):
    settings = Settings(PLACE, SPECS[:1], CAPS[2:3], 4, 2, 1, text_caps=(128,))
    assert forecast(road, settings, Ledger(tmp_path / "new" / "ledger.jsonl", resume=True)) != []
    assert list(tmp_path.iterdir()) == []


def untimed(points: list[Point]) -> list[Point]:
    return [replace(point, latency_ms={}) for point in points]


def test_a_run_that_is_ended_goes_on_and_gives_the_same_points(road: Road, tmp_path: Path):
    settings = Settings(PLACE, SPECS[:2], CAPS[1:4], 8, 2, 2, text_caps=(128, 320))
    whole = run_curve(road, settings, Ledger(None, resume=False))
    path, n_heard = tmp_path / "ledger.jsonl", 0

    def end_after_20(_: object) -> None:
        nonlocal n_heard
        n_heard += 1
        if n_heard == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_curve(road, settings, Ledger(path, resume=True), end_after_20)
    assert path.read_bytes().count(b"\n") == 20
    path.write_bytes(path.read_bytes()[:-100])  # killed in the middle of a line
    ledger = Ledger(path, resume=True)
    n_left = sum(ledger.get(key) is None for key in _keys(path.read_bytes()))
    assert n_left == 0 and path.read_bytes().count(b"\n") == 19
    resumed = run_curve(road, settings, ledger)
    assert untimed(resumed.points) == untimed(whole.points)
    assert (resumed.crossings, resumed.best, resumed.ratios) == (whole.crossings, whole.best, whole.ratios)
    assert forecast(road, settings, ledger) == []
    assert path.read_bytes().count(b"\n") == len(jobs_of(settings))


def _keys(data: bytes) -> list[str]:
    return [json.loads(row)["key"] for row in data.splitlines()]


def test_a_result_as_tables_files_and_a_picture(road: Road):
    settings = Settings(PLACE, SPECS, CAPS, 8, 2, 1, text_caps=(64, 128, 320))
    result = run_curve(road, settings, Ledger(None, resume=False))
    assert {best.family for best in result.best} == {"text", "question text", "tokens | int", "tokens | ecsq"}
    [chosen] = [best for best in result.best if best.family == "tokens | int"]
    assert chosen.dev is not None and chosen.spec in {"back | int(bits=4)", "front | int(bits=4)"}
    assert all(len(row) == len(sheet.columns) for sheet in sheets(result) for row in sheet.cells)
    rows = list(csv.DictReader(io.StringIO(as_csv(result).decode())))
    assert len(rows) == len(result.points) == len(jobs_of(settings))
    error = next(row for row in rows if row["error"])
    assert (error["cap"], error["error"], error["quality"]) == ("64", "BudgetTooSmall", "")
    assert int(error["smallest_cap"]) > 64
    full = [point for point in result.points if point.arm == "all | ecsq" and cap_of(point) is None]
    assert full[0].accuracy >= 0.75 and full[0].metrics["slack_median"] is None
    for point in result.points:
        if cap_of(point) is not None and not (isinstance(point.recipe, dict) and "error" in point.recipe):
            assert point.n_bytes["message"] <= cap_of(point)  # type: ignore[operator]
            assert point.metrics["slack_median"] >= 0  # type: ignore[operator]
    assert json.loads(written(result))["metric"] == "accuracy"
    pytest.importorskip("matplotlib")
    (axes,) = draw(result).axes
    assert {text.get_text() for text in axes.get_legend().get_texts()} > {"text_end", "all | ecsq"}


def test_dev_is_for_families_with_a_choice(road: Road):
    jobs = jobs_of(Settings(PLACE, SPECS, CAPS, 8, 4, 2))
    assert {job.arm.name for job in jobs if job.split == "dev"} == {
        "back | int(bits=4)",
        "front | int(bits=4)",
    }
    assert not any(job.cap is None for job in jobs if job.arm.name == "text_end")
    lines = [job for job in jobs if job.arm.name == "receiver_only"]
    assert [(job.split, job.seed, job.cap) for job in lines] == [("test", 0, None), ("test", 1, None)]


def test_what_would_fail_later_is_refused_first(road: Road):
    across = road_of(("llama", "gemma3"), _shipped())
    settings = Settings(PLACE, specs_of(["all | int(bits=2)"]), CAPS)
    with pytest.raises(CodecNotCovered, match=r"--aligner DIR"):
        require(across, settings)
    for specs, n, what in (
        (["lagrangian | int(bits=4)"], 8, "no precision classes for lagrangian"),
        (["lightning | ecsq"], 8, "without an indexer"),
        (["all | ecsq"], 3, "even number"),
    ):
        with pytest.raises(UsageError) as refused:
            require(road, Settings(PLACE, specs_of(specs), CAPS, n))
        assert what in str(refused.value)
    stories = Settings(Task("continuation", 0), specs_of(["question | raw"]), CAPS)
    with pytest.raises(UsageError, match="stories ask none"):
        require(road, stories)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs" / "recipes" / "curves").glob("*.txt")), ids=lambda path: path.stem
)
def test_shipped_lists_of_specs_can_be_read(path: Path):
    assert len({spec.family for spec in specs_of([], path)}) >= 3


def _shipped() -> Path:
    from kvferry.align.shipped import aligner_path

    return aligner_path("llama", "gemma3")


def test_a_step_that_the_aligner_does_not_bear_is_refused_and_counted():
    across = road_of(("llama", "gemma3"), _shipped())
    room = room_of(across, PLACE, specs_of(["all | ecsq"]), 4, 0, "test")
    [arm] = [arm for arm in arms_of(specs_of(["all | ecsq"]), questions=True) if arm.spec]
    outcome = measure(room, arm, 700)
    assert (outcome.error, sum(outcome.score)) == ("CodecNotCovered", 0.0)
    assert measure(room, arm, None).error is None


def test_questions_are_part_of_what_is_paid(road: Road):
    specs = specs_of(["question | int(bits=4)", "back | int(bits=4)"])
    room = room_of(road, PLACE, specs, 4, 0, "test")
    asked, blind = (measure(room, arm, 2000) for arm in arms_of(specs, questions=True) if arm.spec)
    assert min(asked.request_bytes) > 80 and set(blind.request_bytes) == {0}
    assert (asked.charged(2000) > blind.charged(2000)).all()


def test_bands_of_steps_meet():
    spec = Spec.parse("all | ecsq(step=100)")
    own, first, second = bands_of((spec,))
    assert own[0] == first[0] == repr(spec.codec) and first[1] == second[0]
    assert bands_of((Spec.parse("all | ecsq(step=500)"),)) == [
        ("ecsq(step=500, weighting=layer, profile=none)",)
    ]


def test_a_damaged_ledger_is_refused_and_another_grid_is_not_taken_for_this_one(road: Road, tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"{}\n")
    with pytest.raises(FolderError, match="no ledger"):
        Ledger(path, resume=True)
    path.unlink()
    one = Settings(PLACE, SPECS[:1], (2000,), n_items=2, n_seeds=1, text_caps=(128,))
    run_curve(road, one, Ledger(path, resume=True))
    held = Ledger(path, resume=True)
    assert forecast(road, one, held) == []
    for other in (replace(one, n_items=4), replace(one, caps=(2001,)), replace(one, task=task_of("place:5"))):
        assert forecast(road, other, held) != []
    assert forecast(road, one, Ledger(path, resume=False)) != []
    assert path.read_bytes().count(b"\n") == len(jobs_of(one))  # kept for whoever resumes


def test_stories_close_the_gap_with_the_whole_cache(shared_dir: Path):
    same = road_of((str(shared_dir / "models" / "stories260K"),) * 2, None)
    task = task_of("continuation")
    room = room_of(same, task, specs_of(["all | raw"]), 6, 0, "test")
    for arm in arms_of(room.specs, questions=False):
        if arm.name in ("text", "all | raw", "receiver_only"):
            outcome = measure(room, arm, None)
            gap = sum(outcome.score) / sum(outcome.weight)
            assert gap == pytest.approx(0.0 if arm.name == "receiver_only" else 1.0, abs=1e-3)
    with pytest.raises(UsageError, match="dev split"):
        exam_of(task, same.sender, same.receiver, 10_000, 0, "dev")


def test_the_command_forecasts_measures_and_resumes(tmp_path: Path):
    words = ["curve", "--pair", "llama-to-llama", "--task", "place:2", "--items", "2", "--dev-items", "2"]
    words += ["--seeds", "1", "--specs", "all | raw", "--caps", "full", "--cache", str(tmp_path)]
    files = {kind: tmp_path / f"curve.{kind}" for kind in ("json", "csv")}
    said = CliRunner().invoke(app, [*words, "--forecast-only"], catch_exceptions=False)
    assert said.exit_code == 0 and "about 0 minutes" in said.stderr and not said.stdout
    outs = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    done = CliRunner().invoke(app, [*words, *outs], catch_exceptions=False)
    assert done.exit_code == 0 and "all | raw" in done.stdout
    assert all(path.stat().st_size for path in files.values())
    again = CliRunner().invoke(app, [*words, "--resume"], catch_exceptions=False)
    assert "s for 500" not in again.stderr and again.exit_code == 0


def test_points_of_one_arm_line_up_for_the_bootstrap(road: Road, tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    settings = Settings(PLACE, SPECS[:1], (1000, 2000), n_items=4, n_seeds=2, text_caps=(128,))
    result = run_curve(road, settings, Ledger(path, resume=True))
    held = Ledger(path, resume=True)
    lines = [held.get(key) for key in _keys(path.read_bytes())]
    items = curves_of([line for line in lines if line], "test", PLACE.block)["back | int(bits=4)"]
    assert items.score.shape == (2, 4) and items.seeds.tolist() == [0, 0, 1, 1]
    for row, cap in enumerate((1000, 2000)):
        own = [p.accuracy for p in result.points if p.arm == "back | int(bits=4)" and cap_of(p) == cap]
        assert items.score[row].sum() / items.weight[row].sum() == pytest.approx(np.mean(own))
    assert items_of([(1, 0, line) for line in lines[:1] if line], 2).block == 2

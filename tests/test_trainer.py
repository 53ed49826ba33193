"""The loop: exact gradients however a batch is read, exact resumption after a kill, and typed ends."""

import json
import math
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import toy_training
from kvferry.errors import FolderError, MissingExtra, TrainingDiverged, UnknownName, UsageError
from kvferry.train.checkpoint import NAME, has_checkpoint
from kvferry.train.journal import Board, Journal, read_journal
from kvferry.train.loop import Loss, Trainer
from kvferry.train.loop_recipe import LoopRecipe
from kvferry.train.processes import Processes
from kvferry.train.reports import Evaluation, Step
from source import ROOT
from toy_training import RECIPE, Toy, batches

SHORT = LoopRecipe(steps=12, learning_rate=0.02, warmup=3)


def run(toy: Toy, recipe: LoopRecipe = SHORT, **more):
    """Train; what was reported, and how it ended."""
    reports: list[Step] = []
    ended = Trainer(toy, toy.loss, batches, recipe, on_step=reports.append, **more).run()
    return reports, ended


def losses(reports: list[Step]) -> list[float]:
    return [report.loss for report in reports]


def gradients(toy: Toy) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in toy.named_parameters()}


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=1e-6)


# What a step does


def test_the_loop_is_adam_with_a_cosine():
    """Against the loop that anybody would write."""
    toy, plain = Toy(noise=0.0), Toy(noise=0.0)
    reports, ended = run(toy)
    optimizer = torch.optim.Adam(plain.parameters(), SHORT.learning_rate)
    for step, rows in enumerate(islice(batches(0), SHORT.steps)):
        warm, angle = min(1.0, (step + 1) / 3), math.pi * step / 12
        optimizer.param_groups[0]["lr"] = 0.02 * warm * (0.01 + 0.99 * (1 + math.cos(angle)) / 2)
        loss = plain.loss(step, rows)
        mean = loss.total / loss.n
        optimizer.zero_grad()
        mean.backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        assert reports[step].loss == pytest.approx(mean.item(), rel=1e-5)
        assert reports[step].gradient_norm == pytest.approx(norm.item(), rel=1e-5)
        assert reports[step].learning_rate == pytest.approx(optimizer.param_groups[0]["lr"])
    assert_close(toy.state_dict(), plain.state_dict())
    assert (ended.steps, ended.loss, ended.best_loss, ended.early) == (12, reports[-1].loss, None, False)


def test_parts_of_the_loss_are_told_as_means():
    reports, _ = run(Toy())
    rows = torch.cat(toy_training.draw(0))
    assert reports[0].parts == {"magnitude": pytest.approx(rows.norm(dim=-1).mean().item())}


@pytest.mark.parametrize("pieces", [2, 3, 7])
def test_a_batch_in_pieces_gives_the_gradient_of_the_whole(pieces):
    whole, parts = Toy(noise=0.0), Toy(noise=0.0)
    run(whole, replace(SHORT, steps=1, clip=math.inf))
    run(parts, replace(SHORT, steps=1, clip=math.inf, accumulate=pieces))
    assert_close(gradients(parts), gradients(whole))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 9))
def test_every_row_is_read_once(n, n_pieces, extra):
    batch = list(range(n * n_pieces + extra))
    read = [row for rank in range(n) for piece in Processes(rank, n).pieces(batch, n_pieces) for row in piece]
    assert sorted(read) == batch


def test_a_batch_smaller_than_its_pieces_is_refused():
    with pytest.raises(UsageError, match=r"a batch of 7 .* 8 pieces\. Give batches of at least 8"):
        run(Toy(), replace(SHORT, accumulate=8))


def test_only_matrices_decay():
    toy = Toy()
    before = {name: tensor.clone() for name, tensor in toy.state_dict().items()}
    recipe = LoopRecipe(steps=1, learning_rate=0.1, warmup=0, weight_decay=0.5)
    Trainer(toy, lambda step, rows: Loss(0 * toy(rows[0]).sum(), 1), batches, recipe).run()
    for name, tensor in toy.state_dict().items():
        share = 1 - 0.1 * 0.5 if name.endswith("weight") else 1.0
        torch.testing.assert_close(tensor, share * before[name])


def test_parameters_have_shares_of_the_rate():
    toy = Toy()
    before = {name: tensor.clone() for name, tensor in toy.state_dict().items()}
    recipe = LoopRecipe(steps=1, learning_rate=0.1, warmup=0, shares={"inner": 0.0, "outer": 0.1})
    run(toy, recipe)
    moved = {name: (tensor - before[name]).abs().max().item() for name, tensor in toy.state_dict().items()}
    assert moved["inner.weight"] == moved["inner.bias"] == 0.0
    assert moved["outer.weight"] == pytest.approx(0.01, rel=1e-3), "Adam's first step is the rate itself"
    with pytest.raises(UnknownName, match=r"'iner'. Known: inner\.bias"):
        run(toy, replace(recipe, shares={"iner": 0.5}))


def test_the_forward_pass_is_bf16_and_the_weights_are_not():
    seen: list[torch.dtype] = []
    toy, plain = Toy(noise=0.0), Toy(noise=0.0)
    toy.outer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    half, full = run(toy, replace(SHORT, precision="bf16"))[0], run(plain)[0]
    assert set(seen) == {torch.bfloat16}
    assert {weight.dtype for weight in toy.parameters()} == {torch.float32}
    assert losses(half) == pytest.approx(losses(full), rel=0.02)
    assert losses(half) != losses(full)


@pytest.mark.parametrize("module", [Toy().requires_grad_(False), Toy().half()])
def test_what_cannot_be_trained_is_refused(module):
    with pytest.raises(UsageError, match=r"no weights to train|torch\.float16"):
        run(module)


WRONG = [
    {"steps": -1},
    {"accumulate": 0},
    {"learning_rate": 0.0},
    {"learning_rate": math.nan},
    {"learning_rate": math.inf},
    {"clip": -1.0},
    {"average": 1.0},
    {"weight_decay": -0.1},
    {"shares": {"a": -1.0}},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_recipes_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError, match="out of range"):
        LoopRecipe(**wrong)


# Chance


def test_the_seed_decides_every_loss():
    one, two = run(Toy())[0], run(Toy())[0]
    assert losses(one) == losses(two)
    assert losses(run(Toy(), replace(SHORT, seed=1))[0]) != losses(one)


def test_every_step_has_its_own_chance():
    drawn: list[float] = []
    toy = Toy()
    loss = lambda step, rows: drawn.append(torch.rand(()).item()) or toy.loss(step, rows)  # noqa: E731
    Trainer(toy, loss, batches, SHORT).run()
    assert len(set(drawn)) == SHORT.steps


def test_looking_at_dev_leaves_no_trace():
    toy = Toy()
    watched = run(toy, replace(SHORT, evaluate_every=2), evaluate=toy.dev)[0]
    assert losses(watched) == losses(run(Toy())[0])


# What is handed back


def said(*numbers: float) -> "partial[float]":
    """A dev split that says these numbers, one after the other."""
    return partial(next, iter(numbers))


def weights_along(recipe: LoopRecipe) -> list[torch.Tensor]:
    """The weights before each step and after the last."""
    toy, kept = Toy(), []
    trainer = Trainer(
        toy,
        lambda s, rows: kept.append(toy.outer.weight.detach().clone()) or toy.loss(s, rows),
        batches,
        recipe,
    )
    trainer.run()
    return [*kept, toy.outer.weight.detach().clone()]


def test_the_best_on_dev_is_handed_back_and_the_start_is_a_candidate():
    recipe, along = replace(SHORT, evaluate_every=4), weights_along(SHORT)
    for numbers, best in (
        ((9, 8, 7, 8), 8),
        ((1, 2, 3, 4), 0),
        ((4, 3, 2, 1), 12),
        ((5, math.nan, 4, math.nan), 8),
    ):
        toy = Toy()
        _, ended = run(toy, recipe, evaluate=said(*numbers))
        assert (ended.best_step, ended.averaged) == (best, False)
        assert ended.best_loss == min(number for number in numbers if number == number)
        assert torch.equal(toy.outer.weight, along[best])


def test_the_average_is_a_mean_and_is_handed_back_where_it_is_better():
    """Of 12 steps at decay 0.99 the average still is the plain mean."""
    mean = torch.stack(weights_along(SHORT)[1:]).mean(0)
    recipe, toy, told = replace(SHORT, average=0.99), Toy(), []
    _, ended = run(toy, recipe, evaluate=said(3, 2, 1), on_evaluation=told.append)
    torch.testing.assert_close(toy.outer.weight.detach(), mean)
    assert (ended.averaged, ended.best_loss) == (True, 1)
    assert told == [Evaluation(0, 3, None, 3), Evaluation(12, 2, 1, 1)]
    unasked = Toy()
    assert run(unasked, recipe)[1].averaged
    torch.testing.assert_close(unasked.outer.weight.detach(), mean)


def test_a_short_average_forgets():
    along = weights_along(SHORT)
    expected = (along[1] + along[2]) / 2
    for weights in along[3:]:
        expected = expected.lerp(weights, 0.5)
    toy = Toy()
    run(toy, replace(SHORT, average=0.5))
    torch.testing.assert_close(toy.outer.weight.detach(), expected)


def test_patience_ends_the_training():
    recipe, toy = replace(SHORT, evaluate_every=2, patience=2), Toy()
    reports, ended = run(toy, recipe, evaluate=said(5, 4, 6, 6, 1))
    assert len(reports) == 6
    assert (ended.steps, ended.best_step, ended.early) == (6, 2, True)


# Numbers that are none


def poisoned(toy: Toy, at: int, kept: list[torch.Tensor]):
    """The loss of the toy, NaN from a step on."""

    def loss(step, rows):
        kept.append(toy.outer.weight.detach().clone())
        found = toy.loss(step, rows)
        return Loss(found.total * (math.nan if step >= at else 1), found.n)

    return loss


def test_a_loss_that_is_no_number_stops_the_training(tmp_path):
    toy, kept = Toy(), []
    recipe = replace(SHORT, checkpoint_every=2)
    with pytest.raises(TrainingDiverged, match=r"loss is nan.* at step 5.*Lower the learning rate") as caught:
        Trainer(toy, poisoned(toy, 5, kept), batches, recipe, folder=tmp_path).run()
    assert caught.value.step == 5
    assert torch.equal(toy.outer.weight, kept[4]), "the last weights whose loss was finite"
    file = load_file(tmp_path / NAME)
    assert torch.equal(file["module.outer.weight"], kept[4]), "the checkpoint of step 4 is still there"
    mended = Toy()
    assert len(run(mended, recipe, folder=tmp_path)[0]) == 8, "and it can be gone on from"


def test_the_best_on_dev_survives_a_loss_that_is_no_number():
    toy, kept = Toy(), []
    recipe = replace(SHORT, evaluate_every=2)
    with pytest.raises(TrainingDiverged, match="the best on dev, of step 2"):
        Trainer(toy, poisoned(toy, 5, kept), batches, recipe, evaluate=said(3, 1, 2)).run()
    assert torch.equal(toy.outer.weight, kept[2])


def test_weights_that_explode_reach_neither_dev_nor_a_checkpoint(tmp_path):
    """The loss is finite, and the step from there leads beyond what fp32 can hold."""
    module = nn.Linear(1, 1)
    nn.init.constant_(module.weight, 3.3e38)
    recipe = LoopRecipe(steps=1, learning_rate=3e37, warmup=0, clip=math.inf)

    def loss(step, rows):
        return Loss(-1e-4 * module.weight.sum(), 1)

    with pytest.raises(TrainingDiverged, match="weights are not finite at step 1"):
        Trainer(module, loss, batches, recipe, evaluate=said(0.0), folder=tmp_path).run()
    assert not has_checkpoint(tmp_path)
    assert module.weight.item() == pytest.approx(3.3e38)


# Going on


@contextmanager
def script(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, toy_training.__file__, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        yield running


def test_a_killed_training_goes_on_bit_for_bit(tmp_path):
    whole, again, looks, later = Toy(), Toy(), [], []
    wanted, _ = run(whole, RECIPE, evaluate=whole.dev, folder=tmp_path / "whole", on_evaluation=looks.append)
    with script(tmp_path / "cut", 0.05) as running:
        next(line for line in running.stdout or () if line.startswith("17 "))
        running.send_signal(signal.SIGKILL)
    assert running.returncode == -signal.SIGKILL
    rest, _ = run(again, RECIPE, evaluate=again.dev, folder=tmp_path / "cut", on_evaluation=later.append)
    first = rest[0].step
    assert 15 <= first <= 20, "it goes on from the last checkpoint"
    assert [(report.step, report.loss) for report in rest] == [(r.step, r.loss) for r in wanted[first:]]
    assert later == [look for look in looks if look.step > first]
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


def test_what_has_ended_stays_as_it_ended(tmp_path):
    toy, again = Toy(), Toy()
    recipe = replace(RECIPE, patience=1)
    numbers = (5, 4, 4.5, 3, 3.5, 6, 6)
    _, first = run(toy, recipe, evaluate=said(*numbers), folder=tmp_path)
    reports, second = run(again, recipe, evaluate=said(), folder=tmp_path)
    assert (reports, second) == ([], first)
    assert first.early
    assert torch.equal(toy.outer.weight, again.outer.weight)


def test_going_on_needs_the_same_recipe_and_identity(tmp_path):
    run(Toy(), SHORT, folder=tmp_path, identity={"data": "a"})
    with pytest.raises(UsageError, match=r"learning_rate=0\.02, not 0\.1"):
        run(Toy(), replace(SHORT, learning_rate=0.1), folder=tmp_path, identity={"data": "a"})
    with pytest.raises(UsageError, match="data='a', not 'b'"):
        run(Toy(), SHORT, folder=tmp_path, identity={"data": "b"})


@given(st.integers(0, 2**30), st.integers(1, 255))
def test_a_damaged_checkpoint_is_refused(tmp_path_factory, place, change):
    folder = tmp_path_factory.mktemp("damaged")
    data = bytearray(whole_checkpoint())
    data[place % len(data)] ^= change
    (folder / NAME).write_bytes(data)
    with pytest.raises(FolderError, match="Delete the file"):
        run(Toy(), replace(SHORT, steps=1), folder=folder)


def test_a_checkpoint_that_was_cut_or_is_of_another_module_is_refused(tmp_path):
    (tmp_path / NAME).write_bytes(whole_checkpoint()[:-1])
    with pytest.raises(FolderError, match="Delete the file"):
        run(Toy(), replace(SHORT, steps=1), folder=tmp_path)
    (tmp_path / NAME).write_bytes(whole_checkpoint())
    other = Toy()
    other.outer = nn.Linear(8, 4)
    with pytest.raises(FolderError, match="of another module"):
        run(other, replace(SHORT, steps=1), folder=tmp_path)


def whole_checkpoint(found: list[bytes] = []) -> bytes:  # noqa: B006 (made once)
    if not found:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            run(Toy(), replace(SHORT, steps=1), folder=Path(folder))
            found.append((Path(folder) / NAME).read_bytes())
    return found[0]


@contextmanager
def full_disk(n_bytes: int) -> Iterator[None]:
    """No file may grow beyond this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    recipe = replace(SHORT, steps=4, checkpoint_every=2)

    def fill(report: Step) -> None:
        if report.step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    toy = Toy()
    with full_disk(10**9), pytest.raises(FolderError, match=r"cannot write .*Free space there and run again"):
        Trainer(toy, toy.loss, batches, recipe, folder=tmp_path, on_step=fill).run()
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    reports, _ = run(Toy(), recipe, folder=tmp_path)
    assert [report.step for report in reports] == [2, 3]


# Several processes


def test_two_processes_give_the_gradient_of_one(tmp_path):
    """Rows of different lengths, so that a mean of means would be off."""
    alone = Toy(noise=0.0)
    run(alone, replace(toy_training.ONE_STEP, accumulate=1))
    with script(tmp_path, 0, 0, 2) as one, script(tmp_path, 0, 1, 2) as other:
        for process in (one, other):
            _, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
    assert_close(load_file(tmp_path / "gradient.safetensors"), gradients(alone))


# The journal


def report(step: int, **parts: float) -> Step:
    return Step(step, 0.5, 1.0, 1e-3, 0.01, parts)


def test_the_journal_is_json_lines_and_survives_a_kill(tmp_path):
    path = tmp_path / "run" / "journal.jsonl"
    with Journal(path) as journal:
        journal.evaluation(Evaluation(0, 3.0, None, 3.0))
        for step in range(4):
            journal.step(report(step, cosine=0.9))
            if step == 1:
                journal.evaluation(Evaluation(2, 2.0, math.inf, 2.0))
        assert len(path.read_text().splitlines()) == 6, "written through before it is closed"
    with path.open("a") as file:
        file.write('{"event": "st')
    with Journal(path) as journal:
        journal.step(report(2))
    events = [(row["event"], row["step"]) for row in read_journal(path)]
    assert events == [("evaluation", 0), ("step", 0), ("step", 1), ("evaluation", 2), ("step", 2)]
    rows = read_journal(path)
    assert rows[1]["parts"] == {"cosine": 0.9}
    assert rows[3]["averaged_loss"] is None, "JSON has no infinity"
    with Journal(path) as journal:
        journal.evaluation(Evaluation(0, 3.0, None, 3.0))
    assert len(read_journal(path)) == 1, "a new training begins a new journal"


def test_a_magnitude_out_of_bounds_is_an_alarm(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, bounds={"magnitude": (0.5, 2.0)}) as journal:
        for step, magnitude in enumerate((1.0, 2.5, math.nan)):
            journal.step(report(step, magnitude=magnitude))
    alarms = [row for row in read_journal(path) if row["event"] == "alarm"]
    assert [(row["step"], row["value"]) for row in alarms] == [(1, 2.5), (2, None)]
    assert journal.alarms == {"magnitude"}


def test_a_journal_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(FolderError, match="cannot write to"):
        Journal(tmp_path).step(report(0))
    with full_disk(150), Journal(tmp_path / "journal.jsonl") as journal:
        journal.step(report(0))
        with pytest.raises(FolderError, match="cannot write to"):
            journal.step(report(1))
    assert [row["step"] for row in read_journal(tmp_path / "journal.jsonl")] == [0]


def test_tensorboard_gets_the_same_numbers(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = Board(tmp_path)
    board.step(report(3, cosine=0.25))
    board.evaluation(Evaluation(4, 2.0, 1.0, 1.0))
    board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]} == pytest.approx(
        {
            "train/loss": 0.5,
            "train/gradient_norm": 1.0,
            "train/rate": 1e-3,
            "train/cosine": 0.25,
            "dev/loss": 2.0,
            "dev/averaged_loss": 1.0,
        }
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtra, match=r"kvferry\[tensorboard\]"):
        Board(tmp_path)


def test_a_training_writes_its_journal(tmp_path):
    toy = Toy()
    with Journal(tmp_path / "journal.jsonl") as journal:
        reports, _ = run(toy, SHORT)
        recipe = replace(SHORT, evaluate_every=6)
        trainer = Trainer(
            Toy(),
            toy.loss,
            batches,
            recipe,
            evaluate=toy.dev,
            on_step=journal.step,
            on_evaluation=journal.evaluation,
        )
        trainer.run()
    rows = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows].count("evaluation") == 3
    assert len(rows) == len(reports) + 3


# The page


def test_the_first_training_of_the_page_runs(tmp_path, monkeypatch, capsys):
    """With fewer steps and smaller batches."""
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.S)
    for old, new in (("steps=40", "steps=10"), ("size=32", "size=8"), ("size=8", "size=4")):
        assert old in code
        code = code.replace(old, new)
    exec(compile(code, "docs/training.md", "exec"), {})
    assert "Trained(steps=10" in capsys.readouterr().out
    told = [row for row in read_journal(tmp_path / "run" / "journal.jsonl") if row["event"] == "evaluation"]
    assert told[-1]["best"] < 0.9 * told[0]["loss"]


def test_the_page_says_every_setting_and_its_default():
    page = (ROOT / "docs" / "training.md").read_text().split("`LoopRecipe`")[1].split("With `evaluate`")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", page, re.M))
    assert set(rows) | {"warmup"} == {field.name for field in fields(LoopRecipe)}
    for name, written in rows.items():
        value = getattr(LoopRecipe(), name)
        assert written == str(value) or (not value and written == "none") or float(written) == value

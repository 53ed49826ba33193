"""The judge: items, arms, and a whole demo of eight items between two real processes."""

import io
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from rich.console import Console

from kvferry.align.folder import load_contract
from kvferry.align.shipped import aligner_path
from kvferry.errors import CodecNotCovered, FolderError, PeerLost, UsageError
from kvferry.lab.arms import ARMS, Reading, arms_for, family_of, last_bytes, mean_groups
from kvferry.lab.compare import pairs
from kvferry.lab.demo import Demo, DemoResult, run_demo
from kvferry.lab.items import Batch, Worlds, chance, right
from kvferry.lab.ledger import load_result, save_result, write_file
from kvferry.lab.peer import receiver_process
from kvferry.lab.point import Point, commit, machine, versions
from kvferry.lab.report import write_report
from kvferry.lab.summary import controls, summary
from kvferry.lab.table import rich_table
from kvferry.session.sender import Sender

SENDER, RECEIVER = "llama", "gemma3"

pytestmark = pytest.mark.timeout(600)  # a busy machine takes minutes to start a process that needs seconds


@pytest.fixture(scope="module")
def sender() -> Sender:
    return Sender(SENDER)


@pytest.fixture(scope="module")
def reading(sender: Sender) -> Reading:
    worlds = Worlds()
    (batch,) = worlds.twins(6, seed=5)
    mean = mean_groups(sender.capture(worlds.others(4, seed=5)))
    return Reading(batch, sender.capture(batch.contexts), mean)


@pytest.fixture(scope="module")
def result() -> DemoResult:

    return run_demo(Demo(SENDER, RECEIVER, str(aligner_path(SENDER, RECEIVER)), n_items=8))


# Items


def test_items_are_twins():
    items = [item for batch in Worlds().twins(130, seed=0) for item in batch.items]
    for one, two in zip(items[::2], items[1::2], strict=True):
        assert one.question == two.question
        assert one.answer != two.answer
        assert one.context != two.context
    assert {item.kind for item in items} == {"place", "met"}


def test_batches_hold_64_and_twins_stay_together():
    batches = Worlds().twins(130, seed=0)
    assert [len(batch.items) for batch in batches] == [64, 64, 2]
    assert batches[0].twins.twins == batches[0]
    assert batches[0].twins.questions == batches[0].questions


def test_seeds_draw_other_items_and_the_same_again():
    assert Worlds().twins(4, seed=1) == Worlds().twins(4, seed=1)
    assert Worlds().twins(4, seed=1) != Worlds().twins(4, seed=2)


def test_the_mean_cache_reads_other_texts():
    tested = {context for batch in Worlds().twins(200, seed=0) for context in batch.contexts}
    assert not tested & set(Worlds().others(64, seed=0))


@pytest.mark.parametrize("n_items", [0, 1, 7, -2])
def test_items_without_twin_are_refused(n_items: int):
    with pytest.raises(UsageError, match="even number"):
        Worlds().twins(n_items, seed=0)


def test_chance_counts_the_words_of_the_type():
    one, two = Worlds(kinds=("place",)).twins(2, seed=0)[0].items
    batch = Batch((replace(one, choices=("a", "b")), replace(two, choices=("a",) * 4)))
    assert chance([batch]) == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_only_the_whole_answer_is_right():
    assert right(["Oslo", " Oslo\n", "Oslo.", "oslo", ""], ["Oslo"] * 5).tolist() == [1, 1, 0, 0, 0]


# Arms


@pytest.mark.parametrize("n_bytes", [16, 32, 64])
def test_texts_keep_the_cap_and_cut_between_characters(n_bytes: int):
    text = "Zoë hält Öl in Łódź. 日本語も読める。" * 3
    end = last_bytes(text, n_bytes)
    assert text.endswith(end)
    assert n_bytes - 3 <= len(end.encode()) <= n_bytes


def test_every_arm_makes_one_message_per_item(sender: Sender, reading: Reading):
    for arm in ARMS:
        messages = arm.pack(arm.sender(sender), reading)
        assert len(messages) == len(reading.batch.items)
        assert all(message.is_text == (arm.codec is None) for message in messages)


def test_text_arms_carry_text(sender: Sender, reading: Reading):
    texts = {arm.name: [m.text for m in arm.pack(sender, reading)] for arm in ARMS if arm.codec is None}
    assert texts["receiver_only"] == [""] * 6
    assert texts["text_full"] == texts["text_zstd"] == reading.batch.contexts
    assert all(
        text.endswith(end) for text, end in zip(reading.batch.contexts, texts["text_at_32"], strict=True)
    )


def test_controls_look_like_caches(sender: Sender, reading: Reading):
    made = {arm.name: arm.pack(arm.sender(sender), reading) for arm in ARMS}
    own = made["kv_int8"]
    assert made["kv_twin"] == [own[index ^ 1] for index in range(6)]
    for name in ("kv_zeroed", "kv_mean"):
        assert [message.frame.n_tokens for message in made[name]] == [
            message.frame.n_tokens for message in own
        ]
        assert all(a != b for a, b in zip(made[name], own, strict=True))


def test_the_mean_skips_padding(sender: Sender):
    texts = ["Ann has tea in Oslo.", "Ben met Cleo. Dan has rope in Lima. The sun is up."]
    batch = sender.capture(texts)
    mean = mean_groups(batch)
    for group, found in zip(batch.groups, mean, strict=True):
        for row, layer in enumerate(group.layers):
            tokens = torch.cat([group.keys[row, i][:, batch.present[layer, i]] for i in range(2)], dim=1)
            torch.testing.assert_close(found.keys[row, 0, :, 0], tokens.mean(1))


def test_comparisons_name_arms():
    named = {name for pair in pairs(["kv_raw", "kv_int8", "kv_int4"]) for name in pair}
    assert named <= {arm.name for arm in ARMS} | {"sender_alone"}


def test_an_aligner_brings_its_steps_and_must_bear_the_common_codecs():
    common = ("raw(dtype=float16)", "int(bits=8, group=32, axis=token, centred=False, scale=float16)")
    int4 = "int(bits=4, group=32, axis=token, centred=False, scale=float16)"
    own, profiled = (
        "ecsq(step=-64, weighting=layer, profile=none)",
        "ecsq(step=8, weighting=layer, profile=x)",
    )
    assert arms_for((*common, int4)) == ARMS
    brought = arms_for((*common, int4, own, profiled))[len(ARMS) :]
    assert [(arm.name, arm.codec) for arm in brought] == [("kv_ecsq_-64", own), ("kv_profile_8", profiled)]
    with pytest.raises(CodecNotCovered, match="bits=4"):
        arms_for(common)


# Points


def test_a_point_tells_no_names_and_no_paths():
    said = f"{machine()} {versions()} {commit()}"
    assert os.uname().nodename not in said
    assert str(Path.home()) not in said
    assert re.fullmatch(r"unknown|[0-9a-f]{12}\+?", commit())


# The demo


def test_every_arm_is_measured(result: DemoResult):
    arms = [arm.name for arm in arms_for(load_contract(aligner_path("llama", "gemma3")).coded_with)]
    assert [row.arm for row in result.rows] == [*arms, "sender_alone"]
    caches = [arm for arm in arms if family_of(arm) == "cache"]
    assert {"kv_ecsq_-64", "kv_profile_144"} < set(caches)
    assert all(row.n == 8 for row in result.rows)
    assert [(test.a, test.b) for test in result.tests] == pairs(caches)
    assert result.chance == pytest.approx((1 / 24 + 1 / 32 + 1 / 32 + 1 / 32) / 4, abs=0.01)


def test_two_processes_and_none_left(result: DemoResult):
    sender, receiver = (int(process["pid"]) for process in result.processes)
    assert sender == os.getpid() != receiver
    with pytest.raises(ProcessLookupError):
        os.kill(receiver, 0)


def test_the_cache_carries_what_was_read(result: DemoResult):
    assert result.row("kv_raw").accuracy >= 0.75
    assert result.row("kv_int8").accuracy >= 0.75
    assert (result.row("kv_twin").metrics["follows_payload"] or 0) >= 0.75
    assert max(result.row(arm).accuracy for arm in ("receiver_only", "kv_zeroed", "kv_mean")) <= 0.5


def test_bytes_are_counted(result: DemoResult):
    for row in result.rows[:-1]:
        assert row.n_bytes["link"] > row.n_bytes["message"] > 0
    sizes = [
        result.row(arm).n_bytes["message"]
        for arm in ("text_at_16", "text_at_64", "kv_int4", "kv_int8", "kv_raw")
    ]
    assert sizes == sorted(sizes)


def test_stages_are_timed(result: DemoResult):
    times = result.row("kv_int8").latency_ms
    assert list(times) == ["capture", "encode", "link", "decode", "align", "prefill", "generate", "total"]
    assert all(ms > 0 for ms in times.values())
    assert "capture" not in result.row("text_full").latency_ms


def test_json_in_is_json_out(result: DemoResult, tmp_path: Path):
    save_result(result, tmp_path / "result.json")
    assert load_result(tmp_path / "result.json") == result
    row = TypeAdapter(Point).dump_python(result.rows[0], mode="json")
    assert {
        "arm",
        "recipe",
        "metrics",
        "ci95",
        "n_bytes",
        "latency_ms",
        "machine",
        "versions",
        "commit",
    } <= set(row)


def test_the_report_needs_nothing_else(result: DemoResult, tmp_path: Path):
    page = write_report(result, tmp_path / "new").read_text()
    assert "<svg" in page
    assert not re.search(r"(src|href)=\"http|@import|<script", page)
    assert all(row.arm in page for row in result.rows)
    assert {file.name for file in (tmp_path / "new").iterdir()} == {
        "picture.png", "picture.svg", "report.html", "result.json",
    }  # fmt: skip


def test_the_table_fits_a_terminal(result: DemoResult):
    console = Console(width=80, file=io.StringIO())
    console.print(rich_table(result))
    text = console.file.getvalue()
    assert "…" not in text
    assert "receiver_only" in text


def test_words_follow_the_numbers(result: DemoResult):
    small = "even the smallest cache is"
    assert small in " ".join(summary(result))
    rows = [
        replace(row, n_bytes={"message": 9.0 if row.arm == "kv_profile_144" else 1e6, "link": 0.0})
        for row in result.rows
    ]
    assert small not in " ".join(summary(replace(result, rows=rows)))
    assert len(controls(result)) == 5


def test_a_receiver_that_does_not_start_says_why():
    with pytest.raises(PeerLost, match="unknown model 'qwen33'"), receiver_process(SENDER, "qwen33", None):
        pass


# Files


def test_a_failed_write_leaves_the_old_file(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="cannot write"):
        write_file(tmp_path / "folder", b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_a_file_that_is_no_result(tmp_path: Path):
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(FolderError, match="kvferry demo --json"):
        load_result(tmp_path / "bad.json")

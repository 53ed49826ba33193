"""Measured against analytic bytes: every byte has its place, and a formula is held to the message."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import contract
from kvferry.cli import app
from kvferry.codec import CODECS
from kvferry.codec.estimate import estimate
from kvferry.errors import UsageError
from kvferry.lab.drift import MAX_DRIFT, contexts, drifts
from kvferry.session.sender import Sender
from kvferry.wire import SegmentType
from specs import SPECS

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def sender() -> Sender:
    return Sender("llama")


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "zstd" not in spec])
def test_the_formula_is_the_payload(spec):
    codec, kv = CODECS.parse(spec), contract.cache(contract.RAGGED)
    found = estimate(codec, kv)
    if found is not None:
        bodies = codec.encode(kv).bodies(SegmentType.PAYLOAD)
        assert found.payload + found.scales == sum(len(body) for body in bodies)


def test_scales_and_means_are_counted_apart():
    kv = contract.cache(((2, 8, 8),), n_tokens=5)
    assert estimate(CODECS.parse("raw"), kv).scales == 0
    plain = estimate(CODECS.parse("int(4, group=4)"), kv)
    assert (plain.payload, plain.scales) == (80, 2 * 2 * 2 * 5 * 2)
    centred = estimate(CODECS.parse("int(4, group=4, centred=True)"), kv)
    assert centred.scales == plain.scales + 2 * 2 * 8


def test_every_byte_has_its_place(sender):
    texts = contexts(6)
    for row in drifts(sender, [CODECS.parse(spec) for spec in ("raw", "int(4)", "int(4, zstd=3)")], texts):
        assert row.n == 6
        assert sum(row.breakdown.values()) == pytest.approx(row.measured.mean)
        assert row.measured.median <= row.measured.p95
        assert row.drift == pytest.approx(row.measured.mean / row.analytic.mean - 1)
        assert not row.flagged


def test_headers_of_small_messages_are_flagged(sender):
    """T1: the drift of a message of few tokens is its header, and is told."""
    (row,) = drifts(sender, [CODECS.parse("int(2)")], ["Ann has tea."])
    assert row.flagged and row.drift > MAX_DRIFT
    body = row.breakdown["payload"] + row.breakdown["scales"]
    assert body == pytest.approx(row.analytic.mean)
    assert row.measured.mean - body == pytest.approx(row.breakdown["headers"] + row.breakdown["indices"])


def test_the_command_prints_and_writes(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    file = tmp_path / "bytes.json"
    words = ["bytes", "--n", "3", "--codecs", "int(4); raw", "--json", str(file)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "llama: int(bits=4)" in done.stdout
    found = json.loads(file.read_text())
    assert [row["codec"] for row in found["codecs"]] == ["int(bits=4)", "raw"]
    assert set(found["codecs"][0]["breakdown"]) == {"indices", "payload", "scales", "headers"}
    assert CliRunner().invoke(app, ["bytes", "--codecs", "itn"]).exit_code == 2


def test_no_contexts():
    with pytest.raises(UsageError, match="0 contexts"):
        contexts(0)

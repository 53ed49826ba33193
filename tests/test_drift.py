"""Measured against analytic bytes: every byte has its place, and a formula is held to the message."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import contract
from kvferry.cli import app
from kvferry.codec import CODECS
from kvferry.codec.ecsq import Ecsq
from kvferry.codec.estimate import Estimate, estimate
from kvferry.codec.fixed import FixedRate
from kvferry.errors import UsageError
from kvferry.lab.drift import MAX_DRIFT, contexts, drifts
from kvferry.session.sender import Sender
from kvferry.wire import SegmentType
from profiles import held_profile
from specs import SPECS

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def sender() -> Sender:
    return Sender("llama")


FIXED = [spec for spec in SPECS if "zstd" not in spec and isinstance(CODECS.parse(spec), FixedRate)]


@pytest.mark.parametrize("spec", FIXED)
def test_the_formula_is_the_payload(spec):
    codec, kv = CODECS.parse(spec), contract.cache(contract.RAGGED)
    found, bodies = estimate(codec, kv), codec.encode(kv).bodies(SegmentType.PAYLOAD)
    assert found is not None
    assert found.payload + found.scales == sum(len(body) for body in bodies)


@pytest.mark.parametrize("step", [-500, -64, 200])
@pytest.mark.parametrize("n_tokens", [1, 7, 300])
@pytest.mark.parametrize("with_profile", [False, True])
def test_the_ideal_of_the_entropy_coder_is_nearly_the_payload(n_tokens, step, with_profile):
    """Beside it are two lengths, a state for each lane, and less than a byte of padding and a word for each run."""
    kv = contract.cache(contract.RAGGED, n_tokens=n_tokens)
    codec = Ecsq(step, profile=held_profile(kv.geometry).name if with_profile else "none")
    found, (body,) = estimate(codec, kv), codec.encode(kv).bodies(SegmentType.PAYLOAD)
    assert 1 < len(body) - found.payload - found.scales < 3 + 4 * (1 << body[0]) + 3
    assert (found.scales == 0) == with_profile


def test_the_ideal_of_nothing():
    kv = contract.cache(n_tokens=0)
    assert estimate(Ecsq(), kv) == Estimate(0, 0)


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

"""A slice of `make fuzz`: some thousand mutated frames of every seed, always the same ones."""

import pytest

from fuzz import oracle
from fuzz.run import run_chunk
from fuzz.seeds import seeds
from fuzz.structure import parts_of, written

FRAMES = [seed for seed in seeds() if not seed.datagrams]


@pytest.mark.parametrize("seed", FRAMES, ids=lambda seed: seed.name)
def test_a_seed_is_read_and_can_be_taken_apart(seed):
    assert oracle.check(seed, seed.data) == "read"
    assert written(parts_of(seed)) == seed.data
    oracle.check_aside(seed, seed.data)
    oracle.check_memory(seed, seed.data)
    oracle.check_paths(seed, seed.data)


@pytest.mark.parametrize("seed_number", range(4))
def test_a_slice(seed_number):
    report = run_chunk(seed_number, 0, 1500)
    assert report.findings == []
    # Every kind of outcome occurs: the changes reach what lies behind the checksums.
    assert {"read", "Malformed", "ChecksumMismatch", "Truncated", "ForeignModel", "LimitExceeded"} <= set(
        report.outcomes
    )


def test_a_finding_is_told(monkeypatch):
    def broken(*_):
        raise IndexError("a bug")

    monkeypatch.setattr(oracle, "check", broken)
    report = run_chunk(0, 0, 50)
    assert "--seed 0 --at 0" in report.findings[0] and "a bug" in report.findings[0]
    assert len(report.findings) == 10

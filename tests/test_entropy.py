"""The entropy coder: frozen tables, rANS in numpy and compiled, numbers of any size, and refusal of what is cut."""

import hashlib
from importlib import resources

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.codec.entropy import symbols as sym
from kvferry.codec.entropy.rans import MAX_LANE_BITS, Decoder, Run, encode, lane_count
from kvferry.codec.entropy.rawbits import BitReader, write_bits
from kvferry.codec.entropy.tables import COST_UNIT, INVERSE_BITS, N_TABLES, TOTAL, derive, tables
from kvferry.errors import Malformed
from paths import every_path, on_both, path

FROZEN = "a572bb2d83ac60ad40335c479e6d56e6bf4d51e0905e0fc465e7f4511d8e44d6"
LANES = [1 << bits for bits in range(MAX_LANE_BITS + 1)]
seeds = st.integers(0, 1 << 30)


def test_the_tables_are_frozen():
    stored = resources.files("kvferry.codec.entropy").joinpath("tables.bin").read_bytes()
    assert hashlib.sha256(stored).hexdigest() == FROZEN
    assert derive() == stored


def test_each_table_covers_every_slot():
    table = tables()
    used = 2 * table.reach + 2
    assert (table.frequency.sum(axis=1) == TOTAL).all()
    assert all(
        (row[:n] > 0).all() and not row[n:].any() for row, n in zip(table.frequency, used, strict=True)
    )
    for which in range(N_TABLES):
        assert (np.bincount(table.lookup[which], minlength=128) == table.frequency[which]).all()


def test_a_table_is_symmetric_and_its_centroids_lie_inside_their_cells():
    for reach, row in zip(tables().reach, tables().frequency, strict=True):
        assert (row[:reach] == row[reach + 1 : 2 * reach + 1][::-1]).all()
    assert (np.abs(tables().centroid - np.arange(4)) <= 0.5).all()


def test_the_inverse_of_a_frequency_divides_exactly():
    """Every frequency there can be, at multiples of it, one below, and the ends of the range of a state."""
    f = np.arange(1, TOTAL + 1, dtype=np.uint64)
    inverse = -(-(1 << INVERSE_BITS) // f.astype(np.int64)).astype(np.uint64)
    generator = np.random.default_rng(0)
    for q in (1, 2, 3, 1 << 17, (1 << 18) - 1, 1 << 18, *generator.integers(4, 1 << 18, 40).tolist()):
        for x in (np.uint64(q) * f - np.uint64(1), np.uint64(q) * f):
            x = np.minimum(x, (f << np.uint64(18)) - np.uint64(1))
            assert (x * inverse >> np.uint64(INVERSE_BITS) == x // f).all()


def some_run(generator: np.random.Generator, n: int) -> tuple[Run, np.ndarray]:
    """`n` symbols of some tables, as likely as these say."""
    rows = int(generator.integers(1, 7))
    cuts = np.sort(generator.integers(0, n + 1, rows - 1))
    run = Run(
        generator.integers(0, N_TABLES, rows).astype(np.uint8), np.diff(np.concatenate([[0], cuts, [n]]))
    )
    return run, tables().lookup[run.tables(), generator.integers(0, TOTAL, n)]


@settings(max_examples=60)
@given(st.lists(st.integers(0, 900), min_size=1, max_size=3), st.sampled_from(LANES), seeds)
def test_any_symbols_over_any_lanes(lengths, n_lanes, seed):
    generator = np.random.default_rng(seed)
    runs = [some_run(generator, n) for n in lengths]
    plain, fast = on_both(lambda: encode(runs, n_lanes))
    assert plain == fast
    for compiled in (False, True):
        with path(compiled):
            decoder = Decoder(plain, n_lanes)
            assert all((decoder.read(run) == symbols).all() for run, symbols in runs)
            decoder.close()


def test_merged_rows_are_the_same_symbols():
    run = Run(np.array([3, 3, 7, 7, 7, 3], np.uint8), np.array([1, 4, 0, 2, 5, 1]))
    assert run.merged.table.tolist() == [3, 7, 3]
    assert run.merged.lengths.tolist() == [5, 7, 1]
    empty = Run(np.zeros(0, np.uint8), np.zeros(0, np.int64))
    assert empty.merged.n_symbols == 0


@pytest.mark.parametrize("table", range(N_TABLES))
def test_size_is_the_ideal_one(table):
    generator = np.random.default_rng(table)
    n = 40_000
    symbols = tables().lookup[table, generator.integers(0, TOTAL, n)]
    run = Run(np.array([table], np.uint8), np.array([n]))
    ideal = tables().cost[table, symbols].sum() / COST_UNIT / 8
    for n_lanes in (1, 16, 256):
        assert abs(len(encode([(run, symbols)], n_lanes)) - ideal) <= 0.002 * ideal + 4 * n_lanes + 2


def test_size_is_that_of_another_coder():
    constriction = pytest.importorskip("constriction")
    generator = np.random.default_rng(0)
    rows = [(table, tables().lookup[table, generator.integers(0, TOTAL, 5_000)]) for table in range(N_TABLES)]
    run = Run(np.arange(N_TABLES, dtype=np.uint8), np.full(N_TABLES, 5_000))
    ours = len(encode([(run, np.concatenate([symbols for _, symbols in rows]))], 4))
    coder = constriction.stream.stack.AnsCoder()
    for table, symbols in reversed(rows):
        shares = tables().frequency[table][: 2 * tables().reach[table] + 2] / TOTAL
        model = constriction.stream.model.Categorical(shares, perfect=False)
        coder.encode_reverse(symbols.astype(np.int32), model)
    assert abs(ours - coder.num_bits() / 8) <= 0.005 * ours + 4 * 4


@given(st.integers(0, 1 << 24))
def test_states_of_lanes_are_at_most_a_hundredth(n_bytes):
    n_lanes = lane_count(n_bytes)
    assert n_lanes == 1 or 4 * n_lanes <= n_bytes / 100
    assert n_lanes == 256 or 4 * 2 * n_lanes > n_bytes / 100 - 4


@every_path
@pytest.mark.parametrize("n_lanes", [1, 4, 64])
def test_a_stream_cut_anywhere_is_refused(compiled, n_lanes):
    with path(compiled):
        run, symbols = some_run(np.random.default_rng(5), 300)
        data = encode([(run, symbols)], n_lanes)
        for length in range(len(data)):
            with pytest.raises(Malformed):
                _read(data[:length], n_lanes, run)
        for tail in (b"\0", b"\0\0"):
            with pytest.raises(Malformed):
                _read(data + tail, n_lanes, run)


@every_path
def test_a_stream_of_other_numbers_is_refused_or_read(compiled):
    """Any state, any words: no other error, and no symbol that its table lacks."""
    generator = np.random.default_rng(1)
    with path(compiled):
        for n_lanes in (1, 2, 32):
            run, _ = some_run(generator, 200)
            for _ in range(50):
                data = generator.bytes(4 * n_lanes + 2 * int(generator.integers(0, 200)))
                decoder = Decoder(data, n_lanes)
                try:
                    found = decoder.read(run)
                except Malformed:
                    continue
                assert (found < 2 * tables().reach[run.tables()] + 2).all()


def _read(data: bytes, n_lanes: int, run: Run) -> None:
    decoder = Decoder(data, n_lanes)
    decoder.read(run)
    decoder.close()


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 1 << 40)), max_size=50), st.integers(0, 50))
def test_raw_bits(numbers, cut):
    widths = np.array([width for width, _ in numbers], np.int64)
    values = np.array([value for _, value in numbers], np.int64) & (1 << widths) - 1
    data = write_bits(values, widths)
    assert len(data) == -(-widths.sum() // 8)
    reader = BitReader(data)
    parts = [reader.read(part) for part in (widths[:cut], widths[cut:])]
    assert np.concatenate(parts).tolist() == values.tolist()
    reader.close()


def test_raw_bits_that_are_left_over():
    for data in (b"\x80", b"\0\0", b"\x01\0"):
        reader = BitReader(data)
        reader.read(np.array([3]))
        with pytest.raises(Malformed, match="left over"):
            reader.close()
    with pytest.raises(Malformed, match="8 raw bits, 9 are needed"):
        BitReader(b"\0").read(np.array([9]))


@settings(max_examples=60)
@given(seeds, st.integers(0, 60), st.sampled_from([0.1, 1.0, 30.0, 1e7]))
def test_numbers_of_any_size(seed, n_rows, spread):
    """Levels that fit and levels that do not: escapes above, raw bits below."""
    generator = np.random.default_rng(seed)
    level = generator.integers(-12, sym.MAX_LEVEL + 1, n_rows)
    rows = sym.Rows(level, generator.integers(0, 9, n_rows))
    numbers = spread * 2.0 ** (rows.each(level) / 4) * generator.standard_cauchy(int(rows.lengths.sum()))
    whole = np.rint(np.clip(numbers, -(2**30), 2**30)).astype(np.int64)
    symbols, raw = sym.split(whole, rows)
    reader = BitReader(write_bits(raw.values, raw.widths))
    assert sym.join(symbols, rows, reader).tolist() == whole.tolist()
    reader.close()
    plain, fast = on_both(lambda: sym.cost_bits(symbols, rows))
    assert plain == fast


def test_a_number_beyond_the_limit_is_refused():
    rows = sym.Rows(np.array([0]), np.array([1]))
    escape = np.array([2 * tables().reach[12] + 1], np.uint8)
    raw = write_bits(np.array([31, 0, (1 << 31) - 1]), np.array([5, 1, 31]))
    with pytest.raises(Malformed, match="beyond"):
        sym.join(escape, rows, BitReader(raw))

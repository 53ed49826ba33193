"""Messages in files: `pack`, `unpack`, `inspect`, run in process on real files; an error is one line and a code."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import contract
from kvferry.cli import app
from kvferry.codec import CODECS, decode
from kvferry.codec.varints import write_varints
from kvferry.errors import CacheError, ForeignModel, ShapeMismatch
from kvferry.kv import Plan
from kvferry.session.cache_file import load_cache, save_cache
from kvferry.session.message import Message, message_of, text_message
from kvferry.session.survey import survey
from kvferry.wire import SHORT_HEADER_BYTES, MessageKind, Segment, SegmentType, json_frame, pack

CONTEXT = "Ann has tea in Oslo. Ben has salt in Rome."
HOLES = contract.cache(contract.RAGGED)
PLAN = Plan.everything(HOLES)
PLAN.classes[1, :, 2:4] = 0
KV_MESSAGE = message_of(CODECS.parse("int(4)").encode(HOLES, PLAN))

pytestmark = pytest.mark.timeout(600)


def kvferry(*words: object, stdin: str = "", code: int = 0) -> str:
    """What a verb prints; for a failure its one line on stderr."""
    done = CliRunner().invoke(app, [str(word) for word in words], input=stdin)
    assert done.exit_code == code, done.output
    if not code:
        return done.stdout
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.fixture(scope="module")
def message(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("message") / "m.kvw"
    kvferry("pack", "--context", "-", "--out", path, stdin=CONTEXT)
    return path


def test_pack_says_what_it_wrote(tmp_path: Path) -> None:
    out = tmp_path / "m.kvw"
    said = json.loads(kvferry("pack", "--context", "-", "--out", out, "--json", stdin=CONTEXT))
    assert said["message"] == out.stat().st_size > 1000
    assert said["tokens"] > 5
    assert 2 < said["bits_per_element"] < 5
    words = kvferry("pack", "--context", "-", "--codec", "int(4)", "--out", out, stdin=CONTEXT)
    assert words.startswith(f"{out.stat().st_size:,} bytes")
    assert list(tmp_path.iterdir()) == [out]


def test_pack_keeps_a_cap_or_says_which_would_do(tmp_path: Path) -> None:
    out = tmp_path / "m.kvw"
    call = ("pack", "--context", "-", "--out", out, "--max-bytes")
    assert "Allow at least" in kvferry(*call, 100, stdin=CONTEXT, code=2)
    assert list(tmp_path.iterdir()) == []
    kvferry(*call, 100_000, stdin=CONTEXT)


def test_what_was_unpacked_packs_to_the_same_message(message: Path, tmp_path: Path) -> None:
    tensors, again = tmp_path / "c.safetensors", tmp_path / "again.kvw"
    said = kvferry("unpack", message, "--out", tensors)
    assert "ecsq(step=-64" in said
    kvferry("pack", "--cache", tensors, "--out", again, "--codec", "raw")
    assert kvferry("unpack", again, "--out", tmp_path / "d.safetensors")
    one, other = load_file(tensors), load_file(tmp_path / "d.safetensors")
    assert {"present", "positions", "roles", "keys.0", "values.0"} <= set(one)
    assert all(torch.equal(one[name], other[name]) for name in {*one, *other})


def test_a_foreign_sender_is_refused(message: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.safetensors"
    said = kvferry("unpack", message, "--sender", "qwen3", "--out", out, code=1)
    assert "aligner that was fitted for this sender" in said
    kvferry("unpack", message, "--out", out)
    said = kvferry("pack", "--cache", out, "--sender", "qwen3", "--out", tmp_path / "m.kvw", code=1)
    assert "Name the model that made the cache" in said
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("pack", "--out", "m"), 2, "Give --context or --cache"),
        (("pack", "--context", "-", "--cache", "c", "--out", "m"), 2, "Give --context or --cache"),
        (("pack", "--context", "-", "--codec", "itn", "--out", "m"), 2, "Did you mean 'int'?"),
        (("pack", "--context", "none.txt", "--out", "m"), 2, "cannot read none.txt"),
        (
            ("pack", "--cache", "none.safetensors", "--out", "m"),
            2,
            "cannot read none.safetensors: No such file",
        ),
        (("pack", "--context", "-", "--out", "no/folder/m.kvw"), 2, "no/folder/m.kvw: No such file"),
        (("pack", "--context", "-", "--out", "/dev/null"), 2, "no regular file"),
        (("unpack", "none.kvw", "--out", "c"), 2, "cannot read none.kvw: No such file"),
        (("inspect", "none.kvw"), 2, "cannot read none.kvw: No such file"),
        (("inspect", "/"), 2, "cannot read /: Is a directory"),
        (("fly",), 2, "No such command 'fly'. See kvferry --help"),
        (("inspect", "m", "--fly"), 2, "No such option: --fly. See kvferry inspect --help"),
        (("pack", "--max-bytes", "1e4"), 2, "See kvferry pack --help"),
        (("ask", "--context", "-", "--question", " "), 2, "the question ' ' is empty"),
        (("send", "--context", "-", "--question", ""), 2, "the question '' is empty"),
        (
            ("pack", "--context", "-", "--out", "m", "--codec", "ecsq(profile='p')"),
            2,
            "there is no profile p",
        ),
        (
            ("pack", "--context", "-", "--out", "m", "--codec", "int(4, zstd=99)"),
            2,
            "codec int: zstd=99. 0 is none",
        ),
        (("pack", "--context", "-", "--out", "m", "--sender", "/none"), 2, "there is no model '/none'"),
        (
            ("pack", "--context", "-", "--out", "m", "--sender", "/"),
            2,
            "no model in '/': it has no config.json",
        ),
        (("certify", "./none"), 2, "no aligner folder './none'"),
        (("certify", "/"), 2, "no aligner in /: it has no config.json"),
        (("export", "none", "--onnx", "m"), 2, "unknown aligner 'none'"),
        (("fit", "--auto", "--max-mb", "0", "--out", "m"), 2, "Give more than 0 MB"),
        (("fit", "--auto", "--max-mb", "nan", "--out", "m"), 2, "Give more than 0 MB"),
        (
            ("fit", "--sender", "/none", "--codecs", "raw; ecsq(profile=p)", "--out", "m"),
            2,
            "there is no profile p",
        ),
        (
            ("fit", "--sender", "/none", "--aligner", "linear(neighbours=a)", "--out", "m"),
            2,
            "neighbours='a'",
        ),
        (
            ("fit-importance", "--sender", "/none", "--codec", "ecsq(profile=p)", "--out", "m"),
            2,
            "there is no profile p",
        ),
        (
            ("fit-importance", "--sender", "/none", "--steps", "0", "--out", "m"),
            2,
            "steps is 0. Give at least 1",
        ),
        (
            ("fit-indexer", "--model", "/none", "--max-tokens", "10", "--out", "m"),
            2,
            "max_tokens is 10, out of range. Give at least 11",
        ),
        (("profile", "--model", "/none", "--seed", "-1", "--out", "m"), 2, "seed is -1. Give at least 0"),
        (("bench", "wire", "--models", "/none", "--codecs", "ecsq(profile=p)"), 2, "there is no profile p"),
        (
            ("bench", "refine", "--model", "/none", "--codec", "int"),
            2,
            "messages of int cannot be sent in parts",
        ),
        (
            ("bench", "refine", "--model", "/none", "--codec", "progressive(profile=p)"),
            2,
            "there is no profile p",
        ),
        (("bench", "pairs", "--seed", "-1"), 2, "See kvferry bench pairs --help"),
    ],
)
def test_bad_calls(words: tuple[str, ...], code: int, said: str) -> None:
    assert said in kvferry(*words, stdin=CONTEXT, code=code)


BENCHES = {
    "bench wire --models /none": ("--json", "--plot", "--page"),
    "bench fuse": ("--json",),
    "bench select": ("--json",),
    "bench enrich --sender /none": ("--json",),
    "bench pairs --pairs none": ("--json", "--page"),
    "bench align --pairs none": ("--json", "--page"),
    "bench indexer --models /none": ("--json", "--page"),
    "bench progressive --models /none": ("--json", "--page"),
    "bench refine --model /none": ("--json", "--page"),
}


@pytest.mark.parametrize(
    "words",
    [
        ("pack", "--context", "-", "--sender", "/none", "--out"),
        ("unpack", "{message}", "--sender", "/none", "--out"),
        ("profile", "--model", "/none", "--out"),
        ("bytes", "--sender", "/none", "--json"),
        ("demo", "--sender", "/none", "--json"),
        ("demo", "--sender", "/none", "--report"),
        ("certify", "./none", "--json"),
        ("export", "./none", "--onnx"),
        ("curve", "--pair", "/none-to-/none", "--json"),
        ("curve", "--pair", "/none-to-/none", "--cache"),
        ("fit", "--sender", "/none", "--out"),
        ("fit", "--sender", "/none", "--out", "m", "--checkpoints"),
        ("fit", "--sender", "/none", "--out", "m", "--journal"),
        ("fit-indexer", "--model", "/none", "--out"),
        ("fit-importance", "--sender", "/none", "--out"),
        *((*bench.split(), place) for bench, places in BENCHES.items() for place in places),
    ],
)
def test_a_result_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    words: tuple[str, ...], message: Path, tmp_path: Path
) -> None:
    """There is no such model either; that would be said second."""
    (tmp_path / "file").write_text("")
    call = [word.format(message=message) for word in words]
    said = kvferry(*call, tmp_path / "file" / "x", stdin=CONTEXT, code=2)
    assert f"cannot write {tmp_path / 'file' / 'x'}: Not a directory. Name a file" in said


def test_a_text_too_short_to_choose_on_is_refused_before_the_fit(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("some words " * 500)
    said = kvferry("fit", "--data", tmp_path / "t.txt", "--out", tmp_path / "out", code=2)
    assert "for dev. Give at least" in said


def test_the_smallest_cap_that_is_named_works(tmp_path: Path) -> None:
    call = ("pack", "--context", "-", "--out", tmp_path / "m.kvw", "--codec", "int(4)", "--max-bytes")
    smallest = kvferry(*call, 0, stdin=CONTEXT, code=2).split("at least ")[1].split()[0]
    kvferry(*call, smallest, stdin=CONTEXT)


def test_a_group_without_a_verb_shows_its_help() -> None:
    done = CliRunner().invoke(app, ["bench"])
    assert done.exit_code == 2
    assert "progressive" in done.output and "error" not in done.stderr


def test_a_key_seals_and_opens(tmp_path: Path) -> None:
    key, other, out = tmp_path / "key", tmp_path / "other", tmp_path / "m.kvw"
    key.write_bytes(bytes(range(32)))
    other.write_bytes(bytes(32))
    call = ("pack", "--context", "-", "--codec", "int", "--out", out, "--key-file", key)
    kvferry(*call, stdin=CONTEXT)
    size = out.stat().st_size
    kvferry(*call, "--max-bytes", size, stdin=CONTEXT)
    said = kvferry(*call, "--max-bytes", size - 1, stdin=CONTEXT, code=2)
    assert f"cap of {size - 1} bytes is below the smallest message, {size} bytes" in said
    assert "sealed" in kvferry("inspect", out, "--key-file", key).splitlines()[0]
    kvferry("unpack", out, "--key-file", key, "--out", tmp_path / "c")
    assert "holds no key" in kvferry("unpack", out, "--out", tmp_path / "d", code=1)
    assert "seal does not fit" in kvferry("unpack", out, "--key-file", other, "--out", tmp_path / "d", code=1)
    done = CliRunner().invoke(app, ["inspect", str(out), "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"]["type"] == "NotAuthentic"
    assert json.loads(done.stdout)["segments"][-1]["name"] == "END"


@pytest.mark.parametrize(
    ("size", "said"), [(None, "cannot read the key"), (15, "15 bytes"), (65, "65 bytes")]
)
def test_a_bad_key(message: Path, tmp_path: Path, size: int | None, said: str) -> None:
    if size is not None:
        (tmp_path / "key").write_bytes(bytes(size))
    assert said in kvferry("inspect", message, "--key-file", tmp_path / "key", code=2)


def test_inspect_shows_a_short_header(tmp_path: Path) -> None:
    frame = replace(KV_MESSAGE.frame, short=True)
    found = inspected(tmp_path, pack(frame))
    assert found["header"]["n_bytes"] == SHORT_HEADER_BYTES
    assert found["header"]["contract"] == f"{frame.agreement.contract_id:08x}"
    assert found["header"]["hashes"] is None
    assert found["cache"]["numbers"] > 0
    assert "contract" in kvferry("inspect", tmp_path / "m.kvw")
    said = kvferry("unpack", tmp_path / "m.kvw", "--out", tmp_path / "c", code=1)
    assert "send the full header" in said


def test_a_text_message_holds_no_cache(tmp_path: Path) -> None:
    text_message("hi").save(tmp_path / "t.kvw")
    said = kvferry("unpack", tmp_path / "t.kvw", "--out", tmp_path / "c", code=1)
    assert "TEXT" in said and "kvferry inspect" in said


NO_ROOM = """
import resource, sys
from kvferry.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
sys.argv = ["kvferry", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("verb", ["pack", "unpack"])
def test_without_room_the_old_file_stays(message: Path, tmp_path: Path, verb: str) -> None:
    """The limit on file sizes stands in for a full disk: the write itself fails, half way."""
    out = tmp_path / "out"
    out.write_bytes(b"old")
    words = ["unpack", message] if verb == "unpack" else ["pack", "--context", "-"]
    command = [sys.executable, "-c", NO_ROOM, *words, "--out", out]
    done = subprocess.run(command, input=CONTEXT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "enough space" in done.stderr and done.stderr.count("\n") == 1
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


SMALL_DISK = """
mount -t tmpfs -o size=16k tmpfs "$1" || exit 77
echo old > "$1/out"
shift
"$@" 2> "$DIR.err"
code=$?
cat "$DIR/out" && ls -A "$DIR" && exit $code
"""


def test_a_disk_that_is_full(message: Path, tmp_path: Path) -> None:
    """A real one, where a process may mount a small one of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    verb = [sys.executable, "-m", "kvferry", "unpack", message, "--out", disk / "out"]
    mounted = ["unshare", "--map-root-user", "--mount", "sh", "-c", SMALL_DISK, "sh", disk, *verb]
    environment = {**os.environ, "DIR": str(disk), "PYTHONPATH": os.pathsep.join(sys.path)}
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here")
    done = subprocess.run(mounted, capture_output=True, text=True, env=environment, check=False)
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("no process may mount here")
    assert (done.returncode, done.stdout) == (1, "old\nout\n")
    said = (tmp_path / "disk.err").read_text()
    assert "No space left on device. Name a file" in said and said.count("\n") == 1


def test_a_cache_file_holds_everything(tmp_path: Path) -> None:
    kv = decode(KV_MESSAGE.frame, HOLES.geometry)
    save_cache(kv, tmp_path / "c")
    contract.same(load_cache(tmp_path / "c", kv.geometry), kv)
    with pytest.raises(ForeignModel):
        load_cache(tmp_path / "c", contract.geometry(contract.RAGGED, model="ee"))
    with pytest.raises(ShapeMismatch, match="batch of 2"):
        save_cache(contract.cache(n_batch=2), tmp_path / "d")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    "damage", ["no tensor", "half a file", "other metadata", "doubles", "short roles", "flat"]
)
def test_a_broken_cache_file_is_named(tmp_path: Path, damage: str) -> None:
    kv, path = decode(KV_MESSAGE.frame, HOLES.geometry), tmp_path / "c"
    save_cache(kv, path)
    tensors, metadata = load_file(path), _metadata(path)
    if damage == "no tensor":
        del tensors["keys.0"]
    if damage == "other metadata":
        metadata["keys"] = "sideways"
    if damage == "doubles":
        tensors["values.1"] = tensors["values.1"].double()
    if damage == "short roles":
        tensors["roles"] = tensors["roles"][1:].clone()
    if damage == "flat":
        tensors["positions"] = tensors["positions"].flatten()
    save_file(tensors, path, metadata)
    if damage == "half a file":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CacheError) as caught:
        load_cache(path, kv.geometry)
    assert caught.value.cure


def _metadata(path: Path) -> dict[str, str]:
    size = int.from_bytes(path.read_bytes()[:8], "little")
    return json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]


def inspected(tmp_path: Path, data: bytes, code: int = 0) -> dict:
    """The JSON of a message, which stands on stdout even where the exit code is 1."""
    (tmp_path / "m.kvw").write_bytes(data)
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "m.kvw"), "--json"])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def test_inspect_counts_every_byte(tmp_path: Path) -> None:
    data = KV_MESSAGE.data
    found = inspected(tmp_path, data)
    rows = found["segments"]
    assert [row["name"] for row in rows[:3]] == ["SPEC", "SHAPE", "TOKENS"]
    assert rows[-1]["name"] == "END"
    assert found["header"]["n_bytes"] + sum(row["n_bytes"] for row in rows) == len(data) == found["n_bytes"]
    assert [row["offset"] + row["n_bytes"] for row in rows[:-1]] == [row["offset"] for row in rows[1:]]
    assert sum(row["share"] for row in rows) + found["header"]["n_bytes"] / len(data) == pytest.approx(1)
    for row in rows:
        at = row["offset"] + row["n_bytes"] - row["body_bytes"]
        assert int.from_bytes(data[at - 4 : at], "little") == int(row["checksum"], 16)


def test_inspect_counts_the_numbers(tmp_path: Path) -> None:
    cache = inspected(tmp_path, KV_MESSAGE.data)["cache"]
    layers = HOLES.geometry.layers
    held = [7, 5, 7, 7]
    numbers = sum(n * one.heads * (one.key_dim + one.value_dim) for n, one in zip(held, layers, strict=True))
    assert cache["numbers"] == numbers
    assert cache["bits_per_element"] == pytest.approx(8 * len(KV_MESSAGE) / numbers)
    assert [row["tokens"] for row in cache["layers"]] == held
    assert cache["codec"] == "int(bits=4)"
    assert (cache["keys"], cache["call_length"]) == ("content", 0)


@pytest.mark.parametrize("compress", [False, True])
def test_inspect_reads_texts(tmp_path: Path, compress: bool) -> None:
    found = inspected(tmp_path, text_message("Grüße", compress=compress).data)
    assert found["text"] == "Grüße"
    assert found["cache"] is None
    assert found["header"]["kind"] == "TEXT"


def test_inspect_reads_hellos(tmp_path: Path) -> None:
    found = inspected(tmp_path, pack(json_frame(MessageKind.HELLO, {"grid": "sender"})))
    assert found["json"] == {"grid": "sender"}


def test_inspect_shows_what_is_whole(tmp_path: Path) -> None:
    data = KV_MESSAGE.data
    rows = inspected(tmp_path, data)["segments"]
    borders = [row["offset"] for row in rows] + [len(data)]
    for cut in range(rows[0]["offset"], len(data)):
        found, error = survey(data[:cut])
        assert found.n_bytes_whole == max(border for border in borders if border <= cut)
        assert len(found.segments) == borders.index(found.n_bytes_whole)
        assert type(error).__name__ == found.error.type == "Truncated"


def test_inspect_shows_what_comes_before_the_damage(tmp_path: Path) -> None:
    data = bytearray(KV_MESSAGE.data)
    rows = inspected(tmp_path, bytes(data))["segments"]
    data[rows[-2]["offset"] + 9] ^= 1
    found = inspected(tmp_path, bytes(data), code=1)
    assert found["error"]["type"] == "ChecksumMismatch"
    assert found["error"]["cure"]
    assert found["segments"] == rows[:-2]
    assert found["n_bytes_whole"] == rows[-2]["offset"]
    assert found["cache"]["bits_per_element"] is None
    said = CliRunner().invoke(app, ["inspect", str(tmp_path / "m.kvw")])
    assert said.exit_code == 1 and "SHAPE" in said.stdout and "was changed on the way" in said.stderr


@pytest.mark.parametrize(
    "data", [b"", b"GET / HTTP/1.1\r\n" * 10, bytes(100)], ids=["nothing", "text", "zeros"]
)
def test_inspect_says_what_is_no_message(tmp_path: Path, data: bytes) -> None:
    found = inspected(tmp_path, data, code=1)
    assert found["header"] is None and found["segments"] == []
    assert found["error"]["what"]


NO_TORCH = """
import sys
from kvferry.cli import main
sys.argv = ["kvferry", "inspect", sys.argv[1]]
try:
    main()
finally:
    print({"torch", "transformers", "safetensors"} & set(sys.modules))
"""


def test_inspect_needs_no_torch(message: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, message], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("n_layers", [4097, 2**20, 2**34])
def test_inspect_counts_no_endless_layers(n_layers: int) -> None:
    frame = KV_MESSAGE.frame
    shape = Segment(SegmentType.SHAPE, write_varints(np.array([0, 0, n_layers, 1, 1, 1])))
    others = tuple(segment for segment in frame.segments if segment.type != SegmentType.SHAPE)
    data = pack(replace(frame, segments=(*others, shape)))
    tracemalloc.start()
    found, error = survey(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    assert type(error).__name__ == found.error.type == "LimitExceeded"
    assert found.cache is None and found.segments[-1].name == "END"


def test_inspect_prints_a_table(message: Path) -> None:
    lines = kvferry("inspect", message).splitlines()
    assert lines[0].startswith("KVWire ") and "KV" in lines[0]
    assert "bits each" in kvferry("inspect", message)
    assert lines[-1].split()[-2] == "END"


def test_the_message_is_the_one_that_the_library_reads(message: Path) -> None:
    assert Message.load(message).frame.kind == MessageKind.KV

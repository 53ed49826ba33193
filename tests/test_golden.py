"""What was written once is read for ever, bit for bit; see golden/README.md."""

import re
from pathlib import Path

import numpy as np
import pytest

import contract
from golden.caches import CACHES
from kvferry.codec import CODECS, decode
from kvferry.kv import KV, Geometry
from kvferry.session.cache_file import load_cache, save_cache
from kvferry.session.message import Message, text_message
from kvferry.wire import MessageKind, json_frame, pack, read_json, text_frame, unpack
from profiles import held_profile
from specs import SPECS, untried

FOLDER = Path(__file__).parent / "golden"
KEY = bytes(range(32))
HELLO = {"codec": "int(bits=4)", "grid": "sender", "text": "Grüße", "numbers": [1, 2.5, None, True]}


def name_of(spec: str, cache: str) -> str:
    words = re.findall(r"[a-z0-9_-]+", CODECS.parse(spec).brief().lower())
    return "-".join(words) + ("" if cache == "small" else f"-{cache}")


def profiled(step: int, cache: str, codec: str = "ecsq") -> str:
    """The codec with a profile of the sender of a cache; its hash is frozen too."""
    return f"{codec}(step={step}, profile={held_profile(CACHES[cache]()[0].geometry).name})"


ENTROPY_CODED = [spec for spec in SPECS if spec.startswith(("ecsq", "progressive"))]
MIXED = [spec for spec in SPECS if spec.startswith("mixed")]
SQUEEZED = [spec for spec in SPECS if "zstd" in spec]
KV_GOLDENS = {
    name_of(spec, cache): (spec, cache)
    for cache, specs in (
        ("small", SPECS),
        ("long", [*ENTROPY_CODED, *SQUEEZED, profiled(64, "long")]),
        (
            "classes",
            [*ENTROPY_CODED, *MIXED, profiled(-150, "classes"), profiled(-90, "classes", "progressive")],
        ),
        ("wide", ENTROPY_CODED[1:2]),
        ("grid", ["int(4)", "ecsq"]),
    )
    for spec in specs
}
every_cache = pytest.mark.parametrize("name", KV_GOLDENS)
ZSTD = b"\x28\xb5\x2f\xfd"
OTHERS = {
    "text": pack(text_frame("Grüße aus Oslo")),
    "packed-text": text_message(20 * "Ann has tea in Oslo. ", compress=True).data,
    "sealed-text": pack(text_frame("Grüße aus Oslo"), KEY),
    "hello": pack(json_frame(MessageKind.HELLO, HELLO)),
}


@pytest.fixture(scope="module", autouse=True)
def written(request: pytest.FixtureRequest) -> None:
    """With --write-goldens, what is missing."""
    if request.config.getoption("--write-goldens"):
        for name, data in OTHERS.items():
            _write(name, data)
        for name, (spec, cache) in KV_GOLDENS.items():
            kv, plan = CACHES[cache]()
            if _write(name, pack(CODECS.parse(spec).encode(kv, plan))):
                save_cache(_read(name, kv.geometry), FOLDER / f"{name}.safetensors")


def _write(name: str, data: bytes) -> bool:
    path = FOLDER / f"{name}.kvw"
    if path.exists():
        return False
    path.write_bytes(data)
    return True


def _read(name: str, geometry: Geometry) -> KV:
    return decode(unpack((FOLDER / f"{name}.kvw").read_bytes()), geometry)


def test_every_codec_and_option_has_a_golden():
    assert untried(SPECS) == []
    there = {path.stem for path in FOLDER.glob("*.kvw")}
    assert there == {*KV_GOLDENS, *OTHERS}, "run pytest tests/test_golden.py --write-goldens"


def test_the_second_stage_is_used_in_some():
    used = {spec for name, (spec, _) in KV_GOLDENS.items() if ZSTD in (FOLDER / f"{name}.kvw").read_bytes()}
    assert {CODECS.parse(spec).name for spec in used} == {CODECS.parse(spec).name for spec in SQUEEZED}


def test_goldens_are_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 300_000


@every_cache
def test_a_golden_is_read_as_ever(name):
    kv, _ = CACHES[KV_GOLDENS[name][1]]()
    got, want = _read(name, kv.geometry), load_cache(FOLDER / f"{name}.safetensors", kv.geometry)
    contract.same(got, want)
    for one, other in zip(got.spans, want.spans, strict=True):
        assert np.array_equal(one.overlap, other.overlap)


@pytest.mark.parametrize("name", [name for name, (spec, _) in KV_GOLDENS.items() if "zstd" not in spec])
def test_a_golden_is_written_as_ever(name):
    """The second stage aside, whose library may find shorter ways."""
    spec, cache = KV_GOLDENS[name]
    kv, plan = CACHES[cache]()
    assert pack(CODECS.parse(spec).encode(kv, plan)) == (FOLDER / f"{name}.kvw").read_bytes()


def test_texts_and_hellos_are_read_as_ever():
    data = {name: (FOLDER / f"{name}.kvw").read_bytes() for name in OTHERS}
    assert Message(data["text"]).text == "Grüße aus Oslo"
    assert Message(data["packed-text"]).text == 20 * "Ann has tea in Oslo. "
    assert unpack(data["sealed-text"], key=KEY) == unpack(data["text"])
    assert read_json(unpack(data["hello"])) == HELLO
    assert all(OTHERS[name] == data[name] for name in ("text", "sealed-text", "hello"))

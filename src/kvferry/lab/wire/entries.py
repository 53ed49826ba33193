"""What is measured: our codecs and all peers, each setting one entry, settings of one family together a curve."""

from dataclasses import dataclass, fields

from kvferry.codec import CODECS, Codec
from kvferry.codec.table import ON_THE_WIRE
from kvferry.lab.wire.coding import Coding, through_codec
from kvferry.lab.wire.peers.peer import Label, Peer
from kvferry.lab.wire.peers.table import installed_peers

STEPS = tuple(range(-192, 161, 32))
"""Steps 2^(i/64) of the entropy-coded codec, from an eighth of a deviation to five, in half octaves."""
WEIGHTINGS = ("frame", "part", "layer")

KNOBS = ("step", "bits")
"""The field of a codec that moves along its curve."""

FIXED = (
    "raw(dtype=bfloat16)",
    *(f"int(bits={bits}, group=64, axis=block)" for bits in (8, 4, 3, 2)),
    *(f"int(bits={bits}, group=64, axis=block, centred=True)" for bits in (8, 4, 3, 2)),
    "nf4",
    "fp8",
)


@dataclass(frozen=True)
class Entry:
    """One setting. `family` names the curve that it is a point of."""

    codec: str
    spec: str
    label: Label
    family: str
    coding: Coding


def own_entries(specs: tuple[str, ...]) -> list[Entry]:
    """Our codecs, by spec.

    >>> [entry.family for entry in own_entries(("int(bits=4, group=64)",))]
    ['int(group=64)']
    """
    return [_own(spec) for spec in specs]


def default_specs() -> tuple[str, ...]:
    """Every codec of ours, the entropy-coded one along its curve."""
    if "ecsq" not in ON_THE_WIRE:
        return FIXED
    sweep = (f"ecsq(step={step}, weighting={weighting})" for weighting in WEIGHTINGS for step in STEPS)
    return (*FIXED, *sweep)


def peer_entries(names: tuple[str, ...] | None = None) -> tuple[list[Entry], list[str]]:
    """The peers that are installed (those of `names`, if given), and why others are missing."""
    peers, missing = installed_peers()
    return [_peer(peer) for peer in peers if names is None or peer.codec in names], missing


def _own(spec: str) -> Entry:
    codec = CODECS.parse(spec)
    return Entry(codec.name, repr(codec), "ours", brief(codec, hidden=KNOBS), through_codec(spec))


def brief(codec: Codec, hidden: tuple[str, ...] = ()) -> str:
    """A spec without what is default, and without some of its options.

    >>> brief(CODECS.parse("int(bits=4, group=64)"), hidden=("bits",))
    'int(group=64)'
    """
    plain = {field.name: field.default for field in fields(codec)}
    said = {key: value for key, value in codec.config().items() if key not in hidden and value != plain[key]}
    options = ", ".join(f"{key}={value}" for key, value in said.items())
    return f"{codec.name}({options})" if options else codec.name


def _peer(peer: Peer) -> Entry:
    return Entry(peer.codec, peer.spec, peer.label, peer.codec, peer.coding)

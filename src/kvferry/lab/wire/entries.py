"""What is measured: our codecs and all peers, each setting one entry, settings of one family together a curve."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from kvferry.codec import CODECS, Codec
from kvferry.lab.wire.coding import Coding, through_codec
from kvferry.lab.wire.peers.peer import Label, Peer
from kvferry.lab.wire.peers.table import installed_peers
from kvferry.spec import read_call

STEPS = tuple(range(-192, 161, 32))
"""Steps 2^(i/64) of the entropy-coded codec, from an eighth of a deviation to five and a half, in half octaves."""
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
    """One setting."""

    codec: str
    spec: str
    label: Label
    coding: Coding


def own_entries(specs: Iterable[str]) -> list[Entry]:
    """Our codecs, by spec; `UsageError` for one that is none."""
    return [_own(CODECS.parse(spec)) for spec in specs]


def default_specs() -> tuple[str, ...]:
    """Every codec of ours, the entropy-coded one along its curve."""
    sweep = (f"ecsq(step={step}, weighting={weighting})" for weighting in WEIGHTINGS for step in STEPS)
    return (*FIXED, *sweep)


def profile_entries(profile: str) -> list[Entry]:
    """The entropy-coded codec with a profile, along its curve."""
    return own_entries(f"ecsq(step={step}, profile={profile})" for step in STEPS)


def peer_entries(names: tuple[str, ...] | None = None) -> tuple[list[Entry], list[str]]:
    """The peers that are installed (those of `names`, if given), and why others are missing."""
    peers, missing = installed_peers()
    return [_peer(peer) for peer in peers if names is None or peer.codec in names], missing


def family(label: str, codec: str, spec: str) -> str:
    """The curve that a setting is a point of: what is left of a spec of ours without its knob, or the peer.

    >>> family("ours", "int", "int(bits=4, group=64, axis=token)"), family("like", "turboquant", "bits=4")
    ('int(group=64)', 'turboquant')
    """
    return brief(spec, hidden=KNOBS) if label == "ours" else codec


def brief(spec: str, hidden: tuple[str, ...] = ()) -> str:
    """A spec without what is default, and without some of its options; a profile is one, whatever its hash.

    >>> brief("ecsq(step=0, weighting=layer, profile=p0123456789abcdef)")
    'ecsq(step=0, profile)'
    """
    name, _, said = read_call(spec)
    defaults = {field.name: field.default for field in fields(CODECS.get(name))}
    kept = {key: value for key, value in said.items() if key not in hidden and value != defaults[key]}
    options = ", ".join("profile" if key == "profile" else f"{key}={value}" for key, value in kept.items())
    return f"{name}({options})" if options else name


def _own(codec: Codec) -> Entry:
    return Entry(codec.name, repr(codec), "ours", through_codec(repr(codec)))


def _peer(peer: Peer) -> Entry:
    return Entry(peer.codec, peer.spec, peer.label, peer.coding)

"""The seal of a frame on a hostile link: 16 bytes of keyed BLAKE2b (RFC 7693), the last of END's body.

It covers every byte before END, so also the flag that announces it. END itself only repeats what those bytes imply.
A seal does not hide anything and does not stop a replay: a receiver that must refuse one checks frame ids.
"""

import hashlib
import hmac
from collections.abc import Iterable

from kvferry.errors import NotAuthentic, UsageError

MAC_BYTES = 16
_PERSON = b"KVWire 1"
_SHORTEST_KEY, _LONGEST_KEY = 16, 64


def check_key(key: bytes) -> None:
    """Raise `UsageError` for a key that BLAKE2b cannot take or that can be guessed."""
    if not _SHORTEST_KEY <= len(key) <= _LONGEST_KEY:
        cure = f"Use {_SHORTEST_KEY} to {_LONGEST_KEY} random bytes: secrets.token_bytes(32)"
        raise UsageError(f"a key of {len(key)} bytes", cure=cure)


def mac(key: bytes, parts: Iterable[bytes | memoryview]) -> bytes:
    """The 16 bytes that only a holder of the key can make for these parts joined.

    >>> mac(bytes(16), [b"ab", b"c"]) == mac(bytes(16), [b"abc"])
    True
    """
    state = hashlib.blake2b(digest_size=MAC_BYTES, key=key, person=_PERSON)
    for part in parts:
        state.update(part)
    return state.digest()


def require_seal(sealed: bool, key: bytes | None) -> None:
    """Raise `NotAuthentic` unless a frame is sealed exactly if the reader holds a key."""
    if key is not None:
        check_key(key)
        if not sealed:
            raise NotAuthentic("the frame is not sealed", cure="Pack it with the key that this reader holds")
    elif sealed:
        raise NotAuthentic("the frame is sealed and this reader holds no key", cure="Unpack it with the key")


def check_mac(came: bytes, key: bytes, covered: memoryview) -> None:
    """Raise `NotAuthentic` unless `came` seals the bytes `covered`; takes equally long for every wrong one."""
    if not hmac.compare_digest(came, mac(key, [covered])):
        raise NotAuthentic(
            "the seal does not fit the frame", cure="Use one key on both sides, or trust nobody"
        )

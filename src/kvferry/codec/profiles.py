"""Which profiles are at hand, by name: those that came with the package, those in files, those held by hash.

A message names a profile by hash and causes no file to be read: only what is shipped or was held before is found.
"""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from kvferry.codec.profile import Profile, load_profile
from kvferry.errors import ForeignProfile, MissingFolder
from kvferry.spec import read_call

NONE = "none"
SUFFIX = ".profile.safetensors"
"""Profiles beside an aligner are named by hash, with this ending."""
_HASHED = re.compile(r"p[0-9a-f]{16}")
_SHIPPED = Path(__file__).parents[1] / "profiles"
_held: dict[str, Profile] = {}


def shipped_profiles() -> list[str]:
    """Names of the models whose profiles come with the package.

    >>> "llama" in shipped_profiles()
    True
    """
    return sorted(path.stem for path in _SHIPPED.glob("*.safetensors"))


def name_of(profile_hash: int) -> str:
    """What specs call the profile of a hash; `none` for 0.

    >>> name_of(255), name_of(0)
    ('p00000000000000ff', 'none')
    """
    return f"p{profile_hash:016x}" if profile_hash else NONE


def hold(profile: Profile) -> Profile:
    """Keep a profile at hand for messages that were coded with it."""
    return _held.setdefault(profile.name, profile)


def find_profile(name: str) -> Profile:
    """The profile of a hash, of a shipped model, or in a file; held from then on.

    Raises `ForeignProfile` for a hash that is not held, `MissingFolder` where there is no file,
    `FolderError` for one that holds none.
    """
    if _HASHED.fullmatch(name):
        return _by_hash(name)
    if name in shipped_profiles():
        return _load(_SHIPPED / f"{name}.safetensors")
    if not Path(name).is_file():
        cure = f"Give a file, or one of {', '.join(shipped_profiles())}"
        raise MissingFolder(f"there is no profile {name}", cure=cure)
    return _load(Path(name))


def hold_profiles(folder: Path) -> None:
    """Hold the profiles that lie in the folder of an aligner."""
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        _load(path)


def profiles_of(specs: Iterable[str]) -> tuple[int, ...]:
    """The hashes of the profiles at hand that these codecs name, 0 (none) first."""
    named = {str(read_call(spec)[2].get("profile", NONE)) for spec in specs} - {NONE}
    return 0, *sorted(find_profile(name).wire_hash for name in named if _at_hand(name))


def _at_hand(name: str) -> bool:
    try:
        return bool(find_profile(name))
    except ForeignProfile:
        return False


def _by_hash(name: str) -> Profile:
    if name not in _held:
        _hold_shipped()
    if name not in _held:
        cure = f"Hold it first: kvferry.codec.profiles.find_profile(FILE). Held: {', '.join(_held) or 'none'}"
        raise ForeignProfile(f"profile {name} is not at hand", cure=cure)
    return _held[name]


@cache
def _hold_shipped() -> None:
    """Once: messages that name unknown hashes must not cause files to be read again and again."""
    for name in shipped_profiles():
        find_profile(name)


def _load(path: Path) -> Profile:
    return hold(load_profile(path))

"""Every error that kvferry raises on purpose: it names the value, the limit and the cure.

KvferryError
├── UsageError (ValueError)     the call cannot be carried out as asked; exit code 2
│   ├── UnknownName             no such codec, model, aligner, option ...: did you mean
│   ├── BadSpec                 a method's configuration cannot be read
│   ├── EmptyContext            nothing to read
│   ├── ContextTooLong          more tokens than the model has positions for
│   ├── BudgetTooSmall          no message fits the cap; carries the smallest cap that would do
│   ├── UncertifiableMap        no useful bound can be proven for this map
│   ├── TrainingDiverged        a loss, gradient or weight that is no number; carries the step
│   └── MissingExtra            an optional dependency is not installed
├── CacheError                  a cache in the hand is not what it must be
│   ├── ShapeMismatch           tensors, masks or positions disagree
│   ├── NotFinite               NaN or infinity; names layer, head and token
│   └── WrongKeySpace           rotated keys where content keys are needed, or the reverse
├── ModelRefused                a model kvferry cannot carry
│   ├── UnsupportedLayer        a layer kind without an attention cache (MLA, recurrent, learned positions)
│   └── RotaryMismatch          a rotation that was read does not reproduce the model's own
├── WireError                   bytes that are no valid message
│   ├── Truncated               fewer bytes than announced
│   ├── Malformed               a field outside its range, a hole, an overlap, a wrong order
│   ├── ChecksumMismatch        the bytes were changed on the way
│   ├── UnsupportedVersion      written in another major version of the format
│   ├── UnknownSegment          a critical segment this version does not know
│   ├── NotAuthentic            no seal where one is needed, a wrong one, or one that cannot be checked
│   └── LimitExceeded           valid so far, but larger than the reader allows
├── ContractError               a valid message that this receiver must not use
│   ├── UnknownContract         a short header that names a contract this reader has not agreed to
│   ├── ForeignProfile          coded with a profile that this reader does not hold
│   ├── ForeignModel            other weights, geometry or tokenizer than the aligner was fitted for
│   ├── GridMismatch            another token grid
│   └── CodecNotCovered         a codec that the aligner was not fitted under
├── LinkError                   the other side, or the way to it
│   ├── CannotListen            port in use or not permitted
│   ├── PeerLost                unreachable, or gone in the middle of a message
│   ├── PeerTimeout             no answer within the time allowed
│   └── PeerRefused             the peer answered with an error of its own
└── FolderError                 a weights folder or profile is corrupt or of another kind
    └── MissingFolder           there is none; a UsageError too, exit code 2
"""

import difflib
from collections.abc import Iterable


class KvferryError(Exception):
    """Base of the tree: `what` happened, with value and limit, and the `cure`."""

    exit_code = 1

    def __init__(self, what: str, *, cure: str) -> None:
        what = what.rstrip(".")
        super().__init__(f"{what}. {cure}")
        self.what = what
        self.cure = cure

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[KvferryError], args: tuple[object, ...], state: dict[str, object]) -> KvferryError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class UsageError(KvferryError, ValueError):
    exit_code = 2


class UnknownName(UsageError):
    """A name that is in no table.

    >>> raise UnknownName("codec", "itn", ["int", "raw"])
    Traceback (most recent call last):
    kvferry.errors.UnknownName: unknown codec 'itn'. Did you mean 'int'? Known: int, raw
    """

    def __init__(self, kind: str, name: str, choices: Iterable[str]) -> None:
        self.kind, self.name, self.choices = kind, name, sorted(choices)
        close = difflib.get_close_matches(name, self.choices, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        super().__init__(f"unknown {kind} {name!r}", cure=f"{hint}Known: {', '.join(self.choices) or 'none'}")


class BadSpec(UsageError): ...


class EmptyContext(UsageError): ...


class ContextTooLong(UsageError): ...


class BudgetTooSmall(UsageError):
    """No message fits the cap."""

    def __init__(self, max_bytes: int, smallest_bytes: int) -> None:
        self.max_bytes, self.smallest_bytes = max_bytes, smallest_bytes
        super().__init__(
            f"the cap of {max_bytes} bytes is below the smallest message, {smallest_bytes} bytes",
            cure=f"Allow at least {smallest_bytes} bytes or choose a coarser codec",
        )


class UncertifiableMap(UsageError): ...


class TrainingDiverged(UsageError):
    """Training met NaN or infinity and stopped; the module holds the weights that `kept` names."""

    def __init__(self, step: int, what: str, kept: str) -> None:
        self.step = step
        cure = "Lower the learning rate, or look for NaN in the models and the data"
        super().__init__(f"{what} at step {step}; the weights in hand are {kept}", cure=cure)


class MissingExtra(UsageError):
    """An optional dependency is absent."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed", cure=f"Run: pip install 'kvferry[{extra}]'")


class CacheError(KvferryError): ...


class ShapeMismatch(CacheError): ...


class NotFinite(CacheError): ...


class WrongKeySpace(CacheError): ...


class ModelRefused(KvferryError): ...


class UnsupportedLayer(ModelRefused): ...


class RotaryMismatch(ModelRefused): ...


class WireError(KvferryError): ...


class Truncated(WireError): ...


class Malformed(WireError): ...


class ChecksumMismatch(WireError): ...


class UnsupportedVersion(WireError): ...


class UnknownSegment(WireError): ...


class NotAuthentic(WireError): ...


class LimitExceeded(WireError): ...


class ContractError(KvferryError): ...


class UnknownContract(ContractError): ...


class ForeignProfile(ContractError): ...


class ForeignModel(ContractError): ...


class GridMismatch(ContractError): ...


class CodecNotCovered(ContractError): ...


class LinkError(KvferryError): ...


class CannotListen(LinkError): ...


class PeerLost(LinkError): ...


class PeerTimeout(LinkError): ...


class PeerRefused(LinkError): ...


class FolderError(KvferryError): ...


class MissingFolder(FolderError, UsageError): ...

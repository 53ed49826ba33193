"""The two models of a pair and the map between them, as bytes meet them."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch

from kvferry.align.contract import Aligner, Contract
from kvferry.align.folder import load_aligner, save_aligner
from kvferry.codec import Codec, codec_of, decode
from kvferry.codec.ecsq import Ecsq
from kvferry.errors import CodecNotCovered, FolderError, UsageError
from kvferry.kv import KV, stack
from kvferry.lab.align.arms import BEST_CLOSED, NEIGHBOURS, Settings
from kvferry.lab.align.passages import pair_of
from kvferry.lab.curve.spec import Spec
from kvferry.lab.wire.texts import SHARED, shared_folder
from kvferry.models.load import Model, load
from kvferry.models.tokenizer import Tokenizer, tokenizer_of
from kvferry.models.zoo.catalog import names as zoo_names
from kvferry.session.message import Message
from kvferry.session.receiver import Receiver
from kvferry.train.fit import closed_form, frozen, prepare
from kvferry.train.route import Route

_COARSER = (0, 64, 128, 192)
"""Steps up to which maps fitted here bear `ecsq`: what a cap makes of it."""


@dataclass(frozen=True)
class Road:
    """From a sender to a receiver and its maps: the first that was fitted under a message's codec takes it."""

    sender: Model
    receiver: Model
    aligners: tuple[Aligner, ...]

    @property
    def contract(self) -> Contract:
        """Of all maps, but for the codecs."""
        return self.aligners[0].contract

    @cached_property
    def onto(self) -> Tokenizer | None:
        """The receiver's tokens, where the maps read those."""
        return tokenizer_of(self.receiver) if self.contract.grid == "receiver" else None

    @cached_property
    def identity(self) -> dict[str, str | int]:
        """Weights and contracts, in hex: what a result depends on beside the settings."""
        digest = hashlib.sha256()
        for aligner in self.aligners:
            digest.update(repr((aligner.name, aligner.contract.coded_with)).encode())
            for name, tensor in sorted(aligner.state_dict().items()):
                digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        ends = {"sender": self.sender.geometry, "receiver": self.receiver.geometry}
        found = {side: f"{one.model[:32]} {one.tokenizer[:32]}" for side, one in ends.items()}
        return {**found, "aligner": digest.hexdigest()[:32]}

    def require(self, specs: tuple[Spec, ...]) -> None:
        """Raise `CodecNotCovered` for a codec that no map was fitted under."""
        for codec in (repr(spec.codec.agreed()) for spec in specs):
            if self._aligner(codec) is None:
                held = ", ".join(spec for one in self.aligners for spec in one.contract.coded_with)
                cure = (
                    f"Send with one of: {held}; or fit one (kvferry fit --sender {self.sender.name} "
                    f"--receiver {self.receiver.name} --codec '{codec}' --out DIR) and give --aligner DIR"
                )
                raise CodecNotCovered(f"the aligner was not fitted under {codec}", cure=cure)

    def covers(self, message: Message) -> bool:
        """Whether the receiver would take it: a cap may have made its step coarser than the maps bear."""
        return self._aligner(repr(codec_of(message.frame))) is not None

    @torch.no_grad()
    def arrived(self, messages: list[Message]) -> KV:
        """What the receiver holds of caches that came as bytes; raises as a session's receiver does."""
        if len(self.aligners) == 1:
            return self.aligners[0](stack([self._decoded(message) for message in messages]))
        return stack([self._for(message)(self._decoded(message)) for message in messages])

    def _aligner(self, codec: str) -> Aligner | None:
        return next((one for one in self.aligners if _takes(one, codec)), None)

    def _for(self, message: Message) -> Aligner:
        codec = repr(codec_of(message.frame))
        found = self._aligner(codec) or self.aligners[0]
        found.require_codec(codec)
        return found

    def _decoded(self, message: Message) -> KV:
        found = self._for(message)
        return decode(message.frame, found.contract.sender, device=self.receiver.device)


def _takes(aligner: Aligner, codec: str) -> bool:
    try:
        aligner.require_codec(codec)
    except CodecNotCovered:
        return False
    return True


def pair_named(text: str) -> tuple[str, str]:
    """Sender and receiver of `A-to-B`, which may be the same.

    >>> pair_named("llama-to-llama")
    ('llama', 'llama')
    """
    sender, found, receiver = text.partition("-to-")
    if not (found and sender and receiver):
        raise UsageError(f"{text!r} is no pair", cure="Give SENDER-to-RECEIVER, say llama-to-gemma3")
    return sender, receiver


def model_named(name: str) -> Model:
    """A member of the zoo, a folder or hub id, or a model of the shared folder by name; `FolderError`."""
    if name in zoo_names() or "/" in name or Path(name).is_dir():
        return load(name)
    folder = shared_folder()
    if folder is None:
        cure = f"Let ${SHARED} name the shared folder, give a folder, or one of {', '.join(zoo_names())}"
        raise FolderError(f"there is no model {name!r}", cure=cure)
    return load(str(folder / "models" / name))


def road_of(pair: tuple[str, str], aligner: str | Path | None) -> Road:
    """With an aligner in hand; None for a model and itself. Raises `ForeignModel` for one of another pair."""
    sender = model_named(pair[0])
    receiver = sender if pair[0] == pair[1] else model_named(pair[1])
    found = Receiver(receiver, aligner).aligner
    found.contract.require_sender(sender.geometry.model, sender.geometry.tokenizer)
    return Road(sender, receiver, (found,))


def road_of_stories(
    pair: tuple[str, str],
    specs: tuple[Spec, ...],
    cache: Path,
    n_texts: int,
    on_fit: Callable[[str], None] = lambda what: None,
) -> Road:
    """With maps in closed form for these codecs, fitted as `bench align` does, and kept under `cache`.

    A map for each codec, and for each band of steps of `ecsq`: fitted under all of them at once, a closed form bears
    none of them well. Raises what the fits raise.
    """
    sender, receiver = map(model_named, pair)
    alike = sender.geometry.tokenizer == receiver.geometry.tokenizer
    route = Route(sender, receiver, "sender" if alike else "receiver")
    maps = [_kept(route, codecs, cache, n_texts, on_fit) for codecs in bands_of(specs)]
    return Road(sender, receiver, tuple(one.to(receiver.device) for one in maps))


def bands_of(specs: tuple[Spec, ...]) -> list[tuple[str, ...]]:
    """The codecs that one map each must bear: `ecsq` at its own step, and between two coarser ones that caps drive it
    to.

    >>> [len(codecs) for codecs in bands_of((Spec.parse("all | ecsq"), Spec.parse("all | int(bits=4)")))]
    [1, 2, 2, 2, 2, 1]
    """
    found = [band for spec in specs for band in _bands(spec.codec)]
    return list(dict.fromkeys(found))


def _bands(codec: Codec) -> list[tuple[str, ...]]:
    if not isinstance(codec, Ecsq):
        return [(repr(codec),)]
    steps = [codec.step, *(step for step in _COARSER if step > codec.step)]
    coded = [repr(replace(codec, step=step)) for step in steps]
    return [(coded[0],), *pairwise(coded)]


def _kept(
    route: Route, codecs: tuple[str, ...], cache: Path, n_texts: int, on_fit: Callable[[str], None]
) -> Aligner:
    """From the cache, or fitted now."""
    ends, spec = (route.sender.geometry.model, route.receiver.geometry.model), BEST_CLOSED[route.grid]
    said = json.dumps([*ends, spec, codecs, n_texts])
    folder = cache / "aligners" / hashlib.sha256(said.encode()).hexdigest()[:16]
    if not folder.is_dir():
        on_fit(f"fitting {spec} under {', '.join(codecs)}")
        save_aligner(_fitted(route, codecs, spec, n_texts), folder, f"Closed form, {n_texts} texts.\n")
    return load_aligner(folder)


def _fitted(route: Route, codecs: tuple[str, ...], spec: str, n_texts: int) -> Aligner:
    pair = pair_of(route.sender, route.receiver)
    recipe = Settings(texts=n_texts, steps=0).recipe(codecs, route.grid)
    with frozen(route.sender), frozen(route.receiver):
        return closed_form(prepare(route, pair, recipe, NEIGHBOURS), spec)[0]

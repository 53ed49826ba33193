"""Fusers as the authors of C2C publish them: `projector_config.json`, and for each i `projector_{i}.json` and `.pt`.

The `.pt` files are pickles. Nothing in this package unpickles; whoever trusts the files hands in what reads them.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from kvferry.errors import FolderError
from kvferry.fuse.c2c import C2CFuser
from kvferry.kv import Geometry
from kvferry.weights import readable

ReadTensors = Callable[[Path], Mapping[str, Tensor]]

_NAMES = {
    "in": "entry",
    "mlp1.blocks": "shared",
    "scalar_mlp2.blocks": "weigher",
    "scalar_head": "weight",
    "proj_mlp2.blocks": "projector",
    "proj_out": "content",
    "gate_logit": "gate",
}
_PARAMETER = re.compile(rf"(key|value)_({'|'.join(map(re.escape, _NAMES))})((?:\.\w+)*)")
_CURE = "Give a folder of projector_*.json and projector_*.pt with its projector_config.json"


def load_published(folder: Path, sender: Geometry, receiver: Geometry, read: ReadTensors) -> C2CFuser:
    """The fuser of a published checkpoint, in evaluation mode.

    `read` turns a `.pt` file into named tensors, for example `functools.partial(torch.load, weights_only=True)`.
    Raises `FolderError` for a folder of another layout, for other geometries, and for missing or unknown tensors.
    """
    folder = Path(folder)
    with readable(folder, "published C2C fuser"):
        table = json.loads((folder / "projector_config.json").read_text(encoding="utf-8"))
        places = _places(table, receiver.n_layers)
        first = _arguments(folder, places[0][1])
        fuser = C2CFuser(
            sender,
            receiver,
            hidden=first["hidden_dim"],
            inner=first["intermediate_dim"],
            depth=first["num_layers"],
            dropout=first["dropout"],
            sources=[source for source, _ in places],
        )
        for layer, (source, number) in enumerate(places):
            _check_dims(_arguments(folder, number), sender, receiver, source, layer)
            tensors = dict(read(folder / f"projector_{number}.pt"))
            fuser.temperature.copy_(tensors.pop("gate_temperature"))
            renamed = {_rename(name): tensor for name, tensor in tensors.items()}
            fuser.projectors[layer].load_state_dict(renamed, strict=True)
    return fuser.eval()


def _places(table: dict[str, Any], n_layers: int) -> list[tuple[int, int]]:
    """For each receiver layer the sender layer and the projector's number.

    The table is `{receiver model: {sender model: {layer: [[sender layer, number], ...]}}}`, of one pair of models; of
    several sources for a layer the published code computes all and uses the first.
    """
    [senders] = table.values()
    [layers] = senders.values()
    firsts = (layers[str(layer)][0] for layer in range(n_layers))
    return [(int(source), int(number)) for source, number in firsts]


def _arguments(folder: Path, number: int) -> dict[str, Any]:
    return json.loads((folder / f"projector_{number}.json").read_text(encoding="utf-8"))["init_args"]


def _check_dims(found: dict[str, Any], sender: Geometry, receiver: Geometry, source: int, layer: int) -> None:
    heard, own = sender.layers[source], receiver.layers[layer]
    got = [found[f"{side}_{what}"] for side in ("source", "target") for what in ("num_heads", "dim")]
    want = [heard.heads, heard.key_dim, own.heads, own.key_dim]
    if got != want:
        what = f"layer {layer} was published for heads and dims {got}, these models have {want}"
        raise FolderError(what, cure="Give the geometries of the published pair")


def _rename(name: str) -> str:
    """`key_mlp1.blocks.0.w1.weight` -> `key.shared.0.up.weight`."""
    found = _PARAMETER.fullmatch(name)
    if found is None:
        raise FolderError(f"unknown tensor {name!r}", cure=_CURE)
    side, part, rest = found.groups()
    return f"{side}.{_NAMES[part]}{rest.replace('.w1.', '.up.').replace('.w2.', '.down.')}"

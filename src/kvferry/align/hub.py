"""One shared space for any number of models: an encoder and a decoder each, instead of a map for every pair.

Latent spaces between caches: arXiv:2601.06123. A code is one vector per token, for all its layers, keys and values. The
space of one model alone is that of the best linear autoencoder of its cache.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvferry.align.classwise import scaled
from kvferry.align.contract import Contract
from kvferry.align.hub_pair import Decoder, Encoder, HubPair
from kvferry.align.penalised import penalised
from kvferry.align.ridge import Sums, standardise
from kvferry.errors import ShapeMismatch, UsageError
from kvferry.kv import Geometry

FLOOR = 1e-9
"""Of a code's variance, next to that of its largest direction: what lies below is rounding."""
RARE = 0.005
"""Weight of the tokens of all places beside those of one place: enough for a place that is never met."""


class Hub(nn.Module):
    """Members by name, each an autoencoder through codes of `dim` channels that all members share.

    Kept as a folder per member, `save_aligner(hub.member(name), ...)`, and put together again with `add`.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.names: list[str] = []
        self._members = nn.ModuleList()  # no ModuleDict: its keys bear no dots, names of models do

    def member(self, name: str) -> HubPair:
        """Raises `UsageError` for a name that has not joined."""
        if name not in self.names:
            raise UsageError(f"{name!r} is no member", cure=f"One of: {', '.join(self.names) or 'none yet'}")
        return self._members[self.names.index(name)]  # type: ignore[return-value]

    def add(self, name: str, member: HubPair) -> None:
        """Let an autoencoder join: one from a folder, or a fresh one to be trained."""
        if name in self.names or member.dim != self.dim:
            cure = f"Give a new name, and codes of {self.dim} channels"
            raise UsageError(f"{name!r} with codes of {member.dim} channels cannot join", cure=cure)
        self.names.append(name)
        self._members.append(member)

    def join(
        self, name: str, geometry: Geometry, sent: Sums, held: Sums | Sequence[Sums], penalty: float
    ) -> None:
        """Add a model in closed form; the others stay as they are.

        `sent` are sums of its features, with as many neighbours as it shall see, with codes of the same tokens
        (`Sums.of(features, hub.encode(other, theirs))`), `held` of these codes with its features, place by place.
        """
        places = [held] if isinstance(held, Sums) else held
        neighbours = len(sent.x) // geometry.floats_per_token
        member = HubPair(Contract(geometry, geometry), self.dim, neighbours, len(places))
        _fit_encoder(member.encoder, sent, penalty)
        _fit_decoder(member.decoder, places, penalty)
        self.add(name, member)

    def encode(self, name: str, features: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch code"]:
        return self.member(name).encoder(features)

    def decode(self, name: str, code: Float[Tensor, "*batch code"]) -> Float[Tensor, "*batch features"]:
        return self.member(name).decoder(code)

    def loss(self, features: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """Mean squared error of every member's features from every member's codes, in units of each channel's variance.

        `features` are `[tokens, features]` of the same tokens for each member that takes part.
        """
        codes = [self.encode(name, sent) for name, sent in features.items()]
        errors = [
            ((self.decode(name, code) - held) / self.member(name).decoder.std).square().mean()
            for name, held in features.items()
            for code in codes
        ]
        return torch.stack(errors).mean()

    def train_only(self, name: str) -> None:
        """Freeze all members but one, so that it learns the space as it is."""
        member = self.member(name)
        self.requires_grad_(False)
        member.requires_grad_(True)

    def aligner(
        self, sender: str, receiver: str, coded_with: tuple[str, ...] = (), stride: float = 1.0
    ) -> HubPair:
        """The map between two members, a copy. `coded_with` are the codecs that the sender's encoder was fitted for."""
        source, target = self.member(sender), self.member(receiver)
        geometries = source.contract.sender, target.contract.receiver
        contract = Contract(*geometries, coded_with=coded_with, stride=stride)
        pair = HubPair(contract, self.dim, source.neighbours, target.places)
        pair.encoder.load_state_dict(source.encoder.state_dict())
        pair.decoder.load_state_dict(target.decoder.state_dict())
        return pair.to(source.encoder.weight.device)


@torch.no_grad()
def found(geometries: Mapping[str, Geometry], sums: Sums, dim: int, penalty: float) -> Hub:
    """A hub in closed form: principal directions of one model's features, or of several models' side by side.

    `sums` are of these features with themselves, for tokens that all models share; the models count alike, however wide
    they are. Codes have unit variance. An encoder gives what the model alone tells of the code, by ridge.
    """
    widths = [geometry.floats_per_token for geometry in geometries.values()]
    if len(sums.x) != sum(widths) or len(sums.y) != sum(widths):
        what = f"sums of {len(sums.x)} by {len(sums.y)} features for models of {widths}"
        raise ShapeMismatch(
            what, cure="Give the sums of all models' features, in their order, with themselves"
        )
    if not 0 < dim <= sum(widths):
        raise UsageError(f"codes of {dim} channels", cure=f"Give 1 to {sum(widths)}")
    std = standardise(sums)
    code = _directions(std.xx, widths, dim)
    hub, start = Hub(dim), 0
    for name, geometry in geometries.items():
        member = HubPair(Contract(geometry, geometry), dim)
        own = slice(start, start := start + geometry.floats_per_token)
        for half in (member.encoder, member.decoder):
            half.mean.copy_(std.x_mean[own])
            half.std.copy_(std.x_std[own])
            half.bias.zero_()
        with_code = std.xx[own] @ code
        member.encoder.weight.copy_(penalised(std.xx[own, own], with_code, penalty))
        member.decoder.weight[0].copy_(with_code.T)
        hub.add(name, member)
    return hub


def _directions(
    xx: Float[Tensor, "features features"], widths: list[int], dim: int
) -> Float[Tensor, "features code"]:
    """From standardised features to codes of unit variance; each model weighs as much as any other."""
    scale = torch.cat([torch.full((width,), width**-0.5, dtype=xx.dtype) for width in widths]).to(xx.device)
    values, vectors = torch.linalg.eigh(scale.unsqueeze(-1) * xx * scale)
    values, vectors = values.flip(0)[:dim], vectors.flip(1)[:, :dim]
    return scale.unsqueeze(-1) * vectors * values.clamp(min=float(values[0]) * FLOOR).rsqrt()


@torch.no_grad()
def _fit_encoder(encoder: Encoder, sums: Sums, penalty: float) -> None:
    std = standardise(sums)
    encoder.mean.copy_(std.x_mean)
    encoder.std.copy_(std.x_std)
    encoder.weight.copy_(penalised(std.xx, std.xy, penalty) * std.y_std)
    encoder.bias.copy_(std.y_mean)


@torch.no_grad()
def _fit_decoder(decoder: Decoder, places: Sequence[Sums], penalty: float) -> None:
    total = sum(places[1:], places[0])
    over_all = standardise(total)
    decoder.mean.copy_(over_all.y_mean)
    decoder.std.copy_(over_all.y_std)
    for weight, bias, found in zip(decoder.weight, decoder.bias, places, strict=True):
        std = standardise(found + scaled(total, RARE) if len(places) > 1 else found)
        per_code = penalised(std.xx, std.xy, penalty) / std.x_std.unsqueeze(-1) * (std.y_std / over_all.y_std)
        weight.copy_(per_code)
        bias.copy_((std.y_mean - over_all.y_mean) / over_all.y_std - std.x_mean @ per_code)

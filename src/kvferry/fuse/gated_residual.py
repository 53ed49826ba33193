"""A gated low-rank residual in content space, all layers at once.

The idea is that of C2C (arXiv:2510.03215; `fuse/c2c.py`): own and arrived token in, a residual with head weights and a
gate out. What differs: keys carry no rotation; every receiver layer sees all of the sender's layers, through one
projection that all share; gates are drawn once for a layer and sequence, with unbiased noise; no loop over layers.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from kvferry.errors import UsageError
from kvferry.fuse.bank import Bank, blocks_by_shape
from kvferry.fuse.contract import Fuser
from kvferry.kv import KV, Geometry, Group

_HARDEST = 0.1
"""Temperature of the gates at the end of training; smaller ones starve them of gradient."""
_FLOOR = 1e-4
"""Variance added to every direction before it is whitened; a standardised channel has one."""


class GatedResidual(Fuser):
    """Token by token: `residual = gate * sigmoid(head weight) * content`, content and weight of own and arrived token.

    In training a gate is `sigmoid((logit + noise) / temperature)`, its noise logistic (the difference of two Gumbels:
    at logit 0 as often open as closed); in evaluation it is open or closed, and a layer whose gates are closed is not
    written. `rank` bounds the residual of each layer, `width` what is heard of the sender. Gates start at logit 1 and
    content at zero, so that a fresh one changes nothing. Call `start`, or at least `standardise`, before training.
    """

    name: ClassVar[str] = "gated_residual"

    mean: Tensor
    deviation: Tensor
    temperature: Tensor

    def __init__(self, sender: Geometry, receiver: Geometry, rank: int = 64, width: int = 384) -> None:
        super().__init__(sender, receiver)
        if min(rank, width) < 1:
            raise UsageError(f"rank is {rank}, width {width}", cure="Give at least 1 for each")
        self.rank, self.width = rank, width
        self.register_buffer("mean", torch.zeros(sender.floats_per_token))
        self.register_buffer("deviation", torch.ones(sender.floats_per_token))
        self.register_buffer("temperature", torch.ones(()))
        self.hear = nn.Linear(sender.floats_per_token, width)
        self.gate = nn.Parameter(torch.ones(receiver.n_layers, 2))
        shapes = blocks_by_shape(receiver).items()
        self.banks = nn.ModuleList(Bank(shape, blocks, width, rank) for shape, blocks in shapes)

    def options(self) -> dict[str, Any]:
        return {"rank": self.rank, "width": self.width}

    def anneal(self, progress: float) -> None:
        """Temperature from 1 down to a tenth, geometrically."""
        super().anneal(progress)
        self.temperature.fill_(_HARDEST**progress)

    def open_gates(self) -> Bool[Tensor, "layers 2"]:
        """Which layers are written in evaluation, keys and values apart."""
        return self.gate > 0

    @torch.no_grad()
    def standardise(self, own: KV, arrived: KV) -> None:
        """Take means and deviations of both sides' channels from example caches, of the same tokens or not."""
        heard = _features(arrived)[arrived.present.all(0)]
        self.mean.copy_(heard.mean(0))
        self.deviation.copy_(_deviation(heard))
        for bank in self._banks():
            _standardise(bank, own)

    @torch.no_grad()
    def start(self, own: KV, arrived: KV) -> None:
        """`standardise`, and hear the sender's directions equally loud, however little they vary.

        What tells one text from another varies a hundred times less than what tells tokens apart; unwhitened, training
        does not find it for hundreds of steps. Raises `UsageError` for fewer tokens than channels.
        """
        self.standardise(own, arrived)
        heard = _features(arrived)[arrived.present.all(0)]
        if len(heard) < heard.shape[1]:
            cure = "Give more texts, or call standardise alone"
            raise UsageError(f"{len(heard)} tokens to whiten {heard.shape[1]} channels", cure=cure)
        nn.init.orthogonal_(self.hear.weight)
        self.hear.weight.copy_(self.hear.weight @ _whitening((heard - self.mean) / self.deviation))
        nn.init.zeros_(self.hear.bias)

    def forward(self, own: KV, arrived: KV) -> KV:
        self.require_models(own, arrived)
        self.require_same_tokens(own, arrived)
        heard = (_features(arrived).to(self.mean.dtype) - self.mean) / self.deviation
        latent, gate = functional.gelu(self.hear(heard)), self._gate(own.n_batch)
        parts = {place: part for bank in self._banks() for place, part in bank(own, latent, gate).items()}
        groups = (Group(g.layers, parts[i, 0], parts[i, 1]) for i, g in enumerate(own.groups))
        written = own.present & arrived.present.all(0)
        if not self.training:
            written = written & self.open_gates().any(1)[:, None, None]
        return KV(own.geometry, tuple(groups), written, own.positions, own.spans, "content", own.call_length)

    def _banks(self) -> list[Bank]:
        return [bank for bank in self.banks if isinstance(bank, Bank)]

    def _gate(self, n_batch: int) -> Float[Tensor, "layers 2 batch"]:
        logit = self.gate.unsqueeze(-1).expand(-1, -1, n_batch)
        if not self.training:
            return (logit > 0).to(logit.dtype)
        tiny = torch.finfo(logit.dtype).eps
        noise = torch.rand_like(logit).clamp(tiny, 1 - tiny).logit()
        return ((logit + noise) / self.temperature).sigmoid()


def _features(kv: KV) -> Float[Tensor, "batch tokens features"]:
    """A token's keys and values of all layers as one vector, fp32; zero where any layer lacks the token."""
    parts = [part for group in kv.groups for part in (group.keys, group.values)]
    flat = torch.cat([part.float().permute(1, 3, 0, 2, 4).flatten(2) for part in parts], -1)
    return flat.masked_fill(~kv.present.all(0).unsqueeze(-1), 0)


def _standardise(bank: Bank, own: KV) -> None:
    seen = bank.gather(own).float().transpose(2, 3)[:, own.present.all(0)]
    bank.mean.copy_(seen.mean(1))
    bank.deviation.copy_(_deviation(seen.transpose(0, 1)))


def _deviation(samples: Float[Tensor, "n *channels"]) -> Float[Tensor, "*channels"]:
    """Of constant channels one, so that nothing divides by zero."""
    deviation = samples.std(0, correction=0)
    return torch.where(deviation > 1e-6, deviation, 1.0)


def _whitening(samples: Float[Tensor, "n channels"]) -> Float[Tensor, "channels channels"]:
    """The inverse root of their second moments."""
    samples = samples.double()
    variance, directions = torch.linalg.eigh(samples.T @ samples / len(samples))
    return ((directions * (variance.clamp(min=0) + _FLOOR).rsqrt()) @ directions.T).float()

"""How far a coded cache is from the clean one: in what the model says next, and in what attention reads."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvferry.kv import KV
from kvferry.lab.wire.subject import N_SUFFIX, Subject, log_probs
from kvferry.rope import rotate


@dataclass(frozen=True)
class Quality:
    """Means over messages and tokens, in nats per token.

    `suffix_kl`: KL(clean || coded) of the predictions at the 64 tokens right after the prefix; `gap_kl`: at the 64
    tokens that follow 64 others, which the receiver read itself (None where the context has no room). `nll_delta`: by
    how much the real next tokens of the suffix became less likely. `attention_error`: relative L2 distance of
    softmax(qK)V over the prefix, real suffix queries, root mean square over layers.
    """

    suffix_kl: float
    nll_delta: float
    gap_kl: float | None
    attention_error: float


def measure(subject: Subject, kv: KV) -> Quality:
    """The quality of coded caches, in either key space; one forward pass."""
    coded = log_probs(subject.model, kv, subject.after)
    suffix, gap = slice(0, N_SUFFIX), slice(N_SUFFIX, 2 * N_SUFFIX)
    has_gap = coded.shape[1] > N_SUFFIX
    return Quality(
        suffix_kl=_kl(subject.clean[:, suffix], coded[:, suffix]),
        nll_delta=_nll(subject, coded) - _nll(subject, subject.clean),
        gap_kl=_kl(subject.clean[:, gap], coded[:, gap]) if has_gap else None,
        attention_error=attention_error(subject, kv),
    )


def _kl(clean: Float[Tensor, "batch n vocab"], coded: Float[Tensor, "batch n vocab"]) -> float:
    # In float64: what is left of two nearly equal numbers must not be rounding.
    clean, coded = clean.double(), coded.double()
    return max(0.0, float((clean.exp() * (clean - coded)).sum(-1).mean()))


def _nll(subject: Subject, spoken: Float[Tensor, "batch after vocab"]) -> float:
    targets = subject.targets[:, :N_SUFFIX].unsqueeze(-1)
    return -float(spoken[:, :N_SUFFIX].gather(-1, targets).double().mean())


@torch.no_grad()
def attention_error(subject: Subject, kv: KV) -> float:
    """Relative L2 of what the suffix reads from the prefix, rms over layers."""
    errors = [_layer_error(subject, kv, layer) for layer in range(kv.geometry.n_layers)]
    return float(torch.tensor(errors).square().mean().sqrt())


def _layer_error(subject: Subject, kv: KV, layer: int) -> float:
    clean, coded = _read(subject, subject.rotated, layer), _read(subject, kv, layer)
    norm = float(clean.norm())
    return float((coded - clean).norm()) / norm if norm else 0.0


def _read(subject: Subject, kv: KV, layer: int) -> Float[Tensor, "batch queries suffix dim"]:
    queries, (keys, values) = subject.queries[layer], kv.layer(layer)
    if kv.space == "content":
        keys = rotate(keys, kv.positions, kv.geometry.layers[layer].rotary, kv.call_length)
    share = queries.shape[1] // keys.shape[1]
    keys, values = (part.float().repeat_interleave(share, 1) for part in (keys, values))
    scores = queries @ keys.transpose(-1, -2) * _scaling(subject, layer)
    hidden = ~_visible(subject, layer)
    # A suffix token whose window holds nothing of the prefix reads zero.
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0.0)
    return weights @ values


def _visible(subject: Subject, layer: int) -> Bool[Tensor, "suffix tokens"]:
    window, n = subject.model.geometry.layers[layer].window, subject.tokens
    distance = torch.arange(n, n + N_SUFFIX).unsqueeze(-1) - torch.arange(n)
    return distance < window if window is not None else distance >= 0


def _scaling(subject: Subject, layer: int) -> float:
    """What the model multiplies scores by."""
    layers: Any = subject.model.hf.get_decoder().layers  # transformers' modules are not typed
    return float(layers[layer].self_attn.scaling)

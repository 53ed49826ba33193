"""How far a coded cache is from the clean one: in what the model says next, and in what attention reads."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.kv import KV
from kvferry.lab.wire.attention import read_prefix
from kvferry.lab.wire.subject import N_SUFFIX, Subject, log_probs


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
    # Summed in float64: what is left of nearly equal numbers must not be rounding.
    return max(0.0, float((clean.exp() * (clean - coded)).sum(-1, dtype=torch.float64).mean()))


def _nll(subject: Subject, spoken: Float[Tensor, "batch after vocab"]) -> float:
    targets = subject.targets[:, :N_SUFFIX].unsqueeze(-1)
    return -float(spoken[:, :N_SUFFIX].gather(-1, targets).double().mean())


def attention_error(subject: Subject, kv: KV) -> float:
    """Relative L2 of what the suffix reads from the prefix, rms over layers."""
    coded = read_prefix(subject.model, subject.queries, kv)
    errors = [_relative(a, b) for a, b in zip(coded, subject.reads, strict=True)]
    return float(torch.tensor(errors).square().mean().sqrt())


def _relative(coded: Float[Tensor, "*shape"], clean: Float[Tensor, "*shape"]) -> float:
    norm = float(clean.norm())
    return float((coded - clean).norm()) / norm if norm else 0.0

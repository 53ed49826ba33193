"""What a codec's error can do behind an aligner: a bound that holds, layer by layer, beside what it did.

    codec  --|dx|-->  map  --|dk|, |dv|-->  softmax(qk) v  --|do|

Two bounds, both derived in docs/theory.md. *Certified* knows of the codec only how far off a token's numbers are, and
of the map its Lipschitz constants. *Given* knows the errors of keys and values themselves. Both hold for the queries
that were asked; neither says what a wrong read does to the answer.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from kvferry.align.covered import covers
from kvferry.align.features import with_neighbours
from kvferry.errors import ForeignModel, UsageError
from kvferry.metrics.attention import Scores
from kvferry.metrics.likeness import Likeness, attention_reads, likeness
from kvferry.models.scores import scores_of
from kvferry.train.cases import Asked, Case, Way
from kvferry.train.certified_layer import LayerCertificate, certify_layer
from kvferry.train.examples import Source
from kvferry.train.impulse import token_map


@dataclass(frozen=True)
class Certificate:
    """What was certified and measured. `input_*`: L2 norms of a sender token with its neighbours, and of its error.

    `attention_*` compare what is read from the mapped cache with what is read from the receiver's own: that error is
    the map's. It is measured only, nothing here bounds it.
    """

    aligner: str
    codec: str
    covered: bool
    n_texts: int
    n_tokens: int
    neighbours: int
    n_parameters: int
    map_ms_per_token: float
    input_norm_mean: float
    input_error_mean: float
    input_error_max: float
    attention_cosine: float
    attention_error: float
    attention_cosine_coded: float
    attention_error_coded: float
    layers: tuple[LayerCertificate, ...]

    @property
    def vacuous(self) -> bool:
        """Whether the certified bound says nothing of any read."""
        return all(layer.vacuous_certified == 1 for layer in self.layers)


@torch.no_grad()
def certify(way: Way, source: Source, *, n: int = 16, seed: int = 0) -> Certificate:
    """Certify a codec behind an aligner on `n` test texts of a source.

    Raises `ForeignModel` for other models than the aligner's, `UncertifiableMap` for a map without a useful bound.
    """
    _check(way, n)
    cases = list(way.cases(list(islice(source.examples("test", seed), n))))
    through, scores = token_map(way.aligner, cases[0].sent), scores_of(way.receiver)
    errors = [_input_errors(case, through.neighbours) for case in cases]
    held, wrong = (
        _of_present(cases, [_input_norms(case, through.neighbours) for case in cases]),
        _of_present(cases, errors),
    )
    clean, coded = (
        [_likeness(case, mapped, scores) for case, mapped in zip(cases, part, strict=True)]
        for part in ([case.mapped for case in cases], [case.mapped_coded for case in cases])
    )
    return Certificate(
        aligner=way.aligner.name,
        codec=repr(way.codec),
        covered=covers(way.aligner.contract.coded_with, repr(way.codec.agreed())),
        n_texts=n,
        n_tokens=len(wrong),
        neighbours=through.neighbours,
        n_parameters=sum(parameter.numel() for parameter in way.aligner.parameters()),
        map_ms_per_token=_map_ms_per_token(way, cases[0]),
        input_norm_mean=float(held.mean()),
        input_error_mean=float(wrong.mean()),
        input_error_max=float(wrong.max()),
        attention_cosine=_mean([one.attention_cosine for one in clean]),
        attention_error=_mean([one.attention_error for one in clean]),
        attention_cosine_coded=_mean([one.attention_cosine for one in coded]),
        attention_error_coded=_mean([one.attention_error for one in coded]),
        layers=tuple(
            certify_layer(index, scores[index], through, cases, errors)
            for index in range(way.receiver.geometry.n_layers)
        ),
    )


def _check(way: Way, n: int) -> None:
    if n < 1:
        raise UsageError(f"{n} texts", cure="Certify on at least one")
    sender, receiver, contract = way.sender.geometry, way.receiver.geometry, way.aligner.contract
    contract.require_sender(sender.model, sender.tokenizer)
    if receiver.model != contract.receiver.model:
        what = f"receiver {receiver.model[:16]}, the aligner was fitted for {contract.receiver.model[:16]}"
        raise ForeignModel(what, cure="Give --receiver the model named in the aligner's card")


def _input_norms(case: Case, neighbours: int) -> Float[Tensor, "batch tokens"]:
    return with_neighbours(case.sent, neighbours).norm(dim=-1)


def _input_errors(case: Case, neighbours: int) -> Float[Tensor, "batch tokens"]:
    """How far off each token is, with its neighbours; 0 for tokens that are not there."""
    sent, coded = (with_neighbours(kv, neighbours).double() for kv in (case.sent, case.coded))
    return (coded - sent).norm(dim=-1) * case.sent.present.all(0)


def _of_present(
    cases: Sequence[Case], numbers: Sequence[Float[Tensor, "batch tokens"]]
) -> Float[Tensor, " n"]:
    return torch.cat([part[case.sent.present.all(0)] for case, part in zip(cases, numbers, strict=True)])


def _likeness(case: Case, mapped: Asked, scores: Sequence[Scores]) -> Likeness:
    got, want = (attention_reads(one.kv, one.queries, one.positions, scores) for one in (mapped, case.own))
    return likeness(got, want, case.own.mask)


def _map_ms_per_token(way: Way, case: Case) -> float:
    """Of the map alone, on this machine, for a batch; the first call is not counted."""
    way.aligner(case.coded)
    start = time.perf_counter()
    mapped = way.aligner(case.coded)
    mapped.present.sum().item()  # waits for the device
    return 1e3 * (time.perf_counter() - start) / int(case.coded.present[0].sum())


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)

"""The error of a coded cache in the measure that its codec codes by: what a step of `ecsq` is a step of."""

import numpy as np
from jaxtyping import Float64

from kvferry.codec.ecsq import Ecsq
from kvferry.codec.ecsq.grid import step_size
from kvferry.codec.ecsq.scheme import FromProfile
from kvferry.codec.profiles import NONE, find_profile
from kvferry.kv import KV


def felt_error(codec: Ecsq, kv: KV, came: KV) -> float:
    """Mean square over one sequence that was sent whole, layers and keys and values alike.

    With a profile of A e over the steps' weights, A its matrix of a head; without one of e over the deviation of the
    block about its channels' means.
    """
    scheme = None if codec.profile == NONE else FromProfile(find_profile(codec.profile), kv.geometry)
    found = [
        _felt(scheme, layer, which, *(one.layer(layer)[which][0].double().numpy() for one in (kv, came)))
        for layer in range(kv.geometry.n_layers)
        for which in (0, 1)
    ]
    return float(np.mean(found))


def _felt(
    scheme: FromProfile | None,
    layer: int,
    which: int,
    sent: Float64[np.ndarray, "heads tokens dim"],
    came: Float64[np.ndarray, "heads tokens dim"],
) -> float:
    error = came - sent
    if scheme is None:
        return float(np.mean(error**2) / np.mean(sent.var(axis=1)))
    heads, _, dim = sent.shape
    matrix = np.tril(scheme.feedback[layer, which].astype(np.float64), -1) + np.eye(dim)
    weight = scheme.profile.weight[scheme.channels[layer, which]].astype(np.int64)
    unit = step_size(weight).astype(np.float64).reshape(heads, 1, dim)
    return float(np.mean((np.einsum("hij,htj->hti", matrix, error) / unit) ** 2))

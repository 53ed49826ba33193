"""The quantised caches of transformers, one layer at a time: peers of the bench, not part of any path of ours."""

import os
import warnings
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import cache_utils

from kvferry.errors import UsageError

Backend = Literal["quanto", "hqq"]

_CURES = {
    "quanto": "Run: pip install 'kvferry[bench]'",
    "hqq": "Run: DISABLE_CUDA=1 pip install --no-deps hqq termcolor einops",
}
_LAYERS = {"quanto": "QuantoQuantizedLayer", "hqq": "HQQQuantizedLayer"}


def quantised_layer(backend: Backend, bits: int) -> Any:
    """A layer of `transformers.QuantizedCache` with its defaults: groups of 64 along axis 0.

    Raises `UsageError` without the package.
    """
    os.environ.setdefault("DISABLE_CUDA", "1")  # read by hqq, which otherwise looks for kernels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return getattr(cache_utils, _LAYERS[backend])(
                nbits=bits, axis_key=0, axis_value=0, q_group_size=64, residual_length=128
            )
        except ImportError:
            raise UsageError(f"{backend} is not installed", cure=_CURES[backend]) from None


def fill(layer: Any, keys: Tensor, values: Tensor) -> None:
    """What a prefill does: keys and values `[1, heads, tokens, dim]` are quantised at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.update(keys, values)


def quantised_bytes(layer: Any) -> int:
    """Bytes of codes, scales and zeros that the layer holds."""
    return sum(_bytes(part) for part in (layer._quantized_keys, layer._quantized_values))


def dequantised(layer: Any) -> tuple[Tensor, Tensor]:
    """Keys and values as attention gets them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keys, values = (layer._dequantize(x) for x in (layer._quantized_keys, layer._quantized_values))
    return keys, values


def _bytes(quantised: Any) -> int:
    if isinstance(quantised, tuple):  # hqq: codes and a dictionary
        codes, meta = quantised
        return sum(part.nbytes for part in (codes, meta["scale"], meta["zero"]))
    codes = quantised._data._data if hasattr(quantised._data, "_data") else quantised._data
    return sum(part.nbytes for part in (codes, quantised._scale, quantised._shift) if torch.is_tensor(part))

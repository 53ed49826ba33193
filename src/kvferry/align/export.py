"""Aligners for runtimes without torch: the map from features to features as an ONNX graph."""

import importlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvferry.align.contract import Aligner
from kvferry.align.features import flatten, look_back, unflatten
from kvferry.errors import MissingExtra, UsageError
from kvferry.kv import KV, Geometry, Spans

TOLERANCE = 1e-4
"""Largest difference of the graph's numbers from torch's, next to the largest number."""


@runtime_checkable
class FeatureMap(Protocol):
    """An aligner that maps each token by itself, or with those before it."""

    neighbours: int

    def map(self, wide: Tensor) -> Tensor: ...


def export_onnx(aligner: Aligner, file: Path) -> float:
    """Write `features [batch, tokens, sender]` -> `mapped [batch, tokens, receiver]`, and give the error measured.

    Features are those of `features.flatten`, in content space, zero for tokens that are not there. Batch and tokens may
    be of any length. The graph is run by onnxruntime and compared before it is put in place; weights that do not fit
    into one file lie beside it. Raises `UsageError` for an aligner that is no such map and for a graph that is off by
    more than `TOLERANCE`, `MissingExtra` without onnx.
    """
    if not isinstance(aligner, FeatureMap):
        cure = "Export a map that was fitted, such as linear or residual_mlp"
        raise UsageError(f"{aligner.name} maps no features", cure=cure)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _require(package)
    graph = _Graph(aligner).eval()
    example = torch.randn(2, 5, aligner.contract.sender.floats_per_token)
    example = example.to(next(aligner.parameters()).device)
    with _beside(file) as beside:
        draft = beside / file.name
        _write(graph, example, draft)
        error = _error(aligner, example[:1, :3], draft)
        if not error <= TOLERANCE:
            cure = "Export with other versions of torch and onnxscript"
            raise UsageError(f"the graph is off by {error:.1e}, more than {TOLERANCE:.0e}", cure=cure)
        for written in beside.iterdir():
            written.replace(file.parent / written.name)
    return error


class _Graph(nn.Module):
    """What is exported."""

    def __init__(self, aligner: FeatureMap) -> None:
        super().__init__()
        self.aligner = aligner

    def forward(self, features: Float[Tensor, "batch tokens features"]) -> Float[Tensor, "batch tokens out"]:
        return self.aligner.map(look_back(features, self.aligner.neighbours))


@contextmanager
def _beside(file: Path) -> Iterator[Path]:
    """A folder for drafts next to where the file goes."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=file.parent, prefix=".export-")
    except OSError as error:
        cure = "Give a place that can be written"
        raise UsageError(f"cannot write {file}: {error.strerror}", cure=cure) from None
    with folder as name:
        yield Path(name)


def _require(package: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError:
        raise MissingExtra(package, "onnx") from None


def _write(graph: nn.Module, example: Tensor, file: Path) -> None:
    program = torch.onnx.export(
        graph,
        (example,),
        dynamo=True,
        verbose=False,
        input_names=["features"],
        output_names=["mapped"],
        dynamic_shapes={"features": {0: "batch", 1: "tokens"}},
    )
    if program is None:
        raise UsageError("torch wrote no graph", cure="Export with another version of torch")
    program.save(str(file))


@torch.no_grad()
def _error(aligner: Aligner, features: Float[Tensor, "1 tokens features"], file: Path) -> float:
    """How far onnxruntime is from what the aligner makes of the same cache."""
    from onnxruntime import InferenceSession

    session = InferenceSession(str(file), providers=["CPUExecutionProvider"])
    [got] = session.run(["mapped"], {"features": features.cpu().numpy()})
    want = flatten(aligner(_cache(features, aligner.contract.sender))).cpu().numpy()
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30))


def _cache(features: Float[Tensor, "1 tokens features"], geometry: Geometry) -> KV:
    """One sequence of these features."""
    n_tokens = features.shape[1]
    zeros = np.zeros(n_tokens, np.int32)
    spans = Spans(zeros, zeros, zeros, zeros.astype(np.uint8))
    present = torch.ones(geometry.n_layers, 1, n_tokens, dtype=torch.bool, device=features.device)
    positions = torch.arange(n_tokens, device=features.device).expand(1, 1, -1)
    return KV(geometry, unflatten(features, geometry), present, positions, (spans,))

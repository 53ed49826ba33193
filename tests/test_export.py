"""Aligners as ONNX graphs: onnxruntime says what torch says, whatever the batch and the length."""

import sys

import numpy as np
import onnxruntime
import pytest
import torch
from typer.testing import CliRunner

from contract import cache, geometry
from kvferry.align.contract import Contract
from kvferry.align.elastic import ElasticBottleneck
from kvferry.align.export import TOLERANCE, export_onnx
from kvferry.align.features import flatten
from kvferry.align.folder import save_aligner
from kvferry.align.headwise import HeadwiseProjector
from kvferry.align.identity import Identity
from kvferry.align.kv_projector import KVCacheProjector
from kvferry.align.kv_projector_mlp import KVCacheProjectorMLP
from kvferry.align.linear import Linear
from kvferry.align.map_projection import MapProjectionAligner
from kvferry.align.residual_mlp import ResidualMLP
from kvferry.cli import app
from kvferry.errors import MissingExtra, UsageError

# torch's exporter copies tree specs with a constructor that torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")

SENDER, RECEIVER = ((2, 3, 4), (2, 3, 4), (1, 2, 2)), ((1, 5, 3), (2, 4, 4))
CONTRACT = Contract(geometry(SENDER), geometry(RECEIVER, model="ef"))


def scattered(aligner):
    for parameter in aligner.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return aligner.eval()


def said_by(file, kv):
    """By the graph, of features without the tokens that are not there."""
    features = flatten(kv) * kv.present.all(0).unsqueeze(-1)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["mapped"], {"features": features.numpy()})[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Linear(CONTRACT, neighbours=3),
        lambda: ResidualMLP(CONTRACT, neighbours=2, hidden=8),
        lambda: KVCacheProjector(CONTRACT, neighbours=2, output_norm=True),
        lambda: KVCacheProjectorMLP(CONTRACT, hidden_dim=8),
        lambda: HeadwiseProjector(CONTRACT, sources=[[0, 1], []], neighbours=2),
        lambda: ElasticBottleneck(CONTRACT),
        pytest.param(lambda: MapProjectionAligner(CONTRACT), marks=pytest.mark.slow),
    ],
    ids=[
        "linear",
        "residual_mlp",
        "kv_projector",
        "kv_projector_mlp",
        "headwise",
        "elastic",
        "map_projection",
    ],
)
def test_the_graph_maps_caches_as_the_aligner_does(make, tmp_path):
    aligner, file = scattered(make()), tmp_path / "new" / "map.onnx"
    assert export_onnx(aligner, file) <= TOLERANCE
    assert [path.name for path in file.parent.iterdir()] == ["map.onnx"]
    for n_batch, n_tokens in ((1, 1), (3, 9)):
        kv = cache(SENDER, n_tokens, n_batch)
        kv.present[:, 0, 0] = False
        held = kv.present[0].unsqueeze(-1)
        got, want = said_by(file, kv) * held, flatten(aligner(kv)).detach() * held
        assert torch.allclose(got, want, atol=1e-4 * max(float(want.abs().max()), 1e-9))


def test_the_command_writes_a_graph(tmp_path):
    save_aligner(scattered(Linear(CONTRACT)), tmp_path / "linear", card="")
    words = ["export", str(tmp_path / "linear"), "--onnx", str(tmp_path / "map.onnx"), "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert f'"n_bytes": {(tmp_path / "map.onnx").stat().st_size}' in done.output


def test_what_is_no_map_of_features_is_refused(tmp_path):
    with pytest.raises(UsageError, match="identity maps no features"):
        export_onnx(Identity(CONTRACT), tmp_path / "map.onnx")


def test_without_the_extra_the_cure_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        MissingExtra, match=r"onnxscript is not installed. Run: pip install 'kvferry\[onnx\]'"
    ):
        export_onnx(Linear(CONTRACT), tmp_path / "map.onnx")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot write .*map.onnx"):
        export_onnx(Linear(CONTRACT), tmp_path / "file" / "map.onnx")


def test_a_graph_that_is_off_is_not_put_in_place(tmp_path):
    aligner = scattered(Linear(CONTRACT))
    aligner.weight.data[0, 0] = np.nan
    with pytest.raises(UsageError, match="off by nan"):
        export_onnx(aligner, tmp_path / "map.onnx")
    assert list(tmp_path.iterdir()) == []

"""Trained maps: each starts where its closed form ends, and says what it is to the last parameter."""

import pytest
import torch

from contract import cache
from kvferry.align.contract import Contract
from kvferry.align.features import flatten, with_neighbours
from kvferry.align.linear import affine
from kvferry.align.residual_mlp import ResidualMLP
from kvferry.align.ridge import Sums, solve

SENDER, RECEIVER = ((2, 3, 4), (2, 3, 4), (1, 2, 2)), ((1, 5, 3), (2, 4, 4))


def pair(n_tokens=400):
    """A sender's cache, uneven in scale and correlated, and a receiver's cache that hangs on it."""
    sent, held = cache(SENDER, n_tokens, n_batch=2, scale=3.0), cache(RECEIVER, n_tokens, n_batch=2)
    for row in range(1, 3):
        keys = sent.layer(row)[0]
        keys.mul_(10.0**row).add_(row)
    even = (flatten(sent) - flatten(sent).mean((0, 1))) / flatten(sent).std((0, 1))
    n_in, n_out = even.shape[-1], flatten(held).shape[-1]
    bent = torch.relu(even @ torch.randn(n_in, 2)) @ torch.randn(2, n_out)
    target = 7 + 10 * (even @ torch.randn(n_in, n_out) + bent)
    return sent, target, Contract(sent.geometry, held.geometry)


def features_of(kv, neighbours=1):
    return with_neighbours(kv, neighbours).flatten(0, 1)


@pytest.fixture
def fitted():
    sent, target, contract = pair()
    aligner = ResidualMLP(contract, neighbours=2, hidden=8)
    sums = Sums.of(features_of(sent, 2), target.flatten(0, 1))
    weight, bias = solve(sums, 1e-3)
    aligner.start_from(sums, weight, bias)
    return sent, target, aligner, affine(sent, weight, bias, contract)


def test_the_residual_map_starts_at_the_ridge(fitted):
    sent, _, aligner, ridge = fitted
    assert torch.allclose(flatten(aligner(sent)), flatten(ridge), rtol=1e-4, atol=1e-3)


def test_whitened_coordinates_have_unit_variance(fitted):
    sent, _, aligner, _ = fitted
    z = (features_of(sent, 2) - aligner.x_mean) @ aligner.basis
    covariance = z.T @ z / len(z)
    assert torch.allclose(covariance, torch.eye(len(covariance)), atol=2e-2)


def test_a_few_steps_of_the_residual_beat_the_ridge(fitted):
    sent, target, aligner, ridge = fitted
    optimizer = torch.optim.Adam(aligner.parameters(), 1e-2)
    for _ in range(150):
        loss = ((flatten(aligner(sent)) - target) / aligner.y_std).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * ((flatten(ridge) - target) / aligner.y_std).square().mean()


def test_folding_keeps_the_map_and_drops_the_basis(fitted):
    sent, _, aligner, _ = fitted
    torch.nn.init.normal_(aligner.down.weight)
    plain = aligner.fold()
    assert torch.allclose(flatten(plain(sent)), flatten(aligner(sent)), rtol=1e-3, atol=1e-2)
    assert set(plain.state_dict()) == {"inner", "shift", "up.weight", "up.bias", "down.weight"}
    assert plain.options()["folded"] and plain.fold() is plain

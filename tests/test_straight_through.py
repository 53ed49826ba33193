"""What arrives, with the gradient of what was sent."""

import pytest
import torch

from contract import RAGGED, cache
from kvferry.codec import CODECS, roundtrip
from kvferry.codec.straight_through import straight_through
from kvferry.kv import KV, Group

SPECS = (
    "raw",
    "int(bits=8)",
    "int(bits=4, axis=channel)",
    "nf4",
    "fp8",
    "mixed",
    "ecsq(step=-64)",
    "ecsq(step=0)",
)


def leaves(kv: KV) -> KV:
    return kv.with_groups(
        tuple(
            Group(g.layers, g.keys.clone().requires_grad_(), g.values.clone().requires_grad_())
            for g in kv.groups
        )
    )


@pytest.mark.parametrize("spec", SPECS)
def test_forward_is_the_wire_and_back_is_the_identity(spec):
    codec, kv = CODECS.parse(spec), cache(RAGGED, n_tokens=6, n_batch=2)
    present = kv.present.clone()
    present[1, 0, 2] = False
    sent = leaves(KV(kv.geometry, kv.groups, present, kv.positions, kv.spans))
    arrived, want = straight_through(codec, sent), roundtrip(codec, sent)
    total = torch.zeros(())
    for got, other in zip(arrived.groups, want.groups, strict=True):
        assert torch.equal(got.keys, other.keys) and torch.equal(got.values, other.values)
        total = total + (3 * got.keys).sum() + (3 * got.values).sum()
    total.backward()
    for group in sent.groups:
        held = present[list(group.layers)][:, :, None, :, None].float()
        for leaf in (group.keys, group.values):
            assert leaf.grad is not None and torch.equal(leaf.grad, (3 * held).expand_as(leaf))

"""A cache is checked once, when it is made."""

import pytest

import contract
from kvferry.errors import ShapeMismatch
from kvferry.kv import Group


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        ((3, 1, 2, 7, 4), (3, 1, 2, 7, 5), "layer 0 holds"),
        ((3, 1, 2, 7, 5), (3, 1, 2, 7, 4), "layer 0 holds"),
        ((3, 1, 2, 6, 4), (3, 1, 2, 6, 4), "layer 0 holds"),
        ((2, 1, 2, 7, 4), (2, 1, 2, 7, 4), "2 keys and 2 values for 3 layers"),
        ((4, 1, 2, 7, 4), (4, 1, 2, 7, 4), "4 keys and 4 values for 3 layers"),
    ],
)
def test_groups_that_do_not_fit_the_geometry(keys, values, message):
    kv = contract.cache()
    zeros = kv.groups[0].keys.new_zeros
    with pytest.raises(ShapeMismatch, match=message):
        kv.with_groups((Group((0, 1, 2), zeros(keys), zeros(values)),))


def test_each_layer_is_held_once():
    kv = contract.cache()
    with pytest.raises(ShapeMismatch, match="groups hold layers"):
        kv.with_groups((Group((0, 1, 1), kv.groups[0].keys, kv.groups[0].values),))

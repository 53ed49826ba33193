"""Profiles for the models of the bench: shipped ones for the zoo, for others fitted on calibration text.

A profile sees stories of the calibration file only, and none that the test reads. Its weights are flat over the age of
tokens.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from kvferry.codec.profiles import hold, shipped_profiles
from kvferry.fuse.layout import text_slots
from kvferry.kv import Role
from kvferry.lab.wire.subject import N_SUFFIX
from kvferry.lab.wire.texts import passages
from kvferry.models.capture import capture
from kvferry.models.load import Model
from kvferry.models.tokens import Tokens, join, pad, plain_spans
from kvferry.train.profile import Case, ProfileRecipe, profile_of

N_TOKENS = 128
RECIPE = ProfileRecipe()


def profile_name(model: Model) -> str:
    """A name that codecs find the model's profile by. It is fitted now where none is shipped."""
    if model.name in shipped_profiles():
        return model.name
    ids = passages(model, RECIPE.n_contexts, prefix=N_TOKENS, after=N_SUFFIX, split="calibration")
    return hold(profile_of(model, _cases(model, ids), RECIPE)).name


def _cases(model: Model, ids: Int[Tensor, "batch tokens"]) -> Iterator[Case]:
    """Caches of the prefix without the model's head, and what follows them."""
    n_head = model.head.ids.shape[1]
    for part in ids.split(RECIPE.batch_size):
        prefix = join(model.heads(len(part)), _text(part[:, n_head:N_TOKENS]))
        after = _text(part[:, N_TOKENS:])
        yield text_slots(capture(model, prefix).kv), after, torch.ones_like(after.mask)


def _text(ids: Int[Tensor, "batch tokens"]) -> Tokens:
    return pad([(row.tolist(), plain_spans(len(row), Role.TEXT)) for row in ids])

"""Reads the rotary embedding of a live model, per layer, and proves it by experiment.

Rule 1: numbers come from the live modules (tables as they are after loading, casting and scaling), not from names.
Rule 2: which table a layer uses, and how it pairs channels, is found by the +37 probe: the spec that carries the keys
of one position to another, 37 positions on and further, is the layer's. None that does: the model is refused.
Rule 3: the model leaves the probe exactly as it came, the state of its rotary modules included.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvferry.errors import ModelRefused, RotaryMismatch
from kvferry.models.probe import (
    TOKENS,
    Probe,
    attention_layers,
    decoder_of,
    rotary_modules,
    run_probe,
    table_names,
    untouched,
)
from kvferry.rope import NO_ROTATION, LongRule, RotarySpec, rotate, strip

OFFSETS = (0, 37, 1009)
"""The second offset gives the probe its name; the third shows errors in channels that turn slowly."""

TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest error allowed, as a share of the largest key: 16-bit models round their cosines and their products."""
_FULL_PRECISION = 1e-5

STYLES: tuple[Literal["half", "interleaved"], ...] = ("half", "interleaved")
ORDERS: tuple[Literal["blocks", "turns"], ...] = ("blocks", "turns")


def read_rotary(hf_model: PreTrainedModel) -> tuple[RotarySpec, ...]:
    """The `RotarySpec` of every layer, each one verified against the model itself.

    Raises `RotaryMismatch` naming the first layer whose keys none of the model's tables explains, `ModelRefused` for
    keys that are NaN or infinite.
    """
    return read_layers(hf_model)[0]


def read_layers(hf_model: PreTrainedModel) -> tuple[tuple[RotarySpec, ...], Probe]:
    """As `read_rotary`, with the probe: its keys and values tell the dims of every layer."""
    tables = _tables(decoder_of(hf_model))
    axes = max([len(spec.sections) for _, spec in tables], default=1) or 1
    with untouched(hf_model):
        reset_call_state(hf_model)
        seen = run_probe(hf_model, 0, _offsets_below(_shortest(hf_model, tables)), axes)
        _require_finite(hf_model, seen)
        specs = tuple(_explain(hf_model, layer, tables, seen) for layer in range(len(seen.keys)))
        if thresholds := [spec.long.threshold for spec in specs if spec.long]:
            reset_call_state(hf_model)
            long = run_probe(hf_model, max(thresholds), OFFSETS, axes)
            for layer, spec in enumerate(specs):
                _require(hf_model, layer, spec, long)
    return specs, seen


def reset_call_state(hf_model: PreTrainedModel) -> None:
    """Put the rotary modules back to where loading left them.

    Transformers keeps the frequencies of the longest call so far (dynamic) or of the last one (longrope). After a
    reset a prefill depends on its own length alone, which is what `RotarySpec.for_call` describes.
    """
    for module in rotary_modules(decoder_of(hf_model)):
        for name in table_names(module):
            prefix = name.removesuffix("inv_freq")
            original = getattr(module, f"{prefix}original_inv_freq", None)
            if original is None or not _depends_on_call(_rope_type(module, prefix)):
                continue
            module._buffers[name] = original.clone().to(module.get_buffer(name).device)
            if hasattr(module, f"{prefix}max_seq_len_cached"):
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _tables(decoder: nn.Module) -> list[tuple[str, RotarySpec]]:
    """Layer type ("" for all) and, as a half-split spec, each table of frequencies that the model holds."""
    found = []
    for module in rotary_modules(decoder):
        for name in table_names(module):
            prefix = name.removesuffix("inv_freq")
            if _rope_type(module, prefix) is not None:
                found.append((prefix.removesuffix("_"), _read_table(module, prefix)))
    return found


def _read_table(module: Any, prefix: str) -> RotarySpec:
    rule = _long_rule(module, prefix)
    table = getattr(module, f"{prefix}original_inv_freq" if rule else f"{prefix}inv_freq")
    inv_freq = tuple(table.float().tolist())
    sections = _numbers(module, prefix).get("mrope_section") or getattr(module, "mrope_section", ())
    return RotarySpec(
        "half",
        dim=2 * len(inv_freq),
        inv_freq=inv_freq,
        scaling=float(getattr(module, f"{prefix}attention_scaling", 1.0)),
        sections=tuple(sections) if sum(sections) == len(inv_freq) else (),
        long=rule,
    )


def _rope_type(module: Any, prefix: str) -> str | None:
    kind = getattr(module, "rope_type", "default")
    return kind.get(prefix.removesuffix("_")) if isinstance(kind, dict) else kind


def _numbers(module: Any, prefix: str) -> dict[str, Any]:
    """What the configuration says of a table."""
    found = getattr(module.config, "rope_parameters", None) or {}
    return found.get(prefix.removesuffix("_")) or {} if prefix else found


def _depends_on_call(rope_type: str | None) -> bool:
    return rope_type is not None and ("dynamic" in rope_type or rope_type == "longrope")


def _long_rule(module: Any, prefix: str) -> LongRule | None:
    kind = _rope_type(module, prefix)
    if not _depends_on_call(kind):
        return None
    numbers, layer_type = _numbers(module, prefix), prefix.removesuffix("_") or None
    if kind != "longrope":
        base, factor = float(numbers["rope_theta"]), float(numbers["factor"])
        return LongRule("dynamic", int(module.original_max_seq_len), base=base, factor=factor)
    threshold = int(numbers["original_max_position_embeddings"])
    # Made where loading made the short one; transformers copies it into the buffer, rounding to its dtype.
    table, _ = ROPE_INIT_FUNCTIONS["longrope"](
        module.config, "cpu", seq_len=threshold + 1, layer_type=layer_type
    )
    rounded = table.to(module.get_buffer(f"{prefix}inv_freq").dtype).float()
    scaling = float(getattr(module, f"{prefix}attention_scaling"))
    return LongRule("longrope", threshold, inv_freq=tuple(rounded.tolist()), scaling=scaling)


def _shortest(hf_model: PreTrainedModel, tables: list[tuple[str, RotarySpec]]) -> int:
    """Length of the longest call to which no rule for long calls applies."""
    limit = getattr(hf_model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    limits = [spec.long.threshold for _, spec in tables if spec.long]
    return min([*limits, limit or OFFSETS[-1] + TOKENS])


def _offsets_below(length: int) -> tuple[int, ...]:
    return tuple(sorted({min(offset, max(length - TOKENS, 1)) for offset in OFFSETS}))


def _explain(
    hf_model: PreTrainedModel, layer: int, tables: list[tuple[str, RotarySpec]], seen: Probe
) -> RotarySpec:
    """The candidate that reproduces the layer's keys best, if it does so well enough."""
    types = getattr(hf_model.config.get_text_config(decoder=True), "layer_types", None)
    # Among tables of equal numbers the one that is meant for this type of layer wins, being the first.
    declared = sorted(tables, key=lambda table: types is None or table[0] != types[layer])
    candidates = [NO_ROTATION, *(variant for _, spec in declared for variant in _variants(spec))]
    fitting = [spec for spec in candidates if spec.dim <= seen.keys[layer].shape[-1]]
    best = min(fitting, key=lambda spec: probe_error(seen, layer, spec))
    _require(hf_model, layer, best, seen)
    return best


def _variants(spec: RotarySpec) -> Iterator[RotarySpec]:
    """Every way in which a layer may use a table: pairing, order of the sections, sense of rotation."""
    for style in STYLES:
        for order in ORDERS if spec.sections else ORDERS[:1]:
            variant = replace(spec, style=style, section_order=order)
            yield variant
            yield replace(variant, inv_freq=tuple(-frequency for frequency in spec.inv_freq))


def probe_error(seen: Probe, layer: int, spec: RotarySpec) -> float:
    """Largest error of carrying the keys of the first row to the positions of the others, over the largest key."""
    keys, positions = seen.keys[layer].float(), seen.positions.to(seen.keys[layer].device)
    content = strip(keys[:1], positions[:, :1], spec, seen.call_length)
    carried = rotate(content.expand_as(keys), positions, spec, seen.call_length)
    return float((carried - keys).abs().max() / keys.abs().max())


def _require_finite(hf_model: PreTrainedModel, seen: Probe) -> None:
    """Refuse keys that say nothing of rotations, and name the weights behind them."""
    spoilt = [layer for layer, keys in enumerate(seen.keys) if not bool(keys.isfinite().all())]
    if not spoilt:
        return
    for name, weight in hf_model.named_parameters():
        if not bool(weight.isfinite().all()):
            what = f"the weights {name} hold numbers that are NaN or infinite"
            raise ModelRefused(what, cure="Load or train the model anew")
    what = f"the keys of layer {spoilt[0]} are NaN or infinite"
    raise ModelRefused(what, cure="Load the model in a wider dtype, float32 or bfloat16")


def _require(hf_model: PreTrainedModel, layer: int, spec: RotarySpec, seen: Probe) -> None:
    error, limit = probe_error(seen, layer, spec), TOLERANCE.get(seen.keys[layer].dtype, _FULL_PRECISION)
    if not error <= limit:
        name = type(attention_layers(decoder_of(hf_model)).get(layer)).__name__
        what = f"layer {layer} ({name}): the best rotation found misses its keys by {error:.1e}, allowed {limit:.0e}"
        raise RotaryMismatch(what, cure="Its keys cannot be moved between positions; use another model")

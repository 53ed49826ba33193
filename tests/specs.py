"""A spec for every codec and every value of every option: what the fuzzer starts from and what goldens are kept for."""

import dataclasses
import typing

from kvferry.codec import CODECS

SPECS = [
    "raw",
    "raw(float16)",
    "raw(bfloat16, zstd=3)",
    "int(8)",
    "int(8, group=0, axis=head)",
    "int(8, group=5, axis=block, scale=bfloat16)",
    "int(6)",
    "int(6, group=5, axis=block, zstd=3)",
    "int(4)",
    "int(4, group=3, axis=channel)",
    "int(4, group=64, axis=block)",
    "int(4, group=4, axis=channel, centred=True, zstd=19)",
    "int(3)",
    "int(3, group=4, axis=channel, scale=bfloat16)",
    "int(2, group=8, axis=head, zstd=1)",
    "int(2, group=2, centred=True)",
    "nf4",
    "nf4(block=5, scale=bfloat16, zstd=3)",
    "fp8",
    "fp8(e5m2, group=4, axis=token, scale=float16, zstd=3)",
    "fp8(e4m3, group=3, axis=channel)",
    "fp8(e5m2, group=7, axis=block)",
    "mixed(fp16_int8_int6_int4_int3_int2)",
    "mixed(int8_int4_int2, group=3)",
    "ecsq",
    "ecsq(step=-300, weighting=part)",
    "ecsq(step=40, weighting=frame)",
    "progressive",
    "progressive(step=-300, weighting=part, n_layers=4)",
    "progressive(step=40, weighting=frame, n_layers=2)",
]


def untried(specs: list[str]) -> list[str]:
    """Codecs, and values of options of few values, that occur in no spec."""
    tried = {(one.name, *item) for one in map(CODECS.parse, specs) for item in one.config().items()}
    return [
        f"{name}({option}={value})"
        for name in CODECS.names()
        for option, values in _choices(CODECS.get(name)).items()
        for value in values
        if (name, option, value) not in tried
    ]


def _choices(method: type) -> dict[str, tuple[object, ...]]:
    hints = typing.get_type_hints(method)
    found = {field.name: hints[field.name] for field in dataclasses.fields(method)}
    return {
        name: (True, False) if hint is bool else typing.get_args(hint)
        for name, hint in found.items()
        if hint is bool or typing.get_origin(hint) is typing.Literal
    }

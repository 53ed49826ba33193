"""How long fusing takes and how large a fuser is: ours beside the published one, on the same random caches.

From the receiver's own rotated cache and the sender's, as they lie in memory, to the receiver's fused, rotated cache.

`published` is C2C run as its authors' code runs it: both caches are cloned; a Python loop goes over the receiver's
layers, each with modules of its own for keys and for values; in each of them the head weights are copied to the CPU and
the gate is read as a number, for analysis, which waits for the device four times a layer; the clone is overwritten.
Rule 1: gates are open everywhere, so that all of the work is needed.
Rule 2: what content space costs is counted: the receiver's rotation is taken off and put on again. The sender's was
taken off at capture; what that costs there is not counted.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from pydantic import TypeAdapter
from torch import nn

from kvferry.fuse.c2c import Branch, C2CFuser
from kvferry.fuse.contract import Fuser
from kvferry.fuse.gated_residual import GatedResidual
from kvferry.fuse.residual import enriched
from kvferry.kv import KV, Geometry, Group, KeySpace, LayerGeometry, Role
from kvferry.lab.ledger import write_file
from kvferry.lab.point import Point
from kvferry.lab.wire.sheets import Sheet
from kvferry.models.tokens import plain_spans
from kvferry.rope import RotarySpec

OURS, PUBLISHED, LOOP_ONLY = "gated_residual", "c2c, published", "c2c, loop only"
_ROPE_BASE = 1e6
_N_WARM = 1  # the first call allocates; it is not counted
_LEGEND = (
    "ms: median of one fusion of a prompt; faster: times, than as published; MB: the fuser's weights, 10^6 bytes; "
    "c2c, loop only: neither clones nor copies to the CPU"
)


@dataclass(frozen=True)
class Size:
    """A model as far as fusing sees it."""

    name: str
    layers: int
    heads: int
    dim: int

    def geometry(self) -> Geometry:
        pairs = self.dim // 2
        spec = RotarySpec("half", self.dim, tuple(_ROPE_BASE ** (-i / pairs) for i in range(pairs)))
        layer = LayerGeometry(self.heads, self.dim, self.dim, spec)
        return Geometry((layer,) * self.layers, model=self.name, tokenizer="")


@dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are the pair and the length of prompt of the published latencies."""

    sender: Size = Size("Qwen2.5-0.5B", 24, 2, 64)
    receiver: Size = Size("Qwen3-0.6B", 28, 8, 128)
    tokens: int = 170
    repeats: int = 5
    seed: int = 0


@dataclass(frozen=True)
class FusionResult:
    """A point for each way of fusing and each device."""

    settings: Settings
    points: list[Point]
    seconds: float


F = TypeVar("F", bound=Fuser)
OnPart = Callable[[str], None]


def run_bench(settings: Settings, on_part: OnPart = lambda _: None) -> FusionResult:
    """All ways of fusing, on the CPU in float32 and, where there is a GPU, there in bfloat16."""
    start, points = time.perf_counter(), []
    torch.manual_seed(settings.seed)
    cases = [("cpu", torch.float32), *([("cuda", torch.bfloat16)] if torch.cuda.is_available() else [])]
    for device, dtype in cases:
        points += _points(settings, device, dtype, on_part)
    return FusionResult(settings, points, time.perf_counter() - start)


@torch.no_grad()
def _points(settings: Settings, device: str, dtype: torch.dtype, on_part: OnPart) -> list[Point]:
    """Ways take turns, so that a busy machine slows all of them."""
    on_part(f"making fusers for {device}")
    sender, receiver = settings.sender.geometry(), settings.receiver.geometry()
    spaces: tuple[tuple[Geometry, KeySpace], ...]
    spaces = ((receiver, "rotated"), (sender, "content"), (sender, "rotated"))
    own, content, rotated = (random_cache(*one, settings.tokens, device, dtype) for one in spaces)
    ours = randomised(GatedResidual(sender, receiver)).to(device, dtype)
    c2c = randomised(C2CFuser(sender, receiver)).to(device, dtype)
    ways: dict[str, tuple[Fuser, Callable[[], KV]]] = {
        OURS: (ours, lambda: enriched(own, [(ours, content)])),
        PUBLISHED: (c2c, lambda: published(c2c, own, rotated)),
        LOOP_ONLY: (c2c, lambda: enriched(own, [(c2c, rotated)])),
    }
    on_part(f"fusing on {device}")
    rounds = [
        [_once_ms(work, device) for _, work in ways.values()] for _ in range(_N_WARM + settings.repeats)
    ]
    ms = map(median, zip(*rounds[_N_WARM:], strict=True))
    return [
        _point(settings, arm, fuser, device, time_ms)
        for (arm, (fuser, _)), time_ms in zip(ways.items(), ms, strict=True)
    ]


def random_cache(geometry: Geometry, space: KeySpace, n_tokens: int, device: str, dtype: torch.dtype) -> KV:
    """Normal numbers, one sequence, every slot present."""
    layer, layers = geometry.layers[0], tuple(range(geometry.n_layers))
    shape = (len(layers), 1, layer.heads, n_tokens, layer.key_dim)
    keys, values = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    return KV(
        geometry,
        (Group(layers, keys, values),),
        present=torch.ones(len(layers), 1, n_tokens, dtype=torch.bool, device=device),
        positions=torch.arange(n_tokens, device=device).view(1, 1, -1),
        spans=(plain_spans(n_tokens, Role.TEXT),),
        space=space,
    )


@torch.no_grad()
def randomised(fuser: F) -> F:
    """Every weight random, every gate open, in evaluation mode."""
    for name, parameter in fuser.named_parameters():
        if name.split(".")[-1] == "gate":
            parameter.fill_(1.0)
        else:
            nn.init.uniform_(parameter, -0.03, 0.03)
    return fuser.eval()


def published(fuser: C2CFuser, own: KV, arrived: KV) -> KV:
    """C2C as its authors' code runs it, see the top of this file."""
    ours, theirs = _clone(own), _clone(arrived)
    with _analysed(fuser):
        for layer, projector in enumerate(fuser.projectors):
            before = ours.layer(layer)
            more = projector(before, theirs.layer(fuser.sources[layer]), fuser.temperature)
            for states, residual in zip(before, more, strict=True):
                states.copy_(states + residual)
    return ours


@contextmanager
def _analysed(fuser: C2CFuser) -> Iterator[None]:
    """Inside, head weights go to the CPU and gates become numbers in every forward pass, and nobody reads them."""
    branches = [module for module in fuser.modules() if isinstance(module, Branch)]
    hooks = [branch.weight.register_forward_hook(_copy_weights) for branch in branches]
    hooks += [branch.register_forward_hook(_read_gate) for branch in branches]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _copy_weights(_: nn.Module, __: object, logits: torch.Tensor) -> None:
    logits.sigmoid().detach().cpu()


def _read_gate(branch: nn.Module, _: object, __: object) -> None:
    branch.gate.detach().cpu().item()  # type: ignore[operator]


def _clone(kv: KV) -> KV:
    return kv.with_groups(tuple(Group(g.layers, g.keys.clone(), g.values.clone()) for g in kv.groups))


def _point(settings: Settings, arm: str, fuser: Fuser, device: str, time_ms: float) -> Point:
    mb = sum(tensor.numel() for tensor in fuser.state_dict().values()) * 4e-6
    recipe: dict[str, str | int] = {
        "fuser": fuser.name,
        "options": str(fuser.options()),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "dtype": str(next(fuser.parameters()).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "tokens": settings.tokens,
    }
    return Point(
        arm=arm,
        recipe=recipe,
        sender=settings.sender.name,
        receiver=settings.receiver.name,
        task="fuse",
        split="random",
        n=settings.repeats,
        seed=settings.seed,
        metrics={
            "parameters": sum(parameter.numel() for parameter in fuser.parameters()),
            "mb_float32": mb,
            "mb_bfloat16": mb / 2,
        },
        latency_ms={"fuse": time_ms},
    )


def _once_ms(work: Callable[[], KV], device: str) -> float:
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def times_faster(result: FusionResult, point: Point) -> float:
    """The published way's milliseconds on the same device over those of a point."""
    [base] = [
        p
        for p in result.points
        if p.arm == PUBLISHED and p.recipe["device"] == point.recipe["device"]  # type: ignore[index]
    ]
    return base.latency_ms["fuse"] / point.latency_ms["fuse"]


def fusion_sheet(result: FusionResult) -> Sheet:
    """The result as plain cells."""
    settings = result.settings
    title = f"{settings.receiver.name} fuses what {settings.sender.name} read: {settings.tokens} tokens"
    cells = tuple(_cells(result, point) for point in result.points)
    return Sheet(title, ("", "device", "ms", "faster", "MB fp32", "MB bf16"), cells, _LEGEND)


def _cells(result: FusionResult, point: Point) -> tuple[str, ...]:
    numbers = (point.metrics["mb_float32"] or 0.0, point.metrics["mb_bfloat16"] or 0.0)
    device = f"{point.recipe['device']} {point.recipe['dtype']}"  # type: ignore[index]
    faster = f"{times_faster(result, point):.1f}"
    return (point.arm, device, f"{point.latency_ms['fuse']:.1f}", faster, *(f"{mb:,.1f}" for mb in numbers))


def save_fusion(result: FusionResult, path: Path) -> None:
    """As JSON."""
    write_file(path, TypeAdapter(FusionResult).dump_json(result, indent=1) + b"\n")

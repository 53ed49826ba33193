"""A training small enough for tests; run as a script it is the process that they kill, or one of several.

python toy_training.py FOLDER SECONDS          train in FOLDER, so slowly, and say each step
python toy_training.py FOLDER SECONDS RANK N   be one of N processes; the first keeps the gradient in FOLDER
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from kvferry.train.loop import Loss, Trainer
from kvferry.train.loop_recipe import LoopRecipe
from kvferry.train.reports import Step

RECIPE = LoopRecipe(
    steps=40, learning_rate=0.02, warmup=5, average=0.8, evaluate_every=7, checkpoint_every=5, seed=3
)
ONE_STEP = LoopRecipe(steps=1, accumulate=2, clip=float("inf"))


class Toy(nn.Module):
    """A map with noise, to be learned from rows of different lengths."""

    def __init__(self, noise: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.noise = noise
        self.inner = nn.Linear(6, 8)
        self.outer = nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.inner(x + self.noise * torch.randn_like(x)).tanh()
        return self.outer(functional.dropout(hidden, self.noise, self.training))

    def loss(self, step, rows) -> Loss:
        x = torch.cat(list(rows))
        error = (self(x) - x[:, :3].cumsum(-1)).square().mean(-1)
        return Loss(error.sum(), len(x), {"magnitude": x.norm(dim=-1).sum()})

    def dev(self) -> float:
        loss = self.loss(0, draw(10_000))
        return loss.total.item() / loss.n


def draw(number: int) -> list[torch.Tensor]:
    """Batch `number`: seven rows of one to nine tokens."""
    generator = torch.Generator().manual_seed(number)
    lengths = torch.randint(1, 10, (7,), generator=generator).tolist()
    return [torch.randn(n, 6, generator=generator) for n in lengths]


def batches(start: int) -> Iterator[list[torch.Tensor]]:
    while True:
        yield draw(start)
        start += 1


def train_slowly(folder: Path, seconds: float) -> None:
    def say(report: Step) -> None:
        sys.stdout.write(f"{report.step} of {RECIPE.steps}\n")
        sys.stdout.flush()
        time.sleep(seconds)

    toy = Toy()
    Trainer(toy, toy.loss, batches, RECIPE, evaluate=toy.dev, folder=folder, on_step=say).run()


def be_one_of(folder: Path, rank: int, n: int) -> None:
    """Through a file instead of a port, which somebody else might hold."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
    }
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=n)
    toy = Toy(noise=0.0)
    with torch.no_grad():
        toy.inner.weight += rank  # to be overruled by the first process
    Trainer(toy, toy.loss, batches, ONE_STEP, evaluate=lambda: float(rank)).run()
    if rank == 0:
        found = {name: weight.grad for name, weight in toy.named_parameters() if weight.grad is not None}
        save_file(found, folder / "gradient.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, *numbers = sys.argv[1:]
    if len(numbers) == 1:
        train_slowly(Path(where), float(numbers[0]))
    else:
        be_one_of(Path(where), int(numbers[1]), int(numbers[2]))

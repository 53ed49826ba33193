"""The training loop: a loss over batches, one module, and what makes hours of it safe to stop and to repeat.

Rule 1: a loss is a sum and its count. Pieces of a batch, in turn or in several processes, then give exactly the
gradient of the whole batch, whatever each of them holds.
Rule 2: the step and the seed decide everything random; generators are seeded anew at each step. So nothing of them
has to be kept, evaluations leave no trace, and a run that was killed goes on with the same losses, bit for bit.
Rule 3: the host waits for the device once a step, to look whether loss and gradient are finite before they are used.
"""

import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate.utils import set_seed
from jaxtyping import Float
from torch import Tensor, nn

from kvferry.errors import TrainingDiverged
from kvferry.train.candidates import holding, put
from kvferry.train.checkpoint import load_checkpoint, save_checkpoint
from kvferry.train.loop_recipe import LoopRecipe
from kvferry.train.processes import Processes
from kvferry.train.reports import Evaluation, Step, Trained
from kvferry.train.training_state import TrainingState

T = TypeVar("T")


@dataclass(frozen=True)
class Loss:
    """A sum over what is scored (tokens, say) and how many they are; the step minimises total / n over the batch.

    `parts` are sums over the same n, for the journal: terms of the loss, a cosine, a magnitude. A loss that is a mean
    already is `Loss(mean * n, n)`.
    """

    total: Float[Tensor, ""]
    n: float
    parts: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)


class Trainer(Generic[T]):
    """Trains the parameters of `module` that require gradients; they must be fp32.

    `loss(step, rows)` gives the `Loss` of some rows of a batch. `batches(start)` iterates from batch number `start`,
    the same one each time, and never ends. `evaluate()` is the loss on dev, lower is better. In a `folder` training
    goes on from the checkpoint that lies there; `identity` (JSON: of the data, of the models) must then be the same.

    >>> module = nn.Linear(1, 1, bias=False)
    >>> def loss(step, rows):
    ...     return Loss((module(torch.tensor(rows)) - 3 * torch.tensor(rows)).square().sum(), len(rows))
    >>> trainer = Trainer(module, loss, lambda start: iter(lambda: [[1.0], [2.0]], None), LoopRecipe(200, 0.1))
    >>> trainer.run().steps, round(module.weight.item(), 2)
    (200, 3.0)
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[int, Sequence[T]], Loss],
        batches: Callable[[int], Iterator[Sequence[T]]],
        recipe: LoopRecipe,
        *,
        evaluate: Callable[[], float] | None = None,
        folder: Path | None = None,
        identity: Mapping[str, Any] | None = None,
        on_step: Callable[[Step], None] | None = None,
        on_evaluation: Callable[[Evaluation], None] | None = None,
    ) -> None:
        self.module, self.loss, self.batches, self.recipe = module, loss, batches, recipe
        self.evaluate, self.folder, self.identity = evaluate, folder, dict(identity or {})
        self.state = TrainingState.start(module, recipe)
        self.device = self.state.weights[0].device
        self.processes = Processes.of(self.device)
        self.on_step = on_step if self.processes.is_first else None
        self.on_evaluation = on_evaluation if self.processes.is_first else None

    def run(self) -> Trained:
        """Train to the end, or go on to it.

        Raises `TrainingDiverged` for a loss, a gradient or weights that are not finite; `FolderError` for a damaged
        checkpoint or one that cannot be written; `UsageError` for one of another recipe.
        """
        state = self.state
        if self.folder is not None:
            load_checkpoint(self.folder, state, self.recipe, self.identity)
        self.processes.agree(state.weights)
        if state.step == 0:
            self._ask_dev()
        stream = self.batches(state.step)
        while not self._ended:
            self._step(next(stream))
            self._look_around()
        put(self._chosen(), state.weights)
        self.module.eval()
        return self._trained()

    @property
    def _ended(self) -> bool:
        return self.state.step >= self.recipe.steps or self._early

    @property
    def _early(self) -> bool:
        return 0 < self.recipe.patience <= self.state.best.n_since

    def _step(self, batch: Sequence[T]) -> None:
        state, started = self.state, time.perf_counter()
        rate = self.recipe.rate(state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        names, sums = self._gradient(batch)
        norm = nn.utils.clip_grad_norm_(state.weights, self.recipe.clip)
        loss, *parts, norm = torch.cat([sums, norm.float().unsqueeze(0)]).tolist()
        if not math.isfinite(loss) or not math.isfinite(norm):
            self._give_up(f"the loss is {loss}, the norm of its gradient {norm}")
        put(state.weights, state.good)
        state.optimizer.step()
        if state.average is not None:
            state.average.add(state.weights)
        state.step, state.loss = state.step + 1, loss
        if self.on_step is not None:
            seconds = time.perf_counter() - started
            told = dict(zip(names, parts, strict=True))
            self.on_step(Step(state.step - 1, loss, norm, rate, seconds, told))

    def _gradient(self, batch: Sequence[T]) -> tuple[list[str], Float[Tensor, " numbers"]]:
        """Leave the gradient of the batch's mean loss in the module; names of the parts, and means: loss, parts."""
        self._seed()
        self.module.train()
        self.state.optimizer.zero_grad(set_to_none=False)
        losses = [self._backward(piece) for piece in self.processes.pieces(batch, self.recipe.accumulate)]
        names = list(losses[0].parts)
        sums = torch.stack([_numbers(loss, names) for loss in losses]).sum(0)
        gradients = [weight.grad for weight in self.state.weights if weight.grad is not None]
        self.processes.add_up([*gradients, sums])
        n = torch.where(sums[:1] > 0, sums[:1], 1)
        for gradient in gradients:
            gradient.div_(n[0])
        return names, sums[1:] / n

    def _backward(self, rows: Sequence[T]) -> Loss:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            loss = self.loss(self.state.step, rows)
        loss.total.backward()
        return loss

    def _seed(self) -> None:
        """Another seed for each step and process; the CRC only mixes them."""
        set_seed(zlib.crc32(f"{self.recipe.seed} {self.state.step} {self.processes.rank}".encode()))

    def _look_around(self) -> None:
        """After a step: look at the weights, ask dev and write a checkpoint, where these are due."""
        last = self.state.step >= self.recipe.steps
        ask, keep = last or self._due(self.recipe.evaluate_every), self._due(self.recipe.checkpoint_every)
        if (ask or keep) and not all(bool(weight.isfinite().all()) for weight in self.state.weights):
            self._give_up("weights are not finite")
        if ask:
            self._ask_dev()
        if (keep or self._ended) and self.folder is not None and self.processes.is_first:
            save_checkpoint(self.folder, self.state, self.recipe, self.identity)

    def _due(self, every: int) -> bool:
        return every > 0 and self.state.step % every == 0

    def _ask_dev(self) -> None:
        if self.evaluate is None:
            return
        state, best = self.state, self.state.best
        best.n_since += state.step > 0
        loss, averaged = self._dev_loss(self.evaluate), None
        best.offer(loss, state.step, state.weights, averaged=False)
        if state.average is not None and state.step > 0:
            with holding(state.average.weights, state.weights):
                averaged = self._dev_loss(self.evaluate)
            best.offer(averaged, state.step, state.average.weights, averaged=True)
        if self.on_evaluation is not None:
            self.on_evaluation(Evaluation(state.step, loss, averaged, best.loss))

    @torch.no_grad()
    def _dev_loss(self, evaluate: Callable[[], float]) -> float:
        """As the first process has it: were they to differ in the last digit, they would stop at different steps."""
        self.module.eval()
        return self.processes.agree_on(evaluate(), self.device)

    def _chosen(self) -> Sequence[Tensor]:
        state = self.state
        if state.best.weights:
            return state.best.weights
        return state.weights if state.average is None else state.average.weights

    def _trained(self) -> Trained:
        state, judged = self.state, bool(self.state.best.weights)
        return Trained(
            steps=state.step,
            loss=state.loss,
            best_loss=state.best.loss if judged else None,
            best_step=state.best.step if judged else state.step,
            averaged=state.best.averaged if judged else state.average is not None,
            early=self._early,
        )

    def _give_up(self, what: str) -> None:
        """Back to weights that are known to be good."""
        best, where = self.state.best, "those before the step that led there"
        put(best.weights or self.state.good, self.state.weights)
        if best.weights:
            where = f"the best on dev, of step {best.step}"
        raise TrainingDiverged(self.state.step, what, where)


def _numbers(loss: Loss, names: list[str]) -> Float[Tensor, " numbers"]:
    """Count, loss and parts; filled in place on the device, since a copy from the host would wait for it."""
    total = loss.total.detach().float()
    parts = [loss.parts[name].detach().float() for name in names]
    return torch.stack([total.new_full((), loss.n), total, *parts])

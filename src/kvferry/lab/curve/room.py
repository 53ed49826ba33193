"""The items of one seed as the sender holds them: read once, for all ways of sending and all caps."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from kvferry.lab.curve.exam import Exam, exam_of, slices
from kvferry.lab.curve.road import Road
from kvferry.lab.curve.spec import Spec, needs_of
from kvferry.lab.curve.task import Split, Task
from kvferry.select.sight import Sight
from kvferry.session.selecting import look


@dataclass(frozen=True)
class Room:
    """An exam, and what may be sent of each of its contexts."""

    road: Road
    exam: Exam
    specs: tuple[Spec, ...]

    @property
    def n(self) -> int:
        return len(self.exam.contexts)

    @cached_property
    def sights(self) -> list[Sight]:
        """In batches, with the evidence that any of the selectors needs."""
        contexts, questions = self.exam.contexts, self.exam.questions
        asks = questions if any(spec.selector.reads_question for spec in self.specs) else None
        found: list[Sight] = []
        for rows in slices(self.n):
            found += look(
                self.road.sender,
                contexts[rows],
                needs_of(self.specs),  # type: ignore[arg-type]
                onto=self.road.onto,
                questions=None if asks is None else asks[rows],
                readout=self.road.aligners[0],
            )
        return found


def room_of(road: Road, task: Task, specs: Sequence[Spec], n: int, seed: int, split: Split) -> Room:
    """`n` items of a seed."""
    exam = exam_of(task, road.sender, road.receiver, n, seed, split)
    return Room(road, exam, tuple(specs))

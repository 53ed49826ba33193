"""The guided engine: atheris (libFuzzer) keeps the frames that reach new code and changes those further.

The first byte of an input chooses the seed whose reader is used, the others are the frame.
"""

import multiprocessing
import sys
import tempfile
from itertools import count
from pathlib import Path
from random import Random

import atheris

_MEMORY_EVERY = 64


def run_guided(seed_number: int, n: int, seconds: float | None, jobs: int) -> int:
    """Share `n` frames among processes; 0 if none of them found anything. A finding is printed in Base64."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        share = [(seed_number + job, -(-n // jobs), seconds, Path(folder) / str(job)) for job in range(jobs)]
        workers = [context.Process(target=_work, args=asked) for asked in share]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    return int(any(worker.exitcode for worker in workers))


def _work(seed_number: int, n: int, seconds: float | None, corpus: Path) -> None:
    sys.modules["numba"] = None  # plain loops are what coverage can see
    with atheris.instrument_imports(include=["kvferry.wire", "kvferry.codec", "kvferry.session.survey"]):
        from fuzz import oracle
        from fuzz.mutate import mutated
        from fuzz.seeds import seeds
        from fuzz.structure import restructured
    oracle.be_strict()
    numbers = count()
    found = [seed for seed in seeds() if not seed.datagrams]

    def one(data: bytes) -> None:
        if data:
            holds = oracle.check if next(numbers) % _MEMORY_EVERY else oracle.check_memory
            holds(found[data[0] % len(found)], data[1:])

    def mutate(data: bytes, max_size: int, number: int) -> bytes:
        random = Random(number)
        match random.randrange(4):
            case 0:
                return atheris.Mutate(data, max_size)
            case 1:
                return data[:1] + mutated(random, data[1:], [seed.data for seed in found])
            case _:
                which = random.randrange(len(found))
                return bytes([which]) + restructured(random, found[which])

    corpus.mkdir()
    for number, seed in enumerate(found):
        (corpus / str(number)).write_bytes(bytes([number]) + seed.data)
    limits = [f"-max_total_time={int(seconds)}"] if seconds else []
    options = [
        f"-runs={n}",
        f"-seed={seed_number + 1}",
        f"-artifact_prefix={corpus}/",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, *limits, "-verbosity=0", str(corpus)], one, custom_mutator=mutate)
    atheris.Fuzz()

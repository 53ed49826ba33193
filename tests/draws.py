"""The command of files that check many random draws, each from a seed of its own."""

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def all_draws(check: Callable[[int], T], description: str | None) -> list[T]:
    """What `check` says of each of the seeds that the command line names."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--draws", type=int, default=100_000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.draws)
    with ProcessPoolExecutor(options.jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(check, seeds, chunksize=500))

"""`python -m fuzz`: see README.md beside."""

import argparse
import importlib.util
import os
import sys
import tempfile
import time

from fuzz.run import Report, frame, run, try_frame


def main() -> int:
    words = argparse.ArgumentParser(prog="fuzz", description="Mutated frames through every reader.")
    words.add_argument("--n", type=int, default=1_000_000, help="frames")
    words.add_argument("--seed", type=int, default=0, help="another million")
    words.add_argument("--seconds", type=float, help="stop after so many")
    words.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    words.add_argument("--engine", choices=("auto", "seeded", "atheris"), default="auto")
    words.add_argument("--at", type=int, help="one frame alone")
    asked = words.parse_args()
    if asked.at is not None:
        return _show(asked.seed, asked.at)
    installed = importlib.util.find_spec("atheris") is not None
    if asked.engine == "atheris" or (asked.engine == "auto" and installed):
        return _atheris(asked, installed)
    start = time.monotonic()
    report = run(asked.seed, asked.n, asked.seconds, asked.jobs, _progress)
    return _tell(report, time.monotonic() - start)


def _progress(report: Report) -> None:
    if sys.stderr.isatty():
        print(f"\r{report.outcomes.total():,} frames", end="", file=sys.stderr, flush=True)


def _tell(report: Report, seconds: float) -> int:
    n = report.outcomes.total()
    print(f"{n:,} frames in {seconds:.0f} s, {n / seconds:,.0f} per second, {len(report.findings)} findings")
    for outcome, count in report.outcomes.most_common():
        print(f"  {outcome:20} {count:>10,}  {count / n:6.2%}")
    for finding in report.findings:
        print(f"\n{finding}")
    return 1 if report.findings else 0


def _show(seed_number: int, index: int) -> int:
    seed, data = frame(seed_number, index)
    print(seed.name, *(piece.hex() for piece in data), sep="\n")
    print(try_frame(seed_number, index))
    return 0


def _atheris(asked: argparse.Namespace, installed: bool) -> int:
    if not installed:
        print("atheris is not installed: pip install atheris, or --engine seeded", file=sys.stderr)
        return 2
    from fuzz.guided import run_guided

    return run_guided(asked.seed, asked.n, asked.seconds, asked.jobs)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        # Compiled loops check every index here, and are kept apart from those that do not.
        os.environ |= {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": folder}
        sys.exit(main())

"""What every test may rely on: one thread, a seed, and the shared folder if there is one."""

from pathlib import Path

import pytest
import torch
from hypothesis import settings

import shared

# Machines are noisy and a first example may load a model: time is no property.
settings.register_profile("kvferry", deadline=None)
settings.load_profile("kvferry")


# It holds no tests, and the import needs atheris, which is in no extra that tests need.
collect_ignore = ["fuzz/guided.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-goldens", action="store_true", help="Write the goldens that are missing.")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models get slower, not faster, with more."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of other people's models and texts; the test is skipped where there is none."""
    folder = shared.find()
    if folder is None:
        pytest.skip(
            f"no shared folder at {shared.expected()}; set {shared.VARIABLE} to one with models/ and data/"
        )
    return folder

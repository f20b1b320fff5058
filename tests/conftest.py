"""Settings that all tests share."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("stable", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("stable")


def pytest_configure(config: pytest.Config) -> None:
    """Workers side by side, and the processes that they start, on one thread each, before anything loads torch.

    Two threads each on the same cores wait for each other, and are ten times slower.
    """
    if hasattr(config, "workerinput"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors on one thread: waiting for a second one costs up to ten times the work on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

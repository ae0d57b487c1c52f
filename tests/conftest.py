"""Fixtures that several test files share.

The process that hands out the tests loads this file and runs none of them: torch is imported by those that do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    import torch

os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")

Zoo = Callable[..., Path]


def _without_waiting(descriptor: int) -> None:
    """Stand in for os.fsync: refuse what is not open, and wait for no disk, since no test cuts the power."""
    os.fstat(descriptor)


os.fsync = _without_waiting  # of this process; those that tests start wait


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow tests: a process that comes to one last works on while the others have nothing left."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Give each test the same draws from torch's global generator, whatever ran before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Return a function that gives a family's tiny checkpoint, made once a session and never to be written to."""
    import torch

    from tests.zoo import save_zoo

    made: dict[tuple[str, int, torch.dtype], Path] = {}

    def folder(name: str, shards: int = 1, dtype: torch.dtype = torch.float32) -> Path:
        key = (name, shards, dtype)
        if key not in made:
            made[key] = save_zoo(name, tmp_path_factory.mktemp("zoo") / f"{name}-{shards}", shards, dtype)
        return made[key]

    return folder

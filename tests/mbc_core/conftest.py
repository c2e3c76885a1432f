"""Fixtures for the tests of the core."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def single_thread() -> Iterator[None]:
    """Tiny models are several times faster without torch's threads, on a busy machine fifteen times."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

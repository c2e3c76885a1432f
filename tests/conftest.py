"""Fixtures and settings shared by every test.

Three tiers: plain tests take no model and no network; tests with the fixture `assets` take the real encoder,
language model and corpus (fetched once into the user's cache by `make test`); tests marked `slow` take more than
ten seconds and are left to `make test-slow`.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

from mbc_core.assets import Assets

settings.register_profile(
    "mbc", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "mbc"))

# Nothing may reach for a model hub while tests run, and progress bars would only clutter the report.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["NO_COLOR"] = "1"
os.environ["COLUMNS"] = "120"


@pytest.fixture(scope="session")
def assets() -> Assets:
    """The real encoder, language model and corpus; fetched when they are not in the cache yet."""
    return Assets.ensure()

"""Shipped weights: small files trained by this project, each with a card."""

from __future__ import annotations

from pathlib import Path


def path(name: str) -> Path:
    """Where the shipped file or folder ``name`` lies."""
    return Path(__file__).parent / name

"""Options that several commands share, as decorators: one spelling, one help text, one default."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import click

from mbc_core.errors import BadDocument, UsageError
from mbc_core.windows import parse_length
from schemas.document import parse_timestamp
from schemas.manifest import PROFILES

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Command], Command]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Time(click.ParamType[datetime]):
    """ISO 8601 → datetime in UTC."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Read the time, or fail as wrong use."""
        try:
            micros = parse_timestamp(value)
        except BadDocument as error:
            self.fail(str(error), param, ctx)
        if micros is None:
            self.fail("the time is empty; write it like 2024-07-01 or 2024-07-01T09:30:00Z", param, ctx)
        return _EPOCH + timedelta(microseconds=micros)


class Duration(click.ParamType[int]):
    """``1d``, ``6h``, ``30m``, ``2w``, ``45s`` → seconds."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read the duration, or fail as wrong use."""
        try:
            return parse_length(str(value))
        except UsageError as error:
            self.fail(str(error), param, ctx)


def bank_option(command: Command) -> Command:
    """``--bank URI``."""
    return click.option(
        "--bank", required=True, metavar="URI", help="The bank: a folder, s3://bucket/path or gs://bucket/path."
    )(command)


def json_option(command: Command) -> Command:
    """``--json``."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object on standard output and nothing else there."
    )(command)


def as_of_option(command: Command) -> Command:
    """``--as-of TIME``."""
    return click.option(
        "--as-of", type=Time(), default=None, help="Answer as the bank stood then (ISO 8601; UTC if no zone)."
    )(command)


def k_option(command: Command) -> Command:
    """``--k``."""
    return click.option(
        "--k", type=click.IntRange(1, 100), default=5, show_default=True, help="How many passages are recalled."
    )(command)


def device_option(command: Command) -> Command:
    """``--device``."""
    return click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="Where models run; auto takes a GPU when there is one.",
    )(command)


def profile_option(command: Command) -> Command:
    """``--profile``."""
    return click.option(
        "--profile",
        type=click.Choice(list(PROFILES)),
        help="Codes a passage: "
        + "; ".join(f"{name} {profile.slots} + {profile.words} words" for name, profile in PROFILES.items())
        + ". The bank's own, or `default` for a new bank.",
    )(command)


def window_option(command: Command) -> Command:
    """``--window``."""
    return click.option(
        "--window",
        "window_seconds",
        type=Duration(),
        help="Length of a time window, such as 1d or 6h. The bank's own, or a day for a new bank.",
    )(command)


def seed_option(command: Command) -> Command:
    """``--seed``."""
    return click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same result.")(command)


def resolve_device(device: str) -> str:
    """``auto`` → ``cuda`` when there is one, else ``cpu``."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"

"""Beam and jobs: wiring, sources, sinks, keys, coders and options around ``mbc_core``; no mathematics here."""

import logging


def _concerns_this_project(record: logging.LogRecord) -> bool:
    """Beam says at import, to everybody without the extra `gcp`, that BigQuery is not there; nothing here uses it."""
    return "bigquery client libraries are not available" not in record.getMessage()


logging.getLogger().addFilter(_concerns_this_project)

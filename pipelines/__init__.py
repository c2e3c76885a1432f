"""Beam and jobs: wiring, sources, sinks, keys, coders and options around ``mbc_core``; no mathematics here."""

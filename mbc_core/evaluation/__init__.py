"""Metrics, cloze questions and the reads that are compared with them."""

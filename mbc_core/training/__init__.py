"""Training of every shipped weight: plain functions with plain arguments."""

"""A key and value prefix of every layer, in the form that transformers models take."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from mbc_core.reader.language_model import HfModel

Pairs: TypeAlias = list[tuple[Tensor, Tensor]]
"""Key and value of each layer, each [B, key-value heads, virtual tokens, head width]."""


def prefix_cache(pairs: Pairs, dtype: torch.dtype | None = None) -> HfModel:
    """A transformers cache that holds the prefix; gradients flow through it.

    The model fills it further, so each forward pass needs a new one.

    Args:
        dtype: of the language model's keys; None leaves the prefix's.
    """
    from transformers import DynamicCache

    return DynamicCache([(key.to(dtype or key.dtype), value.to(dtype or value.dtype)) for key, value in pairs])

"""Sentence encoders as parts of the paper's model."""

from __future__ import annotations

from pathlib import Path

import torch

from mbc_core.reader.language_model import HfModel


def sentence_encoder(folder: Path, device: torch.device) -> HfModel:
    """A sentence encoder's own weights, float32, without pooler."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    model.pooler = None  # never read
    return model.to(device)

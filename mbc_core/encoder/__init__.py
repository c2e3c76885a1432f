"""Text → embedding and word salience, in one forward pass of a frozen encoder."""

from mbc_core.encoder.passage_encoder import EncodedPassage, PassageEncoder, Precision
from mbc_core.encoder.salience_head import SalienceHead

__all__ = ["EncodedPassage", "PassageEncoder", "Precision", "SalienceHead"]

"""The mathematics and the meaning of memory bank compression. Never imports Beam."""

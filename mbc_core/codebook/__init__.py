"""The one shared codebook: immutable versions, mergeable statistics, EMA with reset, and the chain of versions."""

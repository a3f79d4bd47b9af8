"""Block-sparse self-attention: which blocks of keys a block of queries reads, and how they are read."""

"""Block-sparse self-attention of long sequences: which blocks of keys a block of queries reads, and how they are read."""

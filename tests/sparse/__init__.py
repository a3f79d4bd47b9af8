"""Block-sparse attention: the laws of its blocks, and what it does in live pipelines."""

"""The embedded world: small captioned scenes that a small model can learn and a program can mark."""

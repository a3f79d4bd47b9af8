"""Training of the embedded models, one stage a file; `scripts/train_shapes.py` runs them."""

"""Training of the embedded models, one stage a file: data, vae, text, unet and dit; `scripts/train_shapes.py` runs them."""

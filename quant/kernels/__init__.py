"""What computes quantized layers, one file a library."""

"""Cache methods, one file each."""

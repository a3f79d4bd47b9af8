"""Parallel methods, one file each."""

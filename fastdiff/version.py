"""The version of this package, apart so that a room may say it."""

__version__ = "0.1.0"

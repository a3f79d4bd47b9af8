from tests.cli.conftest import cli, model

__all__ = ["cli", "model"]

from tests.cli.conftest import cli, model
from tests.clusters import cluster

__all__ = ["cli", "cluster", "model"]

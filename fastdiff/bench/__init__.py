"""Benchmarks: every row against the unaccelerated image of the same seed, and against simply taking fewer steps."""

from .measure import Observer, run
from .plan import Contender, Settings, contenders, rivals, sources
from .prompts import Prompts, prompts_for
from .row import Row

__all__ = [
    "Contender",
    "Observer",
    "Prompts",
    "Row",
    "Settings",
    "contenders",
    "prompts_for",
    "rivals",
    "run",
    "sources",
]

"""Everything fastdiff refuses, one class a reason. Each message names the value, what is allowed and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FastdiffError(Exception):
    """Base of all errors a user can cause; the command line prints the message and no traceback."""


class BadConfig(FastdiffError):
    """A key, type or value that the config does not allow, or a combination that cannot work."""


class UnknownName(BadConfig):
    """A preset, method or setting that does not exist."""

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        known = sorted(known)
        near = difflib.get_close_matches(str(name), known, 1)
        hint = f", did you mean {near[0]!r}?" if near else "."
        listing = f" Known: {', '.join(known)}." if known else f" No {kind} exists yet."
        super().__init__(f"unknown {kind} {name!r}{hint}{listing}")


class UnsupportedModel(FastdiffError):
    """The method cannot work on this denoiser, or nobody described the denoiser."""


class BadModel(FastdiffError):
    """A model directory or file that is missing, broken or not safe to read."""


class BackendUnavailable(FastdiffError):
    """A kernel, device or package that this machine does not have."""


class NotReversible(FastdiffError):
    """Something else changed what fastdiff had patched, so it cannot be put back exactly."""


class NotCopyable(FastdiffError):
    """A patched pipeline or denoiser that somebody pickles or deep-copies."""


class DoesNotFit(FastdiffError):
    """More memory than there is, known before it is taken."""


class PeerLost(FastdiffError):
    """Another rank of a parallel run died, hung, or broke off."""

"""Model offload wraps and unwraps a denoiser's forward around every call; the patches must live through it."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from fastdiff.errors import NotReversible
from fastdiff.patch import PatchSet


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def plus_one(forward):
    return lambda x: forward(x) + 1


def hook(module: nn.Module) -> None:
    add_hook_to_module(module, ModelHook())


def unhook(module: nn.Module) -> None:
    remove_hook_from_module(module)


ONE = torch.ones(())


@pytest.mark.parametrize("before, after", [(True, True), (True, False), (False, True), (False, False)])
def test_a_patch_survives_hooks_that_come_and_go(before: bool, after: bool) -> None:
    """`before`: hooked when patched. `after`: hooked when restored. In between they are taken out and put back."""
    module, patches = Double(), PatchSet()
    if before:
        hook(module)
    patches.wrap_forward(module, plus_one)
    patches.wrap_forward(module, plus_one)
    assert module(ONE) == 4
    for _ in range(2):
        if "_hf_hook" in vars(module):
            unhook(module)
            assert module(ONE) == 4
        hook(module)
        assert module(ONE) == 4
    if not after:
        unhook(module)
    patches.restore()
    assert module(ONE) == 2
    if after:
        unhook(module)
    assert module(ONE) == 2


def test_restore_leaves_an_unhooked_module_pristine() -> None:
    module, patches = Double(), PatchSet()
    pristine = dict(vars(module))
    patches.wrap_forward(module, plus_one)
    patches.restore()
    assert vars(module) == pristine


def test_a_foreign_forward_on_top_is_refused_and_nothing_changes() -> None:
    module, patches = Double(), PatchSet()
    patches.wrap_forward(module, plus_one)
    ours = module.forward
    module.forward = lambda x: ours(x) * 10
    with pytest.raises(NotReversible, match=r"Double\.forward was changed"):
        patches.restore()
    assert module(ONE) == 30
    module.forward = ours
    patches.restore()
    assert module(ONE) == 2

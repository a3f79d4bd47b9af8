"""PatchSet: instance level, last in first out, all or nothing, refusing what it cannot put back."""

from __future__ import annotations

import pytest
from torch import nn

from fastdiff.errors import NotReversible
from fastdiff.patch import PatchSet


class Thing:
    shared = "class"

    def greet(self) -> str:
        return "hello"


def test_restore_puts_back_instance_attributes_and_uncovers_those_of_the_class():
    thing = Thing()
    thing.own = before = object()
    patches = PatchSet()
    patches.set(thing, "own", 1)
    patches.set(thing, "shared", 2)
    patches.set(thing, "greet", lambda: "hi")
    assert (thing.own, thing.shared, thing.greet()) == (1, 2, "hi")
    assert Thing.shared == "class" and Thing().greet() == "hello"
    patches.restore()
    assert vars(thing) == {"own": before} and thing.own is before and thing.greet() == "hello"
    patches.restore()
    assert vars(thing) == {"own": before}


def test_patches_are_undone_last_in_first_out():
    order: list[str] = []
    thing, patches = Thing(), PatchSet()
    for name in "abc":
        patches.call(lambda name=name: order.append(f"do {name}"), lambda name=name: order.append(f"undo {name}"))
    patches.set(thing, "shared", 1)
    patches.set(thing, "shared", 2)
    patches.restore()
    assert order == ["do a", "do b", "do c", "undo c", "undo b", "undo a"]
    assert vars(thing) == {}


def test_an_exception_rolls_everything_back_and_goes_on():
    thing, undone = Thing(), []
    with pytest.raises(ZeroDivisionError), PatchSet() as patches:
        patches.set(thing, "shared", 1)
        patches.call(lambda: None, lambda: undone.append(True))
        _ = 1 / 0
    assert vars(thing) == {} and undone == [True]


def test_a_change_that_fails_halfway_is_undone_as_far_as_it_went():
    thing = Thing()

    def half() -> None:
        thing.own = 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), PatchSet() as patches:
        patches.call(half, lambda: vars(thing).pop("own", None))
    assert vars(thing) == {}


def test_a_clean_exit_keeps_the_changes():
    thing = Thing()
    with PatchSet() as patches:
        patches.set(thing, "shared", 1)
    assert thing.shared == 1
    patches.restore()
    assert thing.shared == "class"


def test_it_refuses_and_changes_nothing_if_somebody_patched_on_top():
    thing, other, undone = Thing(), Thing(), []
    patches = PatchSet()
    patches.set(other, "shared", 1)
    patches.call(lambda: None, lambda: undone.append(True))
    patches.set(thing, "greet", lambda: "fast")
    inner = thing.greet
    thing.greet = on_top = lambda: inner() + " and on top"
    for _ in range(2):
        with pytest.raises(NotReversible, match=r"Thing\.greet was changed"):
            patches.restore()
        assert thing.greet is on_top and other.shared == 1 and undone == []
    thing.greet = inner
    patches.restore()
    assert vars(thing) == vars(other) == {} and undone == [True]


def test_two_sets_on_one_object_restore_in_reverse_order_only():
    thing, first, second = Thing(), PatchSet(), PatchSet()
    first.set(thing, "shared", 1)
    second.set(thing, "shared", 2)
    with pytest.raises(NotReversible):
        first.restore()
    second.restore()
    assert thing.shared == 1
    first.restore()
    assert vars(thing) == {}


def test_a_module_registers_nothing():
    """`module.forward = other_module` would become a submodule through nn.Module.__setattr__."""
    module, patches = nn.Linear(2, 2), PatchSet()
    before = dict(vars(module))
    patches.set(module, "forward", nn.Identity())
    assert list(module.children()) == [] and dict(vars(module)) != before
    patches.restore()
    assert dict(vars(module)) == before


def test_wrapping_a_forward_goes_below_an_offload_hook_that_comes_or_goes_later():
    """accelerate's hooks keep the forward they wrap in `_old_forward`, and put it back when they are removed."""
    hooks = pytest.importorskip("accelerate.hooks")

    def doubled(forward):
        return lambda *args: 2 * forward(*args)

    for before in (True, False):
        for removed in (True, False):
            module, patches = nn.Identity(), PatchSet()
            clean = set(vars(module))
            if before:
                hooks.add_hook_to_module(module, hooks.ModelHook())
            patches.wrap_forward(module, doubled)
            if not before:
                hooks.add_hook_to_module(module, hooks.ModelHook())
            assert module(3) == 6
            if removed:
                hooks.remove_hook_from_module(module)
                assert module(3) == 6
            patches.restore()
            assert module(3) == 3
            if not removed:
                hooks.remove_hook_from_module(module)
            assert module(3) == 3 and set(vars(module)) - clean <= {"forward"}

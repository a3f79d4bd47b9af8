"""Bits by layer under a budget, from a measured table (linear error model of HIGGS, https://arxiv.org/abs/2411.17525)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from torch import nn

from fastdiff.anatomy import fingerprint
from fastdiff.errors import BadConfig
from fastdiff.method import Settings
from fastdiff.plans import Each, from_file, own
from fastdiff.quant.allocate import Allocation, Choice, Table, allocate
from fastdiff.quant.base import QuantMethod
from fastdiff.quant.build import Found, layers_of
from fastdiff.quant.calls import Calls
from fastdiff.quant.recipe import Recipe
from fastdiff.quant.sensitivity import FORMAT, said, sensitivities, stored, stored_as, together
from fastdiff.weights import nbytes

Bits = Literal[4, 5, 8, 16, "normal2", "normal3", "normal4"]
Name = Annotated[int | str, Field(union_mode="left_to_right")]  # JSON has strings for names: "4" is 4 again
_HINT = "fastdiff quantize -o PLAN.json --set quant.method=mixed makes one"


class BitPlan(Settings):
    """Bits of each layer, and the table they were chosen from: relative squared error of the guided output."""

    version: Literal[1] = 1
    denoiser: str = Field(max_length=200, description="class and configuration of the model that was measured")
    group_size: int = 64
    bits: Mapping[str, Bits]
    bytes: int = Field(ge=0, description="of the denoiser's weights, those that stay as they are included")
    predicted: float = Field(ge=0, description="sum of the layers' errors: relative squared error of the output")
    measured: float = Field(ge=0, description="the same error with all layers quantized at once")
    table: Mapping[str, Mapping[Name, float]] = Field(default_factory=dict)

    @property
    def additivity(self) -> float:
        """Measured over predicted error; 1 where the linear model holds."""
        return self.measured / self.predicted if self.predicted else 1.0

    def summary(self) -> str:
        counts = {b: sum(chosen == b for chosen in self.bits.values()) for b in FORMAT}
        layers = ", ".join(f"{count} layers of {said(bits)}" for bits, count in counts.items() if count)
        return (
            f"{layers}: {self.bytes / 1e6:.2f} MB; output error {self.measured**0.5:.2%}, predicted "
            f"{self.predicted**0.5:.2%}"
        )


class Mixed(QuantMethod):
    """4-, 5-, 8- or 16-bit weights, layer by layer: the least error within `budget_mb`, or the least memory.

    The least memory within `target_error`. Only the denoiser's layers are chosen from.

    Formula: choose the bits b_l of each layer l that make sum e_l(b_l) least while sum bytes_l(b_l) stays within the
    budget, e_l(b) being the relative squared error of the denoiser's output, after guidance, with layer l alone in b
    bits.
    """

    method: Literal["mixed"] = "mixed"
    budget_mb: float | None = Field(None, gt=0, description="of each denoiser's weights, in MB of 10^6 bytes")
    target_error: float | None = Field(
        None, gt=0, lt=1, description="relative error of the guided output, as the linear model predicts it"
    )
    choices: tuple[Bits, ...] = Field(
        (4, 5, 8, 16), min_length=1,
        description="bits a layer may have; 5 are 4 in groups of 16; normal2, normal3, normal4 are HIGGS' levels",
    )  # fmt: skip
    plan: Annotated[BitPlan | Each[BitPlan] | None, from_file(BitPlan, "bit plan", _HINT)] = Field(
        None, description="what was chosen, or the path of its file; of several denoisers one each, by component"
    )

    format: ClassVar[str] = "int8"

    @field_validator("components")
    @classmethod
    def _denoiser_only(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if names != ("denoiser",):
            raise ValueError(f"components = {list(names)}: mixed measures the denoiser; give other components a scheme")
        return names

    @model_validator(mode="after")
    def _one_aim(self) -> Mixed:
        if isinstance(self.prune, float):
            raise ValueError("bits are planned for what is left: plan pruning first, and name the file as prune")
        if (self.budget_mb is None) == (self.target_error is None) and self.plan is None:
            raise ValueError("mixed needs one of budget_mb and target_error, or a plan")
        return self

    def of(self, component: str, main: bool) -> QuantMethod | None:
        method, plan = super().of(component, main), own(self.plan, component, main)
        if method is None or (plan is None and self.plan is not None):
            return None
        return method.model_copy(update={"plan": plan})

    def recipe(self, name: str, layer: nn.Module) -> Recipe | None:
        if not isinstance(self.plan, BitPlan):
            raise BadConfig(
                "the quant method mixed needs a plan of bits by layer: fastdiff quantize makes one and uses it, and "
                f"{_HINT} to name as quant.plan"
            )
        if name not in self.plan.bits:
            raise BadConfig(f"the bit plan says nothing of layer {name}; it was made for {self.plan.denoiser}")
        form, group = stored_as(self.plan.bits[name], self.plan.group_size)
        return Recipe(form, "none", group, self.rounding, self.low_rank, self.kernel, self.speed)

    def planned(self, calls: Calls, watch: Callable[[int, int], None] | None = None) -> BitPlan:
        """A plan for the denoiser of these calls, measured on them; the table of a plan that is there is used again.

        Raises BadConfig for a budget or an error that no choice reaches; it says what can be reached.
        """
        anatomy = calls.anatomy
        layers = {f.name: f for f in layers_of(anatomy.denoiser) if self.takes(f.name)}
        rest = nbytes(anatomy.denoiser) - sum(f.layer.weight.nbytes for f in layers.values())  # a bias stays as it is
        if self.budget_mb is not None:  # refused before minutes of measuring, not after
            self._allocated({name: dict.fromkeys(self.choices, 0.0) for name in layers}, layers, rest)
        known = own(self.plan, anatomy.component, True)
        known = known if known is not None and known.denoiser == fingerprint(anatomy) else None
        rows = known.table if known is not None and known.group_size == self.group_size else {}
        if set(rows) == set(layers) and all(set(self.choices) <= set(row) for row in rows.values()):
            table: dict[str, dict[Choice, float]] = {
                name: {bits: row[bits] for bits in self.choices} for name, row in rows.items()
            }
        else:
            table = sensitivities(calls, layers, self.choices, self.group_size, self.rounding, watch)
        found = self._allocated(table, layers, rest)
        return BitPlan(
            denoiser=fingerprint(anatomy), group_size=self.group_size, bits=found.bits, bytes=found.bytes + rest,
            predicted=found.error, measured=together(calls, layers, found.bits, self.group_size, self.rounding),
            table=table,
        )  # fmt: skip

    def _allocated(
        self, table: Table, layers: Mapping[str, Found], rest: int
    ) -> Allocation:  # fmt: skip
        sizes = {name: {b: stored(f.layer, b, self.group_size) for b in table[name]} for name, f in layers.items()}
        if self.budget_mb is not None:
            return allocate(table, sizes, budget=round(self.budget_mb * 1e6), fixed=rest)
        if self.target_error is not None:
            return allocate(table, sizes, target=self.target_error**2, fixed=rest)
        raise BadConfig("mixed needs one of budget_mb and target_error to make a plan")

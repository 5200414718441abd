"""The schema of the section `incremental` of params.yaml."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from longtail.workflow.ranges import Count, Fraction, Name, NotNegative, Positive, Seed

AXES = ("datasets", "orders", "protocols", "recipes", "trainings", "seeds")
SECTIONS = ("plans", "orders", "protocols", "recipes", "trainings", "readouts")


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Plan(Block):
    datasets: list[Name] = Field(min_length=1)
    orders: list[Name] = Field(min_length=1)
    protocols: list[Name] = Field(min_length=1)
    recipes: list[Name] = Field(min_length=1)
    trainings: list[Name] = Field(min_length=1)
    seeds: list[Seed] = Field(min_length=1)
    portable: bool = False  # as of other plans

    @model_validator(mode="after")
    def _no_repeats(self) -> "Plan":
        for axis in AXES:
            values = getattr(self, axis)
            if len(set(values)) < len(values):
                raise ValueError(f"{axis} names something twice: {values}")
        return self


class Order(Block):
    numpy_seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    shuffles_before: list[Count] = Field(default=[], max_length=2)
    listed: list[Annotated[int, Field(ge=0)]] = []

    @model_validator(mode="after")
    def _one_rule(self) -> "Order":
        if self.listed and self.numpy_seed is not None:
            raise ValueError("an order is listed or drawn with numpy_seed, not both")
        if self.shuffles_before and (self.numpy_seed is None or len(self.shuffles_before) != 2):
            raise ValueError("shuffles_before is [count, length], with a numpy_seed")
        return self


class Protocol(Block):
    first_classes: Count
    step_classes: Count
    memory: Annotated[int, Field(ge=0)]
    memory_rule: Literal["total", "per_class"]
    selection: Literal["herding", "herding_released", "herding_raw", "random"]
    held_out: Fraction


class Training(Block):
    loss: Name
    arguments: dict[str, Any]
    replay: bool
    distillation: Literal["none", "share", "added", "sigmoid"]
    temperature: Positive
    teacher: Literal["raw", "bias_layer", "weight_aligning", "weight_aligning_l1", "weight_aligning_released"]
    start: Literal["raw", "teacher"]

    @model_validator(mode="after")
    def _fits(self) -> "Training":
        if (self.distillation == "sigmoid") != (self.loss == "bce" and self.distillation != "none"):
            raise ValueError("distillation: sigmoid goes with loss: bce, and loss: bce with sigmoid or none")
        if self.distillation == "none" and self.teacher != "raw" and self.start == "raw":
            raise ValueError(f"teacher: {self.teacher} has no effect without distillation and with start: raw")
        return self


class BiasLayer(Block):
    l2: NotNegative


class Readouts(Block):
    bias_layer: BiasLayer
    energy_aligning: dict[str, Any]  # held against the block `align` by params.py

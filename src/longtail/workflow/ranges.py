"""The kinds of values that params.yaml may hold, as annotations.

The keyword-only arguments of a loss (`losses/<method>.py`) or reader (`data/sources/<reader>`) are annotated with
these; params.py reads the annotations off the file, so that a new one needs no entry anywhere else.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

__all__ = [
    "Biases",
    "Channels",
    "Count",
    "Fraction",
    "Literal",
    "Md5",
    "Name",
    "NotNegative",
    "Numbers",
    "Positive",
    "Seed",
    "Sha256",
    "Share",
    "Url",
]

LONGEST = 50  # characters of a name: those of a cell are one file's name, which has 255
Name = Annotated[  # no '-': it separates a stage name's parts
    str, Field(pattern=r"^[a-z0-9]+(_[a-z0-9]+)*$", max_length=LONGEST)
]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Numbers = Annotated[list[float], Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=10**6)]
Channels = Literal[1, 3]


MOST_BIASES = 1024  # experts of one network


def _one_for_each(value: Any) -> Any:
    """A list as it is; {low, high, count} as a list of that many, to be checked like any other."""
    if not isinstance(value, dict):
        return value
    limits = (value.get("low"), value.get("high"))
    numbers = all(isinstance(limit, (int, float)) and not isinstance(limit, bool) for limit in limits)
    if set(value) != {"low", "high", "count"} or not numbers or not isinstance(value["count"], int):
        raise ValueError("a list of numbers, or {low: number, high: number, count: whole number}")
    if not 0 < value["count"] <= MOST_BIASES:
        raise ValueError(f"count = {value['count']}: allowed are 1 to {MOST_BIASES}")
    return [float(value["low"])] * value["count"]


Biases = Annotated[list[float], Field(min_length=1), BeforeValidator(_one_for_each)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
Url = Annotated[str, Field(pattern=r"^https?://")]
Md5 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Hashes = Annotated[dict[Literal["train", "test", "places"], Sha256], Field(min_length=2)]

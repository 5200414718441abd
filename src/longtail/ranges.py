"""The kinds of values that params.yaml may hold, as annotations.

The keyword-only arguments of a loss (`losses/<method>.py`) or reader (`sources/<reader>`) are annotated with
these; params.py reads the annotations off the file, so that a new one needs no entry anywhere else.
"""

from typing import Annotated, Literal

from pydantic import Field

__all__ = [
    "Count",
    "Fraction",
    "Literal",
    "Md5",
    "Name",
    "NotNegative",
    "Numbers",
    "Positive",
    "Seed",
    "Share",
    "Url",
]

Name = Annotated[str, Field(pattern=r"^[a-z0-9]+(_[a-z0-9]+)*$")]  # no '-': it separates a stage name's parts
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Numbers = Annotated[list[float], Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
Url = Annotated[str, Field(pattern=r"^https?://")]
Md5 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Hashes = Annotated[dict[Literal["train", "test"], Sha256], Field(min_length=2)]

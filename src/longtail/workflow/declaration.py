"""What a stage declares, read off its pipeline file without DVC, whose import takes longer than most stages.

It knows the part of DVC's templates that our pipeline files use, and says None where there is more: DVC is asked then.
The tests hold it against DVC for every stage of the repository.
"""

import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

Declared = tuple[str, list[str], list[str]]  # command, dependencies, keys of params.yaml
EXPRESSION = re.compile(r"\$\{([\w.-]+(?:\[\d+\])?)\}")


class BeyondError(Exception):
    """It is in DVC's language and not in this part of it."""


_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the compiled one, ten times as fast, where it is there


class Loader(_Loader):  # type: ignore[misc]
    """PyYAML's loader with the scalars of YAML 1.2, which is what DVC reads.

    YAML 1.1, PyYAML's, has 8 for 010, 90 for 1:30, true for yes, and text for 5e-2 and for 1e-05, which DVC writes.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  PyYAML's name for them
        first: [(tag, pattern) for tag, pattern in found if tag.rpartition(":")[2] not in ("bool", "int", "float")]
        for first, found in _Loader.yaml_implicit_resolvers.items()
    }

    def construct_whole(self, node: yaml.ScalarNode) -> int:
        """A whole number; of decimal ones zeros in front say nothing."""
        text = self.construct_scalar(node).replace("_", "").lower()
        base = {"0b": 2, "0o": 8, "0x": 16}.get(text.lstrip("+-")[:2], 10)
        return int(text, base)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})\Z"), list(_first))
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_whole)


def load(path: Path) -> Any:
    """The content of a YAML file, as DVC reads it."""
    return yaml.load(path.read_bytes(), Loader)


def read(address: str) -> Declared | None:
    """The stage with this address (`file:name`, or a name in dvc.yaml); None where only DVC can say.

    Dependencies are relative to the stage's folder, which is the one that it runs in.
    """
    file, _, name = address.rpartition(":")
    try:
        return _read(Path(file or "dvc.yaml"), name)
    except (BeyondError, AttributeError, KeyError, IndexError, TypeError, OSError, yaml.YAMLError):
        return None


def _read(path: Path, name: str) -> Declared:
    contents = load(path)
    values = _variables(path.parent, contents.get("vars", []))
    group, generated, key = name.partition("@")
    body = dict(contents["stages"][group])
    if bool(generated) != ("matrix" in body or "foreach" in body):
        raise BeyondError
    if "matrix" in body:
        axes = {axis: _list(given, values) for axis, given in body.pop("matrix").items()}
        cells = {"-".join(map(_text, cell)): cell for cell in itertools.product(*axes.values())}
        values |= {"key": key, "item": dict(zip(axes, cells[key], strict=True))}
    elif "foreach" in body:
        of = body["foreach"]
        each = _lookup(_whole(of), values) if isinstance(of, str) else of
        body = dict(body["do"])
        if not isinstance(each, Mapping):
            raise BeyondError
        values |= {"key": key, "item": {str(k): v for k, v in each.items()}[key]}
    if "vars" in body or Path(os.path.normpath(path.parent / body.get("wdir", "."))).resolve() != Path.cwd():
        raise BeyondError
    deps = [os.path.normpath(_fill(_string(dep), values)) for dep in body.get("deps", [])]
    keys = [_fill(_string(key), values) for key in body.get("params", [])]
    return _fill(_string(body["cmd"]), values), sorted(deps), sorted(keys)


def _variables(folder: Path, named: list[Any]) -> dict[str, Any]:
    """params.yaml beside the pipeline file, where there is one, and the keys `file:key,key` of others."""
    values: dict[str, Any] = {}
    if (folder / "params.yaml").exists():
        values |= load(folder / "params.yaml")
    for one in named:
        file, _, keys = _string(one).partition(":")
        content = load(folder / file)
        values |= {key: content[key] for key in keys.split(",")} if keys else content
    if {"key", "item"} & values.keys():
        raise BeyondError
    return values


def _list(given: Any, values: Mapping[str, Any]) -> list[Any]:
    found = _lookup(_whole(given), values) if isinstance(given, str) else given
    if not isinstance(found, list):
        raise BeyondError
    return found


def _whole(text: str) -> str:
    """The expression that a text is and nothing else."""
    match = EXPRESSION.fullmatch(text)
    if not match:
        raise BeyondError
    return match[1]


def _lookup(expression: str, values: Mapping[str, Any]) -> Any:
    found: Any = values
    for part in expression.replace("[", ".").replace("]", "").split("."):
        found = found[int(part) if isinstance(found, list) else part]
    return found


def _fill(text: str, values: Mapping[str, Any]) -> str:
    filled = EXPRESSION.sub(lambda match: _text(_lookup(match[1], values)), text)
    if "${" in filled:
        raise BeyondError
    return filled


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise BeyondError  # DVC has its own way to write those
    return str(value)


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise BeyondError
    return value

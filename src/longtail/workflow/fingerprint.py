"""What identifies a training: a digest of all that determines it; and the versions of what computes it."""

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

VERSIONED = ("dvc", "mlflow", "numpy", "torch", "torchvision")


def plain(value: Any) -> Any:
    """`value` with 1.0 as 1, as DVC sees it: a rewritten number that equals the old one changes no digest."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def digest(value: Any) -> str:
    """16 hex digits of the SHA-256 of `value` as canonical JSON (sorted keys, no blanks)."""
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(cmd: str | list[str], deps: Iterable[tuple[str, str]], params: Mapping[str, Any]) -> str:
    """The identity of a training: what DVC decides by whether a train stage has to run.

    Arguments are those of the stage's entry in the lock: the command, (path, md5) of each dependency in any
    order, and the declared parameters as {dotted key: value}.
    """
    return digest({"cmd": cmd, "deps": sorted(map(list, deps)), "params": params})


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that can change a number."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found

"""A configuration file: methods with all their settings, as `foveate tune` writes it and `foveate.apply` takes it.

```json
{"foveate": "0.1.0", "methods": [{"method": "fopru", "settings": {"keep": 0.25}}], "measured": {"flops_ratio": 0.4}}
```
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from foveate.method import InputError, Method, build

ENDING = ".json"
_LARGEST = 2**20
"""Bytes; a configuration has some hundred."""


def is_file(name: str) -> bool:
    """Whether a name is that of a configuration file and not of a method: it ends in ".json"."""
    return name.endswith(ENDING)


def load_configuration(path: str | Path) -> list[Method]:
    """The methods that a file holds, in order, at least one; what else it says ("measured") is not looked at.

    Raises:
        InputError: one line that names the file, for what cannot be read, is not of this form, or names methods or
            settings that there are not.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise InputError(f"{path}: a folder, not a configuration")
        if path.stat().st_size > _LARGEST:
            raise InputError(f"{path}: larger than a configuration can be")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({' '.join(str(error).split())})") from None
    try:
        return _methods(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def save(path: str | Path, methods: Sequence[Method], measured: Mapping[str, Any] | None = None) -> None:
    """Writes a configuration; a reader sees the whole new file or the one before. `measured`: JSON values."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"foveate": release(), "methods": describe(methods), "measured": dict(measured or {})}
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def describe(methods: Sequence[Method]) -> list[dict[str, Any]]:
    """The methods as JSON values, just as they come back from JSON: lists for tuples."""
    values: list[dict[str, Any]] = json.loads(
        json.dumps([{"method": one.card.slug, "settings": one.hyperparameters()} for one in methods])
    )
    return values


def release() -> str:
    """The version of foveate that is installed."""
    try:
        return version("foveate")
    except PackageNotFoundError:
        return "not installed"


def _methods(values: Any) -> list[Method]:
    if not isinstance(values, dict) or "foveate" not in values or "methods" not in values:
        raise InputError('not a configuration; that is {"foveate": VERSION, "methods": [{"method": NAME}, …]}')
    if unknown := set(values) - {"foveate", "methods", "measured"}:
        raise InputError(f"unknown field {min(unknown)!r}; there are foveate, methods, measured")
    entries = values["methods"]
    if not isinstance(entries, list) or not entries:
        raise InputError('"methods" must be a list with at least one method')
    return [_method(number, entry) for number, entry in enumerate(entries, 1)]


def _method(number: int, entry: Any) -> Method:
    if not isinstance(entry, dict) or not isinstance(entry.get("method"), str):
        raise InputError(f'method {number} must be {{"method": NAME, "settings": {{…}}}}')
    if unknown := set(entry) - {"method", "settings"}:
        raise InputError(f"method {number}: unknown field {min(unknown)!r}; there are method, settings")
    settings = entry.get("settings", {})
    if not isinstance(settings, dict):
        raise InputError(f"method {number}: its settings must be an object")
    try:
        return build(entry["method"], {name: _tuples(value) for name, value in settings.items()})
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        # Constructors check values, not every type that JSON can hold.
        raise InputError(f"{entry['method']} cannot have these settings ({' '.join(str(error).split())})") from None


def _tuples(value: Any) -> Any:
    """Tuples for lists, at every depth."""
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value

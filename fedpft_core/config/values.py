"""From keys to a configuration and back: what each key is, and the check of every value."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fedpft_core.config.keys import Config, Scalar
from fedpft_core.errors import UserError

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


@dataclass(frozen=True)
class KeyInfo:
    """One documented key.

    Attributes:
        name: dotted, with dashes.
        type: bool, int, float or str.
        default: taken where the key is absent.
        doc: one line, with the unit.
        low: the least value; None for no limit.
        high: the largest value; None for no limit.
        above: what the value must be more than; None for no limit.
        choices: the only values admitted; empty for any.
        joined: whether several choices in a row, `a+b`, will do.
    """

    name: str
    type: type
    default: Scalar
    doc: str
    low: float | None
    high: float | None
    above: float | None
    choices: tuple[str, ...]
    joined: bool = False

    @property
    def allowed(self) -> str:
        """The admitted values in words, empty when any value of the type will do."""
        if self.choices:
            also = ", or several joined by +" if self.joined else ""
            return "one of " + ", ".join(self.choices) + also
        parts = []
        if self.above is not None:
            parts.append(f"above {self.above:g}")
        if self.low is not None:
            parts.append(f"at least {self.low:g}")
        if self.high is not None:
            parts.append(f"at most {self.high:g}")
        return " and ".join(parts)


def _sections() -> dict[str, type]:
    hints = typing.get_type_hints(Config)
    return {f.name: hints[f.name] for f in fields(Config)}


def keys() -> dict[str, KeyInfo]:
    """All keys in order, by their dotted name.

    Returns:
        A new dictionary, section by section as :class:`Config` has them.
    """
    out: dict[str, KeyInfo] = {}
    for section, cls in _sections().items():
        hints = typing.get_type_hints(cls)
        for f in fields(cls):
            name = f"{section}.{f.name.replace('_', '-')}"
            m = f.metadata
            out[name] = KeyInfo(
                name, hints[f.name], getattr(cls, f.name), m["doc"], m["low"], m["high"],
                m["above"], m["choices"], m["joined"],
            )  # fmt: skip
    return out


_TYPE_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _typed(info: KeyInfo, value: Any) -> Scalar:
    want = info.type
    ok: Scalar | None = None
    if want is bool:
        ok = value if isinstance(value, bool) else None
    elif want is int:
        whole = isinstance(value, int) and not isinstance(value, bool)
        ok = value if whole else None
    elif want is float:
        if isinstance(value, str) and _EXPONENT.fullmatch(value):
            value = float(value)  # YAML 1.1 takes 6e-4, without a point, for a text
        number = isinstance(value, int | float) and not isinstance(value, bool)
        ok = float(value) if number and value == value and abs(value) != float("inf") else None
    elif isinstance(value, str):
        ok = value
    if ok is None:
        raise UserError(f"{info.name}: expected {_TYPE_WORDS[want]}, got {value!r}.")
    words = str(ok).split("+") if info.joined else [ok]
    bad = (
        (info.choices and not all(w in info.choices for w in words))
        or ("none" in words and len(words) > 1)
        or (info.low is not None and ok < info.low)  # type: ignore[operator]
        or (info.high is not None and ok > info.high)  # type: ignore[operator]
        or (info.above is not None and ok <= info.above)  # type: ignore[operator]
    )
    if bad:
        raise UserError(f"{info.name}: expected {info.allowed}, got {value!r}.")
    return ok


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping → dotted keys: `{"lora": {"rank": 4}}` → `{"lora.rank": 4}`.

    Args:
        tree: mappings within mappings, as a YAML or TOML file holds them.
        prefix: what every key of the result begins with.

    Returns:
        Values by dotted key.
    """
    flat: dict[str, Any] = {}
    for k, v in tree.items():
        name = f"{prefix}{k}"
        if isinstance(v, Mapping):
            flat |= flatten(v, f"{name}.")
        else:
            flat[name] = v
    return flat


def from_flat(flat: Mapping[str, Any]) -> Config:
    """Build a Config from dotted keys; absent keys take their default.

    Args:
        flat: values by dotted key, as `flatten` makes them.

    Returns:
        The configuration, every value of its key's type and within its range.

    Raises:
        UserError: a key is unknown, a value has the wrong type or is out of range, or keys
            contradict each other; the key and what was expected are named.
    """
    known = keys()
    values: dict[str, dict[str, Scalar]] = {s: {} for s in _sections()}
    for name, value in flat.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else " `fedpft config` lists all keys."
            raise UserError(f"{name}: no such configuration key.{hint}")
        section, _, key = name.partition(".")
        values[section][key.replace("-", "_")] = _typed(known[name], value)
    return Config(**{s: cls(**values[s]) for s, cls in _sections().items()})


def to_flat(config: Config) -> dict[str, Scalar]:
    """The inverse of `from_flat`, with every key present.

    Args:
        config: a whole run.

    Returns:
        Values by dotted key, in the order of :func:`keys`.
    """
    return {
        f"{s.name}.{f.name.replace('_', '-')}": getattr(getattr(config, s.name), f.name)
        for s in fields(Config)
        for f in fields(getattr(config, s.name))
    }


def to_tree(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Dotted keys → one mapping per section, for YAML and TOML files.

    Args:
        flat: values by dotted key, each with a section before its first dot.

    Returns:
        Values by section and by what follows the dot, in the order of `flat`.
    """
    tree: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        section, _, key = name.partition(".")
        tree.setdefault(section, {})[key] = value
    return tree

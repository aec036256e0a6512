"""What a package says of itself: everything a client needs beside weights and processor files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedpft_core.adapter.lora import AdapterSpec
from fedpft_core.errors import ReplyError
from fedpft_core.model.families import known
from fedpft_core.model.plan import Plan
from fedpft_core.task import Task, make


@dataclass(frozen=True)
class PackageMeta:
    """The metadata of a package.

    Attributes:
        plan: what the proxy keeps of the FM.
        adapter: what the adapter is made of.
        model_config: the Hugging Face config of the FM, as JSON values.
        architecture: the class name of the task model.
        kind: the task's name: what the rows are, `text`, `pair` or `image`.
        labels: label names, in the order of their numbers.
        max_length: the most tokens of a row.
    """

    plan: Plan
    adapter: AdapterSpec
    model_config: Mapping[str, Any]
    architecture: str
    kind: str
    labels: tuple[str, ...]
    max_length: int

    @cached_property
    def task(self) -> Task:
        """What is learned. Raises UserError for a kind of task that is not known here."""
        return make(self.kind, self.labels)

    def as_raw(self) -> dict[str, Any]:
        """The metadata as JSON values.

        Returns:
            What `from_raw` reads, by the names of the attributes.
        """
        return {
            "plan": self.plan.as_raw(),
            "adapter": self.adapter.as_raw(),
            "model_config": dict(self.model_config),
            "architecture": self.architecture,
            "kind": self.kind,
            "labels": list(self.labels),
            "max_length": self.max_length,
        }

    def to_json(self) -> str:
        """One text for equal metadata: it is what the package's digest is over.

        Returns:
            JSON without blanks, keys sorted.
        """
        return self._text

    @cached_property
    def _text(self) -> str:
        return json.dumps(self.as_raw(), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> PackageMeta:
        """The inverse of `to_json`.

        Args:
            text: as it came, from the network or a disk.

        Returns:
            The metadata, every field checked.

        Raises:
            ReplyError: naming the field that is missing, unknown or wrong.
        """
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ReplyError("the package's metadata are not JSON") from error
        return PackageMeta.from_raw(raw)

    @staticmethod
    def from_raw(raw: Any) -> PackageMeta:
        """Metadata from JSON values.

        Args:
            raw: what `as_raw` gives, or anything else that came.

        Returns:
            The metadata, every field checked.

        Raises:
            ReplyError: naming the field that is missing, unknown or wrong.
        """
        if not isinstance(raw, dict):
            raise ReplyError("the package's metadata are no object")
        if raw.keys() != _READ.keys():
            odd = str(min(raw.keys() ^ _READ.keys(), key=str))[:40]
            side = "unknown" if odd in raw else "missing"
            raise ReplyError(f"the package's metadata have the {side} field {odd!r}")
        read = {}
        for name, reader in _READ.items():
            try:
                read[name] = reader(raw[name])
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                why = str(error)[:200]
                raise ReplyError(f"the package's metadata: {name} is wrong ({why})") from error
        if not _plans_for(read["plan"].model_type, read["model_config"]):
            raise ReplyError("the package's plan is for another kind of model than its config")
        return PackageMeta(**read)


def _plans_for(name: str, config: dict[str, Any]) -> bool:
    """Whether a plan of that name is for models with that config."""
    family = known(name)
    # Of kinds that nobody here knows no more is asked than that both are the same.
    return family.fits(config) if family else bool(config["model_type"] == name)


def _config(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get("model_type"), str):
        raise ValueError("not a model's config")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 200:
        raise ValueError("not a text of 1 to 200 characters")
    return value


def _labels(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(label, str) for label in value):
        raise ValueError("not a list of texts")
    return tuple(value)


def _length(value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError("not a whole number above 0")
    return value


_READ: dict[str, Callable[[Any], Any]] = {
    "plan": Plan.from_raw,
    "adapter": AdapterSpec.from_raw,
    "model_config": _config,
    "architecture": _text,
    "kind": _text,
    "labels": _labels,
    "max_length": _length,
}

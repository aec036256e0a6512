"""The client policy: what a node's owner lets a server ask for, checked before anything runs.

A server decides which model a node trains, what of it, on how many rows and for how long. Every
rule here is a key of the node config; a refusal names it. The rules that need no model are held
against the message, those on the package against its metadata before a model is built of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from fedpft_core.adapter.lora import AdapterSpec
from fedpft_core.errors import UserError
from fedpft_core.model.families import FAMILIES, Family, family_of
from fedpft_core.wire.envelope import Envelope
from fedpft_core.wire.identity import is_digest
from fedpft_core.wire.messages import (
    SecureStatisticsRequest,
    SecureTrainRequest,
    StatisticsRequest,
    TrainRequest,
)
from fedpft_core.wire.meta import PackageMeta

PREFIX = "policy-"
LEAVING = ("adapter", "counts", "statistics", "slopes", "merging")
PARTS = ("lora", "head", "any")

# By node config key: type, default, and what the rule says.
KEYS: dict[str, tuple[type, Any, str]] = {
    "policy-adapter": (
        str, "lora,head",
        "what of the sub-FM may be trained: `lora` (factors on attention projections), `head` "
        "(the family's head), `any` (whatever the package names, embeddings among it)",
    ),
    "policy-families": (str, "", "families of models that are trained; empty = all known"),
    "policy-leave": (
        str, "adapter,counts,statistics,slopes",
        "what may leave: `adapter` (what training made), `counts` (of inactive neurons), "
        "`statistics` (sums of features by class), `slopes` (of the loss at heads that the server "
        "sends, for head.descent; not without `statistics`), `merging` (squared gradients, or "
        "products of layers' inputs, for federation.aggregate = fisher or regmean)",
    ),
    "policy-min-rows": (int, 1, "rows that a request must be of in all"),
    "policy-min-step-rows": (int, 1, "rows of a training step"),
    "policy-min-class-rows": (
        int, 1, "rows of each class that this node has at all, for class statistics to leave"
    ),
    "policy-max-steps": (int, 0, "training steps of a request, 0 = no limit"),
    "policy-max-rank": (int, 256, "LoRA's rank"),
    "policy-secure": (
        int, 0,
        "1 = what training made and class statistics leave under the masks of secure aggregation "
        "only",
    ),
    "policy-max-mb": (int, 0, "size of a message, megabytes, 0 = no limit"),
    "policy-app-hash": (
        str, "",
        "hash of this app's code (`fedpft node check --policy` shows it); another code answers "
        "nothing; empty = any",
    ),
}  # fmt: skip


class PolicyError(UserError):
    """A rule of the node's owner refuses a request; the server may know which."""

    def __init__(self, rule: str, allowed: object, why: str) -> None:
        text = f"this node's policy refuses: {PREFIX}{rule} = {allowed}, and {why}"
        super().__init__(text, public=text)


@dataclass(frozen=True)
class Policy:
    """A node's rules; each field is the key of the same name, see `KEYS`."""

    adapter: tuple[str, ...] = ("lora", "head")
    families: tuple[str, ...] = ()
    leave: tuple[str, ...] = LEAVING
    min_rows: int = 1
    min_step_rows: int = 1
    min_class_rows: int = 1
    max_steps: int = 0
    max_rank: int = 256
    secure: int = 0
    max_mb: int = 0
    app_hash: str = ""

    @staticmethod
    def of(node: Mapping[str, Any]) -> Policy:
        """The policy that a node config states.

        Args:
            node: values by node config key; absent ones take their default.

        Returns:
            The policy.

        Raises:
            UserError: naming the key with a value that is no rule.
        """
        made: dict[str, Any] = {}
        choices = {"adapter": PARTS, "families": tuple(FAMILIES), "leave": LEAVING}
        for f in fields(Policy):
            key = PREFIX + f.name.replace("_", "-")
            value = node.get(key, KEYS[key][1])
            if f.name in choices:
                value = tuple(w.strip() for w in value.split(",") if w.strip())
                odd = [w for w in value if w not in choices[f.name]]
                if odd:
                    raise UserError(
                        f"node config: {key} = {odd[0]!r} is none of {', '.join(choices[f.name])}."
                    )
            elif f.name == "app_hash":
                if value and not is_digest(value):
                    raise UserError(f"node config: {key} = {value!r} is no sha256 of 64 digits.")
            elif value < 0:
                raise UserError(f"node config: {key} = {value} is below 0.")
            made[f.name] = value
        return Policy(**made)

    def digest(self) -> str:
        """What the audit log knows the rules by.

        Returns:
            The first 16 hex digits of a sha256 over all of them.
        """
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def check_app(self, app: str) -> None:
        """Hold the code that runs against the one that the owner has seen.

        Args:
            app: the hash of the code.

        Raises:
            PolicyError: naming the rule.
        """
        if self.app_hash and app != self.app_hash:
            raise PolicyError("app-hash", f"{self.app_hash[:12]}…", f"this app's is {app[:12]}…")

    def check_size(self, envelope: Envelope) -> None:
        """Hold a message against the rule on bytes, before it is opened.

        Args:
            envelope: as it came.

        Raises:
            PolicyError: naming the rule.
        """
        size = sum(envelope.sizes().values())
        if self.max_mb and size > self.max_mb * 10**6:
            raise PolicyError("max-mb", self.max_mb, f"the message has {size / 1e6:.1f} MB")

    def check_request(self, request: TrainRequest | StatisticsRequest) -> None:
        """Hold a request against the rules that need neither model nor rows.

        Args:
            request: what is asked for.

        Raises:
            PolicyError: naming the rule.
        """
        masked = SecureTrainRequest | SecureStatisticsRequest
        if self.secure and not isinstance(request, masked):
            raise PolicyError("secure", self.secure, "what is asked for has no masks")
        if isinstance(request, StatisticsRequest):
            self._check_leaves("statistics")
            if request.head:
                self._check_leaves("slopes")
            return
        self._check_leaves("adapter")
        if request.count_rule:
            self._check_leaves("counts")
        if request.merging_rule:
            self._check_leaves("merging")
        s = request.settings
        if self.max_steps and s.steps > self.max_steps:
            raise PolicyError("max-steps", self.max_steps, f"{s.steps} are asked for")
        if s.batch_size < self.min_step_rows:
            raise PolicyError("min-step-rows", self.min_step_rows, f"a step is of {s.batch_size}")

    def check_rows(self, request: TrainRequest | StatisticsRequest, rows: int) -> None:
        """Hold a request against the rules on the rows it would be of.

        Args:
            request: what is asked for.
            rows: rows that the node trains on.

        Raises:
            PolicyError: naming the rule.
        """
        used = rows
        if isinstance(request, TrainRequest):
            s = request.settings
            steps = s.steps or s.epochs * -(-rows // s.batch_size)
            if self.max_steps and steps > self.max_steps:
                raise PolicyError("max-steps", self.max_steps, f"{steps} are asked for")
            used = min(rows, steps * s.batch_size)
            if min(s.batch_size, rows) < self.min_step_rows:
                raise PolicyError("min-step-rows", self.min_step_rows, f"there are {rows} rows")
        if used < self.min_rows:
            raise PolicyError("min-rows", self.min_rows, f"it would be of {used}")

    def check_package(self, meta: PackageMeta) -> None:
        """Hold a sub-FM against the rules on models, before one is built.

        Args:
            meta: its metadata.

        Raises:
            PolicyError: naming the rule.
            UserError: the family is none that this program knows.
        """
        kind = meta.plan.model_type
        family = family_of(kind)
        if self.families and kind not in self.families:
            raise PolicyError("families", ",".join(self.families), f"the sub-FM is a {kind}")
        if meta.adapter.rank > self.max_rank:
            raise PolicyError("max-rank", self.max_rank, f"the adapter's is {meta.adapter.rank}")
        for part, name in trained(meta.adapter, family, meta):
            if part not in self.adapter and "any" not in self.adapter:
                raise PolicyError(
                    "adapter", ",".join(self.adapter), f"{name[:100]} would be trained"
                )

    def check_classes(self, group_rows: Sequence[int]) -> None:
        """Hold class statistics against the rule on rows of a class, before they are summed.

        Args:
            group_rows: how many rows each class of the node has; see `Form.group_rows`.

        Raises:
            PolicyError: naming the rule; not the class, which is the node's secret.
        """
        if any(0 < n < self.min_class_rows for n in group_rows):
            raise PolicyError(
                "min-class-rows", self.min_class_rows, "a class of this node has fewer"
            )

    def _check_leaves(self, what: str) -> None:
        if what not in self.leave:
            raise PolicyError("leave", ",".join(self.leave), f"the server asks for {what}")


def trained(spec: AdapterSpec, family: Family, meta: PackageMeta) -> list[tuple[str, str]]:
    """What an adapter trains, by the part of the model it belongs to.

    Args:
        spec: what the adapter is made of.
        family: of the sub-FM.
        meta: of the package; its plan says which blocks there are.

    Returns:
        Pairs of `lora`, `head` or `other`, and a module's path.
    """
    projections = set(family.lora_targets(tuple(range(len(meta.plan.blocks)))))
    body = f"{family.blocks.split('.')[0]}."
    return [
        *(("lora" if t in projections else "other", t) for t in spec.targets),
        *(("head" if _of_head(m, family, body) else "other", m) for m in spec.modules),
    ]


# Layers between the last block and the head, which a model without trained ones gets anew; the
# second is ModernBERT's.
_BETWEEN = ("pooler", "head")


def _of_head(module: str, family: Family, body: str) -> bool:
    """Whether a module is the family's head or lies between it and the last block."""
    return module in family.heads or module.removeprefix(body).split(".")[0] in _BETWEEN


def table(policy: Policy) -> list[tuple[str, str, str]]:
    """What a server could ask of a node, rule by rule.

    Args:
        policy: the node's.

    Returns:
        Key, value and meaning of each rule.
    """
    out = []
    for key, (_, _, meaning) in KEYS.items():
        value = getattr(policy, key.removeprefix(PREFIX).replace("-", "_"))
        shown = ",".join(value) if isinstance(value, tuple) else str(value)
        out.append((key, shown or "(all)", meaning))
    return out

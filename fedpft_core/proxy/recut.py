"""From one width to another: what a client lacks of a sub-FM, when it has one of another width.

A recut is a patch whose tensors are named `//plan` (the new plan as JSON text, uint8),
`+{weight}` (the entries of the neurons that the other sub-FM has not, in the order of the new
plan) and `={weight}` (a whole weight that differs). Everything else is taken from the sub-FM that
the client has. Between widths that share their weights that is the added neurons and nothing else,
and on the way down the plan alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedpft_core.errors import ReplyError
from fedpft_core.model.plan import Plan
from fedpft_core.proxy.narrow import neuron_parts, neurons_of
from fedpft_core.tensors import Tensors
from fedpft_core.wire.identity import combine_digest, tensor_digest
from fedpft_core.wire.package import Package, Patch

PLAN = "//plan"
_FORMAT = "fp32"  # tensors travel as they are; a patch has to name some format


def is_recut(patch: Patch) -> bool:
    """Whether a patch leads to another width.

    Args:
        patch: any.

    Returns:
        Whether :func:`apply_recut` is for it.
    """
    return PLAN in patch.tensors


def make_recut(source: Package, before: str, target: Package, after: str) -> Patch:
    """What leads from the sub-FM of one width to that of another.

    Args:
        source: the one that the client has.
        before: its digest.
        target: the one that it is to have, of the same FM and adapter.
        after: its digest.

    Returns:
        The patch.
    """
    tensors = {PLAN: torch.frombuffer(bytearray(target.meta.plan.to_json().encode()), dtype=_U8)}
    per_neuron = neuron_parts(target.meta.plan, target.weights)
    for name, value in target.weights.items():
        old = source.weights.get(name)
        if name in per_neuron and old is not None:
            block, axis = per_neuron[name]
            known, here, added = _shared(source.meta.plan, target.meta.plan, block)
            if torch.equal(old.index_select(axis, known), value.index_select(axis, here)):
                if len(added):
                    tensors[f"+{name}"] = value.index_select(axis, added).contiguous()
                continue
        if old is None or old.dtype != value.dtype or not torch.equal(old, value):
            tensors[f"={name}"] = value
    return Patch(before, after, _FORMAT, tensors)


_U8 = torch.uint8


def _shared(old: Plan, new: Plan, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of a block's neurons: places of those in both plans, in each; places of the added ones."""
    a, b = neurons_of(old, block), neurons_of(new, block)
    both = torch.isin(b, a)
    here = both.nonzero().flatten()
    return torch.searchsorted(a, b[here]), here, (~both).nonzero().flatten()


def apply_recut(package: Package, patch: Patch, digests: dict[str, str]) -> Package:
    """Bring a package to another width.

    Args:
        package: the sub-FM that the client has; stays as it was.
        patch: of which :func:`is_recut` is true.
        digests: sha256 of each weight of the package, by name; those of the new one on success.

    Returns:
        A new package, which shares unchanged weights with the old one.

    Raises:
        ReplyError: the patch does not fit, or does not lead to the digest it promises.
    """
    try:
        plan = Plan.from_json(patch.tensors[PLAN].numpy().tobytes().decode())
        old = package.meta.plan
        meta = replace(package.meta, plan=plan)
        weights, fresh = _recut(package.weights, old, plan, patch.tensors, digests)
    except (KeyError, IndexError, RuntimeError, ValueError, TypeError) as error:
        raise ReplyError(f"the patch to another width does not fit ({error})") from error
    if combine_digest(meta.to_json(), package.files, fresh) != patch.target:
        raise ReplyError("the sub-FM of another width does not have the digest that was promised")
    digests.clear()
    digests.update(fresh)
    return Package(meta, package.files, weights)


def _recut(
    weights: Tensors, old: Plan, new: Plan, sent: Tensors, digests: dict[str, str]
) -> tuple[Tensors, dict[str, str]]:
    """The weights of the new width, and the digest of each."""
    of_fm = (old.model_type, old.fm_neurons, old.present)
    if of_fm != (new.model_type, new.fm_neurons, new.present):
        raise ValueError("it is for another FM")
    made: Tensors = {}
    fresh: dict[str, str] = {}
    gone = set(sent) - {PLAN}
    per_neuron = neuron_parts(new, weights)
    whole = {name.removeprefix("="): t for name, t in sent.items() if name.startswith("=")}
    gone -= {f"={name}" for name in whole}
    for name, value in weights.items():
        if name in whole or name not in per_neuron:
            if name not in whole:
                made[name], fresh[name] = value, digests[name]
            continue
        block, axis = per_neuron[name]
        known, here, added = _shared(old, new, block)
        if not len(added) and len(known) == value.shape[axis]:
            made[name], fresh[name] = value, digests[name]
            continue
        shape = list(value.shape)
        shape[axis] = len(here) + len(added)
        grown = value.new_empty(shape)
        grown.index_copy_(axis, here, value.index_select(axis, known))
        if len(added):
            rows = sent[f"+{name}"]
            if rows.dtype != value.dtype or rows.shape[axis] != len(added):
                raise ValueError(f"{name[:80]} has not {len(added)} added neurons")
            grown.index_copy_(axis, added, rows)
            gone.discard(f"+{name}")
        made[name] = grown.contiguous()
        fresh[name] = tensor_digest(made[name])
    if gone:
        raise ValueError(f"{min(gone)[:80]!r} belongs to nothing")
    for name, value in whole.items():
        made[name], fresh[name] = value.contiguous(), tensor_digest(value)
    return made, fresh


__all__ = ["PLAN", "apply_recut", "is_recut", "make_recut"]

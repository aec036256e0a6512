"""What of the FM a package holds: parameters by part of the model, neurons, and exact copies."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpft_core.model.families import FFN, Family, base_model, family_of, family_of_model
from fedpft_core.model.names import bare, in_modules, is_lora, to_proxy_name
from fedpft_core.model.plan import Plan
from fedpft_core.tensors import Tensors
from fedpft_core.wire.identity import tensor_digest
from fedpft_core.wire.package import Package

PARTS = ("embeddings", "attention", "FFN", "norms", "other")
"""Parts of a model in reading order; the head belongs to the adapter and is not counted."""


@dataclass(frozen=True)
class Part:
    """Parameters of one part of the FM.

    Attributes:
        name: one of `PARTS`.
        fm: how many the FM has.
        sent: how many of them a package holds, changed or not.
        copied: how many of those have the FM's bits.
    """

    name: str
    fm: int
    sent: int
    copied: int


@dataclass(frozen=True)
class Exposure:
    """What of the FM a package holds.

    Attributes:
        parts: in the order of `PARTS`.
        disclosed: by FM block, bool [F], the neurons that the package holds, changed or not.
        copied: by FM block, bool [F], those with the FM's bits in all rows, columns and biases.
        size: of the package's weights, bytes.
    """

    parts: tuple[Part, ...]
    disclosed: tuple[Tensor, ...]
    copied: tuple[Tensor, ...]
    size: int


def ffn_digest(fm: nn.Module) -> str:
    """What an FM's neurons are known by, whatever head or adapter the model carries.

    Args:
        fm: bare or with the adapter attached.

    Returns:
        sha256, 64 hex digits, over the digests of all FFNs' weights and biases, in order.
    """
    h = hashlib.sha256()
    for ffn in family_of_model(base_model(fm)).ffns(fm):
        for part, value in ffn.parts().items():
            if not part.startswith("norm."):
                h.update(f"{part} {tensor_digest(value)}\n".encode())
    return h.hexdigest()


def kept_neurons(plan: Plan) -> tuple[Tensor, ...]:
    """The FM's neurons that a proxy holds.

    Args:
        plan: what it is built from.

    Returns:
        By FM block, bool [F].
    """
    out = []
    for i, entry in enumerate(plan.blocks):
        mask = torch.zeros(plan.neurons(i), dtype=torch.bool)
        if entry.state == "whole":
            mask[:] = True
        elif entry.state == "pruned":
            mask[torch.tensor(entry.kept)] = True
        out.append(mask)
    return tuple(out)


@torch.no_grad()
def exposure(
    fm: nn.Module,
    package: Package,
    plan: Plan,
    modules: tuple[str, ...],
    withheld: Tensor | None = None,
    order: Mapping[int, Tensor] | None = None,
) -> Exposure:
    """Hold a package against the FM, tensor by tensor.

    Args:
        fm: the FM, bare or with the adapter attached.
        package: the proxy as clients get it.
        plan: which neuron of the FM each of the proxy's is, in the proxy's order.
        modules: paths of what belongs to the adapter, such as the head.
        withheld: token ids whose row of the embedding table is not in the package.
        order: of whole blocks that are disguised, which neuron of the FM each is, int64 [F].

    Returns:
        Counts and masks; nothing of the models' values.
    """
    body = base_model(fm)
    family = family_of(plan.model_type)
    norms = {name for name, m in body.named_modules() if "norm" in type(m).__name__.lower()}
    table = _table_name(body) if withheld is not None else ""
    kept = {
        b: torch.tensor(entry.kept) if entry.kept else (order or {}).get(b)
        for b, entry in enumerate(plan.blocks)
    }
    sums = {name: [0, 0, 0] for name in PARTS}
    for name, value in _parameters(body, modules):
        sum_of = sums[_part_of(name, family, norms)]
        sum_of[0] += value.numel()
        sent, copied = _compared(name, value, package.weights, plan, family, kept)
        if name == table and withheld is not None:
            rows = torch.ones(len(value), dtype=torch.bool)
            rows[withheld] = False
            sent = int(rows.sum()) * value.shape[1]
            same = package.weights[to_proxy_name(name, plan) or ""] == value.detach().cpu()
            copied = int(same[rows].sum())
        sum_of[1] += sent
        sum_of[2] += copied
    return Exposure(
        tuple(Part(name, *sums[name]) for name in PARTS if sums[name][0]),
        kept_neurons(plan),
        _copied_neurons(body, package, plan, family, kept),
        sum(t.numel() * t.element_size() for t in package.weights.values()),
    )


def _parameters(body: nn.Module, modules: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """The FM's own parameters by bare name, each once."""
    for full, value in body.named_parameters():
        name = bare(full)
        if not is_lora(full) and not in_modules(name, modules):
            yield name, value.detach()


def _table_name(body: nn.Module) -> str:
    """The bare name of the table of word embeddings."""
    weight = body.get_input_embeddings().weight  # type: ignore[operator]
    return next(bare(n) for n, p in body.named_parameters() if p is weight)


def _part_of(name: str, family: Family, norms: set[str]) -> str:
    prefix = f"{family.blocks}."
    module = name.rpartition(".")[0]
    if name.startswith(prefix):
        inside = name[len(prefix) :].partition(".")[2]
        if any(inside.startswith(f"{path}.") for path in (*family.ffn_in, family.ffn_out)):
            return "FFN"
        return "norms" if module in norms else "attention"
    if module in norms:
        return "norms"
    return "embeddings" if "embed" in name else "other"


def _compared(
    name: str,
    value: Tensor,
    weights: Mapping[str, Tensor],
    plan: Plan,
    family: Family,
    kept: Mapping[int, Tensor | None],
) -> tuple[int, int]:
    """How many of a tensor's parameters a package holds, and how many with the same bits."""
    there = to_proxy_name(name, plan)
    if there is None:
        return 0, 0
    if there not in weights:
        # Two thin maps in the place of one: what they hold is of the FM, and no copy.
        low = there.removesuffix(".weight")
        thin = [weights[k].numel() for k in (f"{low}.down", f"{low}.up") if k in weights]
        return min(sum(thin), value.numel()), 0
    sent, want = weights[there], value.cpu()
    at = _place(name, family, kept)
    if at is not None:
        want = want.index_select(at[0], at[1])
    if want.shape != sent.shape:
        return sent.numel(), 0
    return sent.numel(), int((sent == want).sum())


def _place(
    name: str, family: Family, kept: Mapping[int, Tensor | None]
) -> tuple[int, Tensor] | None:
    """Axis and FM indices of the neurons of an FFN's tensor; None where it has all in order."""
    prefix = f"{family.blocks}."
    if not name.startswith(prefix):
        return None
    number, _, inside = name[len(prefix) :].partition(".")
    path, _, leaf = inside.rpartition(".")
    index = kept[int(number)]
    if index is None:
        return None
    if path in family.ffn_in:
        return 0, index
    return (1, index) if path == family.ffn_out and leaf == "weight" else None


def _copied_neurons(
    body: nn.Module,
    package: Package,
    plan: Plan,
    family: Family,
    kept: Mapping[int, Tensor | None],
) -> tuple[Tensor, ...]:
    """By FM block, the neurons all of whose numbers are in the package as they are in the FM."""
    position = {fm: i for i, fm in enumerate(plan.present)}
    out = []
    for i, ffn in enumerate(family.ffns(body)):
        mask = torch.zeros(plan.neurons(i), dtype=torch.bool)
        if i in position:
            index = kept[i]
            index = torch.arange(len(mask)) if index is None else index
            mask[index[_equal(ffn, position[i], index, package.weights, family)]] = True
        out.append(mask)
    return tuple(out)


def _equal(ffn: FFN, position: int, kept: Tensor, weights: Tensors, family: Family) -> Tensor:
    """Which of the neurons of a block's package have the FM's bits, bool [K]."""
    paths = {f"in{i}": path for i, path in enumerate(family.ffn_in)} | {"out": family.ffn_out}
    same = torch.ones(len(kept), dtype=torch.bool)
    for part, value in ffn.parts().items():
        axis = FFN.neuron_axis(part)
        if axis is None:
            continue
        kind, _, leaf = part.partition(".")
        sent = weights[f"{family.blocks}.{position}.{paths[kind]}.{leaf}"]
        equal = sent == value.detach().cpu().index_select(axis, kept)
        same &= equal if equal.dim() == 1 else equal.all(dim=1 - axis)
    return same

"""Slow and obvious versions of what the code does fast: loops over neurons, rows and tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedpft_core.data.batches import batches
from fedpft_core.data.encoded import Encoded
from fedpft_core.model.families import FFN, family_of, family_of_model
from fedpft_core.model.plan import Plan


def saliency(ffn: FFN) -> list[float]:
    """||[W1[j,:]; W2[:,j]]||_2, one weight after the other."""
    scores = []
    for j in range(ffn.neurons):
        squares = [w**2 for linear in ffn.ins for w in linear.weight[j].tolist()]
        squares += [w**2 for w in ffn.out.weight[:, j].tolist()]
        scores.append(math.sqrt(math.fsum(squares)))
    return scores


def largest(scores: Sequence[float], k: int) -> tuple[int, ...]:
    """Indices of the k largest, ascending; of equal scores the lower index goes first."""
    ranked = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    return tuple(sorted(ranked[:k]))


def pruned_ffn(ffn: FFN, kept: Sequence[int], x: Tensor) -> Tensor:
    """FFN(x) = Σ_{j kept} a_j W2[:, j] + b2 for one position x [D], a_j = act(W1[j]·x + b1[j]); in
    gated FFNs times V[j]·x + c[j]."""

    def row(linear: Any, j: int) -> Tensor:
        value: Tensor = (linear.weight[j] * x).sum()
        return value if linear.bias is None else value + linear.bias[j]

    total = torch.zeros_like(x) if ffn.out.bias is None else ffn.out.bias.clone()
    for j in kept:
        a = ffn.activation(row(ffn.ins[0], j))
        for up in ffn.ins[1:]:
            a = a * row(up, j)
        total = total + a * ffn.out.weight[:, j]
    return total


def rows_alone(data: Encoded) -> list[dict[str, Tensor]]:
    """Each row as a batch of its own, so that nothing is padded, in row order."""
    single = list(batches(data, 1, None))
    return sorted(single, key=lambda batch: int(batch["index"]))


def inactive_counts(
    model: nn.Module, plan: Plan, data: Encoded, rule: str
) -> tuple[dict[int, list[int]], dict[int, int]]:
    """Per pruned block: how many real tokens left each neuron inactive, and how many there are.

    Row by row without padding, token by token, neuron by neuron.
    """
    ffns = family_of(plan.model_type).ffns(model)
    position = {fm: i for i, fm in enumerate(plan.present)}
    counts = {b: [0] * ffns[position[b]].neurons for b in plan.pruned}
    tokens = dict.fromkeys(plan.pruned, 0)
    seen: dict[int, Tensor] = {}
    handles = [
        ffns[position[b]].activation.register_forward_hook(
            lambda _m, _i, out, b=b: seen.__setitem__(b, out)
        )
        for b in plan.pruned
    ]
    with torch.no_grad():
        for row in rows_alone(data):
            model(**inputs(row))
            for b in plan.pruned:
                # One row; some models lay the rows of a batch end to end.
                for token in seen[b].view(-1, seen[b].shape[-1]).tolist():
                    tokens[b] += 1
                    for j, value in enumerate(token):
                        inactive = value == 0 if rule == "exact-zero" else value <= 0
                        counts[b][j] += inactive
    for handle in handles:
        handle.remove()
    return counts, tokens


def inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in batch.items() if k not in ("labels", "index")}


def block_outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Outputs [B, L, D] of every block of a whole forward pass, by the model's own numbering."""
    family = family_of_model(model)
    seen: list[Tensor] = []
    handles = [
        block.register_forward_hook(
            lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        for block in family.block_list(model)
    ]
    model(**inputs(batch))
    for handle in handles:
        handle.remove()
    return seen


def hidden_error(h_T: Tensor, h_S: Tensor, mask: Tensor | None) -> float:
    """mean[((h_T − h_S) / rms(h_T))²] over real positions, token by token in float64."""
    teacher, student = [], []
    for b in range(h_T.shape[0]):
        for t in range(h_T.shape[1]):
            if mask is None or int(mask[b, t]):
                teacher += h_T[b, t].tolist()
                student += h_S[b, t].tolist()
    mean_square = math.fsum(v * v for v in teacher) / len(teacher)
    rms = math.sqrt(mean_square)
    pairs = zip(teacher, student, strict=True)
    return math.fsum(((a - b) / rms) ** 2 for a, b in pairs) / len(teacher)


def weight_error(teacher: FFN, student: FFN) -> float:
    """mean[(P_T − P_S)²] / mean[P_T²] with P = W2 W1 entry by entry; of gated FFNs the mean of the
    two with gate and with up."""

    def product(ffn: FFN, i: int) -> list[float]:
        w1, w2 = ffn.ins[i].weight.tolist(), ffn.out.weight.tolist()
        columns = list(zip(*w1, strict=True))
        return [
            math.fsum(a * b for a, b in zip(row, column, strict=True))
            for row in w2
            for column in columns
        ]

    errors = []
    for i in range(len(teacher.ins)):
        p, q = product(teacher, i), product(student, i)
        apart = math.fsum((a - b) ** 2 for a, b in zip(p, q, strict=True))
        errors.append(apart / math.fsum(a * a for a in p))
    return math.fsum(errors) / len(errors)


def head_reads(h_BLD: Tensor, batch: Mapping[str, Tensor], position: str) -> Tensor:
    """What a head reads of a block's output, row by row: [N, D]."""
    mask = batch.get("attention_mask")
    rows = []
    for b in range(len(h_BLD)):
        real = [t for t in range(h_BLD.shape[1]) if mask is None or int(mask[b, t])]
        places = {"first": [0], "last": real[-1:], "every": real}[position]
        rows += [h_BLD[b, t] for t in places]
    return torch.stack(rows)


def round_rates(lr0: float, rounds: int) -> list[float]:
    """The learning rate of each round: equal steps from lr0, one step above 0 at the end."""
    step = lr0 / rounds
    return [lr0 - step * done for done in range(rounds)]


def step_rates(steps: int, warmup: int) -> list[float]:
    """Shares of the peak: `warmup` equal steps up to 1, then equal steps down that stop one
    short of 0."""
    up = [(i + 1) / warmup for i in range(warmup)]
    down = [1 - i / (steps - warmup) for i in range(steps - warmup)]
    return up + down


def weighted_mean(adapters: Sequence[Mapping[str, Tensor]], examples: Sequence[int]) -> Any:
    """Σ |D_i| / |D| · W_i, number by number in float64."""
    total = sum(examples)
    out = {}
    for name, like in adapters[0].items():
        columns = zip(*(a[name].flatten().tolist() for a in adapters), strict=True)
        values = [
            math.fsum(n * v for n, v in zip(examples, column, strict=True)) / total
            for column in columns
        ]
        out[name] = torch.tensor(values, dtype=torch.float64).reshape(like.shape)
    return out


def cosine_and_distance(fm: Sequence[float], proxy: Sequence[float]) -> tuple[float, float]:
    """cos(g_fm, g_proxy) and ||g_proxy − g_fm|| / ||g_fm|| of two flat vectors."""
    dot = math.fsum(a * b for a, b in zip(fm, proxy, strict=True))
    norm_fm = math.sqrt(math.fsum(a * a for a in fm))
    norm_proxy = math.sqrt(math.fsum(b * b for b in proxy))
    difference = math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(fm, proxy, strict=True)))
    return dot / (norm_fm * norm_proxy), difference / norm_fm

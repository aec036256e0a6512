"""Aligning the proxy with the FM: layer-level before FL, neuron-level between rounds.

Both minimise the hidden-state error of the compressed blocks on public data (paper eqs. 3-6);
the layer-level loss adds the error of the products W2 W1.

Shape letters: B rows, L positions, D model width, F neurons of the FM, K neurons kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from . import adapters
from .config import DistillConfig
from .families import FFN, family_of
from .seeds import torch_stream
from .sub_fm import Plan, pruned_ffns
from .training import Batch, device_of, real_positions, to_device

Progress = Callable[[int, int, float], None]


class _Enough(Exception):
    """Raised in a hook to leave a forward pass once the last needed block has run."""


@contextmanager
def _taps(model: nn.Module, plan: Plan, own_index: bool) -> Iterator[dict[int, Tensor]]:
    """Collect the outputs [B, L, D] of the compressed blocks by FM block index.

    Taken by hooks on the blocks, because `hidden_states[-1]` of some families is after the
    final norm. `own_index` says that the model has its own numbering (a proxy).
    """
    blocks = family_of(plan.model_type).block_list(model)
    where = {fm: i for i, fm in enumerate(plan.present)} if own_index else None
    seen: dict[int, Tensor] = {}
    handles = []
    last = max(plan.pruned)
    for fm_index in plan.pruned:

        def tap(_m: nn.Module, _i: object, out: object, fm_index: int = fm_index) -> None:
            seen[fm_index] = out[0] if isinstance(out, tuple) else out  # type: ignore[assignment]
            if fm_index == last:
                raise _Enough

        handles.append(blocks[where[fm_index] if where else fm_index].register_forward_hook(tap))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _outputs(model: nn.Module, plan: Plan, batch: Batch, own_index: bool) -> dict[int, Tensor]:
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "index")}
    with _taps(model, plan, own_index) as seen:
        with suppress(_Enough):
            model(**inputs)
        return dict(seen)


def hidden_errors(
    teacher: Mapping[int, Tensor], student: Mapping[int, Tensor], real_BL: Tensor
) -> dict[int, Tensor]:
    """mean[((h_T − h_S) / rms(h_T))²] per block over real positions (paper eq. 3, scaled so that
    blocks weigh alike)."""
    out = {}
    for block, h_T in teacher.items():
        t, s = h_T[real_BL], student[block][real_BL]
        out[block] = (t - s).square().mean() / t.square().mean()
    return out


def products(ffn: FFN) -> list[Tensor]:
    """W2 W1 [D, D] for every in-projection; biases never enter (paper eq. 4)."""
    return [ffn.out.weight @ linear.weight for linear in ffn.ins]


def weight_error(ffn: FFN, teacher: list[Tensor]) -> Tensor:
    """mean[(P_T − P_S)²] / mean[P_T²], averaged over the in-projections."""
    terms = [
        (t - s).square().mean() / t.square().mean()
        for t, s in zip(teacher, products(ffn), strict=True)
    ]
    return torch.stack(terms).mean()


def warmup_then_linear(step: int, steps: int, warmup_share: float) -> float:
    """Rate of step 0..steps−1 as a share of the peak: linear up, then linear down, never 0."""
    warmup = math.ceil(warmup_share * steps)
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / (steps - warmup)


@torch.inference_mode()
def output_error(
    teacher: nn.Module, student: nn.Module, plan: Plan, data: Iterable[Batch]
) -> dict[int, float]:
    """Hidden-state error per pruned block, averaged over batches."""
    total: dict[int, float] = dict.fromkeys(plan.pruned, 0.0)
    n = 0
    device = device_of(student)
    for batch in data:
        batch = to_device(batch, device)
        h_T = _outputs(teacher, plan, batch, own_index=False)
        h_S = _outputs(student, plan, batch, own_index=True)
        real = real_positions(batch, next(iter(h_T.values())).shape[1])
        for block, e in hidden_errors(h_T, h_S, real).items():
            total[block] += float(e)
        n += 1
    return {block: e / max(n, 1) for block, e in total.items()}


def distil(
    teacher: nn.Module,
    student: nn.Module,
    plan: Plan,
    batches: Iterable[Batch],
    cfg: DistillConfig,
    *,
    steps: int,
    lr: float,
    alpha: float,
    chosen: Mapping[int, Tensor] | None = None,
    noise_seed: int = 0,
    on_step: Progress | None = None,
) -> tuple[float, float, float]:
    """Align `student` with `teacher`; returns (first loss, last loss, seconds).

    Layer-level (paper eq. 5): `chosen` None, all neurons of the pruned blocks move.
    Neuron-level (paper eq. 6): `chosen[block]` int64 positions of the neurons that move; all
    others end bit-unchanged. Out-projection bias and post-norm LayerNorm always move. Whatever
    adapter the two models carry stays; both run in eval mode. With `cfg.adapter_noise` each
    step puts the same random LoRA factors on both, so that they agree around the adapter and
    not only at it.
    """
    teacher.eval()
    student.eval()
    device = device_of(student)
    ffns = pruned_ffns(student, plan)
    if chosen is not None and set(chosen) != set(ffns):
        raise ValueError("neurons must be chosen for each pruned block and for no other")
    moving = {(b, part): p for b, ffn in ffns.items() for part, p in ffn.parts().items()}
    fixed = _fixed(ffns, chosen)
    with torch.no_grad():
        target = {b: products(f) for b, f in _teacher_ffns(teacher, plan).items()} if alpha else {}
    noise = _AdapterNoise(teacher, student, plan, cfg.adapter_noise, noise_seed)
    # The adapter stays: without this the graph would reach down to the first block's LoRA.
    held = [p for p in student.parameters() if p.requires_grad]
    for held_one in held:
        held_one.requires_grad_(False)
    params = list(moving.values())
    for p in params:
        p.requires_grad_(True)
    optimiser = torch.optim.AdamW(params, lr=lr, weight_decay=cfg.weight_decay, fused=True)
    start = time.perf_counter()
    first = last = math.nan
    try:
        for step, batch in enumerate(batches):
            if step == steps:
                break
            batch = to_device(batch, device)
            noise.draw()
            with torch.no_grad():
                h_T = _outputs(teacher, plan, batch, own_index=False)
            h_S = _outputs(student, plan, batch, own_index=True)
            real = real_positions(batch, next(iter(h_T.values())).shape[1])
            loss = torch.stack(list(hidden_errors(h_T, h_S, real).values())).mean()
            if alpha:
                terms = [weight_error(ffn, target[b]) for b, ffn in ffns.items()]
                loss = loss + alpha * torch.stack(terms).mean()
            loss.backward()
            for key, (_, axis, index) in fixed.items():
                grad = moving[key].grad
                assert grad is not None
                grad.index_fill_(axis, index, 0.0)
            nn.utils.clip_grad_norm_(params, cfg.clip)
            for group in optimiser.param_groups:
                group["lr"] = lr * warmup_then_linear(step, steps, cfg.warmup_share)
            optimiser.step()
            # Weight decay touches what has no gradient too: put the fixed neurons back.
            with torch.no_grad():
                for key, (value, axis, index) in fixed.items():
                    moving[key].index_copy_(axis, index, value)
            last = float(loss.detach())
            first = last if step == 0 else first
            optimiser.zero_grad(set_to_none=True)
            if on_step:
                on_step(step + 1, steps, last)
    finally:
        noise.restore()
        for p in params:
            p.requires_grad_(False)
            p.grad = None
        for held_one in held:
            held_one.requires_grad_(True)
    return first, last, time.perf_counter() - start


def _teacher_ffns(teacher: nn.Module, plan: Plan) -> dict[int, FFN]:
    ffns = family_of(plan.model_type).ffns(teacher)
    return {b: ffns[b] for b in plan.pruned}


def _fixed(
    ffns: Mapping[int, FFN], chosen: Mapping[int, Tensor] | None
) -> dict[tuple[int, str], tuple[Tensor, int, Tensor]]:
    """Per moving parameter: values, axis and positions of the neurons that must not move."""
    if chosen is None:
        return {}
    out = {}
    for b, ffn in ffns.items():
        stay = torch.ones(ffn.neurons, dtype=torch.bool)
        stay[chosen[b]] = False
        index = stay.nonzero().flatten().to(ffn.out.weight.device)
        for part, p in ffn.parts().items():
            axis = FFN.neuron_axis(part)
            if axis is not None:
                out[b, part] = (p.detach().index_select(axis, index), axis, index)
    return out


class _AdapterNoise:
    """Random LoRA factors on teacher and student alike, around the adapter they carry."""

    def __init__(
        self, teacher: nn.Module, student: nn.Module, plan: Plan, size: float, seed: int
    ) -> None:
        self.size = size
        if not size:
            return
        self.stream = torch_stream(seed, "adapter-noise")
        t, s = adapters.parameters(teacher), adapters.parameters(student, plan)
        self.pairs = [(t[k], s[k]) for k in s if ".lora_" in k]
        self.start = [p.detach().clone() for p, _ in self.pairs]

    @torch.no_grad()
    def draw(self) -> None:
        if not self.size:
            return
        scale = self.size * float(torch.rand((), generator=self.stream))
        for (t, s), start in zip(self.pairs, self.start, strict=True):
            noise = torch.randn(start.shape, generator=self.stream).to(start.device)
            value = start + scale * noise
            t.copy_(value)
            s.copy_(value)

    @torch.no_grad()
    def restore(self) -> None:
        if self.size:
            for (t, s), start in zip(self.pairs, self.start, strict=True):
                t.copy_(start)
                s.copy_(start)


def apoz(inactive: Tensor, tokens: int) -> Tensor:
    """APoZ_j = Σ inactive / Σ tokens over a round's clients (paper eq. 7). Returns [K] float64."""
    return inactive.double() / max(tokens, 1)


def choose_neurons(
    rates: Mapping[int, Tensor], proportion: float, selection: str, seed: int
) -> dict[int, Tensor]:
    """The share p of each block's neurons to re-align, as sorted int64 positions.

    `apoz`: the highest inactivity (paper); `active`: the lowest; `random`: by the seed. Ties
    keep the lower position; at least one neuron is chosen.
    """
    out = {}
    for block, rate in rates.items():
        m = max(1, round(proportion * len(rate)))
        if selection == "random":
            order = torch.randperm(len(rate), generator=torch_stream(seed, "neurons", block))
        else:
            order = torch.sort(rate, descending=selection == "apoz", stable=True).indices
        out[block] = order[:m].sort().values
    return out

"""What a thief makes of the sub-FM: the missing neurons regrown by distillation from queries.

The thief has a client's package and public texts, and may ask the FM for the embedding of a text
(the mean of the last block's output), as a service would give it; no weight, no layer in between,
no label. It puts fresh neurons in the place of those that are missing and trains the pruned FFNs
until its own embeddings are the FM's. Printed: the error of the embeddings on texts it has not
asked about, as a share of their variance; the accuracy of a linear probe on them, on the task's
test rows; and the mean over missing neurons of the largest cosine with a neuron that was grown
(that of random ones beside it), which says whether the FM's own neurons come back.

`python benchmarks/extraction.py [--queries N] [--plan NAME]`; MiniLM, minutes each.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[1])]

from fedpft_core import config as configs  # noqa: E402
from fedpft_core.align.blocks import outputs  # noqa: E402
from fedpft_core.model.families import FFN, family_of  # noqa: E402
from fedpft_core.model.plan import Plan, pruned_ffns  # noqa: E402
from fedpft_core.proxy.exposure import exposure  # noqa: E402
from fedpft_core.seeds import torch_stream  # noqa: E402
from fedpft_core.train import baselines  # noqa: E402
from server_app.bench import Bench  # noqa: E402
from server_app.phases import distil, load  # noqa: E402
from server_app.run.events import EventLog  # noqa: E402

PLANS: dict[str, dict[str, Any]] = {
    "default": {},
    "a tenth": {"plan.keep-share": 0.1},
    "none whole": {"plan.retained-layers": ""},
    "seen embeddings": {"plan.embeddings": "seen"},
    "undistilled": {"distill.steps": 0},
}
ROWS, LENGTH = 16, 32


def bench_of(keys: dict[str, Any]) -> Bench:
    """FM and distilled sub-FM of a plan."""
    flat = {
        "run.threads": 1, "run.gradient-rows": 0, "data.max-train-rows": 600,
        "data.max-test-rows": 600, "distill.length": LENGTH,
    }  # fmt: skip
    bench = load.load(configs.from_flat(flat | keys), EventLog(None))
    if distil.due(bench):
        distil.distil(bench)
    return bench


def embeddings(model: nn.Module, plan: Plan, batch: Any, own: bool) -> Tensor:
    """The answer to a query: [B, D]."""
    last = len(plan.blocks) - 1
    return outputs(model, plan, batch, own, wanted=(last,))[last].mean(1)


def regrown(proxy: nn.Module, plan: Plan, seed: int) -> nn.Module:
    """A copy of the sub-FM with as many neurons as the FM, the missing ones fresh and silent."""
    model = copy.deepcopy(proxy)
    stream = torch_stream(seed, "extraction")
    for b, ffn in pruned_ffns(model, plan).items():
        k = ffn.neurons
        whole = ffn.resized(plan.neurons(b))
        with torch.no_grad():
            for path, linear in whole.items():
                old = ffn.block.get_submodule(path)
                assert isinstance(old, nn.Linear)
                into = path != ffn.family.ffn_out
                fresh = torch.randn(linear.weight.shape, generator=stream) * old.weight.std()
                linear.weight.copy_(fresh if into else torch.zeros_like(fresh))
                (linear.weight[:k] if into else linear.weight[:, :k]).copy_(old.weight)
                if old.bias is not None:
                    if into:
                        linear.bias.zero_()
                    (linear.bias[:k] if into else linear.bias).copy_(old.bias)
        for path, linear in whole.items():
            ffn.block.set_submodule(path, linear)
    return model


def queries(bench: Bench, count: int, purpose: str) -> list[tuple[Any, Tensor]]:
    """Public texts with what the FM answers."""
    out = []
    with torch.no_grad():
        for batch in bench.rows.public_batches(max(1, count // ROWS), "thief", purpose, rows=ROWS):
            answer = embeddings(bench.models.fm, bench.models.plan, batch, own=False)
            out.append((batch, answer))
    return out


def train(model: nn.Module, plan: Plan, asked: list[tuple[Any, Tensor]], steps: int) -> None:
    """Move the pruned FFNs until the embeddings are those that were answered."""
    parts = [p for ffn in pruned_ffns(model, plan).values() for p in ffn.parts().values()]
    for p in model.parameters():
        p.requires_grad_(False)
    for p in parts:
        p.requires_grad_(True)
    optimiser = torch.optim.AdamW(parts, lr=6e-4, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, steps)
    served: Iterator[tuple[Any, Tensor]] = cycle(asked)
    for _ in range(steps):
        batch, answer = next(served)
        loss = (embeddings(model, plan, batch, own=True) - answer).square().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parts, 1.0)
        optimiser.step()
        rate.step()


@torch.no_grad()
def error(model: nn.Module, plan: Plan, held: list[tuple[Any, Tensor]]) -> float:
    """Mean square error of the embeddings over their variance."""
    wanted = torch.cat([answer for _, answer in held])
    found = torch.cat([embeddings(model, plan, batch, own=True) for batch, _ in held])
    spread = (wanted - wanted.mean(0)).square().mean()
    return float((found - wanted).square().mean() / spread)


def probe(bench: Bench, model: nn.Module) -> float:
    """Accuracy of a linear probe on a model's features, test rows."""
    found = baselines.score(model, bench.rows.processor, bench.rows.data, bench.config)
    return found["linear-probe"].value


@torch.no_grad()
def cosine(bench: Bench, model: nn.Module, fresh: bool) -> float:
    """Mean over missing neurons of the largest cosine with one that was grown, in both matrices."""
    m, out = bench.models, []
    for b, ffn in pruned_ffns(model, m.plan).items():
        kept = torch.tensor(m.plan.blocks[b].kept)
        gone = torch.ones(m.plan.neurons(b), dtype=torch.bool)
        gone[kept] = False
        own = _vectors(_fm_ffn(bench, b))[gone]
        grown = _vectors(ffn)[len(kept) :]
        if fresh:
            grown = torch.randn(grown.shape, generator=torch_stream(0, "chance"))
        grown = nn.functional.normalize(grown, dim=1)
        out.append(float((nn.functional.normalize(own, dim=1) @ grown.T).amax(1).mean()))
    return sum(out) / len(out)


def _fm_ffn(bench: Bench, block: int) -> FFN:
    return family_of(bench.models.plan.model_type).ffns(bench.models.fm)[block]


def _vectors(ffn: FFN) -> Tensor:
    """A neuron's row and column, each of norm 1, side by side: [F, 2 D]."""
    rows = nn.functional.normalize(ffn.ins[0].weight, dim=1)
    return torch.cat([rows, nn.functional.normalize(ffn.out.weight.T, dim=1)], 1)


def attack(name: str, counts: list[int], steps: int) -> None:
    """Print what the thief reaches under a plan."""
    bench = bench_of(PLANS[name])
    m = bench.models
    found = exposure(m.fm, bench.package(), m.plan, m.spec.modules, m.withheld)
    sums = [sum(getattr(p, f) for p in found.parts) for f in ("fm", "sent", "copied")]
    neurons = sum(int(x.sum()) for x in found.disclosed) / sum(len(x) for x in found.disclosed)
    left = f"{100 * sums[1] / sums[0]:.0f} | {100 * sums[2] / sums[0]:.0f} | {100 * neurons:.0f}"
    held = queries(bench, 256, "held")
    whole = probe(bench, m.fm)
    print(f"| {name} | {left} | FM | | 0 | {100 * whole:.1f} | |", flush=True)
    e, p = error(m.proxy, m.plan, held), probe(bench, m.proxy)
    print(f"| {name} | {left} | as sent | 0 | {e:.3f} | {100 * p:.1f} | |", flush=True)
    for count in counts:
        start = time.perf_counter()
        asked = queries(bench, count, "asked")
        model = regrown(m.proxy, m.plan, 0)
        train(model, m.plan, asked, steps)
        e, p = error(model, m.plan, held), probe(bench, model)
        like = f"{cosine(bench, model, False):.2f} ({cosine(bench, model, True):.2f})"
        print(
            f"| {name} | {left} | regrown | {count} | {e:.3f} | {100 * p:.1f} | {like} | "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )


def main() -> None:
    """Run the attack as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", default="512,4096", help="texts asked about, a list")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--plan", action="append", choices=PLANS, help="default: all")
    args = parser.parse_args()
    columns = "plan, left %, bit-equal %, neurons %, model, queries, error, probe %, cosine"
    print("| " + " | ".join(columns.split(", ")) + " |")
    print("|---|--:|--:|--:|---|--:|--:|--:|--:|")
    for name in args.plan or PLANS:
        attack(name, [int(q) for q in args.queries.split(",")], args.steps)


if __name__ == "__main__":
    main()

"""Speed as ratios, both sides taken in turn in one process: these figures survive noisy machines.

`python benchmarks/run.py [NAME …]` prints a Markdown row for each: step, overhead, distil,
average, statistics, plug, memory. Medians over interleaved repetitions on one torch thread, in
processor time of this process, which other processes disturb less than time on the clock.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from fedpft_core import config
from fedpft_core.adapter import lora as adapters
from fedpft_core.aggregation import Replies
from fedpft_core.aggregation.average import aggregate
from fedpft_core.align import distill
from fedpft_core.align.blocks import outputs
from fedpft_core.data.encoding import encode
from fedpft_core.data.public import load_public
from fedpft_core.data.stream import public_batches
from fedpft_core.head import imitate
from fedpft_core.head.refit import last_linear, of_rows
from fedpft_core.model import load as models
from fedpft_core.model.plan import pruned_ffns
from fedpft_core.proxy import cost as inspect
from fedpft_core.proxy.build import build
from fedpft_core.proxy.choose import make_plan
from fedpft_core.task import load_task, make
from fedpft_core.train import tune as training
from fedpft_core.train.evaluate import evaluate
from fedpft_core.wire import messages as exchange
from fedpft_core.wire.envelope import open_envelope, seal
from fedpft_core.wire.validate import Expected, validate

REPEATS = 7


def interleaved(*works: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Median processor seconds of each piece of work, taken in turn: noise falls on all alike."""
    times: list[list[float]] = [[] for _ in works]
    for work in works:
        work()
    for _ in range(repeats):
        for work, seen in zip(works, times, strict=True):
            gc.collect()
            start = time.process_time()
            work()
            seen.append(time.process_time() - start)
    return [statistics.median(t) for t in times]


class Setting:
    """MiniLM, the default plan, and rows of the built-in task."""

    def __init__(self, retained: str = "first,last") -> None:
        cfg = config.from_flat({"plan.retained-layers": retained})
        self.cfg = cfg
        self.data = load_task(cfg.data, 0)
        self.task = self.data.task
        self.loaded = models.load(cfg.model, self.task.model(), 0)
        self.plan = make_plan(self.loaded.model, cfg.plan, 0)
        proxy = build(self.loaded.model, self.plan)
        self.ratio = inspect.step_ratio(
            self.loaded.model, proxy, self.loaded.family, self.mean_length(), cfg.lora.rank
        )
        spec = adapters.make_spec(self.loaded.family, self.plan, self.loaded.fresh, cfg.lora)
        self.fm = adapters.attach(self.loaded.model, spec)
        self.proxy = adapters.attach(proxy, spec, self.plan)
        self.rows = self.encoded(128)

    def encoded(self, count: int) -> training.Encoded:
        stride = len(self.data.train) // count
        rows = self.data.train.select(range(0, count * stride, stride))
        return encode(rows, self.loaded.processor, 64)

    def mean_length(self) -> int:
        return int(np.mean(self.encoded(512).lengths))


def settings(steps: int) -> training.LocalSettings:
    return training.LocalSettings(8e-4, 16, 1, steps, 0.0, 1.0, 1, 10.0)


def bench_step() -> list[str]:
    """Client step on the proxy against the same step on the FM, and what FLOPs allow."""
    out = []
    for name, retained in (("default plan", "first,last"), ("all blocks pruned", "")):
        s = Setting(retained)
        fm, proxy = interleaved(
            lambda s=s: training.fine_tune(s.fm, s.task, s.rows, settings(8), 0),
            lambda s=s: training.fine_tune(s.proxy, s.task, s.rows, settings(8), 0),
            repeats=15,
        )
        share = fm / proxy / s.ratio
        out.append(
            f"| client step, {name} | FM {fm / 8 * 1e3:.0f} ms, sub-FM {proxy / 8 * 1e3:.0f} ms | "
            f"{fm / proxy:.2f}x of {s.ratio:.2f}x that FLOPs allow = {100 * share:.0f}% | ≥ 85% |"
        )
    return out


def bench_overhead() -> list[str]:
    """`fine_tune` against a bare loop over the same modules and ready-made batches."""
    s = Setting()
    ready = list(training.local_batches(s.rows, settings(8), 0))

    def bare() -> None:
        params = [p for p in s.proxy.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(params, lr=8e-4, weight_decay=0.0, fused=True)
        s.proxy.train()
        for batch in ready:
            inputs = {k: v for k, v in batch.items() if k not in ("labels", "index")}
            loss = F.cross_entropy(s.proxy(**inputs).logits, batch["labels"])
            loss.backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        s.proxy.eval()

    plain, ours = interleaved(
        bare, lambda: training.fine_tune(s.proxy, s.task, s.rows, settings(8), 0), repeats=11
    )
    return [
        f"| fine_tune against a bare loop | bare {plain / 8 * 1e3:.1f} ms, "
        f"ours {ours / 8 * 1e3:.1f} ms | {100 * (ours / plain - 1):+.1f}% | ≤ +5% |"
    ]


def bench_distil() -> list[str]:
    """`distil` against the bare forward and backward passes of both models."""
    s = Setting()
    texts = load_public("builtin:public", "text", "text", (), 2000, 0)
    steps = 6
    ready = list(public_batches(texts, s.loaded.processor, 16, 64, steps, 0))
    ffns = pruned_ffns(s.proxy, s.plan)
    moving = [p for f in ffns.values() for p in f.parts().values()]

    def bare() -> None:
        held = [p for p in s.proxy.parameters() if p.requires_grad]
        for p in held:
            p.requires_grad_(False)
        for p in moving:
            p.requires_grad_(True)
        for batch in ready:
            with torch.no_grad():
                h_T = outputs(s.fm, s.plan, batch, own_index=False)
            h_S = outputs(s.proxy, s.plan, batch, own_index=True)
            torch.autograd.grad(sum((h_S[b] - h_T[b]).square().mean() for b in h_T), moving)
        for p in moving:
            p.requires_grad_(False)
        for p in held:
            p.requires_grad_(True)

    def ours() -> None:
        distill.distil(
            s.fm, s.proxy, s.plan, iter(ready), s.cfg.distill, steps=steps, lr=1e-5, alpha=0.01
        )

    plain, full = interleaved(bare, ours)
    return [
        f"| layer-level distillation | bare {plain / steps * 1e3:.0f} ms, "
        f"ours {full / steps * 1e3:.0f} ms a step of 16 × 64 tokens | "
        f"{100 * plain / full:.0f}% of the bare throughput | ≥ 80% |"
    ]


def bench_average() -> list[str]:
    """What a round does with 100 replies of 1.2M parameters, against NumPy's running mean.

    Beside validation and the mean there is the file in which replies wait, so that memory does not
    grow with their number; its writing is timed apart.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(768, 8), (8, 768)] * 96 + [(8, 2560)]
    sent = {f"t{i:03d}": torch.randn(s, generator=generator) for i, s in enumerate(shapes)}
    names = list(sent)
    count = sum(t.numel() for t in sent.values())
    packed = [
        seal(
            exchange.TrainReply(
                "c", 1, "0" * 64, 10, 5, 0.5, 1.0, {k: t + i * 1e-4 for k, t in sent.items()},
                "fp32",
            )
        )
        for i in range(10)
    ]  # fmt: skip
    want = Expected(1, "0" * 64, "fp32", sent, 1e6, {}, make("text", ("a", "b")))
    opened = [r for r in map(open_envelope, packed) if isinstance(r, exchange.TrainReply)]
    arrays = [[r.adapter[k].numpy() for k in names] for r in opened]

    def plain() -> None:
        total = [np.zeros(a.shape) for a in arrays[0]]
        for i in range(100):
            for t, a in zip(total, arrays[i % 10], strict=True):
                t += a.astype(np.float64) * 10.0
        [(t / 1000).astype(np.float32) for t in total]

    with Replies(sent) as kept:

        def checked() -> None:
            for i in range(100):
                validate(opened[i % 10], want, "c", 10)

        def stored() -> None:
            with Replies(sent) as fresh:
                for i in range(100):
                    fresh.add(f"{i:03d}", 10, opened[i % 10].adapter)

        for i in range(100):
            kept.add(f"{i:03d}", 10, opened[i % 10].adapter)
        numpy, check, store, mean = interleaved(
            plain, checked, stored, lambda: aggregate(kept), repeats=5
        )
    return [
        f"| validate and average 100 replies of {count / 1e6:.2f}M parameters | NumPy float64 "
        f"mean {numpy:.2f} s; validation {check:.2f} s, mean {mean:.2f} s | "
        f"{(check + mean) / numpy:.1f}x | ≤ 2x |",
        f"| keep them in a file meanwhile | {store:.2f} s | {store / numpy:.1f}x | none |",
    ]


def bench_statistics() -> list[str]:
    """A client's class statistics against one evaluation pass over the same rows."""
    s = Setting()
    rows, width, classes = s.encoded(256), last_linear(s.proxy).in_features, len(s.task.labels)
    scoring, ours = interleaved(
        lambda: evaluate(s.proxy, s.task, rows, 64),
        lambda: of_rows(s.proxy, rows, classes, 64, 1024, 0),
    )
    numbers = sum(
        t.numel() for t in of_rows(s.proxy, rows, classes, 64, 1024, 0).tensors().values()
    )
    allowed = width * (width + 1) // 2 + classes * width + classes
    return [
        f"| class statistics of {len(rows)} rows | evaluation {scoring:.2f} s, statistics "
        f"{ours:.2f} s | {ours / scoring:.2f}x | ≤ one evaluation pass |",
        f"| numbers they are | {numbers:,} | {numbers / allowed:.2f}x of D(D+1)/2 + CD + C | ≤ 1 |",
    ]


def bench_plug() -> list[str]:
    """Plug-in by distillation against three rounds of the default job, all clients together."""
    s = Setting()
    cfg = config.from_flat({})
    rows, f, t, p = s.encoded(400), cfg.federation, cfg.train, cfg.plug
    how = imitate.Settings(p.distil_steps, p.distil_batch_size, p.distil_lr, p.distil_head_lr)
    steps = 16
    one = training.LocalSettings(1e-4, t.batch_size, 1, steps, 0.0, 1.0, 1)
    part, full = interleaved(
        lambda: training.fine_tune(s.proxy, s.task, rows, one, 0),
        lambda: imitate.imitate(s.fm, s.proxy, s.task, rows, how, 0),
        repeats=3,
    )
    rounds = 3 * f.clients_per_round * t.local_steps / steps * part
    return [
        f"| plug-in by distillation, {p.distil_steps} steps of {p.distil_batch_size} rows | three "
        f"rounds of {f.clients_per_round} clients {rounds:.1f} s, ours {full:.1f} s | "
        f"{full / rounds:.2f}x | ≤ three rounds |"
    ]


_BUILD = """
import sys, torch, transformers
sys.path.insert(0, ".")
from fedpft_core import config
from fedpft_core.model import load as models
from fedpft_core.proxy.build import build
from fedpft_core.proxy.choose import make_plan
torch.set_num_threads(1)
cfg = transformers.BertConfig(hidden_size=1280, num_hidden_layers=16, num_attention_heads=20,
                              intermediate_size=5120, vocab_size=30522)
cfg.architectures = ["BertForSequenceClassification"]
fm = transformers.AutoModelForSequenceClassification.from_config(cfg)
def memory(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(field))
plan = make_plan(fm, config.PlanConfig(), 0)
open("/proc/self/clear_refs", "w").write("5")  # forget the peak of making the model
before = memory("VmRSS")
if sys.argv[1] == "build":
    proxy = build(fm, plan)
    block = sum(p.numel() * 4 for p in fm.bert.encoder.layer[1].parameters())
    print(before, memory("VmHWM"), models.size(fm)[1], models.size(proxy)[1], block)
"""


def bench_memory() -> list[str]:
    """Building a sub-FM of a synthetic model of over 1 GB: peak memory over FM + sub-FM."""
    done = subprocess.run(
        [sys.executable, "-c", _BUILD, "build"], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    before, after, fm, proxy, block = map(int, done.stdout.split())
    extra = after - before - proxy
    return [
        f"| building a sub-FM | FM {fm / 1e9:.2f} GB, sub-FM {proxy / 1e9:.2f} GB, one block "
        f"{block / 1e6:.0f} MB | {extra / 1e6:+.0f} MB beyond FM + sub-FM | ≤ one block |"
    ]


BENCHES = {
    "step": bench_step,
    "overhead": bench_overhead,
    "distil": bench_distil,
    "average": bench_average,
    "statistics": bench_statistics,
    "plug": bench_plug,
    "memory": bench_memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*BENCHES, []])
    names = parser.parse_args().names or list(BENCHES)
    torch.set_num_threads(1)
    print("| what | measured | result | goal |\n|---|---|---|---|")
    for name in names:
        for row in BENCHES[name]():
            print(row, flush=True)
    print(f"\ntorch {torch.__version__}, one thread.")


if __name__ == "__main__":
    main()

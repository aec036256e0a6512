"""Sizes of the parts of a message by wire format, as a Markdown table.

    python benchmarks/wire_sizes.py --width 768 --blocks 12 --neurons 768 --rank 8

The adapter is LoRA on four square matrices a block and a head. Its changes are drawn at random,
row by row of different size; the error is that of what arrives, relative to what was trained,
after one message and after ten (the sum of ten changes, each sent by itself).

With --default the shape and the package are those of the run that `fedpft run` makes when it is
given no configuration.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from fedpft_core.proxy.build import build
from fedpft_core.proxy.choose import make_plan
from fedpft_core.tensors import Tensors
from fedpft_core.wire import codec
from fedpft_core.wire.package import Patch

ROUNDS = 10


def adapter(width: int, blocks: int, rank: int, classes: int) -> Tensors:
    """An adapter as large as that of a model of this shape; A as LoRA starts it, B zero."""
    out: Tensors = {}
    stream = torch.Generator().manual_seed(0)
    for block in range(blocks):
        for target in ("query", "key", "value", "output"):
            name = f"encoder.layer.{block}.attention.{target}"
            bound = width**-0.5
            out[f"{name}.lora_A.weight"] = (
                2 * torch.rand(rank, width, generator=stream) - 1
            ) * bound
            out[f"{name}.lora_B.weight"] = torch.zeros(width, rank)
    out["classifier.weight"] = 0.02 * torch.randn(classes, width, generator=stream)
    out["classifier.bias"] = torch.zeros(classes)
    return out


def patch(width: int, blocks: int, neurons: int) -> Tensors:
    """What an alignment of `neurons` neurons in each of `blocks` post-norm blocks changes."""
    out: Tensors = {}
    for block in range(blocks):
        out[f"{block}/index"] = torch.arange(neurons)
        out[f"{block}/in0.weight"] = torch.randn(neurons, width)
        out[f"{block}/in0.bias"] = torch.randn(neurons)
        out[f"{block}/out.weight"] = torch.randn(width, neurons)
        for part in ("out.bias", "norm.weight", "norm.bias"):
            out[f"{block}/{part}"] = torch.randn(width)
    return out


def change(base: Tensors, seed: int) -> Tensors:
    """Gaussian, with a size of its own for every row."""
    stream = torch.Generator().manual_seed(seed)
    out = {}
    for name, t in base.items():
        size = torch.rand(len(t), *([1] * (t.dim() - 1)), generator=stream)
        out[name] = 0.01 * size * torch.randn(t.shape, generator=stream)
    return out


def distance(a: Tensors, b: Tensors) -> float:
    return float(sum((a[k] - b[k]).double().square().sum() for k in a)) ** 0.5


def errors(base: Tensors, fmt: str) -> tuple[float, float]:
    """Relative L2 error after one message and after ROUNDS of them."""
    arrived, trained, residual = base, base, {}
    found = []
    for seed in range(ROUNDS):
        step = change(base, seed)
        trained = {k: trained[k] + step[k] for k in base}
        new = {k: arrived[k] + step[k] for k in base}
        wire, residual = codec.encode_update(new, arrived, residual, fmt)
        arrived = codec.decode_update(wire, arrived, fmt)
        found.append(distance(arrived, trained) / distance(trained, base))
    return found[0], found[-1]


def default_run() -> tuple[int, dict[str, Any]]:
    """Bytes of the package of the default run, and its shape as arguments."""
    from fedpft_core import config
    from fedpft_core.adapter import lora as adapters
    from fedpft_core.model import load as models
    from fedpft_core.proxy.package import make_package
    from fedpft_core.task import load_task

    cfg = config.Config()
    task = load_task(cfg.data, cfg.run.seed).task
    loaded = models.load(cfg.model, task.model(), cfg.run.seed)
    plan = make_plan(loaded.model, cfg.plan, cfg.run.seed)
    spec = adapters.make_spec(loaded.family, plan, loaded.fresh, cfg.lora)
    package = make_package(
        build(loaded.model, plan), plan, spec, loaded.processor, task.name,
        task.labels, cfg.data.max_length,
    )  # fmt: skip
    shape = {
        "width": loaded.shape.hidden,
        "blocks": len(plan.blocks),
        "neurons": len(plan.blocks[plan.pruned[0]].kept),
        "rank": cfg.lora.rank,
        "classes": len(task.labels),
        "pruned": len(plan.pruned),
    }
    return len(package.to_bytes()), shape


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("width", 768), ("blocks", 12), ("neurons", 768), ("rank", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--pruned", type=int, default=-1, help="pruned blocks, default all but two")
    parser.add_argument("--default", action="store_true", help="the shape of the default run")
    args = parser.parse_args()
    if args.default:
        size, shape = default_run()
        vars(args).update(shape)
        print(f"Package: {size:,} bytes\n")
    base = adapter(args.width, args.blocks, args.rank, args.classes)
    count = sum(t.numel() for t in base.values())
    print(
        f"Adapter of {count:,} values: width {args.width}, {args.blocks} blocks, rank {args.rank}\n"
    )
    print("| format | bytes | of fp32 | error, 1 message | error, 10 messages |")
    print("|---|--:|--:|--:|--:|")
    full = len(codec.pack(codec.encode(base, "fp32")))
    for fmt in codec.UPDATE_FORMATS:
        wire, _ = codec.encode_update(base, base, {}, fmt)
        size = len(codec.pack(wire))
        first, last = errors(base, fmt)
        print(f"| {fmt} | {size:,} | {size / full:.1%} | {first:.1e} | {last:.1e} |")
    pruned = args.pruned if args.pruned >= 0 else max(1, args.blocks - 2)
    print(f"\nPatch of {args.neurons} neurons in each of {pruned} blocks\n")
    print("| format | bytes |")
    print("|---|--:|")
    moved = patch(args.width, pruned, args.neurons)
    for fmt in codec.FORMATS:
        print(f"| {fmt} | {len(codec.pack(Patch.encoded(moved, fmt))):,} |")


if __name__ == "__main__":
    main()

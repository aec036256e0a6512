"""What a client takes with its frozen base in floats and in 8 bits: memory, and seconds of a step.

A package is made of a random model, and a process for each base does what a client does with it:
unpacks it, builds the model, lets the package go and trains some steps on rows of full length.
Prints a Markdown table.

    python benchmarks/base.py [--package int8] [--hidden 768] [--blocks 12] [--neurons 3072]
                              [--batch 8] [--tokens 128] [--steps 6]
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def client(path: str, base: str, batch: int, steps: int) -> dict[str, Any]:
    """What this process takes to train on a package; without one, what its imports take."""
    import torch

    import client_app.answer  # noqa: F401  # what a client's process imports
    from client_app.check.step import full_rows
    from fedpft_core.adapter import lora as adapters
    from fedpft_core.model.families import family_of
    from fedpft_core.proxy.int8 import give_back
    from fedpft_core.proxy.package import rebuild
    from fedpft_core.train.tune import LocalSettings, fine_tune
    from fedpft_core.wire.identity import combine_digest, tensor_digest
    from fedpft_core.wire.package import Package

    torch.set_num_threads(1)
    found: dict[str, Any] = {"imports": _memory("VmHWM")}
    if not path:
        return found
    data = Path(path).read_bytes()
    package = Package.from_bytes(data)
    meta = package.meta
    made = rebuild(package, base)
    del package
    gc.collect()
    if base != "float":
        give_back()
    found["held"] = _memory("VmRSS")
    found["built"] = _memory("VmHWM")
    shape = family_of(meta.plan.model_type).shape(meta.model_config)
    torch.manual_seed(0)
    rows = full_rows(made.task, shape, meta.max_length, batch)
    adapters.load(made.model, adapters.initial(made.model, 0, made.plan), made.plan)
    one = LocalSettings(1e-4, batch, 1, 1, 0.0, 1.0, 1)
    fine_tune(made.model, made.task, rows, one, 0)
    start = time.process_time()
    fine_tune(made.model, made.task, rows, replace(one, steps=steps), 1)
    found["step"] = (time.process_time() - start) / steps
    found["peak"] = _memory("VmHWM")
    adapter = adapters.read(made.model, made.plan)
    found["adapter"] = combine_digest("", {}, {k: tensor_digest(t) for k, t in adapter.items()})
    return found


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def in_process(path: str, base: str, batch: int, steps: int) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--client", path, "--base", base, "--batch", f"{batch}",
               "--steps", f"{steps}"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def package(args: argparse.Namespace) -> Any:
    """A package of a random BERT, half of whose neurons are kept."""
    import torch
    import transformers

    from fedpft_core import config as configs
    from fedpft_core.adapter import lora as adapters
    from fedpft_core.model.families import family_of
    from fedpft_core.proxy.build import build
    from fedpft_core.proxy.choose import make_plan
    from fedpft_core.proxy.package import make_package

    torch.manual_seed(0)
    labels = ("a", "b", "c")
    cfg = transformers.BertConfig(
        hidden_size=args.hidden, num_hidden_layers=args.blocks, intermediate_size=args.neurons,
        num_attention_heads=args.hidden // 64, num_labels=len(labels),
    )  # fmt: skip
    fm: Any = transformers.AutoModelForSequenceClassification.from_config(cfg)
    plan = make_plan(fm, configs.PlanConfig(), 0)
    spec = adapters.make_spec(family_of("bert"), plan, (), configs.LoraConfig())
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "word"]
    tokenizer = transformers.BertTokenizerFast(vocab={w: i for i, w in enumerate(words)})
    return make_package(
        build(fm, plan), plan, spec, tokenizer, "text", labels, args.tokens, args.package
    )


def main() -> None:
    """Make the package, measure each base, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", default="int8", choices=("fp32", "bf16", "fp16", "int8"))
    for name, default in (("hidden", 768), ("blocks", 12), ("neurons", 3072), ("batch", 8),
                          ("tokens", 128), ("steps", 6)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--client", metavar="PACKAGE", help=argparse.SUPPRESS)
    parser.add_argument("--base", default="float", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client is not None:
        print(json.dumps(client(args.client, args.base, args.batch, args.steps)))
        return
    from fedpft_core.proxy import memory

    with tempfile.TemporaryDirectory() as folder:
        made = package(args)
        path = Path(folder) / "package"
        path.write_bytes(made.to_bytes())
        count = sum(t.numel() for t in made.weights.values())
        imports = in_process("", "float", 1, 1)["imports"]
        print(f"A random BERT's sub-FM of {count / 1e6:.0f}M parameters, {args.package}, "
              f"{path.stat().st_size / 1e6:.0f} MB as sent; steps of {args.batch} rows of "
              f"{args.tokens} tokens; imports alone {imports / 1e6:.0f} MB\n")  # fmt: skip
        print(
            "| base | model, MB | held, MB | peak until built, MB | peak, MB | step, s | adapter |"
        )
        print("|---|--:|--:|--:|--:|--:|---|")
        for base in ("float", "int8"):
            found = in_process(str(path), base, args.batch, args.steps)
            held, built, peak = (
                f"{(found[key] - imports) / 1e6:.0f}" for key in ("held", "built", "peak")
            )
            cells = (base, f"{memory.base_bytes(made, base) / 1e6:.0f}", held, built, peak,
                     f"{found['step']:.2f}", found["adapter"][:8])  # fmt: skip
            print(f"| {' | '.join(cells)} |", flush=True)
    print("\nMemory is beyond the imports'; what is held has the message in it.")


if __name__ == "__main__":
    main()

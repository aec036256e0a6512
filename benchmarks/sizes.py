"""Four decoders of one recipe, from 50,000 to 5 million parameters, trained from scratch.

`python benchmarks/sizes.py [--steps 1000] [--out build/sizes]` writes one model folder a size, each
with the tokenizer that all share. They differ in width and depth alone: the same Llama shape
(SwiGLU, tied embeddings), the same text (`builtin:public`, which every installation has), the same
tokens in the same order, the same steps. `experiments/sizes.yaml` then compares one-shot with
several rounds on each, for the question whether one round loses less the larger a model is;
`python benchmarks/sizes.py --cells experiments/sizes/cells.jsonl [--plot FILE]` answers it from the
cells: of the nats a token that ten rounds gain on the model as it was, the share that one gains.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path[:0] = [str(Path(__file__).parents[1])]

from fedpft_core.data.builtin import public_paragraphs  # noqa: E402
from fedpft_core.seeds import torch_stream  # noqa: E402

SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (32, 2, 2), "small": (64, 4, 4), "medium": (128, 6, 4), "large": (256, 6, 8),
}  # fmt: skip
"""Hidden size, blocks and attention heads by name; the FFN is 8/3 of the hidden size."""

VOCABULARY, LENGTH, BATCH = 1024, 128, 8
RATE = 0.2  # over the hidden size: one rate for all left the largest behind the one before it


def tokenizer_of(texts: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the texts.

    Args:
        texts: what it is trained on.

    Returns:
        The tokenizer, with tokens for beginning, end and padding.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def model_of(size: str, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A decoder with random weights.

    Args:
        size: one of SIZES.
        tokenizer: whose tokens it is to read.

    Returns:
        The model.
    """
    hidden, blocks, heads = SIZES[size]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=blocks,
        num_attention_heads=heads, intermediate_size=round(8 * hidden / 3 / 8) * 8,
        max_position_embeddings=256, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def trained(model: LlamaForCausalLM, tokens: torch.Tensor, steps: int, name: str) -> float:
    """Train a decoder on the text, and say how it goes.

    Args:
        model: with random weights; trained in place.
        tokens: int64 [N], the whole text.
        steps: optimiser steps of BATCH rows of LENGTH tokens.
        name: for the lines it prints.

    Returns:
        Mean loss of the last tenth of the steps, nats a token.
    """
    stream = torch_stream(0, "sizes")
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=RATE / model.config.hidden_size, weight_decay=0.1
    )
    warm = max(1, steps // 20)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda s: min((s + 1) / warm, 0.5 * (1 + math.cos(math.pi * s / steps))),
    )
    losses, start = [], time.monotonic()
    for step in range(steps):
        at = torch.randint(len(tokens) - LENGTH, (BATCH,), generator=stream)
        batch = torch.stack([tokens[i : i + LENGTH] for i in at.tolist()])
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rate.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        if step % 50 == 49:
            left = (time.monotonic() - start) / (step + 1) * (steps - step - 1)
            print(f"{name}: step {step + 1}/{steps}, loss {sum(losses[-50:]) / 50:.3f}, "
                  f"{left:.0f} s left", flush=True)  # fmt: skip
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


@dataclass(frozen=True)
class Gain:
    """What rounds gained on the model as it was: one size and partition, mean over seeds.

    Attributes:
        partition: the partition's name.
        parameters: of the model.
        before: perplexity of the model as it was.
        ten: perplexity after ten rounds.
        one: the same after one.
        share: of what ten rounds gain in nats a token, the part that one gains.
        spread: standard deviation of the share over seeds; not a number for a single one.
        two: the mean share that two rounds gain, of the seeds that have them; not a number without.
        seeds: how many there are.
    """

    partition: str
    parameters: int
    before: float
    ten: float
    one: float
    share: float
    spread: float
    two: float
    seeds: int


def gains(cells: Path) -> list[Gain]:
    """What ten rounds and one gain on the model as it was, by partition and size.

    Args:
        cells: finished cells of `experiments/sizes.yaml`.

    Returns:
        A line for each partition and size that has both.
    """
    runs: dict[tuple[str, int, int], dict[str, Any]] = {}
    for line in cells.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        place = (row["partition"], row["fm_parameters"], row["seed"])
        runs.setdefault(place, {})[row["method"]] = row
    found: dict[tuple[str, int], list[tuple[float, ...]]] = {}
    for (partition, parameters, _), run in sorted(runs.items()):
        if not {"rounds-10", "one-shot"} <= run.keys():
            continue
        before = run["rounds-10"]["baselines"]["zero-shot"]
        one, two, ten = (
            run[method]["fm_test"] if method in run else math.nan
            for method in ("one-shot", "rounds-2", "rounds-10")
        )
        shares = (math.log(before / after) / math.log(before / ten) for after in (one, two))
        found.setdefault((partition, parameters), []).append((before, ten, one, *shares))
    lines = []
    for (partition, parameters), values in found.items():
        before, ten, one, share, two = (statistics.fmean(v) for v in zip(*values, strict=True))
        spread = statistics.stdev(v[3] for v in values) if len(values) > 1 else math.nan
        lines.append(Gain(partition, parameters, before, ten, one, share, spread, two, len(values)))
    return lines


def plot(found: list[Gain], path: Path) -> None:
    """The share of the gain over the parameters.

    Args:
        found: as `gains` gives it.
        path: file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.2, 3.2), layout="constrained")
    for partition in dict.fromkeys(f.partition for f in found):
        own = [f for f in found if f.partition == partition]
        axes.errorbar(
            [f.parameters for f in own], [100 * f.share for f in own],
            yerr=[0 if math.isnan(f.spread) else 100 * f.spread for f in own],
            fmt="o-", capsize=3, label=partition,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_ylim(0, 105)
    axes.axhline(100, color="0.6", linewidth=1)
    axes.set_xlabel("parameters of the model")
    axes.set_ylabel("one round's share of the\ngain of ten, percent")
    axes.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Train all sizes, or those named, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("build/sizes"))
    parser.add_argument("--size", choices=SIZES, action="append")
    parser.add_argument("--cells", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.cells:
        found = gains(args.cells)
        print(
            "| partition | parameters | as it was | ten rounds | one-shot "
            "| one round's share of the gain, % | two rounds' | seeds |"
        )
        print("|---|--:|--:|--:|--:|--:|--:|--:|")
        for f in found:
            print(
                f"| {f.partition} | {f.parameters:,} | {f.before:.1f} | {f.ten:.1f} | {f.one:.1f} "
                f"| {100 * f.share:.0f} ± {100 * f.spread:.1f} | {100 * f.two:.0f} | {f.seeds} |"
            )
        if args.plot:
            plot(found, args.plot)
        return
    texts = public_paragraphs()
    tokenizer = tokenizer_of(texts)
    ends = tokenizer.eos_token or ""
    tokens = torch.tensor(tokenizer(ends.join(texts))["input_ids"])
    print(f"{len(tokens)} tokens of {len(texts)} paragraphs", flush=True)
    rows = []
    for size in args.size or SIZES:
        model = model_of(size, tokenizer)
        start = time.monotonic()
        loss = trained(model, tokens, args.steps, size)
        folder = args.out / size
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        rows.append(
            f"| {size} | {sum(p.numel() for p in model.parameters()):,} | {loss:.3f} | "
            f"{time.monotonic() - start:.0f} |"
        )
    print("| size | parameters | loss at the end, nats a token | seconds |\n|---|--:|--:|--:|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()

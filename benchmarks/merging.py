"""Merging replies against plain NumPy, and the exact truncated product against a dense SVD.

`python benchmarks/merging.py` prints both ratios, each measured side by side in one process: the
least of several alternating runs. `--check` exits with 1 where a bound of docs/one_shot.md is not
kept. Validation of a reply (size of its change, finiteness) is timed apart.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parents[1])]

from fedpft_core.aggregation import RuleSettings  # noqa: E402
from fedpft_core.aggregation._product import stack, truncate  # noqa: E402
from fedpft_core.aggregation.average import RunningSum, aggregate  # noqa: E402
from fedpft_core.seeds import torch_stream  # noqa: E402
from fedpft_core.tensors import Tensors  # noqa: E402
from server_app.rounds.outcome import Good  # noqa: E402
from server_app.run.replies import KeptReplies  # noqa: E402

MERGE, EXACT, ERROR = 1.3, 0.1, 1e-5


def least(runs: int, *work: Callable[[], object]) -> list[float]:
    """The least seconds of each, over alternating runs."""
    found = [float("inf")] * len(work)
    for _ in range(runs):
        for i, one in enumerate(work):
            start = time.perf_counter()
            one()
            found[i] = min(found[i], time.perf_counter() - start)
    return found


def drawn(seed: int, parameters: int) -> Tensors:
    """An adapter of so many values in layers of 8 x 768, as LoRA of rank 8 has."""
    stream = torch_stream(seed, "merging")
    layers = max(1, parameters // (8 * 768))
    return {f"t{i:04d}.weight": torch.randn(8, 768, generator=stream) for i in range(layers)}


def merging(replies: int, parameters: int, runs: int) -> tuple[float, float, float, float]:
    """Seconds of the running merge, of the final one and of NumPy, and adapters held in memory."""
    with tempfile.TemporaryDirectory() as folder:
        kept = KeptReplies(drawn(0, parameters), Path(folder) / "replies", RuleSettings(), "x")
        for i in range(replies):
            kept.add(f"{i:03d}", 5 + i, drawn(i, parameters))
            kept.commit(f"{i:03d}", Good(5 + i, 1.0, 1.0, 1.0), 0)
        names = kept.names
        arrays = [[t.numpy() for t in kept.adapter(n).values()] for n in names]
        weights = kept.weights

        def plain() -> list[np.ndarray]:
            total = [np.zeros(a.shape) for a in arrays[0]]
            for reply, weight in zip(arrays, weights, strict=True):
                for sum_, array in zip(total, reply, strict=True):
                    sum_ += array.astype(np.float64) * weight
            return [(t / sum(weights)).astype(np.float32) for t in total]

        def running() -> Tensors:
            average = RunningSum(kept)
            for name, weight in zip(names, weights, strict=True):
                average.add(name, weight)
            return average.result()

        final = aggregate(kept)
        assert all(
            np.array_equal(a, t.numpy()) for a, t in zip(plain(), final.values(), strict=True)
        )
        seconds = least(runs, running, lambda: aggregate(kept), plain)
        tracemalloc.start()
        aggregate(kept)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        kept.remove()
    size = sum(t.numel() * 4 for t in final.values())
    return *seconds, peak / size  # type: ignore[return-value]


def exact(width: int, clients: int, rank: int, runs: int) -> tuple[float, float, float]:
    """Seconds of the truncated product and of a dense SVD, and their relative difference."""
    stream = torch_stream(width, "exact")
    parts = [
        (
            1 / clients,
            torch.randn(width, rank, generator=stream),
            torch.randn(rank, width, generator=stream),
        )
        for _ in range(clients)
    ]
    found: list[torch.Tensor] = []
    dense: list[torch.Tensor] = []

    def thin() -> None:
        b, a, _ = truncate(*stack(parts), rank)
        found[:] = [b, a]

    def full() -> None:
        b, a = stack(parts)
        u, s, vh = torch.linalg.svd(b @ a, full_matrices=False)
        dense[:] = [u[:, :rank] * s[:rank], vh[:rank]]

    seconds = least(runs, thin, full)
    want = dense[0] @ dense[1]
    return *seconds, float((found[0] @ found[1] - want).norm() / want.norm())  # type: ignore[return-value]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=1_200_000)
    parser.add_argument("--replies", type=int, nargs="+", default=[5, 50])
    parser.add_argument("--width", type=int, nargs="+", default=[1024])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    good = True
    print("| replies | running sum s | final merge s | NumPy s | ratios | adapters in memory |")
    print("|---|---|---|---|---|---|")
    for replies in args.replies:
        running, final, plain, held = merging(replies, args.parameters, args.runs)
        ratios = running / plain, final / plain
        print(
            f"| {replies} of {args.parameters / 1e6:.1f}M | {running:.3f} | {final:.3f} "
            f"| {plain:.3f} | {ratios[0]:.2f}, {ratios[1]:.2f} | {held:.1f} |", flush=True,
        )  # fmt: skip
        good &= max(ratios) <= MERGE
    print("\n| D | clients x rank | QR s | dense SVD s | ratio | relative difference |")
    print("|---|---|---|---|---|---|")
    for width in args.width:
        for clients in (width // 64, width // 32):
            thin, full, error = exact(width, clients, 8, max(1, args.runs // 2))
            print(f"| {width} | {clients} x 8 | {thin:.3f} | {full:.3f} | {thin / full:.3f} "
                  f"| {error:.1e} |", flush=True)  # fmt: skip
            good &= thin / full <= EXACT and error <= ERROR
    return 0 if good or not args.check else 1


if __name__ == "__main__":
    sys.exit(main())

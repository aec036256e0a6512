"""What secure aggregation costs a round: bytes, and seconds of the server.

`PYTHONPATH=. python benchmarks/secure.py [--clients N …]` prints a Markdown row for each number of
clients and way of sending: plain int8 adapters, and masked changes of 8 and 16 bits. Clients are in
this process, and do everything but train; seconds are of the processor, and their time is not the
server's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]


def one(clients: int, bits: int, root: Path) -> tuple[int, float, float]:
    """A round; bits = 0 is a plain one. Returns bytes, seconds of the server and of a client."""
    import fabricate
    from masking import SecureNode

    from fedpft_core.config import from_flat
    from server_app.run.events import EventLog
    from server_app.strategy import Strategy

    flat: dict[str, Any] = {
        "federation.clients": clients, "federation.clients-per-round": clients,
        "federation.min-clients": 3, "federation.weighting": "uniform", "wire.adapter": "int8",
        "head.start": "zero", "head.end": "trained", "plug.method": "as-trained",
    }  # fmt: skip
    if bits:
        flat |= {"privacy.secure": True, "privacy.secure-bits": bits}
    names = [f"node-{i:04d}" for i in range(clients)]
    nodes = {i: SecureNode(n, root=root, noted=False) for i, n in enumerate(names)}
    network = fabricate.Network(nodes)
    state = fabricate.state()
    # As the default run's: LoRA of rank 8 on four projections of six blocks, and a head.
    shapes = {f"{i:02d}.A": (8, 384) for i in range(24)} | {
        f"{i:02d}.B": (384, 8) for i in range(24)
    }
    shapes["classifier.weight"] = (11, 384)
    state.adapter = {k: 0.1 * torch.randn(shape) for k, shape in shapes.items()}
    spent = 0.0
    for node in nodes.values():
        node.packages[state.digest] = state.package
        state.have[node.name] = (state.digest,)

    def timed(answer: Any) -> Any:
        def run(envelope: Any) -> Any:
            nonlocal spent
            began = time.process_time()
            made = answer(envelope)
            spent += time.process_time() - began
            return made

        return run

    for node in nodes.values():
        node.answer = timed(node.answer)  # type: ignore[method-assign]
    strategy = Strategy(from_flat(flat), network, EventLog(None))
    began = time.process_time()
    strategy.run_round(state, 1, "")
    total = time.process_time() - began
    size = sum(sum(e.sizes().values()) for _, _, e in network.log if "hello" not in e.kind)
    return size, total - spent, spent / clients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    clients = parser.parse_args().clients
    torch.set_num_threads(1)
    print("| clients | sent | MB a round | of plain | server, s | of plain | a client, s |")
    print("|--:|---|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        one(3, 8, Path(folder))  # what is imported and compiled once
    for n in clients:
        first: tuple[int, float] | None = None
        for bits in (0, 8, 16):
            with tempfile.TemporaryDirectory() as folder:
                size, server, client = one(n, bits, Path(folder))
            first = first or (size, server)
            print(
                f"| {n} | {f'masked, {bits} bits' if bits else 'plain int8'} | {size / 1e6:.1f} | "
                f"{size / first[0]:.2f} | {server:.2f} | {server / first[1]:.2f} | {client:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""What secure aggregation costs a round: bytes, and seconds of the server.

`PYTHONPATH=. python benchmarks/secure.py [--clients N …]` prints a Markdown row for each number of
clients and way of sending: plain int8 adapters, and masked changes of 8 and 16 bits. With
`--statistics` it is class statistics that are sent, plain and masked. Clients are in this process,
and do everything but train or read rows; seconds are of the processor, and their time is not the
server's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
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
    strategy = Strategy(from_flat(flat), network, EventLog(None))
    return _counted(network, state, lambda: strategy.run_round(state, 1, ""))


def statistics(clients: int, masked: bool, root: Path) -> tuple[int, float, float]:
    """Class statistics of 384 features and 4 classes; returns as `one`."""
    import fabricate
    from masking import SecureNode

    from fedpft_core.config import from_flat
    from fedpft_core.head.closed import Classes
    from fedpft_core.wire.envelope import open_envelope, seal
    from fedpft_core.wire.messages import StatisticsReply, StatisticsRequest
    from fedpft_core.wire.validate import ExpectedStatistics
    from server_app.run.events import EventLog
    from server_app.strategy import Strategy

    class Plain(SecureNode):
        def answer(self, envelope: Any) -> Any:
            message = open_envelope(envelope)
            if type(message) is not StatisticsRequest:
                return super().answer(envelope)
            found = self.sums.tensors()
            return seal(StatisticsReply(self.name, 0, message.digest, self.examples, 0.5, found))

    flat: dict[str, Any] = {
        "federation.clients": clients, "federation.clients-per-round": clients,
        "federation.min-clients": 3, "federation.weighting": "uniform", "privacy.secure": masked,
        "head.max-features": 384,
    }  # fmt: skip
    form, rows = Classes(4), 400
    sums = form.of(torch.randn(rows, 384, dtype=torch.float64), torch.arange(rows) % 4)
    names = [f"node-{i:04d}" for i in range(clients)]
    network = fabricate.Network({
        i: Plain(n, rows, root=root, sums=sums, form=form) for i, n in enumerate(names)
    })  # fmt: skip
    state = fabricate.state()
    want = ExpectedStatistics(0, state.digest, form, 384, 100.0, fabricate.MAX_LENGTH)
    strategy = Strategy(from_flat(flat), network, EventLog(None))
    return _counted(network, state, lambda: strategy.gather(state, want))


def _counted(network: Any, state: Any, work: Callable[[], object]) -> tuple[int, float, float]:
    """Bytes of some work, and seconds of the server and of a client."""
    spent, nodes = 0.0, network.members
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
        node.answer = timed(node.answer)
    began = time.process_time()
    work()
    total = time.process_time() - began
    size = sum(sum(e.sizes().values()) for _, _, e in network.log if "hello" not in e.kind)
    return size, total - spent, spent / len(nodes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--statistics", action="store_true")
    args = parser.parse_args()
    clients = args.clients
    ways: list[tuple[str, Any]] = [
        ("plain int8", lambda n, root: one(n, 0, root)),
        ("masked, 8 bits", lambda n, root: one(n, 8, root)),
        ("masked, 16 bits", lambda n, root: one(n, 16, root)),
    ]
    if args.statistics:
        ways = [
            ("plain statistics", lambda n, root: statistics(n, False, root)),
            ("masked statistics", lambda n, root: statistics(n, True, root)),
        ]
    torch.set_num_threads(1)
    print("| clients | sent | MB a round | of plain | server, s | of plain | a client, s |")
    print("|--:|---|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        one(3, 8, Path(folder))  # what is imported and compiled once
    for n in clients:
        first: tuple[int, float] | None = None
        for way, work in ways:
            with tempfile.TemporaryDirectory() as folder:
                size, server, client = work(n, Path(folder))
            first = first or (size, server)
            print(
                f"| {n} | {way} | {size / 1e6:.1f} | "
                f"{size / first[0]:.2f} | {server:.2f} | {server / first[1]:.2f} | {client:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

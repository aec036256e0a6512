"""Memory and time of the server in a round with many replies.

`python benchmarks/aggregation.py [--parameters N] [--replies N …]` prints a Markdown row for every
rule and number of replies: peak memory of a process of its own that runs one round of the real
strategy, with a transport that makes each reply when it is due and keeps none, and the seconds
that round took. `--one RULE REPLIES` is such a process; it prints its peak in bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]


def one(rule: str, replies: int, parameters: int) -> tuple[int, float]:
    """Run one round; returns the peak memory in bytes and the seconds of the round."""
    import fabricate
    import torch

    from fedpft_core import registry
    from fedpft_core.seeds import torch_stream
    from fedpft_core.tensors import Tensors
    from fedpft_core.wire import flower as wire
    from fedpft_core.wire.envelope import Envelope, open_envelope, seal
    from fedpft_core.wire.messages import Hello, HelloReply, TrainReply, TrainRequest
    from server_app.phases.reporting import peak_rss_bytes
    from server_app.run.events import EventLog
    from server_app.strategy import Strategy
    from server_app.transport import Meanwhile, OnReply

    rows = parameters // 16
    shapes = {f"t{i:02d}.weight": (rows // 16, 8) for i in range(30)}
    shapes["classifier.weight"] = (8, (parameters - 30 * 8 * (rows // 16)) // 8)

    def drawn(seed: int) -> Tensors:
        stream = torch_stream(seed, "reply")
        return {k: torch.randn(shape, generator=stream) for k, shape in shapes.items()}

    class Edge:
        """Nodes that answer at once, each with an adapter of its own."""

        def nodes(self) -> list[int]:
            return list(range(replies))

        def exchange(
            self,
            messages: Mapping[int, Envelope],
            round: int,
            timeout: float,
            on_reply: OnReply,
            meanwhile: Meanwhile | None = None,
        ) -> None:
            for node, envelope in messages.items():
                asked = open_envelope(envelope)
                if isinstance(asked, Hello):
                    made = seal(HelloReply(f"node-{node}", 5))
                else:
                    assert isinstance(asked, TrainRequest)
                    reply = TrainReply(
                        f"node-{node}", round, asked.digest, 5, 1, 1.0, 0.1, drawn(node), "fp32"
                    )
                    made = wire.from_record(wire.to_record(seal(reply)))
                on_reply(node, made)

    with tempfile.TemporaryDirectory() as folder:
        config = fabricate.config(
            federation__aggregate=rule, federation__clients=replies,
            federation__clients_per_round=replies, federation__min_clients=min(2, replies),
            wire__max_update_norm=1e9, run__dir=folder,
        )  # fmt: skip
        state = fabricate.state()
        state.adapter = drawn(-1)
        registry.load("aggregation", rule)  # its import is not the round's
        events = EventLog(Path(folder) / "events.jsonl")
        start = time.perf_counter()
        outcome = Strategy(config, Edge(), events).run_round(state, 1, "")
        seconds = time.perf_counter() - start
        events.close()
    assert outcome.good == replies
    return peak_rss_bytes(), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=1_200_000)
    parser.add_argument("--replies", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--one", nargs=2, metavar=("RULE", "REPLIES"))
    parser.add_argument("--json", action="store_true", help="with --one: bytes and seconds")
    args = parser.parse_args()
    if args.one:
        peak, seconds = one(args.one[0], int(args.one[1]), args.parameters)
        print(json.dumps([peak, seconds]) if args.json else peak)
        return
    from fedpft_core import registry

    print("| rule | replies | peak memory | against the first | s |")
    print("|---|---|---|---|---|")
    for rule in registry.names("aggregation"):
        first = 0
        for replies in args.replies:
            done = subprocess.run(
                [
                    sys.executable, __file__, "--json", "--one", rule, str(replies),
                    "--parameters", str(args.parameters),
                ],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            peak, seconds = json.loads(done.stdout)
            first = first or peak
            print(
                f"| `{rule}` | {replies} of {args.parameters / 1e6:.2f}M parameters "
                f"| {peak / 1e6:.0f} MB | {100 * (peak / first - 1):+.1f}% | {seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

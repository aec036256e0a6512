"""What federated averaging as Flower ships it makes of one bad reply among three.

    python benchmarks/peers/garbage.py

Prints a Markdown table. What this project does with the same replies is in docs/faults.md; its
tests are `pytest tests/wire/test_messages.py tests/server_app/test_strategy.py`.
"""

from __future__ import annotations

import logging

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

BAD = {
    "NaN in one value": (np.array([[np.nan, 1.0], [1.0, 1.0]]), 10.0),
    "values of 1e30": (np.full((2, 2), 1e30), 10.0),
    "another shape, which NumPy broadcasts": (np.full((1, 2), 5.0), 10.0),
    "a negative number of rows": (np.full((2, 2), 5.0), -15.0),
    "a million rows, of which nobody knows": (np.full((2, 2), 5.0), 1e6),
}


def reply(values: np.ndarray, rows: float, node: int) -> Message:
    asked = Message(RecordDict(), dst_node_id=node, message_type="train")
    content = RecordDict({
        "arrays": ArrayRecord({"lora_A": Array(values.astype(np.float32))}),
        "metrics": MetricRecord({"num-examples": rows, "loss": 1.0}),
    })  # fmt: skip
    return Message(content, reply_to=asked)


def main() -> None:
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    for name in ("_run_id", "_node_id", "_task_id"):
        setattr(TaskIdentity, name, 1)
    good = np.ones((2, 2))
    print("| one of three replies has | the mean of all ones becomes |\n|---|---|")
    for name, (values, rows) in BAD.items():
        replies = [reply(good, 10.0, 2), reply(good, 10.0, 3), reply(values, rows, 4)]
        try:
            arrays, _ = FedAvg().aggregate_train(1, replies)
            assert arrays is not None
            (found,) = [a.numpy() for a in arrays.values()]
            said = " ".join(f"{v:.4g}" for v in found.ravel())
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        print(f"| {name} | {said} |")


if __name__ == "__main__":
    main()

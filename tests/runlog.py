"""The log of a run made up by hand, whose every figure is known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from server_app.run.events import event_of
from server_app.run.schema import Event


def event(t: float, kind_: str, **fields: Any) -> dict[str, Any]:
    return {"t": t, "event": kind_} | fields


TASK = {"metric": "accuracy", "higher_is_better": True, "share": True}


def scored(share: float, rows: int = 400) -> dict[str, Any]:
    """The fields of an accuracy with its standard error."""
    error = math.sqrt(share * (1 - share) / rows)
    return {"metric": "accuracy", "value": share, "error": error, "rows": rows}


def made(kind_: str, **fields: Any) -> Event:
    """An event of which only some fields matter."""
    found = event_of({"event": kind_} | fields)
    assert found is not None
    return found


def whole_run() -> list[dict[str, Any]]:
    """Two rounds with every kind of event, an alignment, a refused reply and a side run."""
    e = [
        event(100, "run_started", run_dir="/r", version="1", seed=7, method="fedpft", rounds=2,
              clients_per_round=2, resumed_from=None),
        event(101, "phase_started", phase="load"),
        event(103, "phase_finished", phase="load", seconds=2.0),
        event(103, "task", name="builtin:x", kind="text", train=10, validation=2, test=400,
              labels=["a", "b"], public=5, **TASK),
        event(103, "model", fm_parameters=22_700_000, fm_bytes=90_800_000,
              proxy_parameters=11_350_000, proxy_bytes=45_400_000,
              fm_block_parameters=10_000_000, proxy_block_parameters=5_000_000, blocks=[]),
        event(103, "nodes", count=4, names=["0", "1", "2", "3"]),
        event(104, "baseline", name="tf-idf", **scored(0.5)),
        event(104, "baseline", name="linear-probe", **scored(0.6)),
        event(104, "baseline", name="undistilled", **scored(0.4)),
        # The side run's bytes and evaluations must not be mixed up with the run's.
        event(104, "bytes", arm="undistilled", round=1, client="0", direction="down",
              kind="package", bytes=999_999_999),
        event(104, "evaluation", arm="undistilled", round=1, model="fm", split="test",
              **scored(0.01), loss=9.0, seconds=1.0),
        event(105, "progress", phase="distil", done=10, total=20, unit="steps", loss=0.5),
        event(106, "distilled", steps=20, seconds=3.0, loss_first=1.0, loss_last=0.25,
              output_error={"1": 0.1}),
        event(106, "agreement", round=0, when="start", cosine=0.5, relative_l2=0.9,
              head_cosine=1.0, blocks=[]),
    ]  # fmt: skip
    for n in (1, 2):
        t = 100 + 10 * n
        e += [
            event(t, "round_started", round=n, rounds=2, attempt=1, clients=["0", "1", "2"], lr=1),
            event(t, "bytes", round=n, client="0", direction="down", kind="adapter", bytes=1000),
            event(t, "bytes", round=n, client="1", direction="down", kind="adapter", bytes=1000),
            event(t, "bytes", round=n, client="0", direction="up", kind="adapter", bytes=1500),
            event(t + 1, "reply", round=n, client="0", status="ok", seconds=1.0, examples=5,
                  loss=1.0),
            event(t + 1, "reply", round=n, client="1", status="ok", seconds=1.0, examples=5,
                  loss=math.nan),
            event(t + 4, "evaluation", round=n, model="proxy", split="test",
                  **scored(0.5 + 0.1 * n), loss=1.0, seconds=1.0),
            event(t + 5, "evaluation", round=n, model="fm", split="test", **scored(0.5), loss=1.0,
                  seconds=1.0),
            event(t + 6, "round_finished", round=n, seconds=6.0, train_seconds=4.0,
                  exchange_seconds=3.0, evaluate_seconds=2.0, loss=1.0 / n, examples=10, good=2,
                  bad=n - 1),
        ]  # fmt: skip
        if n == 1:
            e += [
                event(t, "bytes", round=1, client="0", direction="down", kind="package",
                      bytes=45_400_000),
                event(t + 6, "agreement", round=1, when="before-align", cosine=0.6,
                      relative_l2=0.8, head_cosine=1.0, blocks=[]),
                event(t + 7, "alignment", round=1, neurons=384, share=0.5, loss_before=0.3,
                      loss_after=0.2, digest_from="aaaaaaaabbbb", digest_to="ccccccccdddd",
                      gap_before=0.05, gap_after=-0.025,
                      seconds=1.0, blocks=[{"block": 1, "error_before": 0.3, "error_after": 0.1},
                                           {"block": 2, "error_before": 0.5, "error_after": 0.3}]),
                event(t + 7, "agreement", round=1, when="after-align", cosine=0.7,
                      relative_l2=0.7, head_cosine=1.0, blocks=[]),
                event(t + 8, "phase_finished", phase="align", seconds=1.0),
            ]  # fmt: skip
        else:
            e.append(event(t + 2, "reply", round=2, client="2", status="refused", seconds=1.0,
                           examples=0, loss=None, reason="shape | of head"))  # fmt: skip
        e.append(event(t + 9, "phase_finished", phase="round", seconds=9.0))
    return [
        *e,
        event(129, "memory", process="server", peak_rss_bytes=1_500_000_000),
        event(130, "files", paths={"adapter": "/r/adapter"}),
        event(130, "run_finished", seconds=30.0),
    ]


def put(folder: Path, events: list[dict[str, Any]]) -> None:
    lines = [json.dumps(e) + "\n" for e in events]
    (folder / "events.jsonl").write_text("".join(lines), encoding="utf-8")

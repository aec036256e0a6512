"""Clients whose class statistics spoil the head, found by the server's validation rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from client_app.client import Client
from fedpft_console import report
from fedpft_console.lines import lines_for
from fedpft_core import config
from fedpft_core.config import FederationConfig
from fedpft_core.errors import RunError, UserError
from fedpft_core.head.closed import Classes
from fedpft_core.head.form import Sums
from fedpft_core.wire.envelope import Envelope, open_envelope, seal
from fedpft_core.wire.messages import StatisticsReply
from fedpft_core.wire.validate import ExpectedStatistics
from server_app.phases.guard import _limit
from server_app.rounds.nodes import Node
from server_app.rounds.statistics import Gathered
from server_app.run.events import EventLog, read_events
from server_app.run.record import of_log
from server_app.state import State

GUARDED = {"head.start": "statistics", "head.guard": "validation"}
HEAD = "base_model.model.classifier."


def texts(count: int, seed: int) -> list[tuple[str, str]]:
    """Rows with four telling words, 70 % of which are of the row's own label."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        share = [0.7 if k == i % 3 else 0.15 for k in range(3)]
        kinds = rng.choice(3, size=4, p=share)
        words = [str(rng.choice(tiny.WORDS[tiny.LABELS[k]])) for k in kinds]
        found.append((" ".join(["the", *words]), tiny.LABELS[i % 3]))
    return found


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Ten clients; of 1,500 rows the server has 600 for validation, half of which judge."""
    folder = tmp_path_factory.mktemp("task")
    flat = tiny.write_task("bert", folder)
    for split, (count, seed) in {"train": (1500, 0), "test": (150, 1)}.items():
        tiny.write_csv(folder / f"{split}.csv", texts(count, seed))
    return flat | {
        "data.validation-share": 0.4, "federation.clients": 10, "federation.clients-per-round": 10,
        "federation.rounds": 1, "distill.steps": 4, "align.interval": 0, "plug.refit": "none",
        "federation.partition": "iid",
        # A rate at which nothing moves: what is exported is what round 1 began with.
        "train.lr": 1e-30, "train.local-steps": 1, "wire.adapter": "fp32", "lora.dropout": 0.0,
    }  # fmt: skip


def of(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [e for e in events if e["event"] == name]


def names(flat: dict[str, Any], count: int) -> list[str]:
    federation = tiny.Federation(flat)
    return [federation.client(i).name for i in range(count)]


def head(run: Path) -> dict[str, torch.Tensor]:
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    return {k.removeprefix(HEAD): t for k, t in stored.items() if k.startswith(HEAD)}


def silent(federation: tiny.Federation, who: list[str]) -> Any:
    """Some clients send statistics that are refused, as if they had none."""
    honest = Client.handle

    def handle(self: Client, envelope: Envelope) -> Envelope:
        reply = honest(self, envelope)
        message = open_envelope(reply)
        if self.name in who and isinstance(message, StatisticsReply):
            worse = {k: -t for k, t in message.statistics.items()}
            return seal(StatisticsReply(**message.__dict__ | {"statistics": worse}))
        return reply

    return handle


def test_with_the_guard_the_head_is_that_without_the_attackers(
    job: dict[str, Any], tmp_path: Path
) -> None:
    """Two of ten have flipped labels; with the guard not a bit of the head is theirs."""
    attack = {"simulate.attack": "label-flip", "head.start": "statistics"}
    bad = names(job, 2)
    spoilt = tiny.run(job | attack, tmp_path / "spoilt")
    guarded = tiny.run(job | attack | GUARDED, tmp_path / "guarded")
    with pytest.MonkeyPatch.context() as patch:
        federation = tiny.Federation(job | attack)
        patch.setattr(Client, "handle", silent(federation, bad))
        without = tiny.run(job | attack, tmp_path / "without", federation)
    assert tiny.same_bits(head(tmp_path / "guarded"), head(tmp_path / "without"))
    assert not tiny.same_bits(head(tmp_path / "guarded"), head(tmp_path / "spoilt"))
    scores = [of(e, "evaluation")[0] for e in (spoilt, guarded, without)]
    assert scores[1]["value"] == scores[2]["value"] and scores[1]["loss"] == scores[2]["loss"]
    assert scores[1]["loss"] < scores[0]["loss"] - 0.02  # 0.467 and 0.493

    (found,) = of(guarded, "guarded")
    assert {out["client"] for out in found["left_out"]} == set(bad)
    assert found["clients"] == 10 and found["rows"] == 300 and found["after"] < found["before"]
    assert of(guarded, "head")[0]["rows"] == of(without, "head")[0]["rows"]
    (said,) = [e["text"] for e in of(guarded, "warning") if "class statistics without" in e["text"]]
    assert all(f"{name}: the head's loss on 300 validation rows falls by" in said for name in bad)
    assert not of(spoilt, "guarded")

    record = of_log(EventLog(tmp_path / "guarded" / "events.jsonl"))
    (table,) = [s for s in report.sheets(record) if s.title == "Statistics left out"]
    assert {row[2] for row in table.rows} == set(bad) and "head.guard" in table.notes[0]
    assert "## Statistics left out" in report.markdown(record)
    (line,) = lines_for(record.rounds[0].guarded[0], record)
    assert "held against 300 validation rows" in line and all(name in line for name in bad)


def test_of_honest_clients_nobody_is_left_out_and_the_bits_are_those_without_a_guard(
    job: dict[str, Any], tmp_path: Path
) -> None:
    flat = job | {"head.start": "statistics", "federation.partition": "shards"}
    tiny.run(flat, tmp_path / "plain")
    events = tiny.run(flat | GUARDED, tmp_path / "guarded")
    (found,) = of(events, "guarded")
    assert found["left_out"] == [] and found["before"] == found["after"]
    assert tiny.same_bits(head(tmp_path / "guarded"), head(tmp_path / "plain"))
    record = of_log(EventLog(tmp_path / "guarded" / "events.jsonl"))
    assert "Statistics left out" not in [s.title for s in report.sheets(record)]
    assert lines_for(record.rounds[0].guarded[0], record)[0].endswith("nobody left out")


def test_wherever_statistics_are_summed_and_to_the_bit_when_resumed(
    job: dict[str, Any], tmp_path: Path
) -> None:
    """Before round 1, on the way, at the end, and for the product."""
    flat = job | GUARDED | {
        "simulate.attack": "label-flip", "head.end": "statistics", "plug.method": "mapped",
        "head.interval": 1, "federation.rounds": 2, "train.lr": 1e-2, "train.local-steps": 3,
    }  # fmt: skip
    whole = tiny.run(flat, tmp_path / "whole")
    assert [e["round"] for e in of(whole, "guarded")] == [0, 1, 2]
    bad = set(names(flat, 2))
    out = [{o["client"] for o in e["left_out"]} for e in of(whole, "guarded")]
    assert out[0] == bad and all(found and found <= bad for found in out)
    with pytest.raises(RunError):
        tiny.run(flat | {"run.stop-after": 1}, tmp_path / "parts")
    tiny.run(flat | {"run.resume": True}, tmp_path / "parts")
    a, b = (
        load_file(tmp_path / n / "adapter" / "adapter_model.safetensors")
        for n in ("whole", "parts")
    )
    assert tiny.same_bits(a, b)
    parts = [e for _, e in read_events(tmp_path / "parts" / "events.jsonl")]
    told = [[e[k] for k in ("round", "left_out", "before", "after")] for e in of(whole, "guarded")]
    assert told == [
        [e[k] for k in ("round", "left_out", "before", "after")] for e in of(parts, "guarded")
    ]


def test_only_the_product_needs_them(job: dict[str, Any], tmp_path: Path) -> None:
    flat = job | {"head.guard": "validation", "plug.method": "mapped"}
    events = tiny.run(flat | {"simulate.attack": "label-flip"}, tmp_path / "run")
    (found,) = of(events, "guarded")
    assert found["round"] == 1 and len(found["left_out"]) == 2 and not of(events, "head")


def test_each_width_is_judged_by_itself(job: dict[str, Any], tmp_path: Path) -> None:
    flat = job | GUARDED | {
        "plan.widths": "0.25,0.5", "federation.widths": "0.25,0.5",
        "simulate.attack": "label-flip", "simulate.attackers": 0.4, "federation.attackers": 0.4,
    }  # fmt: skip
    events = tiny.run(flat, tmp_path / "run")
    found = {e["width"]: e for e in of(events, "guarded")}
    assert set(found) == {"0.25", "0.5"} and all(e["clients"] == 5 for e in found.values())
    every = names(flat, 10)
    for width, hostile in (("0.25", {every[0], every[2]}), ("0.5", {every[1], every[3]})):
        out = [o["client"] for o in found[width]["left_out"]]
        assert out and set(out) <= hostile


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"data.validation-share": 0.0}, "there are none: set data.validation"),
        ({"data.validation-share": 0.02}, "that is 15 rows of the 30 it needs"),
        ({"plug.rows": 20}, "plug.rows = 20: that is 20 rows of the 30"),
    ],
)
def test_too_few_rows_to_judge_by_are_refused(
    job: dict[str, Any], tmp_path: Path, keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=r"head\.guard = validation .*" + said.split(":")[0]):
        tiny.run(job | GUARDED | keys, tmp_path / "run")
    assert said in of([e for _, e in read_events(tmp_path / "run" / "events.jsonl")],
                      "run_failed")[0]["reason"]  # fmt: skip


def test_secure_aggregation_has_nothing_to_judge() -> None:
    keys = {
        "privacy.secure": True, "federation.min-clients": 3, "federation.weighting": "uniform",
    }  # fmt: skip
    config.from_flat(keys)
    with pytest.raises(UserError, match=r"privacy\.secure = true needs head\.guard = none"):
        config.from_flat(keys | {"head.guard": "validation"})


def test_always_fewer_than_half_are_left_out() -> None:
    assert [_limit(0.2, n) for n in (1, 2, 3, 5, 10, 11, 20)] == [0, 0, 1, 1, 2, 3, 4]
    assert [_limit(0.0, n) for n in (1, 2, 3, 4, 5, 20)] == [0, 0, 1, 1, 2, 9]
    assert [_limit(0.49, n) for n in (3, 20)] == [1, 9]


def test_min_clients_are_left(job: dict[str, Any], tmp_path: Path) -> None:
    flat = job | GUARDED | {"simulate.attack": "label-flip", "federation.min-clients": 9}
    (found,) = of(tiny.run(flat, tmp_path / "run"), "guarded")
    assert len(found["left_out"]) == 1


@pytest.mark.parametrize("weighting", ["examples", "uniform", "capped"])
def test_the_total_is_that_of_those_who_stay(weighting: str) -> None:
    """To the bit, in any order, weights included."""

    class Silent:
        def emit(self, event: Any) -> None:
            pass

    form, generator = Classes(2), torch.Generator().manual_seed(0)
    rows: dict[str, Sums] = {
        f"c{k}": form.of(
            torch.randn(5 + 7 * k, 4, generator=generator, dtype=torch.float64),
            torch.arange(5 + 7 * k) % 2,
        )
        for k in range(6)
    }
    f = FederationConfig(weighting=weighting, weight_cap=0.3)

    def gathered(who: list[str]) -> Gathered:
        nodes = [Node(i, name, rows[name].rows) for i, name in enumerate(who)]
        state = State.__new__(State)
        state.have, state.digest, state.others, state.given = {}, "0" * 64, {}, {}
        got = Gathered(ExpectedStatistics(0, "0" * 64, form, 4, 1e6), nodes, state, Silent())
        for node in nodes:
            sums = rows[node.name].tensors()
            got.judge(node, seal(StatisticsReply(node.name, 0, "0" * 64, node.examples, 1.0, sums)))
        assert not got.bad, got.bad
        return got

    (want,) = gathered(["c1", "c3", "c4", "c5"]).total(f).values()
    for who in (sorted(rows), sorted(rows)[::-1]):
        got = gathered(who)
        assert list(got.parts(f)[""]) == sorted(rows)
        got.leave_out(["c2", "c0"])
        (found,) = got.total(f).values()
        assert tiny.same_bits(found.tensors(), want.tensors())

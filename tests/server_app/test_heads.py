"""Class statistics through the whole protocol, and the ways of plugging in that build on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from client_app.client import Client
from fedpft_core.config import FederationConfig
from fedpft_core.errors import ReplyError, RunError, UserError
from fedpft_core.head.closed import Classes, Labels, Values
from fedpft_core.head.discriminant import solve
from fedpft_core.head.statistics import Statistics
from fedpft_core.wire import codec
from fedpft_core.wire.envelope import Envelope, open_envelope, seal
from fedpft_core.wire.messages import StatisticsReply, StatisticsRequest
from fedpft_core.wire.validate import ExpectedStatistics, validate_statistics

SHORT = {"federation.rounds": 2, "distill.steps": 4, "align.steps": 2, "train.local-epochs": 1}
HEAD = "base_model.model.classifier."


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny.write_task("bert", tmp_path_factory.mktemp("task"), rows=120) | SHORT


def of(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [e for e in events if e["event"] == name]


def start_head(run: Path) -> dict[str, torch.Tensor]:
    """The head with which round 1 began, from a run that was not to train."""
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    return {k.removeprefix(HEAD): t for k, t in stored.items() if k.startswith(HEAD)}


def test_the_partition_does_not_change_the_start(job: dict[str, Any], tmp_path: Path) -> None:
    """IID or one class a client: the same head, and far better than chance before round 1."""
    heads, scores = [], []
    for scheme in ("iid", "shards"):
        flat = job | {"federation.partition": scheme, "head.start": "statistics"}
        # A rate at which nothing moves: what is exported is what round 1 began with.
        flat |= {"train.lr": 1e-30, "wire.adapter": "fp32", "plug.refit": "none"}
        flat |= {"align.interval": 0, "lora.dropout": 0.0}
        events = tiny.run(flat, tmp_path / scheme)
        (head,) = of(events, "head")
        assert head["rows"] == of(events, "task")[0]["train"] and head["classes"] == 3
        heads.append(start_head(tmp_path / scheme))
        scores.append(of(events, "evaluation")[0]["value"])
    for name, t in heads[0].items():
        torch.testing.assert_close(t, heads[1][name], rtol=1e-4, atol=1e-5)
    assert min(scores) > 0.6


def test_the_servers_own_rows_give_a_head_without_asking_anybody(
    job: dict[str, Any], tmp_path: Path
) -> None:
    """Of other clients the same head to the bit, from half of the validation rows."""
    found = []
    for scheme in ("iid", "shards"):
        flat = job | {"federation.partition": scheme, "head.start": "server", "lora.dropout": 0.0}
        flat |= {"train.lr": 1e-30, "wire.adapter": "fp32", "align.interval": 0}
        events = tiny.run(flat | {"head.end": "trained"}, tmp_path / scheme)
        (head,) = of(events, "head")
        assert head["rows"] == (of(events, "task")[0]["validation"] + 1) // 2
        assert head["loss"] is None and head["taken"]
        assert "statistics" not in {e["kind"] for e in of(events, "bytes")}
        assert of(events, "evaluation")[0]["value"] > 0.6
        found.append(start_head(tmp_path / scheme))
    for name, t in found[0].items():
        assert torch.equal(t, found[1][name])


def test_a_server_without_labelled_rows_has_no_head_of_its_own(
    job: dict[str, Any], tmp_path: Path
) -> None:
    flat = {k: v for k, v in job.items() if k != "data.validation"} | {
        "data.validation-share": 0.0, "head.start": "server",
    }  # fmt: skip
    with pytest.raises(UserError, match=r"head\.start = server.*data\.validation"):
        tiny.run(flat, tmp_path / "run")


def test_zero_asks_nobody(job: dict[str, Any], tmp_path: Path) -> None:
    events = tiny.run(job, tmp_path / "run")
    assert not of(events, "head") and not of(events, "plugged")
    assert "statistics" not in {e["kind"] for e in of(events, "bytes")}


def test_best_names_every_candidate_and_takes_the_best(job: dict[str, Any], tmp_path: Path) -> None:
    flat = job | {"head.start": "statistics", "head.end": "better", "plug.method": "best"}
    events = tiny.run(flat | {"plug.distil-steps": 6}, tmp_path / "run")
    assert [e["round"] for e in of(events, "head")] == [0, 2]
    (plugged,) = of(events, "plugged")
    assert set(plugged["right"]) == {"as-trained", "refit", "mapped", "distil"}
    assert plugged["right"][plugged["method"]] == max(plugged["right"].values())
    validation = of(events, "task")[0]["validation"]
    assert plugged["rows"] == validation // 2  # judged by one half, then fitted to both
    assert plugged["fitted"] == (
        plugged["rows"] if plugged["method"] == "as-trained" else validation
    )
    last = [e["model"] for e in of(events, "evaluation") if e["round"] == 2]
    assert last == ["proxy", "fm-as-trained", "fm"]
    counted = [e for e in of(events, "bytes") if e["kind"] == "statistics"]
    assert len(counted) == 2 * flat["federation.clients"]


@pytest.mark.parametrize("method", ["as-trained", "mapped", "distil"])
def test_each_method_can_be_asked_for(job: dict[str, Any], tmp_path: Path, method: str) -> None:
    flat = job | {"plug.method": method, "plug.distil-steps": 4}
    events = tiny.run(flat, tmp_path / "run")
    taken = [e["method"] for e in of(events, "plugged")]
    assert taken == ([] if method == "as-trained" else [method])


def test_distilling_asks_for_no_statistics(job: dict[str, Any], tmp_path: Path) -> None:
    """Only mapped statistics need the clients' sums; they are not sent for nothing."""
    events = tiny.run(job | {"plug.method": "distil", "plug.distil-steps": 4}, tmp_path / "run")
    assert [e["method"] for e in of(events, "plugged")] == ["distil"]
    assert "statistics" not in {e["kind"] for e in of(events, "bytes")}


def test_without_validation_rows_the_best_is_mapped_on_public_rows(
    job: dict[str, Any], tmp_path: Path
) -> None:
    flat = job | {"plug.method": "best", "data.validation-share": 0.0, "data.validation": ""}
    events = tiny.run(flat, tmp_path / "run")
    (plugged,) = of(events, "plugged")
    assert (plugged["method"], plugged["right"], plugged["rows"]) == ("mapped", {}, 0)
    said = [e["text"] for e in of(events, "warning")]
    assert sum("fitted to the FM on public rows" in text for text in said) == 1
    assert not [text for text in said if "plugged in as trained" in text]


def test_a_resumed_run_has_the_same_bits(job: dict[str, Any], tmp_path: Path) -> None:
    flat = job | {"head.start": "statistics", "head.end": "statistics", "plug.method": "mapped"}
    flat |= {"head.interval": 1}
    tiny.run(flat, tmp_path / "whole")
    with pytest.raises(RunError):
        tiny.run(flat | {"run.stop-after": 1}, tmp_path / "parts")
    tiny.run(flat | {"run.resume": True}, tmp_path / "parts")
    whole, parts = (
        load_file(tmp_path / n / "adapter" / "adapter_model.safetensors")
        for n in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert all(torch.equal(t, parts[k]) for k, t in whole.items())


def test_a_liar_is_named_and_left_out(job: dict[str, Any], tmp_path: Path) -> None:
    flat = job | {"head.start": "statistics"}
    federation = tiny.Federation(flat)
    honest, liar = Client.handle, federation.client(1).name

    def lie(self: Client, envelope: Envelope) -> Envelope:
        reply = honest(self, envelope)
        message = open_envelope(reply)
        if self.name == liar and isinstance(message, StatisticsReply):
            worse = dict(message.statistics)
            worse["outer"] = -worse["outer"]
            return seal(StatisticsReply(**message.__dict__ | {"statistics": worse}))
        return reply

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "handle", lie)
        events = tiny.run(flat, tmp_path / "run", federation)
    (head,) = of(events, "head")
    assert head["rows"] < of(events, "task")[0]["train"]
    assert any(f"class statistics without {liar}: " in e["text"] for e in of(events, "warning"))


def test_messages_open_as_they_were_sealed() -> None:
    f = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).double()
    sums = Statistics.of(f, torch.arange(9) % 3, 3)
    reply = StatisticsReply("a", 0, "0" * 64, 9, 0.5, sums.tensors())
    back = open_envelope(seal(reply))
    assert isinstance(back, StatisticsReply) and back.examples == 9
    assert torch.equal(back.statistics["outer"], reply.statistics["outer"])
    assert seal(reply).sizes()["statistics"] == len(codec.pack(sums.tensors()))
    request = StatisticsRequest(0, "0" * 64, {"a": torch.ones(2)}, "fp32", 1, 8, 4, 1)
    again = open_envelope(seal(request))
    assert isinstance(again, StatisticsRequest) and again.width == 8 and again.package == b""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": "b"}, "signed"),
        ({"round": 3}, "round"),
        ({"digest": "1" * 64}, "another sub-FM"),
        ({"examples": 8}, "announced"),
        ({"seconds": float("nan")}, "seconds"),
    ],
)
def test_a_reply_to_something_else_is_refused(change: dict[str, Any], reason: str) -> None:
    f = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).double()
    sums = Statistics.of(f, torch.arange(9) % 3, 3)
    want = ExpectedStatistics(0, "0" * 64, Classes(3), 4, float(f.norm(dim=1).max()))
    good = {"name": "a", "round": 0, "digest": "0" * 64, "examples": 9, "seconds": 0.1}
    found = validate_statistics(StatisticsReply(**good, statistics=sums.tensors()), want, "a", 9)
    assert torch.equal(solve(found).weight, solve(sums).weight)
    with pytest.raises(ReplyError, match=reason):
        validate_statistics(
            StatisticsReply(**good | change, statistics=sums.tensors()), want, "a", 9
        )


def test_the_order_of_replies_does_not_change_a_bit() -> None:
    """Clients' sums are added in the order of names, whatever order they came in."""
    from server_app.rounds.nodes import Node
    from server_app.rounds.statistics import Gathered
    from server_app.state import State

    class Silent:
        def emit(self, event: Any) -> None:
            pass

    generator = torch.Generator().manual_seed(0)
    rows = {
        f"c{k}": (
            10.0**k * torch.randn(9, 4, generator=generator, dtype=torch.float64),
            torch.randn(9, generator=generator, dtype=torch.float64),
        )
        for k in range(5)
    }
    for form, learned in (
        (Values(1), lambda y: y), (Labels(2), lambda y: torch.stack([y > 0, y > 1], 1).double()),
        (Classes(2), lambda y: (y > 0).long()),
    ):  # fmt: skip
        totals = []
        for names in (sorted(rows), sorted(rows)[::-1], ["c3", "c0", "c4", "c2", "c1"]):
            nodes = [Node(i, name, 9) for i, name in enumerate(names)]
            state = State.__new__(State)
            state.have, state.digest, state.others, state.given = {}, "0" * 64, {}, {}
            want = ExpectedStatistics(0, "0" * 64, form, 4, 1e6)
            got = Gathered(want, nodes, state, Silent())
            for node in nodes:
                x, y = rows[node.name]
                sums = form.of(x, learned(y)).tensors()
                reply = StatisticsReply(node.name, 0, "0" * 64, 9, 1.0, sums)
                got.judge(node, seal(reply))
            assert not got.bad, got.bad
            (total,) = got.total(FederationConfig()).values()  # there is one width
            totals.append(total.tensors())
        assert all(tiny.same_bits(totals[0], other) for other in totals[1:])


def test_slopes_tune_the_head_alike_whatever_the_partition(
    job: dict[str, Any], tmp_path: Path
) -> None:
    """IID or one class a client: the same head but for rounding, and better than without."""
    found = []
    for scheme in ("iid", "shards"):
        flat = job | {"federation.partition": scheme, "head.start": "statistics"}
        flat |= {"train.lr": 1e-30, "wire.adapter": "fp32", "plug.refit": "none"}
        flat |= {"align.interval": 0, "lora.dropout": 0.0, "head.descent": 8}
        events = tiny.run(flat, tmp_path / scheme)
        (head,) = of(events, "head")
        assert 0 < head["descent"] <= head["exchanges"] <= 8
        kinds = [e["kind"] for e in of(events, "bytes") if e["direction"] == "down"]
        clients = len({e["client"] for e in of(events, "bytes")})
        assert kinds.count("head") == head["exchanges"] * clients
        found.append((start_head(tmp_path / scheme), head["descent"], head["loss"]))
    for name, t in found[0][0].items():
        torch.testing.assert_close(t, found[1][0][name], rtol=1e-4, atol=1e-5)
    assert found[0][1] == found[1][1]
    plain = tiny.run(job | {"head.start": "statistics", "align.interval": 0}, tmp_path / "plain")
    assert found[0][2] < of(plain, "head")[0]["loss"]


def test_masked_slopes_tune_the_head_as_plain_ones_do(job: dict[str, Any], tmp_path: Path) -> None:
    flat = job | {"head.start": "statistics", "head.descent": 3, "head.end": "trained"}
    flat |= {"train.lr": 1e-30, "wire.adapter": "fp32", "align.interval": 0, "lora.dropout": 0.0}
    flat |= {"federation.min-clients": 3, "plug.method": "refit", "plug.refit": "none"}
    steps, made = [], []
    for weighting in (
        "examples",
        "uniform",
    ):  # of changes; masked sums are over rows whatever it is
        run, secure = tmp_path / weighting, weighting == "uniform"
        asked = {"federation.weighting": weighting, "privacy.secure": secure}
        (head,) = of(tiny.run(flat | asked, run), "head")
        steps.append((head["exchanges"], head["descent"]))
        made.append(start_head(run))
    assert steps[0] == steps[1] and steps[0][1] > 0
    for name, t in made[0].items():
        torch.testing.assert_close(t, made[1][name], rtol=1e-3, atol=1e-4)


def test_without_labelled_rows_there_is_no_descent(job: dict[str, Any], tmp_path: Path) -> None:
    flat = {k: v for k, v in job.items() if k != "data.validation"} | {
        "data.validation-share": 0.0, "head.start": "statistics", "head.descent": 3,
        "head.end": "trained", "plug.method": "as-trained",
    }  # fmt: skip
    events = tiny.run(flat, tmp_path / "run")
    assert [e.get("exchanges", 0) for e in of(events, "head")] == [0]
    assert [e for e in of(events, "warning") if "head.descent" in e["text"]]
    with pytest.raises(UserError, match=r"needs head\.descent = 0"):
        tiny.run(flat | {"plan.widths": "0.25,0.5"}, tmp_path / "widths")


@pytest.mark.parametrize("method", ["best", "mapped"])
def test_public_rows_can_come_before_the_tasks_in_the_maps(
    job: dict[str, Any], tmp_path: Path, method: str
) -> None:
    """Another map, the same from run to run, and none of another kind than before."""
    flat = job | {"head.start": "statistics", "head.end": "better", "plug.method": method}
    flat |= {"plug.distil-steps": 2, "run.evaluate-every": 100}
    made = []
    for name, rows in (("none", 0), ("some", 40), ("again", 40)):
        events = tiny.run(flat | {"plug.map-rows": rows}, tmp_path / name)
        (plugged,) = of(events, "plugged")
        assert plugged["method"] in ("as-trained", "refit", "mapped", "distil")
        made.append((plugged["right"], start_head(tmp_path / name)))
    assert made[1][0] == made[2][0] and tiny.same_bits(made[1][1], made[2][1])
    if method == "mapped":
        assert not tiny.same_bits(made[0][1], made[1][1])

"""Whole runs with sub-FMs of several widths: who gets which, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from client_app.client import Client
from client_app.node import client_for
from fedpft_core.errors import RunError, UserError
from fedpft_core.model.names import is_lora
from fedpft_core.proxy.narrow import cut
from fedpft_core.wire.codec import decode
from fedpft_core.wire.envelope import Envelope, open_envelope, seal
from fedpft_core.wire.messages import OUT_OF_MEMORY, Failure, HelloReply, RefusalReply
from fedpft_core.wire.package import Package

ADAPTER = "adapter/adapter_model.safetensors"
MIXED = {"plan.widths": "0.25,0.5,0.75", "federation.widths": "0.25,0.5,0.75,0.25"}


class Nodes(tiny.Federation):
    """A federation whose nodes have more in their node config, or fail.

    `nodes` has node config keys by client; `instead(index, request, reply)` may give another reply.
    """

    def __init__(
        self, flat: dict[str, Any], nodes: dict[int, dict[str, Any]] | None = None,
        instead: Callable[[int, Envelope, Envelope], Envelope] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(flat)
        self.nodes, self.instead = nodes or {}, instead

    def client(self, index: int) -> Client:
        node = {"partition-id": index, "num-partitions": self.count} | self.nodes.get(index, {})
        made = client_for(node, self.flat)
        made.cache = self.caches[index]
        return made

    def _answer(self, index: int, envelope: Envelope) -> Envelope:
        reply = super()._answer(index, envelope)
        if self.instead is not None:
            reply = self.instead(index, envelope, reply)
        return reply

    def requests(self, index: int) -> list[Envelope]:
        return [e for i, e in self.sent if i == index and e.kind == "train"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny.write_task("bert", tmp_path_factory.mktemp("text"), rows=60) | {
        "distill.steps": 4, "align.steps": 3, "align.interval": 1, "align.proportion": 1.0,
        "train.local-epochs": 1, "train.local-steps": 3, "federation.rounds": 3,
        "federation.clients-per-round": 4, "run.evaluate-every": 3, "run.gradient-rows": 0,
    }  # fmt: skip


def given(events: list[dict[str, Any]]) -> dict[str, str]:
    return {e["client"]: e["width"] for e in tiny.main_run(events, "width_given")}


@pytest.fixture(scope="module")
def mixed(text: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    keys = {"head.start": "statistics", "head.end": "better", "plug.method": "best"}
    folder = tmp_path_factory.mktemp("mixed") / "run"
    federation = Nodes(text | MIXED | keys)
    return tiny.run(federation.flat, folder, federation), federation, folder


def test_each_client_trains_the_width_it_was_given(mixed: Any) -> None:
    events, federation, _ = mixed
    assert given(events) == {
        "client-0": "0.25", "client-1": "0.5", "client-2": "0.75", "client-3": "0.25"
    }  # fmt: skip
    sizes = {}
    for i in range(4):
        first = next(e for j, e in federation.sent if j == i and "package" in e.parts)
        package = Package.from_bytes(first.parts["package"])
        sizes[i] = [len(b.kept) or 24 for b in package.meta.plan.blocks]
    assert sizes == {0: [24, 6, 6, 24], 1: [24, 12, 12, 24], 2: [24, 18, 18, 24], 3: [24, 6, 6, 24]}
    replies = tiny.main_run(events, "reply")
    assert all(e["status"] == "ok" and e["width"] == given(events)[e["client"]] for e in replies)
    assert {e["width"] for e in tiny.main_run(events, "width_scored")} == {"0.25", "0.5"}
    assert {e["width"] for e in tiny.main_run(events, "width_distilled")} == {"0.25", "0.5"}
    (widths,) = tiny.main_run(events, "widths")
    assert widths["proxy"] == "0.75"
    assert [s["share"] for s in widths["sizes"]] == [0.625, 0.75, 0.875]


def test_each_width_has_a_patch_chain_of_its_own(mixed: Any) -> None:
    events, federation, _ = mixed
    assert len(tiny.main_run(events, "alignment")) == 2
    for i in range(4):
        kinds = [set(e.sizes()) for j, e in federation.sent if j == i]
        # A package once, then a patch for each alignment.
        assert sum("package" in k for k in kinds) == 1
        assert sum("patch" in k for k in kinds) == 2
    targets = {
        given(events)[f"client-{i}"]: open_envelope(federation.requests(i)[-1]).digest
        for i in range(3)
    }
    assert len(set(targets.values())) == 3


def test_a_smaller_sub_fm_stays_a_slice_through_distillation_and_alignments(mixed: Any) -> None:
    _, federation, _ = mixed
    store = federation.client(0).store
    last = {}
    for i in range(3):
        package = store.get(open_envelope(federation.requests(i)[-1]).digest)
        assert package is not None
        last[i] = package
    wide = last[2]
    for package in last.values():
        found = cut(wide.weights, wide.meta.plan, package.meta.plan)
        assert tiny.same_bits(found, package.weights)


def test_the_report_and_the_ledger_say_who_had_which(mixed: Any) -> None:
    from fedpft_console.report.tables import sheets
    from server_app.run.record import fold

    events, _, _ = mixed
    record = fold(events)
    tables = {s.title: s for s in sheets(record)}
    assert [r[:2] for r in tables["Who had which width"].rows] == [
        ["client-0", "0.25"], ["client-1", "0.5"], ["client-2", "0.75"], ["client-3", "0.25"]
    ]  # fmt: skip
    assert [r[5] for r in tables["Widths"].rows] == ["2", "1", "1"]
    down = sum(e["bytes"] for e in tiny.main_run(events, "bytes") if e["direction"] == "down")
    assert sum(s["down"] for s in record.by_width.values()) == down


def test_one_width_alone_is_the_plan_of_its_share(text: dict[str, Any], tmp_path: Path) -> None:
    """To the bit: what several widths add leaves one of them as it was."""
    tiny.run(text, tmp_path / "share", plan__keep_share=0.5)
    tiny.run(text, tmp_path / "width", plan__widths="0.5")
    assert (tmp_path / "share" / ADAPTER).read_bytes() == (
        tmp_path / "width" / ADAPTER
    ).read_bytes()


@pytest.mark.parametrize("how", ["joint", "apart"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    text: dict[str, Any], tmp_path: Path, how: str
) -> None:
    flat = text | MIXED | {"distill.widths": how, "federation.width-weighting": "agreement"}
    flat["run.gradient-rows"] = 8
    tiny.run(flat, tmp_path / "through")
    with pytest.raises(RunError, match="stopped"):
        tiny.run(flat, tmp_path / "twice", run__stop_after=2)
    with pytest.raises((UserError, RunError), match=r"plan\.widths"):
        tiny.run(
            flat, tmp_path / "twice", run__resume=True, plan__widths="0.25,0.5",
            federation__widths="0.25,0.5",
        )  # fmt: skip
    events = tiny.run(flat, tmp_path / "twice", run__resume=True)
    assert (tmp_path / "through" / ADAPTER).read_bytes() == (
        tmp_path / "twice" / ADAPTER
    ).read_bytes()
    assert len(tiny.main_run(events, "width_given")) == 4


def test_a_budget_below_the_smallest_width_is_left_out_by_name(
    text: dict[str, Any], tmp_path: Path
) -> None:
    flat = text | {"plan.widths": "0.25,0.5", "federation.widths": "0.25,0.5,0.5,none"}
    events = tiny.run(flat, tmp_path / "run", federation__rounds=1)
    assert given(events) == {"client-0": "0.25", "client-1": "0.5", "client-2": "0.5"}
    told = [e["text"] for e in tiny.main_run(events, "warning")]
    assert any("below the smallest width, 0.25" in t for t in told), told
    assert tiny.main_run(events, "round_finished")[0]["good"] == 3


def test_the_widest_that_fits_a_budget_is_given(text: dict[str, Any], tmp_path: Path) -> None:
    flat = text | {"plan.widths": "0.25,0.5,1"}
    sizes = tiny.main_run(
        tiny.run(flat, tmp_path / "sizes", federation__rounds=1), "widths"
    )[0]["sizes"]  # fmt: skip
    small, middle, full = (s["package"] for s in sizes)
    assert small < middle < full
    nodes = {
        0: {"max-package-mb": small / 1e6}, 1: {"max-package-mb": (full - 1) / 1e6},
        2: {"memory-mb": 10**6}, 3: {"width": "0.5", "memory-mb": 10**6},
    }  # fmt: skip
    events = tiny.run(flat, tmp_path / "run", Nodes(flat, nodes), federation__rounds=2)
    assert given(events) == {"client-0": "0.25", "client-1": "0.5", "client-2": "1",
                             "client-3": "0.5"}  # fmt: skip
    assert any("clients get the whole FM" in e["text"] for e in tiny.main_run(events, "warning"))


def test_a_width_that_is_not_given_is_refused_by_name(text: dict[str, Any], tmp_path: Path) -> None:
    flat = text | {"plan.widths": "0.25,0.5"}
    federation = Nodes(flat, {1: {"width": "0.3"}})
    events = tiny.run(flat, tmp_path / "run", federation, federation__rounds=1)
    assert "client-1" not in given(events)
    assert any(
        "its width 0.3 is none of plan.widths (0.25, 0.5)" in e["text"]
        for e in tiny.main_run(events, "warning")
    )
    # Nor is one where there are no widths at all.
    events = tiny.run(text, tmp_path / "one", Nodes(text, {1: {"width": "0.5"}}),
                      federation__rounds=1)  # fmt: skip
    assert any("this run has one sub-FM" in e["text"] for e in tiny.main_run(events, "warning"))


def test_out_of_memory_moves_a_client_down_within_the_round(
    text: dict[str, Any], tmp_path: Path
) -> None:
    flat = text | {"plan.widths": "0.25,0.5,0.75", "align.interval": 0}
    rooms = {0: 2 * 6, 2: 1}  # neurons of the middle blocks that fit

    def instead(index: int, request: Envelope, reply: Envelope) -> Envelope:
        if index in rooms and reply.kind == "train-reply":
            asked = open_envelope(request)
            package = federation.client(index).store.get(asked.digest)
            assert package is not None
            # Client 0 has less room from round 2 on.
            if asked.round > (index == 0) and len(package.meta.plan.blocks[1].kept) > rooms[index]:
                return seal(RefusalReply(f"client-{index}", OUT_OF_MEMORY))
        return reply

    federation = Nodes(flat, instead=instead)
    events = tiny.run(flat, tmp_path / "run", federation)
    moves = [e for e in tiny.main_run(events, "width_given") if "before" in e]
    of = [(e["client"], e["before"], e["width"]) for e in moves]
    assert ("client-0", "0.75", "0.5") in of
    assert [m[1:] for m in of if m[0] == "client-2"] == [("0.75", "0.5"), ("0.5", "0.25")]
    assert all("out of memory" in e["reason"] for e in moves)
    # Client 0 is in every round; client 2 has no room at the smallest and is bad by name.
    finished = tiny.main_run(events, "round_finished")
    assert [e["good"] for e in finished] == [3, 3, 3]
    # What it has already is cut, and not sent again.
    first, last, again = federation.requests(0)[:3]
    assert (
        "package" in first.parts and "package" not in last.parts and not open_envelope(last).patches
    )
    assert "patch.0" in again.parts and "package" not in again.parts
    assert again.sizes()["patch"] < 2000


def test_a_deadline_missed_twice_moves_a_client_down(text: dict[str, Any], tmp_path: Path) -> None:
    flat = text | {"plan.widths": "0.25,0.5"}

    class Slow(Nodes):
        """Client 3 never answers at the larger width."""

        def transport(self) -> Any:
            inner = super().transport()
            exchange = inner.exchange

            def slow(messages: Any, round: int, timeout: float, on_reply: Any, *more: Any) -> None:
                late = 4 if round and messages.get(4) is not None else 0
                if late and messages[4].kind == "train" and len(self.late) < 2:
                    self.late.append(round)
                    on_reply(4, Failure("no reply within 1.0 s", late=True))
                    messages = {k: v for k, v in messages.items() if k != 4}
                exchange(messages, round, timeout, on_reply, *more)

            inner.exchange = slow
            return inner

    federation = Slow(flat)
    federation.late = []  # type: ignore[attr-defined]
    events = tiny.run(flat, tmp_path / "run", federation)
    moves = [e for e in tiny.main_run(events, "width_given") if "before" in e]
    assert [(e["round"], e["client"], e["width"]) for e in moves] == [(2, "client-3", "0.25")]
    assert "missed 2 deadlines" in moves[0]["reason"]
    last = [e for e in tiny.main_run(events, "reply") if e["round"] == 3]
    assert {e["client"]: e["width"] for e in last if e["status"] == "ok"}["client-3"] == "0.25"


def test_a_reply_at_another_width_than_served_is_refused_by_name(
    text: dict[str, Any], tmp_path: Path
) -> None:
    flat = text | {"plan.widths": "0.25,0.5", "federation.widths": "0.25,0.5"}

    def instead(index: int, request: Envelope, reply: Envelope) -> Envelope:
        if index == 0 and reply.kind == "train-reply":
            return seal(replace(open_envelope(reply), digest=wide[0]))
        return reply

    federation = Nodes(flat, instead=instead)
    # The digest of the wider one: from a run with the same weights.
    probe = Nodes(flat)
    tiny.run(flat, tmp_path / "probe", probe, federation__rounds=1)
    wide = [open_envelope(probe.requests(1)[0]).digest]
    events = tiny.run(flat, tmp_path / "run", federation, federation__rounds=1)
    bad = [e for e in tiny.main_run(events, "reply") if e["status"] == "refused"]
    assert [e["client"] for e in bad] == ["client-0"]
    assert "width 0.5, which is not the one it was served" in bad[0]["reason"]


def test_a_wiped_store_is_served_its_own_width_again(text: dict[str, Any], tmp_path: Path) -> None:
    flat = text | MIXED | {"align.interval": 0}

    def wipe(client: Client, request: Any, reply: Envelope) -> None:
        # The last of its width: simulated clients share a store, and the others fill it.
        if client.name == "client-3" and request.round == 1:
            client.store.remove(request.digest)

    federation = Nodes(flat)
    federation.watch = wipe
    events = tiny.run(flat, tmp_path / "run", federation)
    needs = [e for e in tiny.main_run(events, "reply") if e["status"] == "need"]
    assert {e["client"] for e in needs} <= {"client-0", "client-3"} and needs
    assert all(e["good"] == 4 for e in tiny.main_run(events, "round_finished"))


# --- LoRA in fewer blocks -----------------------------------------------------------------


def test_what_a_node_does_not_train_it_does_not_send(text: dict[str, Any], tmp_path: Path) -> None:
    nodes = {0: {"train-blocks": "last:1"}, 1: {"train-blocks": "first:2"}}
    flat = text | {"wire.adapter": "fp32", "align.interval": 0, "federation.rounds": 1}
    federation = Nodes(flat, nodes)
    events = tiny.run(flat, tmp_path / "run", federation)
    sent: dict[int, dict[str, torch.Tensor]] = {}
    for i, reply in federation.received:
        if reply.kind == "train-reply":
            sent[i] = decode(open_envelope(reply).adapter, "fp32")
    start = decode(open_envelope(federation.requests(2)[0]).adapter, "fp32")

    def blocks(names: Any) -> set[int]:
        return {int(n.split("layer.")[1].split(".")[0]) for n in names if is_lora(n)}

    assert blocks(sent[0]) == {3} and blocks(sent[1]) == {0, 1}
    assert blocks(sent[2]) == {0, 1, 2, 3} == blocks(sent[3])
    assert all("classifier.weight" in s for s in sent.values())
    # The mean of each tensor over those who sent it, by hand.
    rows = {i: open_envelope(r).examples for i, r in federation.received if r.kind == "train-reply"}
    found = {
        k.removeprefix("base_model.model."): t
        for k, t in load_file(tmp_path / "run" / ADAPTER).items()
    }
    for name in (n for n in start if is_lora(n)):
        having = [i for i in sorted(sent) if name in sent[i]]
        total = sum(rows[i] for i in having)
        want = sum(sent[i][name].double() * rows[i] for i in having) / total
        torch.testing.assert_close(found[name], want.float(), rtol=0, atol=1e-6)
    assert {e["client"]: e["blocks"] for e in tiny.main_run(events, "width_given")} == {
        "client-0": "last:1", "client-1": "first:2"
    }  # fmt: skip


def test_a_robust_rule_takes_whole_adapters_only(text: dict[str, Any], tmp_path: Path) -> None:
    nodes = {0: {"train-blocks": "last:1"}}
    flat = text | {"federation.aggregate": "median", "federation.rounds": 1}
    events = tiny.run(flat, tmp_path / "run", Nodes(flat, nodes))
    told = [e["text"] for e in tiny.main_run(events, "warning")]
    assert any("federation.aggregate = median takes whole adapters" in t for t in told), told


@pytest.mark.parametrize("means", [
    {"blocks": "middle:2"}, {"blocks": "last:0"}, {"width": "x" * 65}, {"memory": 1.5},
    {"speed": 3}, {"memory": "much"}, {"base": "int4"}, {"base": 8},
])  # fmt: skip
def test_means_that_are_none_are_refused(
    text: dict[str, Any], tmp_path: Path, means: dict[str, Any]
) -> None:
    def instead(index: int, request: Envelope, reply: Envelope) -> Envelope:
        if index == 0 and reply.kind == "hello-reply":
            said = open_envelope(reply)
            assert isinstance(said, HelloReply)
            return seal(replace(said, means=means))
        return reply

    flat = text | {"plan.widths": "0.25,0.5", "federation.rounds": 1}
    events = tiny.run(flat, tmp_path / "run", Nodes(flat, instead=instead))
    assert "client-0" not in given(events)
    assert tiny.main_run(events, "round_finished")[0]["good"] == 3


@pytest.mark.parametrize(("key", "value"), [
    ("memory-mb", -2), ("max-package-mb", -1.0), ("train-blocks", "all"), ("width", 3),
    ("base", "int4"), ("base", ""),
])  # fmt: skip
def test_a_node_config_that_makes_no_sense_is_refused_by_its_key(
    text: dict[str, Any], key: str, value: Any
) -> None:
    with pytest.raises(UserError, match=key):
        client_for({"partition-id": 0, "num-partitions": 4, key: value}, text)


# --- schedules, weights, heads ------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["one-shot", "async"])
def test_other_schedules_serve_each_client_its_width(
    text: dict[str, Any], tmp_path: Path, schedule: str
) -> None:
    keys = {"federation.rounds": 1} if schedule == "one-shot" else {"federation.clients": 4}
    flat = text | MIXED | keys | {"federation.schedule": schedule}
    events = tiny.run(flat, tmp_path / "run")
    replies = [e for e in tiny.main_run(events, "reply") if e["status"] == "ok"]
    assert replies and all(e["width"] == given(events)[e["client"]] for e in replies)


def test_secure_aggregation_serves_each_client_its_width(
    text: dict[str, Any], tmp_path: Path
) -> None:
    flat = text | MIXED | {
        "privacy.secure": True, "federation.min-clients": 3, "federation.weighting": "uniform",
        "align.interval": 0, "federation.rounds": 1,
    }  # fmt: skip
    federation = Nodes(flat)
    events = tiny.run(flat, tmp_path / "run", federation)
    assert tiny.main_run(events, "round_finished")[0]["good"] == 4
    with pytest.raises(UserError, match="width-weighting"):
        tiny.run(flat | {"federation.width-weighting": "width"}, tmp_path / "other")


@pytest.mark.parametrize("how", ["width", "agreement"])
def test_a_width_weighs_as_it_is_asked_to(text: dict[str, Any], tmp_path: Path, how: str) -> None:
    flat = text | MIXED | {
        "federation.width-weighting": how, "run.gradient-rows": 8, "wire.adapter": "fp32",
        "federation.rounds": 1,
        "align.interval": 0, "plug.method": "as-trained", "plug.refit": "none",
    }  # fmt: skip
    federation = Nodes(flat)
    events = tiny.run(flat, tmp_path / "run", federation)
    if how == "width":
        (widths,) = tiny.main_run(events, "widths")
        factors = {s["width"]: s["share"] for s in widths["sizes"]}
    else:
        agreed = tiny.main_run(events, "width_agreement")
        factors = {e["width"]: max(0.0, e["cosine"]) for e in agreed}
    largest = max(factors.values())
    total, weights = 0.0, 0.0
    name = "classifier.weight"
    for i, reply in federation.received:
        if reply.kind == "train-reply":
            message = open_envelope(reply)
            weight = message.examples * factors[given(events)[f"client-{i}"]] / largest
            total = total + weight * decode(message.adapter, "fp32")[name].double()
            weights += weight
    found = load_file(tmp_path / "run" / ADAPTER)[f"base_model.model.{name}"]
    torch.testing.assert_close(found, (total / weights).float(), rtol=0, atol=1e-6)


def test_counts_of_a_neuron_are_of_the_clients_that_have_it(
    text: dict[str, Any], tmp_path: Path
) -> None:
    from fedpft_core.train.inactivity import Counts
    from server_app.rounds.widths import join
    from server_app.state import State, version_of

    flat = text | MIXED | {"align.proportion": 0.5, "federation.rounds": 2}
    federation = Nodes(flat)
    events = tiny.run(flat, tmp_path / "run", federation)
    assert len(tiny.main_run(events, "alignment")) == 1
    store = federation.client(0).store
    made = {}
    for i, name in enumerate(("0.25", "0.5", "0.75")):
        package = store.get(open_envelope(federation.requests(i)[0]).digest)
        assert package is not None
        made[name] = version_of(package)
    wide = made.pop("0.75")
    state = State(0, {}, wide.package, wide.digests, wide.digest, width="0.75", others=made)
    plans = {name: v.package.meta.plan for name, v in state.widths.items()}
    blocks = wide.package.meta.plan.pruned
    stream = torch.Generator().manual_seed(5)
    found, share = [], {}
    for width, tokens in (("0.25", 10), ("0.75", 30), ("0.25", 20)):
        off = {b: torch.randint(0, tokens, (len(plans[width].blocks[b].kept),), generator=stream)
               for b in blocks}  # fmt: skip
        found.append((width, Counts(off, dict.fromkeys(blocks, tokens))))
        for b in blocks:
            for neuron, n in zip(plans[width].blocks[b].kept, off[b].tolist(), strict=True):
                a, t = share.get((b, neuron), (0, 0))
                share[b, neuron] = (a + n, t + tokens)
    joined = join(state)
    assert joined is not None
    total = joined(found)
    assert set(total.tokens.values()) == {60}
    for b in blocks:
        for neuron, n in zip(plans["0.75"].blocks[b].kept, total.inactive[b].tolist(), strict=True):
            a, t = share[b, neuron]
            assert n == round(a / t * 60)


@pytest.mark.parametrize("how", ["joint", "apart"])
def test_distilled_widths_are_found_in_the_cache(
    text: dict[str, Any], tmp_path: Path, how: str
) -> None:
    flat = text | MIXED | {
        "distill.widths": how, "run.proxy-cache": str(tmp_path / "cache"), "federation.rounds": 1,
        "align.interval": 0,
    }  # fmt: skip
    runs = [tiny.run(flat, tmp_path / name) for name in ("first", "second")]
    assert [tiny.main_run(e, "distilled")[0].get("cached", False) for e in runs] == [False, True]
    assert [len(tiny.main_run(e, "width_distilled")) for e in runs] == [2, 2]
    assert (tmp_path / "first" / ADAPTER).read_bytes() == (
        tmp_path / "second" / ADAPTER
    ).read_bytes()


def test_agreement_needs_validation_rows(text: dict[str, Any], tmp_path: Path) -> None:
    flat = text | MIXED | {"federation.width-weighting": "agreement", "run.gradient-rows": 0}
    with pytest.raises(UserError, match="width-weighting"):
        tiny.run(flat, tmp_path / "run")


# --- tensors by their digest --------------------------------------------------------------


def test_widths_travel_rounded_and_stay_slices(text: dict[str, Any], tmp_path: Path) -> None:
    flat = text | {
        "plan.widths": "0.25,0.5,1", "federation.widths": "0.25,0.5,0.5,1", "federation.rounds": 2,
        "wire.package": "int8", "wire.patch": "same",
    }  # fmt: skip
    federation = Nodes(flat)
    events = tiny.run(flat, tmp_path / "run", federation)
    assert all(e["good"] == 4 for e in tiny.main_run(events, "round_finished"))
    store = federation.client(0).store
    last = [store.get(open_envelope(federation.requests(i)[-1]).digest) for i in (0, 1, 3)]
    small, wide, full = (p for p in last if p is not None)
    assert tiny.same_bits(cut(wide.weights, wide.meta.plan, small.meta.plan), small.weights)
    # Clients have a rounded copy of the FM.
    found = load_file(Path(flat["model.name"]) / "model.safetensors")
    fm = {f"bert.{k}": t for k, t in found.items()}
    matrices = [k for k, t in full.weights.items() if t.dim() > 1 and k in fm]
    assert matrices and all(not torch.equal(full.weights[k], fm[k]) for k in matrices)

"""Ten known faults of the method's first implementation, each put in on purpose.

For every fault there is one `check_…`: it passes on the code, and fails once the fault is in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracles
import pytest
import tiny
import torch

import client_app.chain
import client_app.client
import client_app.process
import client_app.simulated
import server_app.app
from fedpft_core import config
from fedpft_core.adapter import lora as adapters
from fedpft_core.aggregation import average as average_module
from fedpft_core.align import distill, losses, selection
from fedpft_core.align.losses import output_error, products, weight_error
from fedpft_core.data.stream import public_batches
from fedpft_core.model import load as models
from fedpft_core.model.families import family_of
from fedpft_core.model.plan import BlockPlan, Plan, pruned_ffns
from fedpft_core.proxy.choose import make_plan
from fedpft_core.train import inactivity
from fedpft_core.train import tune as training
from fedpft_core.train.evaluate import evaluate
from fedpft_core.train.inactivity import Counts, apoz, count_inactive
from fedpft_core.wire.envelope import open_envelope
from server_app.bench import Bench
from server_app.phases import align as align_phase
from server_app.phases import load as load_phase
from server_app.phases import score as score_phase
from server_app.rounds import ledger
from server_app.rounds import outcome as outcome_module
from server_app.rounds import requests as requests_module
from server_app.rounds.requests import learning_rate
from server_app.run.checkpoint import Checkpoints
from server_app.run.events import EventLog
from server_app.state import State, fresh_state
from server_app.strategy import Strategy

Patch = pytest.MonkeyPatch
QUICK = {
    "distill.steps": 4,
    "align.steps": 3,
    "align.interval": 1,
    "train.local-epochs": 1,
    "federation.rounds": 2,
    "run.gradient-rows": 0,
}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny.write_task("bert", tmp_path_factory.mktemp("task"), rows=90) | QUICK


@pytest.fixture
def fails() -> Callable[[], Any]:
    """A check that must notice what was put in."""
    return lambda: pytest.raises(AssertionError)


# --- 1. the weight term has no gradient ---------------------------------------------------


def check_weight_term_has_a_gradient() -> None:
    errors, results = [], []
    for alpha in (0.0, 10.0):
        teacher, student, plan, _ = tiny.pair("bert")
        target = {b: products(family_of("bert").ffns(teacher)[b]) for b in plan.pruned}
        distill.distil(
            teacher, student, plan, tiny.public("bert", 20), config.DistillConfig(),
            steps=20, lr=5e-3, alpha=alpha,
        )  # fmt: skip
        ffns = pruned_ffns(student, plan)
        errors.append(sum(float(weight_error(f, target[b])) for b, f in ffns.items()))
        results.append(tiny.weights(student))
    assert not tiny.same_bits(*results), "alpha does nothing"
    assert errors[1] < 0.9 * errors[0]


def test_1_weight_term_without_gradient(monkeypatch: Patch, fails: Any) -> None:
    check_weight_term_has_a_gradient()
    monkeypatch.setattr(
        losses, "products", lambda ffn: [ffn.out.weight.data @ w.weight.data for w in ffn.ins]
    )
    with fails():
        check_weight_term_has_a_gradient()


# --- 2. another adapter than the aggregate at alignment -----------------------------------


def _bench(flat: dict[str, Any]) -> tuple[Bench, State]:
    bench = load_phase.load(config.from_flat(flat), EventLog(None))
    return bench, fresh_state(bench.models.start, bench.package())


def check_aggregate_is_on_both_models(
    flat: dict[str, Any], align: Callable[[Bench, State, int, Counts], None]
) -> None:
    bench, state = _bench(flat)
    m = bench.models
    aggregate, last_client, stale = (
        tiny.random_adapter(m.proxy, m.plan, seed) for seed in (1, 2, 3)
    )
    adapters.load(m.proxy, last_client, m.plan)
    adapters.load(m.fm, stale)
    state.adapter = {k: v.clone() for k, v in aggregate.items()}
    counts = count_inactive(m.proxy, m.plan, bench.rows.scored, 32, "nonpositive")
    seen: list[dict[str, torch.Tensor]] = []

    def spy(teacher: Any, student: Any, plan: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend((adapters.read(teacher), adapters.read(student, plan)))
        result = real(teacher, student, plan, *args, **kwargs)
        seen.extend((adapters.read(teacher), adapters.read(student, plan)))
        return result

    real = distill.distil
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "distil", spy)
        align(bench, state, 1, counts)
    assert len(seen) == 4
    assert all(tiny.same_bits(adapter, aggregate) for adapter in seen)
    assert tiny.same_bits(state.adapter, aggregate), "alignment moved the adapter"


def test_2_alignment_at_another_adapter(task: dict[str, Any], fails: Any) -> None:
    def student_with_the_last_clients(bench: Bench, *args: Any) -> None:
        m: Any = bench.models
        m.plug = lambda adapter: adapters.load(m.fm, adapter)
        align_phase.align(bench, *args)

    def stale_teacher(bench: Bench, *args: Any) -> None:
        m: Any = bench.models
        m.plug = lambda adapter: adapters.load(m.proxy, adapter, m.plan)
        align_phase.align(bench, *args)

    check_aggregate_is_on_both_models(task, align_phase.align)
    for fault in (student_with_the_last_clients, stale_teacher):
        with fails():
            check_aggregate_is_on_both_models(task, fault)


# --- 3. APoZ: exact zeros, padding, one block's total -------------------------------------


def check_counts(count: Callable[..., Counts]) -> None:
    """Counts under the default rule are the oracle's, and tell neurons apart."""
    _, small, plan, _ = tiny.pair("bert")
    data = tiny.encoded("bert", 23)
    found = count(small, plan, data, 7, config.AlignConfig().inactive)
    inactive, tokens = oracles.inactive_counts(small, plan, data, "nonpositive")
    assert found.tokens == tokens
    assert set(tokens) == set(plan.pruned) and len(tokens) == 2
    assert {b: c.tolist() for b, c in found.inactive.items()} == inactive
    rates = {b: apoz(found.inactive[b], found.tokens[b]) for b in plan.pruned}
    chosen = selection.choose("apoz", selection.View(rates), 0.5)
    for block in plan.pruned:
        assert len(set(rates[block].tolist())) > 3, "the choice is random"
        want = oracles.largest([n / tokens[block] for n in inactive[block]], 3)
        assert tuple(chosen[block].tolist()) == want


def test_3_apoz_counted_wrongly(monkeypatch: Patch, fails: Any) -> None:
    def totals_of_the_first_block(*args: Any) -> Counts:
        found = count_inactive(*args)
        first = min(found.tokens)
        return Counts(found.inactive, {b: n if b == first else 0 for b, n in found.tokens.items()})

    check_counts(count_inactive)
    with fails():
        check_counts(totals_of_the_first_block)
    with monkeypatch.context() as patch:
        patch.setattr(inactivity, "is_inactive", lambda activation, _rule: activation == 0)
        with fails():
            check_counts(count_inactive)
    with monkeypatch.context() as patch:
        patch.setattr(
            inactivity,
            "real_positions",
            lambda batch, n: torch.ones(len(batch["labels"]), n).bool(),
        )
        with fails():
            check_counts(count_inactive)


# --- 4. one model object for everybody ----------------------------------------------------


def check_changed_weights_travel(flat: dict[str, Any], folder: Path) -> None:
    """Every client trains on the weights asked for, which came to it as bytes that were counted."""
    trained_on: list[tuple[int, str, bool]] = []
    servers: list[Bench] = []

    def watch(client: Any, request: Any, reply: Any) -> None:
        if reply.kind != "train-reply":
            return
        held = next(iter(m for d, m in client.cache.models.items() if d == request.digest))
        model = held.model.model
        live = {
            k.removeprefix("base_model.model.").replace(".base_layer.", "."): v
            for k, v in model.state_dict().items()
        }
        package = client.store.get(request.digest)
        same = package is not None and all(
            torch.equal(live[k], v) for k, v in package.weights.items()
        )
        theirs = {p.data_ptr() for p in servers[0].models.proxy.parameters()}
        assert not theirs & {p.data_ptr() for p in model.parameters()}, "shared with the server"
        trained_on.append((request.round, request.digest, same))

    load = load_phase.load

    def spy(*args: Any) -> Any:
        made = load(*args)
        servers.append(made)
        return made

    federation = tiny.Federation(flat | {"federation.clients-per-round": 4}, watch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_phase, "load", spy)
        events = tiny.run(federation.flat, folder, federation)
    alignments = {e["round"]: e for e in tiny.main_run(events, "alignment")}
    assert set(alignments) == {1}
    assert all(same for _, _, same in trained_on), "trained on other weights than asked for"
    for round, digest, _ in trained_on:
        name = "digest_from" if round == 1 else "digest_to"
        assert digest == alignments[1][name]
    assert len(trained_on) == 8
    ledger: dict[tuple[int, str, str], int] = {}
    for e in tiny.main_run(events, "bytes"):
        key = (e["round"], e["direction"], e["kind"])
        ledger[key] = ledger.get(key, 0) + e["bytes"]
    assert ledger.get((1, "down", "package"), 0) > 0, "traffic is not measured"
    assert ledger.get((2, "down", "patch"), 0) > 0, "the changed weights were never sent"
    assert (2, "down", "package") not in ledger
    for direction, messages in (("down", federation.sent), ("up", federation.received)):
        carried: dict[str, int] = {}
        for _, envelope in messages:
            for kind, size in envelope.sizes().items():
                carried[kind] = carried.get(kind, 0) + size
        counted: dict[str, int] = {}
        for (_, way, kind), size in ledger.items():
            if way == direction:
                counted[kind] = counted.get(kind, 0) + size
        assert counted == carried, "the ledger is not what travelled"


@pytest.mark.parametrize("fault", ["none", "stale", "shared", "unsent", "uncounted"])
def test_4_one_model_for_everybody(
    fault: str, task: dict[str, Any], tmp_path: Path, monkeypatch: Patch
) -> None:
    held = client_app.client.Client._held
    deliver = requests_module.delivery

    if fault in ("stale", "shared", "unsent"):
        # Whoever has any sub-FM is sent no other.
        monkeypatch.setattr(
            requests_module, "delivery",
            lambda have, *more: (False, ()) if have else deliver(have, *more),
        )  # fmt: skip
    if fault == "stale":

        def whatever_is_here(self: Any, wanted: Any) -> Any:
            if self.cache.models:
                self.cache.models[wanted.digest] = next(iter(self.cache.models.values()))
            return self.cache.models.get(wanted.digest) or held(self, wanted)

        monkeypatch.setattr(client_app.client.Client, "_held", whatever_is_here)
    if fault == "shared":
        # What the server changes is at the clients without travelling.
        benches: list[Bench] = []
        load = load_phase.load

        def remember(*args: Any) -> Any:
            made = load(*args)
            benches.append(made)
            return made

        def the_servers(self: Any, wanted: Any) -> Any:
            mine = next(iter(self.cache.models.values()), None) or held(self, wanted)
            if mine is not None:
                shared = replace(mine.model, model=benches[-1].models.proxy)
                self.cache.models[wanted.digest] = mine = replace(mine, model=shared)
            return mine

        monkeypatch.setattr(load_phase, "load", remember)
        monkeypatch.setattr(client_app.client.Client, "_held", the_servers)
    if fault == "uncounted":
        monkeypatch.setattr(ledger, "count_bytes", lambda *args: None)

    if fault == "none":
        check_changed_weights_travel(task, tmp_path)
    else:
        why = {
            "stale": "other weights",
            "shared": "shared with the server",
            "unsent": "never sent",  # the clients insist, and are served the whole sub-FM
            "uncounted": "not measured",
        }
        with pytest.raises(AssertionError, match=why[fault]):
            check_changed_weights_travel(task, tmp_path)


def check_nothing_leaks_between_clients(flat: dict[str, Any], folder: Path) -> None:
    """A client's reply is the same whoever used the worker process before."""
    federation = tiny.Federation(flat)
    tiny.run(flat, folder, federation, federation__rounds=1)
    (request, *_) = (e for _, e in federation.sent if e.kind == "train")
    alone = client_app.process.ProcessCache()
    shared = client_app.process.ProcessCache()
    replies = []
    for cache, order in ((alone, [1]), (shared, [0, 2, 1]), (shared, [1])):
        for index in order:
            client = federation.client(index)
            client.cache = cache
            reply = open_envelope(client.handle(request))
        replies.append(reply)
    for reply in replies[1:]:
        assert tiny.same_bits(reply.adapter, replies[0].adapter)
        assert reply.loss == replies[0].loss
        assert tiny.same_bits(reply.counts, replies[0].counts)


def test_4_state_that_leaks_between_clients(
    task: dict[str, Any], tmp_path: Path, monkeypatch: Patch, fails: Any
) -> None:
    check_nothing_leaks_between_clients(task, tmp_path / "real")
    train = client_app.chain.fine_tune

    def on_what_was_left_behind(model: Any, *args: Any) -> Any:
        left = getattr(model, "left_behind", None)
        if left is not None:
            with torch.no_grad():
                for p, value in zip(_trainable(model), left, strict=True):
                    p.copy_(value)
        result = train(model, *args)
        model.left_behind = [p.detach().clone() for p in _trainable(model)]
        return result

    monkeypatch.setattr(client_app.chain, "fine_tune", on_what_was_left_behind)
    with fails():
        check_nothing_leaks_between_clients(task, tmp_path / "fault")


def _trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


# --- 5. replies and weights in different orders -------------------------------------------


class _Backwards:
    """A transport whose replies arrive in the reverse order."""

    def __init__(self, transport: Any) -> None:
        self.transport = transport

    def nodes(self) -> list[int]:
        return list(reversed(self.transport.nodes()))

    def exchange(self, messages: Any, *args: Any) -> None:
        self.transport.exchange(dict(reversed(messages.items())), *args)


class _Federation(tiny.Federation):
    def transport(self) -> Any:
        return _Backwards(super().transport())


def check_weights_belong_to_their_replies(flat: dict[str, Any], folder: Path) -> None:
    """What round 2 starts from is Σ |D_i| / |D| · W_i over the replies of round 1."""
    flat = flat | {"wire.adapter": "fp32"}  # nothing is rounded on the way
    results = []
    for kind in (tiny.Federation, _Federation):
        federation = kind(flat)
        tiny.run(flat, folder / kind.__name__, federation, align__interval=0)
        cfg = config.from_flat(federation.flat)
        replies = [(i, open_envelope(e)) for i, e in federation.received if e.kind == "train-reply"]
        first = [(i, r) for i, r in replies if r.round == 1]
        sizes = [len(client_app.simulated.partition_rows(cfg, i, 4)) for i, _ in first]
        assert len(set(sizes)) > 1
        want = oracles.weighted_mean([r.adapter for _, r in first], sizes)
        asked = [open_envelope(e) for _, e in federation.sent if e.kind == "train"]
        for request in asked:
            if request.round == 2:
                for name, value in request.adapter.items():
                    torch.testing.assert_close(value.double(), want[name], rtol=1e-6, atol=1e-9)
        results.append(asked[-1].adapter)
    assert tiny.same_bits(*results), "the order of arrival matters"


@pytest.mark.parametrize("fault", ["none", "equal weights", "another order", "order of arrival"])
def test_5_replies_weighted_wrongly(
    fault: str, task: dict[str, Any], tmp_path: Path, monkeypatch: Patch, fails: Any
) -> None:
    running = average_module.RunningSum

    class EqualWeights(average_module.RunningSum):
        def add(self, client: str, weight: float) -> None:
            super().add(client, 1)

    class AnotherOrder(average_module.RunningSum):
        def __init__(self, replies: Any) -> None:
            super().__init__(replies)
            self.pending: list[tuple[str, float]] = []

        def add(self, client: str, weight: float) -> None:
            self.pending.append((client, weight))

        def result(self) -> Any:
            right = running(self.replies)
            weights = [w for _, w in self.pending]
            for (client, _), w in zip(self.pending, reversed(weights), strict=True):
                right.add(client, w)
            return right.result()

    if fault == "none":
        check_weights_belong_to_their_replies(task, tmp_path)
        return
    if fault == "equal weights":
        monkeypatch.setattr(average_module, "RunningSum", EqualWeights)
    elif fault == "another order":
        monkeypatch.setattr(average_module, "RunningSum", AnotherOrder)
    else:
        mean = outcome_module.aggregate

        def by_arrival(rule: str, replies: Any) -> Any:
            slots = replies._slots.items()  # as they arrived
            replies._slots = {
                n: (slot, w) for (n, (slot, _)), w in zip(slots, replies.examples, strict=True)
            }
            return mean(rule, replies)

        monkeypatch.setattr(outcome_module, "aggregate", by_arrival)
    with fails():
        check_weights_belong_to_their_replies(task, tmp_path)


# --- 6. schedules -------------------------------------------------------------------------


def check_round_rates(rate: Callable[[float, int, int], float]) -> None:
    for rounds in range(1, 30):
        found = [rate(8e-4, t, rounds) for t in range(1, rounds + 1)]
        assert found == pytest.approx(oracles.round_rates(8e-4, rounds), rel=1e-12)
        assert found[0] == pytest.approx(8e-4, rel=1e-15)
        assert min(found) > 0
        assert len(set(found)) == rounds
    assert [rate(1.0, t, 5) for t in range(1, 6)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


def test_6_learning_rate_of_the_rounds(fails: Any) -> None:
    def skips_one_and_repeats_the_last(lr0: float, t: int, rounds: int) -> float:
        rate = lr0
        for done in range(2, t + 1):
            rate = lr0 * (rounds - done) / rounds or rate  # 0 is taken for unset
        return rate

    values = [skips_one_and_repeats_the_last(1.0, t, 5) for t in range(1, 6)]
    assert values == pytest.approx([1, 0.6, 0.4, 0.2, 0.2])
    check_round_rates(learning_rate)
    with fails():
        check_round_rates(skips_one_and_repeats_the_last)


def check_few_steps_train() -> None:
    """However few steps an alignment has, each runs at a rate above 0, and one at the peak."""
    share = config.DistillConfig().warmup_share
    for steps in range(1, 60):
        rates = [distill.warmup_then_linear(i, steps, share) for i in range(steps)]
        assert min(rates) > 0
        assert max(rates) == 1.0
    teacher, student, plan, _ = tiny.pair("bert")
    before = tiny.weights(student)
    chosen = {b: torch.arange(6) for b in plan.pruned}
    distill.distil(
        teacher, student, plan, tiny.public("bert", 1), config.DistillConfig(),
        steps=1, lr=1e-3, alpha=0.0, chosen=chosen,
    )  # fmt: skip
    assert not tiny.same_bits(tiny.weights(student), before), "the alignment did nothing"


def test_6_alignment_at_rate_0(monkeypatch: Patch, fails: Any) -> None:
    def from_0_to_0(step: int, steps: int, warmup_share: float) -> float:
        warmup = math.ceil(warmup_share * steps)
        if step < warmup:
            return step / warmup
        return (steps - step) / max(1, steps - warmup)

    check_few_steps_train()
    monkeypatch.setattr(distill, "warmup_then_linear", from_0_to_0)
    with fails():
        check_few_steps_train()


def check_alignment_rounds(fires: Callable[[int, int], list[int]]) -> None:
    for rounds in range(1, 13):
        assert fires(0, rounds) == []
        for t in range(1, 15):
            want = [r for r in range(1, rounds) if r % t == 0]
            assert fires(t, rounds) == want, f"t = {t}, T = {rounds}"


def test_6_alignment_after_the_last_round(fails: Any) -> None:
    plan = tiny.plan_for(tiny.model("bert"))

    def real(t: int, rounds: int) -> list[int]:
        cfg = config.from_flat({"align.interval": t, "federation.rounds": rounds})
        every = range(1, rounds + 1)
        return [r for r in every if align_phase.due(cfg, plan, r)]

    def also_after_the_last(t: int, rounds: int) -> list[int]:
        return [r for r in range(1, rounds + 1) if t and r % t == 0]

    def crashes_when_t_is_t(t: int, rounds: int) -> list[int]:
        due = [r for r in range(1, rounds) if t and r % t == 0]
        assert t != rounds or due[-1], "no such round"
        return due

    check_alignment_rounds(real)
    with fails():
        check_alignment_rounds(also_after_the_last)
    with pytest.raises(IndexError):
        check_alignment_rounds(crashes_when_t_is_t)


# --- 7. retained blocks aligned -----------------------------------------------------------


def check_retained_blocks_stay(distil: Callable[..., Any]) -> None:
    teacher, student, plan, _ = tiny.pair("bert")
    chosen = {b: torch.tensor([0, 2, 4]) for b in plan.pruned}
    distil(
        teacher, student, plan, tiny.public("bert", 5), config.DistillConfig(),
        steps=5, lr=5e-3, alpha=0.0, chosen=chosen,
    )  # fmt: skip
    row = family_of("bert")
    for block, (entry, mine, theirs) in enumerate(
        zip(plan.blocks, row.ffns(student), row.ffns(teacher), strict=True)
    ):
        if entry.state == "pruned":
            continue
        assert block in (0, 3)
        for part, p in mine.parts().items():
            assert torch.equal(p, theirs.parts()[part]), f"{part} of whole block {block} moved"


def test_7_retained_blocks_aligned(fails: Any) -> None:
    def with_a_slice_of_every_block(
        teacher: Any, student: Any, plan: Plan, *args: Any, chosen: Any, **kwargs: Any
    ) -> Any:
        blocks = tuple(
            b if b.state == "pruned" else BlockPlan("pruned", tuple(range(24))) for b in plan.blocks
        )
        everywhere = {i: torch.tensor([0, 2, 4]) for i in range(4)}
        wrong = Plan(plan.model_type, plan.fm_neurons, blocks)
        return distill.distil(teacher, student, wrong, *args, chosen=everywhere, **kwargs)

    check_retained_blocks_stay(distill.distil)
    with fails():
        check_retained_blocks_stay(with_a_slice_of_every_block)


# --- 8. seeds that do not seed, choices made on test data ---------------------------------


def check_seeded(draw: Callable[[int], Any]) -> None:
    """The same seed gives the same whatever else happened, another seed something else."""
    drawn = []
    for seed, noise in ((0, 1), (1, 2), (0, 3), (1, 4)):
        torch.manual_seed(noise)
        np.random.seed(noise)
        drawn.append(repr(draw(seed)))
    assert drawn[0] == drawn[2] and drawn[1] == drawn[3], "the seed does not seed"
    assert drawn[0] != drawn[1], "the seed is ignored"


def _with_seed(flat: dict[str, Any], seed: int) -> config.Config:
    return config.from_flat(flat | {"run.seed": seed})


def _draws(flat: dict[str, Any]) -> dict[str, Callable[[int], Any]]:
    fm, small, plan, _ = tiny.pair("bert", dropout=0.3)
    nodes: Any = [SimpleNamespace(name=f"client-{i}") for i in range(20)]
    start = adapters.read(small, plan)
    settings = training.LocalSettings(1e-2, 8, 1, 0, 0.0, 1.0, 1)

    def partition(seed: int) -> Any:
        return client_app.simulated.partition_rows(_with_seed(flat, seed), 0, 4).inputs

    def adapter(seed: int) -> Any:
        return {k: v.tolist() for k, v in adapters.initial(fm, seed).items()}

    def head(seed: int) -> Any:
        cfg = _with_seed(flat, seed)
        return models.load(cfg.model, tiny.TASK.model(), seed).model.classifier.weight.tolist()

    def clients(seed: int) -> Any:
        chosen: Any = Strategy(_with_seed(flat, seed), SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]
        return [n.name for r in range(1, 6) for n in chosen.sample(nodes, r, 1)]

    def local_training(seed: int) -> Any:
        adapters.load(small, start, plan)
        training.fine_tune(small, tiny.TASK, tiny.encoded("bert", 16), settings, seed)
        return {k: v.tolist() for k, v in adapters.read(small, plan).items()}

    def public(seed: int) -> Any:
        rows = [t for t, _ in tiny.sentences(30)]
        made = public_batches(rows, tiny.tokenizer("bert"), 4, 16, 3, seed)
        return [b["input_ids"].tolist() for b in made]

    def random_saliency(seed: int) -> Any:
        cfg = config.PlanConfig(saliency="random")
        return make_plan(tiny.model("bert"), cfg, seed).to_json()

    def validation(seed: int) -> Any:
        return client_app.simulated.load_task(_with_seed(flat, seed).data, seed).validation.inputs

    drawn = (partition, adapter, head, clients, local_training, public, random_saliency, validation)
    return {f.__name__: f for f in drawn}


def test_8_seeds_that_do_not_seed(task: dict[str, Any], fails: Any) -> None:
    draws = _draws(task)
    assert len(draws) == 8
    for draw in draws.values():
        check_seeded(draw)
    with fails():
        check_seeded(lambda seed: torch.rand(9).tolist())
    with fails():
        check_seeded(lambda seed: draws["adapter"](0))


def test_8_partition_cache_that_ignores_the_seed(
    task: dict[str, Any], monkeypatch: Patch, fails: Any
) -> None:
    check_seeded(_draws(task)["partition"])
    make = client_app.simulated._partitions.__wrapped__
    cached: dict[Any, Any] = {}

    def by_number_of_clients(data: Any, federation: Any, seed: int, count: int, run: str) -> Any:
        return cached.setdefault(count, make(data, federation, seed, count, run))

    monkeypatch.setattr(client_app.simulated, "_partitions", by_number_of_clients)
    monkeypatch.setattr(
        client_app.simulated, "_task", lru_cache(lambda d, s: client_app.simulated.load_task(d, 0))
    )
    with fails():
        check_seeded(_draws(task)["partition"])


def check_test_data_decides_nothing(flat: dict[str, Any], folder: Path) -> None:
    """The product is the last round's, whatever the test labels say."""
    exported, accuracies = [], []
    rotated = tiny.write_csv(
        folder / "rotated.csv",
        [(t, tiny.LABELS[(tiny.LABELS.index(y) + 1) % 3]) for t, y in tiny.sentences(90, 1)],
    )
    for name, test in (("true", flat["data.test"]), ("rotated", str(rotated))):
        keys = flat | {"data.test": test, "distill.method": "none"}
        keys |= {"align.interval": 0, "federation.rounds": 3, "train.local-epochs": 3}
        federation = tiny.Federation(keys)
        events = tiny.run(federation.flat, folder / name, federation)
        scores = [e for e in tiny.main_run(events, "evaluation") if e["split"] == "test"]
        accuracies.append([e["value"] for e in scores if e["model"] == "fm"])
        exported.append((folder / name / "adapter" / "adapter_model.safetensors").read_bytes())
    best = [max(range(4), key=a.__getitem__) for a in accuracies]
    # Otherwise choosing by test accuracy would choose the same round.
    assert best[0] != best[1], f"the check has no grip: {accuracies}"
    assert exported[0] == exported[1], "test data decided what is exported"


def test_8_best_checkpoint_chosen_on_test_data(
    task: dict[str, Any], tmp_path: Path, monkeypatch: Patch, fails: Any
) -> None:
    (tmp_path / "real").mkdir(), (tmp_path / "fault").mkdir()
    check_test_data_decides_nothing(task, tmp_path / "real")
    score, export = score_phase.score, adapters.export
    best: dict[str, Any] = {}

    def remember_the_best(bench: Bench, round: int, which: str) -> Any:
        result = score(bench, round, which)
        if round == 0 and which == "proxy":
            best.clear()
        if which != "proxy" and result.value > best.get("value", -1.0):
            best.update(value=result.value, adapter=adapters.read(bench.models.fm))
        return result

    def export_the_best(fm: Any, *args: Any) -> Any:
        adapters.load(fm, best["adapter"])
        return export(fm, *args)

    monkeypatch.setattr(score_phase, "score", remember_the_best)
    monkeypatch.setattr(adapters, "export", export_the_best)
    with pytest.raises(AssertionError, match="test data decided"):
        check_test_data_decides_nothing(task, tmp_path / "fault")


# --- 9. guesses and hard-coded settings ---------------------------------------------------


def check_family_is_read_from_the_model(tell: Callable[[Path], str], folder: Path) -> None:
    for family in tiny.FAMILIES:
        others = "-".join(f for f in tiny.FAMILIES if f != family)
        where = tiny.folder(family, folder / f"fine-tuned-{others}")
        assert tell(where) == family


def test_9_family_guessed_from_the_path(tmp_path: Path, fails: Any) -> None:
    def real(folder: Path) -> str:
        cfg = config.ModelConfig(name=str(folder))
        try:
            loaded = models.load(cfg, tiny.TASK.model(), 0)
        except models.UserError:
            loaded = models.load(cfg, tiny.task_of("vit").model(), 0)
        return loaded.family.name

    def guessed(folder: Path) -> str:
        return next((f for f in ("roberta", "bert", "deit") if f in folder.name), "vit")

    check_family_is_read_from_the_model(real, tmp_path / "real")
    with fails():
        check_family_is_read_from_the_model(guessed, tmp_path / "fault")


def check_alignment_settings(flat: dict[str, Any]) -> None:
    """Rate, steps, batch and length of an alignment are the configuration's."""
    keys = {"align.lr": 3.21e-3, "align.steps": 2, "distill.batch-size": 5, "distill.length": 11}
    bench, state = _bench(flat | keys)
    m = bench.models
    counts = count_inactive(m.proxy, m.plan, bench.rows.scored, 32, "nonpositive")
    peaks: list[float] = []
    shapes: set[tuple[int, ...]] = set()

    class Spy(torch.optim.AdamW):
        def __init__(self, params: Any, lr: float, **kwargs: Any) -> None:
            peaks.append(lr)
            super().__init__(params, lr=lr, **kwargs)

    handle = m.proxy.register_forward_pre_hook(
        lambda _m, _a, kwargs: shapes.add(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    steps: list[int] = []
    real = torch.optim.AdamW.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Spy)
        patch.setattr(
            Spy, "step", lambda self, *a, **k: (steps.append(1), real(self, *a, **k))[1],
            raising=False,
        )  # fmt: skip
        align_phase.align(bench, state, 1, counts)
    handle.remove()
    assert peaks == [3.21e-3]
    assert len(steps) == 2
    assert shapes == {(5, 11)}


@pytest.mark.parametrize("fault", ["none", "lr", "batch"])
def test_9_hard_coded_alignment(
    fault: str, task: dict[str, Any], monkeypatch: Patch, fails: Any
) -> None:
    if fault == "none":
        check_alignment_settings(task)
        return
    if fault == "lr":
        real = distill.distil
        monkeypatch.setattr(
            distill, "distil", lambda *args, **kwargs: real(*args, **(kwargs | {"lr": 6e-4}))
        )
    else:
        import server_app.bench

        stream = server_app.bench.public_batches
        monkeypatch.setattr(
            server_app.bench, "public_batches",
            lambda rows, processor, _size, _length, *more: stream(rows, processor, 32, 16, *more),
        )  # fmt: skip
    with fails():
        check_alignment_settings(task)


def check_image_size_is_the_models(load: Callable[..., models.Loaded], folder: Path) -> None:
    from fedpft_core.data.encoding import encode

    for size in (16, 24):
        where = tiny.folder("vit", folder / str(size), image_size=size)
        cls = type(tiny.processor("vit"))
        shape = {"height": size, "width": size}
        cls(size=shape, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(where)
        loaded = load(config.ModelConfig(name=str(where)), tiny.task_of("vit").model(), 0)
        data = encode(tiny.examples("vit", 3), loaded.processor, 16)
        assert tuple(data.pixels.shape[-2:]) == (size, size)
        evaluate(loaded.model, tiny.TASK, data, 3)


def test_9_hard_coded_image_size(tmp_path: Path, fails: Any) -> None:
    def always_16(*args: Any) -> models.Loaded:
        loaded = models.load(*args)
        loaded.processor.size = {"height": 16, "width": 16}
        return loaded

    check_image_size_is_the_models(models.load, tmp_path / "real")
    with fails():
        check_image_size_is_the_models(always_16, tmp_path / "fault")


# --- 10. one model evaluated, no resume, dropout in distillation --------------------------


def check_both_models_are_scored(flat: dict[str, Any], folder: Path) -> None:
    events = tiny.run(flat, folder, align__interval=0)
    scored = [e for e in tiny.main_run(events, "evaluation") if e["split"] == "test"]
    found = {(e["round"], e["model"]) for e in scored}
    after = {(r, m) for r in (1, 2) for m in ("proxy", "fm-as-trained", "fm")}
    assert found == after | {(0, "proxy"), (0, "fm")}


def test_10_only_the_fm_evaluated(
    task: dict[str, Any], tmp_path: Path, monkeypatch: Patch, fails: Any
) -> None:
    check_both_models_are_scored(task, tmp_path / "real")
    score = score_phase.score

    def fm_only(bench: Bench, round: int, which: str) -> Any:
        if which == "proxy":
            return SimpleNamespace(seconds=0.0, value=0.0)
        return score(bench, round, which)

    monkeypatch.setattr(score_phase, "score", fm_only)
    with fails():
        check_both_models_are_scored(task, tmp_path / "fault")


def check_resume(flat: dict[str, Any], folder: Path) -> None:
    """A resumed run trains the missing rounds only, and ends as an uninterrupted one."""
    flat = flat | {"distill.method": "none", "align.interval": 0, "federation.clients-per-round": 2}
    final = []
    for name, stops in (("stopped", [1, 0]), ("through", [0])):
        for stop in stops:
            federation = tiny.Federation(flat)
            resume = name == "stopped" and stop == 0
            try:
                tiny.run(flat, folder / name, federation, run__stop_after=stop, run__resume=resume)
            except server_app.app.RunError:
                assert stop == 1
            sent = [open_envelope(e) for _, e in federation.sent if e.kind == "train"]
            rounds = {m.round for m in sent}
            if name == "stopped":
                assert rounds == ({1} if stop else {2}), "finished rounds were trained again"
        final.append((folder / name / "adapter" / "adapter_model.safetensors").read_bytes())
    assert final[0] == final[1]


def test_10_no_resume(task: dict[str, Any], tmp_path: Path, monkeypatch: Patch, fails: Any) -> None:
    check_resume(task, tmp_path / "real")
    monkeypatch.setattr(Checkpoints, "latest", lambda self: None)
    with fails():
        check_resume(task, tmp_path / "fault")


def check_distillation_without_dropout(distil: Callable[..., Any]) -> None:
    """Whatever mode the models come in; 0.5 of everything would be dropped otherwise."""
    first = []
    for noise in (0, 1):
        teacher, student, plan, _ = tiny.pair("bert", dropout=0.5)
        for model in (teacher, student):
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.5
            model.train()
        torch.manual_seed(noise)
        batch = tiny.public("bert", 1)
        loss, _, _ = distil(
            teacher, student, plan, batch, config.DistillConfig(), steps=1, lr=1e-9, alpha=0.0
        )
        teacher.eval(), student.eval()
        want = output_error(teacher, student, plan, batch)
        assert loss == pytest.approx(sum(want.values()) / len(want), rel=1e-5)
        first.append(loss)
    assert first[0] == first[1]


def test_10_dropout_in_distillation(fails: Any) -> None:
    def in_training_mode(teacher: Any, student: Any, *args: Any, **kwargs: Any) -> Any:
        eval_mode = student.eval
        student.eval = lambda: student
        try:
            return distill.distil(teacher, student, *args, **kwargs)
        finally:
            student.eval = eval_mode

    check_distillation_without_dropout(distill.distil)
    with fails():
        check_distillation_without_dropout(in_training_mode)


@pytest.fixture(autouse=True)
def _no_cached_task() -> Iterator[None]:
    """Nothing a fault left behind may reach the next test."""
    yield
    for name in ("_partitions", "_task"):
        clear = getattr(getattr(client_app.simulated, name), "cache_clear", None)
        if clear:
            clear()

"""Client-level privacy on the server: sampling, budget, what is let out, what is refused."""

from __future__ import annotations

import math
from typing import Any

import fabricate
import numpy as np
import pytest
import torch
from fabricate import Network

from fedpft_console.lines import lines_for
from fedpft_console.report.tables import sheets
from fedpft_core.errors import RunError, UserError
from fedpft_core.privacy.accounting import Spend, epsilon
from fedpft_core.wire.envelope import open_envelope
from fedpft_core.wire.messages import TrainRequest
from server_app.rounds.private import ClientPrivacy
from server_app.run.events import EventLog
from server_app.run.record import fold
from server_app.state import State
from server_app.strategy import Strategy

NAMES = tuple("abcdefghij")
PRIVATE = {
    "privacy__client_noise": 1.0, "federation__weighting": "uniform", "head__start": "zero",
    "head__end": "trained", "plug__method": "as-trained",
}  # fmt: skip


def started(network: Network, seed: int = 0, **keys: Any) -> tuple[Strategy, State, EventLog]:
    events = EventLog(None)
    config = fabricate.config(**(PRIVATE | keys))
    strategy = Strategy(config, network, events)
    assert strategy.private
    strategy.private.source = np.random.default_rng(seed).bytes
    return strategy, fabricate.state(), events


def asked(network: Network) -> list[int]:
    opened = [(n, open_envelope(e)) for way, n, e in network.log if way == "down"]
    return [n for n, m in opened if isinstance(m, TrainRequest)]


def spent(events: EventLog) -> list[dict[str, Any]]:
    return [e for e in events.seen if e["event"] == "privacy"]


def test_rounds_add_up_to_what_the_accountant_says() -> None:
    strategy, state, events = started(fabricate.network(*NAMES))
    for round in (1, 2, 3):
        state.adapter = strategy.run_round(state, round, "").adapter
    found = [e["epsilon"] for e in spent(events)]
    want = [epsilon([Spend(1.0, rate=0.3)] * n, 1e-5).value for n in (1, 2, 3)]
    assert found == want and found[0] < found[1] < found[2]
    assert len(state.spent) == 3


def test_a_round_that_is_tried_again_is_spent_once() -> None:
    network = fabricate.network(*NAMES)
    failing = network.members[11]
    failing.spoil = fabricate.refuse("not yet")
    keys = {"federation__clients_per_round": 10, "federation__min_clients": 10}
    strategy, state, events = started(network, **keys)
    asked_before = network.exchange

    def exchange(*args: Any) -> None:
        asked_before(*args)
        if asked(network):
            failing.spoil = None

    network.exchange = exchange  # type: ignore[method-assign]
    assert strategy.run_round(state, 1, "").good == 10
    assert len(spent(events)) == 1 and len(state.spent) == 1


def test_the_noise_is_on_the_adapter_and_of_the_size_asked_for() -> None:
    keys = {"federation__clients_per_round": 10, "privacy__client_clip": 0.5}
    noisy, state, _ = started(fabricate.network(*NAMES), **keys)
    plain = Strategy(fabricate.config(federation__clients_per_round=10,
                                      federation__weighting="uniform"),
                     fabricate.network(*NAMES), EventLog(None))  # fmt: skip
    a, b = noisy.run_round(state, 1, "").adapter, plain.run_round(state, 1, "").adapter
    difference = torch.cat([(a[k] - b[k]).reshape(-1) for k in a])
    assert float(difference.std()) == pytest.approx(1.0 * 0.5 / 10, rel=0.25)
    assert not torch.equal(a["classifier.bias"], b["classifier.bias"])


def test_a_boosted_client_is_no_louder_than_the_bound() -> None:
    """Head and all; it is not left out either, which would depend on the others' rows."""

    def outcome(factor: float) -> dict[str, torch.Tensor]:
        network = fabricate.network(*NAMES)
        start = fabricate.adapter()
        network.members[11].spoil = lambda made: type(made)(**(made.__dict__ | {"adapter": {
            k: start[k] + factor * (t - start[k]) for k, t in made.adapter.items()
        }}))  # fmt: skip
        keys = {"federation__clients_per_round": 10, "privacy__client_clip": 0.02}
        strategy, state, _ = started(network, **keys)
        got = strategy.run_round(state, 1, "")
        assert got.good == 10
        return got.adapter

    one, other = outcome(1.0), outcome(900.0)
    moved = math.sqrt(sum(float((one[k] - other[k]).square().sum()) for k in one))
    assert moved <= 0.02 / 10 + 1e-5


def test_poisson_samples_vary_and_an_empty_one_is_a_round() -> None:
    network = fabricate.network(*NAMES)
    keys = {"federation__clients": 200, "federation__clients_per_round": 3}
    strategy, state, events = started(network, **keys)
    empty = 0
    for round in range(1, 13):
        got = strategy.run_round(state, round, "")
        empty += not got.good
        assert math.isnan(got.loss) == (not got.good)
        assert all(bool(t.isfinite().all()) for t in got.adapter.values())
    assert empty and len(spent(events)) == 12


def test_nobody_can_foretell_who_is_drawn() -> None:
    def drawn(seed: int) -> list[int]:
        network = fabricate.network(*NAMES)
        strategy, state, _ = started(network, seed, privacy__sampling="fixed")
        for round in (1, 2, 3):
            strategy.run_round(state, round, "")
        assert len(asked(network)) == 9
        return asked(network)

    assert len({tuple(drawn(seed)) for seed in range(5)}) > 1  # at one and the same run.seed


def test_a_fixed_sample_is_accounted_by_who_is_connected() -> None:
    strategy, state, events = started(fabricate.network(*NAMES), privacy__sampling="fixed")
    strategy.run_round(state, 1, "")
    (event,) = spent(events)
    assert event["pld"] is None
    assert event["epsilon"] == epsilon([Spend(1.0, sample=3, members=10)], 1e-5).rdp


def test_the_bound_follows_and_survives_a_checkpoint() -> None:
    keys = {"privacy__clip_quantile": 0.5, "federation__clients_per_round": 10,
            "privacy__client_clip": 50.0, "privacy__client_noise": 0.5}  # fmt: skip
    strategy, state, events = started(fabricate.network(*NAMES), **keys)
    for round in range(1, 5):
        strategy.run_round(state, round, "")
    bounds = [e["bound"] for e in spent(events)]
    assert bounds[0] == 50.0 and bounds == sorted(bounds, reverse=True)
    assert 0 < state.bound < bounds[-1]


def test_a_run_that_would_spend_too_much_is_refused_at_its_start() -> None:
    keys = {"privacy__epsilon": 2.0, "federation__rounds": 12}
    config = fabricate.config(**(PRIVATE | keys))
    with pytest.raises(UserError, match=r"privacy\.epsilon = 2: federation\.rounds = 12") as error:
        ClientPrivacy(config, EventLog(None)).plan()
    enough = float(str(error.value).split("; ")[1].split(" ")[0])
    ClientPrivacy(fabricate.config(**(PRIVATE | keys | {"privacy__client_noise": enough})),
                  EventLog(None)).plan()  # fmt: skip


def test_a_run_stops_before_the_round_that_would_pass_the_target() -> None:
    """More were spent than planned for, as after a resumption with other settings."""
    limit = epsilon([Spend(1.0, rate=0.3)] * 2, 1e-5).value
    strategy, state, _ = started(fabricate.network(*NAMES), privacy__epsilon=limit * 1.001)
    strategy.run_round(state, 1, "")
    strategy.run_round(state, 2, "")
    with pytest.raises(RunError, match=r"would pass privacy\.epsilon"):
        strategy.run_round(state, 3, "")


def test_counts_are_not_asked_for() -> None:
    strategy, state, _ = started(fabricate.network(*NAMES))
    with pytest.raises(RunError, match="counts of inactive neurons"):
        strategy.run_round(state, 1, "nonpositive")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("federation__aggregate", "median"),
        ("federation__weighting", "examples"),
        ("head__start", "statistics"),
        ("head__end", "better"),
        ("plug__method", "best"),
        ("plug__method", "mapped"),
        ("align__proportion", 0.5),
        ("run__undistilled", True),
    ],
)
def test_what_the_noise_does_not_cover_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(UserError) as error:
        fabricate.config(**(PRIVATE | {key: value}))
    name = key.replace("__", ".").replace("_", "-")
    assert name in str(error.value) and "privacy.client-noise" in str(error.value)


def test_a_budget_without_noise_is_refused() -> None:
    with pytest.raises(UserError, match=r"privacy\.client-noise above 0"):
        fabricate.config(privacy__epsilon=1.0)
    with pytest.raises(UserError, match=r"privacy\.count-noise"):
        fabricate.config(**(PRIVATE | {"privacy__clip_quantile": 0.5, "privacy__count_noise": 0.4}))


def test_a_console_line_and_a_table_show_it() -> None:
    strategy, state, events = started(fabricate.network(*NAMES), privacy__epsilon=9.0)
    strategy.run_round(state, 1, "")
    record = fold(events.seen)
    assert record.rounds[-1].privacy
    (line,) = lines_for(record.rounds[-1].privacy, record)
    assert line.startswith("round 1: epsilon ") and "of 9" in line
    (sheet,) = [s for s in sheets(record) if s.title == "Client-level privacy"]
    assert sheet.rows[0][0] == "1" and "poisson" in sheet.notes[0]

"""Local-only tuning: what each client reaches alone, the reference point without a federation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from fedpft_core.adapter import lora as adapters
from fedpft_core.config import Config
from fedpft_core.data.encoded import Encoded
from fedpft_core.errors import RunError
from fedpft_core.task import Score, mean_score
from fedpft_core.train.evaluate import evaluate
from server_app.bench import Bench
from server_app.phases.plug import refit
from server_app.phases.reporting import phase, progress
from server_app.rounds.nodes import Node
from server_app.run import schema as ev
from server_app.run.events import EventLog
from server_app.state import Events, State
from server_app.strategy import Strategy
from server_app.transport import Transport


class Alone(Strategy):
    """A federation of one client, the one called `name`."""

    def __init__(self, config: Config, transport: Transport, events: Events, name: str) -> None:
        one = replace(config.federation, min_clients=1, clients_per_round=1, aggregate="average")
        super().__init__(replace(config, federation=one), transport, events)
        self.name = name

    def sample(self, nodes: list[Node], round: int, attempt: int) -> list[Node]:
        """The one client, in every round; nobody where it is not connected.

        Args:
            nodes: who is there.
            round: the round's number, from 1.
            attempt: the try's number, from 1.

        Returns:
            One node, or none.
        """
        return [n for n in nodes if n.name == self.name]


def local_only(
    config: Config, transport: Transport, events: EventLog, bench: Bench, state: State
) -> None:
    """Each of `federation.clients-per-round` clients, drawn once, tunes alone for all rounds.

    As many local steps at the same rates as one client's share of every round, no averaging, no
    alignment between rounds. Emits the mean over clients of the scores of proxy and FM, as if one
    round had been evaluated. Nothing is exported: there is no one adapter.

    Args:
        config: the run's configuration.
        transport: the way to the clients.
        events: the run's log; what one client's rounds emit is marked by its name.
        bench: models and rows; the adapter of the last client stays plugged in.
        state: before round 1. Its adapter stays as it is.

    Raises:
        RunError: a client fails, or fewer than federation.min-clients connect and can say who they
            are.
    """
    strategy = Strategy(config, transport, events)
    strategy.nodes.wait()
    chosen = strategy.sample(strategy.nodes.meet(state, 1), 1, 1)
    if len(chosen) < config.federation.min_clients:
        raise RunError(
            f"local-only tuning: {len(chosen)} clients of the federation.min-clients = "
            f"{config.federation.min_clients} needed "
            f"({strategy.why({}) or 'no other clients are connected'})"
        )
    rounds = config.federation.rounds
    split = config.run.eval_split
    evaluation = partial(ev.Evaluation, round=rounds, split=split)
    sets: list[tuple[Callable[..., ev.Event], Encoded]] = [(evaluation, bench.rows.scored)]
    if split != "validation" and len(bench.rows.data.validation):
        sets.append((partial(ev.Validation, round=rounds), bench.rows.validation))
    scores: dict[tuple[Callable[..., ev.Event], str], list[Score]] = {}
    norms = []
    with phase(events, "local"):
        report = progress(events, "local", "rounds")
        for i, node in enumerate(chosen):
            arm = Alone(config, transport, events.tagged(arm=node.name), node.name)
            mine = replace(state, adapter={k: t.clone() for k, t in bench.models.start.items()})
            loss = 0.0
            for round in range(1, rounds + 1):
                outcome = arm.run_round(mine, round, "")
                mine.adapter, loss = outcome.adapter, outcome.loss
                report(i * rounds + round, len(chosen) * rounds, loss)
            bench.models.plug(mine.adapter)
            refit(bench, rounds, arm.events)
            norms.append(adapters.norm(mine.adapter))
            for event, rows in sets:
                for which, model in (("proxy", bench.models.proxy), ("fm", bench.models.fm)):
                    score = evaluate(model, bench.rows.task, rows, config.run.eval_batch_size)
                    scores.setdefault((event, which), []).append(score)
    n = len(chosen)
    events.emit(ev.Adapter(round=rounds, norm=sum(norms) / n))
    for (event, which), found in scores.items():
        mean = mean_score(found)
        events.emit(event(model=which, seconds=mean.seconds, **mean.fields()))

"""What every schedule works on, and the end of a round that all of them share."""

from __future__ import annotations

import time
from dataclasses import dataclass

from fedpft_core.adapter import lora as adapters
from fedpft_core.train import server
from fedpft_core.train.inactivity import Counts
from server_app.bench import Bench
from server_app.phases import align, heads, plug, reference, score
from server_app.phases.reporting import peak_rss_bytes
from server_app.rounds.outcome import Outcome
from server_app.run import schema as ev
from server_app.run.checkpoint import Checkpoints
from server_app.run.events import EventLog
from server_app.state import State
from server_app.strategy import Strategy


@dataclass
class Session:
    """A federation that is about to begin, or to go on.

    Attributes:
        strategy: the clients, and what is sent to them.
        bench: models and rows of the server.
        state: where the run stands.
        checkpoints: where that is kept.
        events: the run's log.
        told: whether this process has noted how the training rows are divided.
    """

    strategy: Strategy
    bench: Bench
    state: State
    checkpoints: Checkpoints
    events: EventLog
    told: bool = False  # how the training rows are divided

    def save(self) -> None:
        """Write a checkpoint of the state, and note the memory in use."""
        self.events.emit(ev.Memory(process="server", peak_rss_bytes=peak_rss_bytes()))
        written = self.events.offset()
        self.checkpoints.save(self.state, self.bench.models, written, self.events.digest(written))


def settle(session: Session, round: int, outcome: Outcome, start: float) -> None:
    """Bring the state to the end of a round: plug in, score, re-align, set the head.

    Args:
        session: both models get the round's adapter.
        round: the round's number, from 1.
        outcome: what the round's replies came to.
        start: when the round began, `time.perf_counter()`.

    Raises:
        RunError: the alignment diverges, or too few clients send statistics.
        UserError: align.threshold compares gradients and there are no validation rows.
    """
    config = session.bench.config
    advance(session, round, outcome)
    values, scored = measure(session, round)
    finish(session, round, outcome, start, scored)
    realign(session, session.state, round, outcome.counts, values)
    every = config.head.interval
    if every and round % every == 0 and round < config.federation.rounds:
        heads.again(session.bench, session.strategy, session.state, session.bench.events)


def advance(session: Session, round: int, outcome: Outcome) -> None:
    """Take a round's adapter over into the state.

    Args:
        session: both models get the adapter.
        round: the round's number, from 1.
        outcome: what the round's replies came to.
    """
    bench, state = session.bench, session.state
    state.adapter, state.memory = server.step(
        bench.config.federation, outcome.before, outcome.adapter, state.memory
    )
    state.round = round
    bench.models.plug(state.adapter)
    bench.events.emit(ev.Adapter(round=round, norm=adapters.norm(state.adapter)))


def measure(session: Session, round: int) -> tuple[tuple[float, float] | None, float]:
    """Score both models with the adapter of a round, where that is due.

    Args:
        session: both models have the adapter.
        round: the round's number, from 1.

    Returns:
        The metric's values of proxy and FM, None where neither was scored, and the seconds.
    """
    bench, config = session.bench, session.bench.config
    last = round == config.federation.rounds
    # Where the plug-in settles the product, the last round is scored once, after it; where the
    # best round is gone back to, after that.
    later = plug.settles(bench) or config.federation.early_stopping
    if (last and later) or not (last or round % config.run.evaluate_every == 0):
        return None, 0.0
    proxy, trained, seconds = score.score_all(bench, round)
    return (proxy.value, trained.value), seconds


def finish(
    session: Session, round: int, outcome: Outcome, start: float, scored: float,
    meanwhile: float = 0.0,
) -> None:  # fmt: skip
    """Say in the log that a round is over.

    Args:
        session: the log, and who is there.
        round: the round's number, from 1.
        outcome: what the round's replies came to.
        start: when the round began, `time.perf_counter()`.
        scored: seconds that its scores took.
        meanwhile: seconds that the server worked on the round before while clients trained.
    """
    seconds = time.perf_counter() - start
    session.bench.events.emit(ev.RoundFinished(
        round=round, seconds=seconds,
        exchange_seconds=outcome.seconds, evaluate_seconds=scored,
        train_seconds=outcome.train_seconds, loss=outcome.loss,
        overhead_seconds=seconds - scored - outcome.busy_seconds,
        examples=outcome.examples, good=outcome.good, bad=outcome.bad,
        meanwhile_seconds=meanwhile,
    ))  # fmt: skip
    if not session.told:
        session.told = True
        names = [node.name for node in session.strategy.nodes.known.values()]
        reference.partition(session.bench, names)


def realign(
    session: Session, state: State, round: int, counts: Counts | None,
    values: tuple[float, float] | None,
) -> None:  # fmt: skip
    """Re-align the proxy after a round, where that is due and it disagrees enough with the FM.

    Args:
        session: its models.
        state: has the round's adapter; gets the patch.
        round: the round's number, from 1.
        counts: the inactivity counts of its clients, where the selection looks at them.
        values: the metric's, of proxy and FM at this adapter, where they are known.

    Raises:
        RunError: the alignment diverges.
        UserError: align.threshold compares gradients and there are no validation rows.
    """
    bench = session.bench
    due = align.due(bench.config, bench.models.plan, round)
    if due and align.disagrees(bench, state, round):
        align.align(bench, state, round, counts, values)


__all__ = ["Session", "advance", "finish", "measure", "realign", "settle"]

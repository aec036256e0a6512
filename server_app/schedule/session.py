"""What every schedule works on, and the end of a round that all of them share."""

from __future__ import annotations

import time
from dataclasses import dataclass

from fedpft_core.adapter import lora as adapters
from fedpft_core.train import server
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
    bench, state = session.bench, session.state
    config, events = bench.config, bench.events
    state.adapter, state.memory = server.step(
        config.federation, outcome.before, outcome.adapter, state.memory
    )
    state.round = round
    bench.models.plug(state.adapter)
    events.emit(ev.Adapter(round=round, norm=adapters.norm(state.adapter)))
    scored, values = 0.0, None
    last = round == config.federation.rounds
    # Where the plug-in settles the product, the last round is scored once, after it; where the
    # best round is gone back to, after that.
    later = plug.settles(bench) or config.federation.early_stopping
    if (round % config.run.evaluate_every == 0 or last) and not (last and later):
        proxy, trained, scored = score.score_all(bench, round)
        values = (proxy.value, trained.value)
    seconds = time.perf_counter() - start
    events.emit(ev.RoundFinished(
        round=round, seconds=seconds,
        exchange_seconds=outcome.seconds, evaluate_seconds=scored,
        train_seconds=outcome.train_seconds, loss=outcome.loss,
        overhead_seconds=seconds - scored - outcome.busy_seconds,
        examples=outcome.examples, good=outcome.good, bad=outcome.bad,
    ))  # fmt: skip
    if not session.told:
        session.told = True
        reference.partition(bench, [node.name for node in session.strategy.nodes.known.values()])
    if align.due(config, bench.models.plan, round) and align.disagrees(bench, state, round):
        align.align(bench, state, round, outcome.counts, values)
    every = config.head.interval
    if every and round % every == 0 and not last:
        heads.again(bench, session.strategy, state, events)


__all__ = ["Session", "settle"]

"""A side run: the same federation on the pruned but undistilled sub-FM."""

from __future__ import annotations

from fedpft_core.train.evaluate import evaluate
from server_app.bench import Bench
from server_app.owner import disclose
from server_app.phases import distil, heads, own, plug, widths
from server_app.phases.reporting import phase
from server_app.run import schema as ev
from server_app.run.events import EventLog
from server_app.strategy import Strategy
from server_app.transport import Transport


def undistilled(bench: Bench, transport: Transport, events: EventLog) -> None:
    """What distillation is worth: the federation without it, its end scored.

    Same partitions, sampling, seeds and steps. Nothing is done where distillation would change
    nothing.

    Args:
        bench: with the proxy not yet distilled; afterwards it has the starting adapter again.
        transport: the way to the clients.
        events: the run's log; what the side run's rounds emit is marked `undistilled`.

    Raises:
        RunError: too few clients connect, or too few replies are good.
    """
    if not distil.due(bench):
        return
    config, models = bench.config, bench.models
    arm = events.tagged(arm="undistilled")
    with phase(events, "undistilled"):
        strategy = Strategy(
            config, transport, arm, own.update_of(bench), widths.agreement_of(bench)
        )
        strategy.nodes.wait()
        models.plug(models.start)
        state = bench.fresh_state()
        disclose.note(bench, state, arm)
        if heads.computed(bench):
            heads.start(bench, strategy, state, arm)
        for round in range(1, config.federation.rounds + 1):
            outcome = strategy.run_round(state, round, "")
            state.adapter, state.round = outcome.adapter, round
            events.emit(ev.Progress(
                phase="undistilled", done=round, total=config.federation.rounds,
                unit="rounds", loss=outcome.loss,
            ))  # fmt: skip
        models.plug(state.adapter)
        plug.finish(bench, strategy, state, arm)
        rows = bench.rows
        score = evaluate(models.fm, rows.task, rows.scored, config.run.eval_batch_size)
        split = config.run.eval_split
        events.emit(ev.Baseline(name="undistilled", split=split, **score.fields()))
        # The main run starts from the adapter this one started from, not where it ended.
        models.plug(models.start)

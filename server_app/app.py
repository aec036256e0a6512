"""ServerApp: load → build → distil → rounds (train, average, evaluate, align) → export."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedpft_core import __version__
from fedpft_core import config as configs
from fedpft_core.adapter import lora as adapters
from fedpft_core.align import selection
from fedpft_core.config import Config
from fedpft_core.errors import RunError, UserError
from fedpft_core.train import baselines, server
from server_app.bench import Bench
from server_app.local import local_only
from server_app.phases import agree, align, heads, load, plug, reference, score
from server_app.phases.reporting import Waits, peak_rss_bytes, phase, progress
from server_app.phases.undistilled import undistilled
from server_app.run import card, proxycache
from server_app.run import schema as ev
from server_app.run.checkpoint import Checkpoints
from server_app.run.events import EventLog
from server_app.run.folder import RunFolder
from server_app.run.record import of_log
from server_app.state import State, fresh_state
from server_app.strategy import Strategy
from server_app.transport import FlowerTransport, Transport

log = logging.getLogger("fedpft")
app = ServerApp()


def _terse(record: logging.LogRecord) -> bool:
    """Flower logs what ends a ServerApp with its traceback; an error for people needs none."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, UserError | RunError):
        record.msg, record.args, record.exc_info = "%s", (error,), None
    return True


logging.getLogger("flwr").addFilter(_terse)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Entry point of `flwr run`. A failure raises, so that Flower reports the run as failed.

    Args:
        grid: Flower's way to the connected nodes.
        context: its `run_config` is the run's configuration, flat.
    """
    config = configs.from_flat(context.run_config)
    with RunFolder.open(config) as folder:
        log.info("run folder: %s", folder.path)
        transport = FlowerTransport(grid, waits=lambda: Waits(folder.events, "replies"))
        run(replace(config, run=folder.run_config), transport, folder.events)


def run(config: Config, transport: Transport, events: EventLog) -> None:
    """A whole run in `config.run.dir`; its last event says how it ended.

    Args:
        config: the run's configuration, with the run folder filled in.
        transport: the way to the clients.
        events: the run's log. A failure is noted in it before it is raised.

    Raises:
        UserError: a setting, a file or a model cannot be used; one clear sentence.
        RunError: the run cannot go on; one clear sentence.
        OSError: a file cannot be read or written.
        Exception: anything else, noted as an internal error.
    """
    start = time.perf_counter()
    try:
        _run(config, transport, events)
    except (UserError, RunError) as error:
        events.emit(ev.RunFailed(reason=str(error)))
        raise
    except OSError as error:
        events.emit(ev.RunFailed(reason=f"run.dir = {config.run.dir}: {error}"))
        raise
    except Exception as error:
        events.emit(ev.RunFailed(reason=f"internal error: {type(error).__name__}: {error}"))
        raise
    events.emit(ev.RunFinished(seconds=time.perf_counter() - start))


def _run(config: Config, transport: Transport, events: EventLog) -> None:
    checkpoints = Checkpoints(Path(config.run.dir) / "checkpoints", keep=config.run.checkpoints)
    saved = checkpoints.latest() if config.run.resume else None
    if saved is not None:
        events.rewind(saved.events_offset)
    f = config.federation
    events.emit(ev.RunStarted(
        run_dir=config.run.dir, version=__version__, seed=config.run.seed,
        method=configs.method_name(config), rounds=f.rounds,
        clients_per_round=f.clients_per_round,
        resumed_from=saved.round if saved else None,
    ))  # fmt: skip

    bench = load.load(config, events)
    strategy = Strategy(config, transport, events)
    if saved is not None:
        state = saved.restore(bench.models, bench.package())
    else:
        state = _before_round_1(bench, strategy, transport, events)
    if f.aggregate == "none":
        local_only(config, transport, events, bench, state)
        events.emit(ev.Files(paths={"plan": f"{config.run.dir}/plan.json"}))
        return
    strategy.nodes.wait()
    last = min(f.rounds, config.run.stop_after or f.rounds)
    first = state.round + 1
    for round in range(first, last + 1):
        with phase(events, "round", round=round):
            one_round(strategy, bench, state, round)
        if round == first:
            reference.partition(bench, [node.name for node in strategy.nodes.known.values()])
        events.emit(ev.Memory(process="server", peak_rss_bytes=peak_rss_bytes()))
        checkpoints.save(state, bench.models, events.offset())
    if last < f.rounds:
        raise RunError(f"stopped after round {last} as run.stop-after asks; resume to go on")
    _export(bench, strategy, state, events)


def _before_round_1(
    bench: Bench, strategy: Strategy, transport: Transport, events: EventLog
) -> State:
    """What a run does once: reference points, distillation, the scores it starts from."""
    config, models = bench.config, bench.models
    (Path(config.run.dir) / "plan.json").write_text(models.plan.to_json(), encoding="utf-8")
    reference.majority(bench)
    if config.run.baselines and len(bench.rows.data.train):
        with phase(events, "baselines"):
            found = baselines.score(
                models.fm, bench.rows.processor, bench.rows.data, config,
                progress(events, "baselines", "rows"),
            )  # fmt: skip
            for name, value in found.items():
                split = config.run.eval_split
                events.emit(ev.Baseline(name=name, split=split, **value.fields()))
    if config.run.undistilled:
        undistilled(bench, transport, events)
    proxycache.distil(bench)
    state = fresh_state(models.start, bench.package())
    models.plug(state.adapter)
    if config.federation.aggregate != "none" and heads.asked(bench):
        with phase(events, "statistics"):
            heads.start(bench, strategy, state, events)
    agree.record(bench, 0, "start", start=True)
    if config.run.evaluate_every <= config.federation.rounds:
        score.score(bench, 0, "proxy")
        score.score(bench, 0, "fm")
    return state


def one_round(strategy: Strategy, bench: Bench, state: State, round: int) -> None:
    """Clients train, the server averages, both models are scored, the proxy is re-aligned.

    Args:
        strategy: the federation that trains.
        bench: both models get the round's adapter.
        state: where the run stands after the round before; it is brought to the end of this one.
        round: the round's number, from 1.

    Raises:
        RunError: too few replies are good, or the alignment diverges.
        UserError: align.threshold compares gradients and there are no validation rows.
    """
    start = time.perf_counter()
    config, events = bench.config, bench.events
    due = align.due(config, bench.models.plan, round)
    a = config.align
    count = due and selection.needs_counts(a.selection, a.proportion)
    outcome = strategy.run_round(state, round, a.inactive if count else "")
    state.adapter, state.memory = server.step(
        config.federation, outcome.before, outcome.adapter, state.memory
    )
    state.round = round
    bench.models.plug(state.adapter)
    events.emit(ev.Adapter(round=round, norm=adapters.norm(state.adapter)))
    scored, values = 0.0, None
    last = round == config.federation.rounds
    # Where the plug-in settles the product, the last round is scored once, after it.
    if (round % config.run.evaluate_every == 0 or last) and not (last and plug.settles(bench)):
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
    if due and align.disagrees(bench, state, round):
        align.align(bench, state, round, outcome.counts, values)
    every = config.head.interval
    if every and round % every == 0 and not last:
        heads.again(bench, strategy, state, events)


def _export(bench: Bench, strategy: Strategy, state: State, events: EventLog) -> None:
    """Settle the head, plug the final adapter into the FM, write the product."""
    config = bench.config
    with phase(events, "export"):
        bench.models.plug(state.adapter)
        agree.record(bench, state.round, "end")
        plug.finish(bench, strategy, state, events)
        if plug.settles(bench):
            score.score_final(bench, state)
        score.score_validation(bench, state.round)
        folder = Path(config.run.dir) / "adapter"
        adapters.export(bench.models.fm, folder, bench.models.source)
        card.write(folder, of_log(events), config, bench.rows.task)
        events.emit(ev.Files(paths={"adapter": str(folder), "plan": f"{config.run.dir}/plan.json"}))

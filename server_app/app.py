"""ServerApp: load → build → distil → rounds (train, average, evaluate, align) → export."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedpft_core import __version__
from fedpft_core import config as configs
from fedpft_core.adapter import lora as adapters
from fedpft_core.align import method as alignment
from fedpft_core.align import selection
from fedpft_core.config import Config
from fedpft_core.errors import RunError, UserError
from fedpft_core.train import baselines
from fedpft_core.train.evaluate import evaluate
from server_app.bench import Bench, peak_rss_bytes, phase
from server_app.local import local_only
from server_app.run import proxycache
from server_app.run.checkpoint import Checkpoints
from server_app.run.events import EventLog
from server_app.run.folder import RunFolder
from server_app.strategy import Events, State, Strategy
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
    """Entry point of `flwr run`. A failure raises, so that Flower reports the run as failed."""
    config = configs.from_flat(context.run_config)
    with RunFolder.open(config) as folder:
        log.info("run folder: %s", folder.path)
        run(replace(config, run=folder.run_config), FlowerTransport(grid), folder.events)


def run(config: Config, transport: Transport, events: EventLog) -> None:
    """A whole run in `config.run.dir`. Raises UserError or RunError with one clear sentence."""
    start = time.perf_counter()
    try:
        _run(config, transport, events)
    except (UserError, RunError) as error:
        events.emit("run_failed", reason=str(error))
        raise
    except OSError as error:
        events.emit("run_failed", reason=f"run.dir = {config.run.dir}: {error}")
        raise
    except Exception as error:
        events.emit("run_failed", reason=f"internal error: {type(error).__name__}: {error}")
        raise
    events.emit("run_finished", seconds=time.perf_counter() - start)


def _run(config: Config, transport: Transport, events: EventLog) -> None:
    checkpoints = Checkpoints(Path(config.run.dir) / "checkpoints", keep=config.run.checkpoints)
    saved = checkpoints.latest() if config.run.resume else None
    if saved is not None:
        events.rewind(saved.events_offset)
    f = config.federation
    events.emit(
        "run_started", run_dir=config.run.dir, version=__version__, seed=config.run.seed,
        method=configs.method_name(config), rounds=f.rounds,
        clients_per_round=f.clients_per_round,
        resumed_from=saved.round if saved else None,
    )  # fmt: skip

    bench, package = Bench.load(config, events)
    if saved is not None:
        state = saved.restore(bench, package)
    else:
        (Path(config.run.dir) / "plan.json").write_text(bench.plan.to_json(), encoding="utf-8")
        if config.run.baselines and len(bench.task.train):
            with phase(events, "baselines"):
                baselines.score(bench.fm, bench.processor, bench.task, config, events)
        if config.run.undistilled:
            undistilled(config, transport, events, bench, package)
        proxycache.distil(bench)
        state = bench.fresh_state(bench.repack(package))
        bench.agreement(0, "start", start=True)
        if config.run.evaluate_every <= f.rounds:
            bench.score(0, "proxy")
            bench.score(0, "fm")

    if f.aggregate == "none":
        local_only(config, transport, events, bench, state)
        events.emit("files", paths={"plan": f"{config.run.dir}/plan.json"})
        return
    strategy = Strategy(config, transport, events)
    strategy.wait_for_nodes()
    last = min(f.rounds, config.run.stop_after or f.rounds)
    for round in range(state.round + 1, last + 1):
        with phase(events, "round", round=round):
            one_round(config, strategy, bench, state, round, events)
        events.emit("memory", process="server", peak_rss_bytes=peak_rss_bytes())
        checkpoints.save(state, bench, events.offset())
    if last < f.rounds:
        raise RunError(f"stopped after round {last} as run.stop-after asks; resume to go on")

    with phase(events, "export"):
        bench.plug(state.adapter)
        bench.agreement(state.round, "end")
        bench.refit(state.round)
        bench.score_validation(state.round)
        folder = Path(config.run.dir) / "adapter"
        adapters.export(bench.fm, folder, bench.source)
        events.emit("files", paths={"adapter": str(folder), "plan": f"{config.run.dir}/plan.json"})


def one_round(
    config: Config, strategy: Strategy, bench: Bench, state: State, round: int, events: Events
) -> None:
    """Clients train, the server averages, both models are scored, the proxy is re-aligned."""
    start = time.perf_counter()
    due = alignment_due(config, bench, round)
    a = config.align
    count = due and selection.needs_counts(a.selection, a.proportion)
    outcome = strategy.run_round(state, round, a.inactive if count else "")
    state.adapter, state.round = outcome.adapter, round
    bench.plug(state.adapter)
    events.emit("adapter", round=round, norm=adapters.norm(state.adapter))
    scored, accuracies = 0.0, None
    if round % config.run.evaluate_every == 0 or round == config.federation.rounds:
        proxy, trained, scored = bench.score_all(round)
        accuracies = (proxy.accuracy, trained.accuracy)
    seconds = time.perf_counter() - start
    events.emit(
        "round_finished", round=round, seconds=seconds,
        exchange_seconds=outcome.seconds, evaluate_seconds=scored,
        train_seconds=outcome.train_seconds, loss=outcome.loss,
        overhead_seconds=seconds - scored - outcome.busy_seconds,
        examples=outcome.examples, good=outcome.good, bad=outcome.bad,
    )  # fmt: skip
    if due and bench.disagrees(state, round):
        bench.align(state, round, outcome.counts, accuracies)


def alignment_due(config: Config, bench: Bench, round: int) -> bool:
    """Every t rounds, and not after the last, where nobody would train on the result.

    With a threshold that is when disagreement is measured."""
    t = config.align.interval
    due = t > 0 and round % t == 0 and round < config.federation.rounds
    return due and bool(bench.plan.pruned)


def undistilled(
    config: Config, transport: Transport, events: EventLog, bench: Bench, package: Any
) -> None:
    """The same federation on the pruned but undistilled sub-FM: what distillation is worth.

    Same partitions, sampling, seeds and steps; only its end is scored.
    """
    d = config.distill
    if not alignment.needed(d.method, bench.plan, d.steps):
        return
    arm = events.tagged(arm="undistilled")
    with phase(events, "undistilled"):
        strategy = Strategy(config, transport, arm)
        strategy.wait_for_nodes()
        state = bench.fresh_state(package)
        for round in range(1, config.federation.rounds + 1):
            outcome = strategy.run_round(state, round, "")
            state.adapter, state.round = outcome.adapter, round
            events.emit(
                "progress", phase="undistilled", done=round, total=config.federation.rounds,
                unit="rounds", loss=outcome.loss,
            )  # fmt: skip
        bench.plug(state.adapter)
        bench.refit(state.round, arm)
        score = evaluate(bench.fm, bench.score_rows, config.run.eval_batch_size)
        events.emit(
            "baseline", name="undistilled", accuracy=score.accuracy, rows=score.rows,
            split=config.run.eval_split,
        )  # fmt: skip
        # The main run starts from the adapter this one started from, not where it ended.
        bench.plug(bench.start)

"""ServerApp: load → build → distil → rounds (train, average, evaluate, align) → export."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedpft_core import __version__
from fedpft_core import config as configs
from fedpft_core.adapter import lora as adapters
from fedpft_core.config import Config
from fedpft_core.errors import RunError, UserError
from fedpft_core.task import Writer
from fedpft_core.train import baselines
from server_app import SIMULATION, schedule
from server_app.bench import Bench
from server_app.local import local_only
from server_app.owner import disclose
from server_app.phases import agree, backdoor, heads, load, own, plug, reference, score, widths
from server_app.phases.reporting import Waits, phase, progress
from server_app.phases.undistilled import undistilled
from server_app.run import card, proxycache, replies
from server_app.run import schema as ev
from server_app.run.checkpoint import Checkpoints
from server_app.run.events import EventLog
from server_app.run.folder import RunFolder
from server_app.run.identity import identity, refuse_another
from server_app.run.record import of_log
from server_app.schedule.session import Session
from server_app.state import State
from server_app.strategy import Strategy
from server_app.transport import FlowerTransport, Transport, WorkerLost

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
        transport = FlowerTransport(
            grid, waits=lambda: Waits(folder.events, "replies"), simulated=SIMULATION in os.environ
        )
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
        events.emit(ev.RunFailed(reason=str(error), again=isinstance(error, WorkerLost)))
        raise
    except OSError as error:
        events.emit(ev.RunFailed(reason=f"run.dir = {config.run.dir}: {error}"))
        raise
    except Exception as error:
        events.emit(ev.RunFailed(reason=f"internal error: {type(error).__name__}: {error}"))
        raise
    events.emit(ev.RunFinished(seconds=time.perf_counter() - start))


def _run(config: Config, transport: Transport, events: EventLog) -> None:
    schedule.check(config)
    made_of = identity(config)
    folder = Path(config.run.dir) / "checkpoints"
    checkpoints = Checkpoints(folder, config.run.checkpoints, made_of)
    saved = checkpoints.latest() if config.run.resume else None
    whole, kept = True, 0
    if saved is not None:
        refuse_another(saved.identity, made_of)
        whole = saved.events_digest in ("", events.digest(saved.events_offset))
        kept, told = replies.events_offset(Path(config.run.dir) / "replies", saved.run)
        events.rewind(max(saved.events_offset, told))
    elif config.run.resume:
        events.rewind(0)  # nothing is kept, and what was counted is counted again
    f = config.federation
    events.emit(ev.RunStarted(
        run_dir=config.run.dir, version=__version__, seed=config.run.seed,
        method=configs.method_name(config), rounds=f.rounds,
        clients_per_round=f.clients_per_round,
        resumed_from=saved.round if saved else None, kept=kept,
    ))  # fmt: skip
    if not whole:
        events.emit(ev.Warned(
            text="events.jsonl is not as the last checkpoint knows it: what it says of the rounds "
            "before may be wrong or missing",
        ))  # fmt: skip

    bench = load.load(config, events)
    disclose.book(bench, transport)
    strategy = Strategy(config, transport, events, own.update_of(bench), widths.agreement_of(bench))
    if strategy.private:
        strategy.private.plan()
    if saved is not None:
        disclose.put_on_again(bench)
        state = saved.restore(bench.models, bench.package(), bench.others())
        disclose.note(bench, state)
    else:
        state = _before_round_1(bench, strategy, transport, events)
    if f.aggregate == "none":
        local_only(config, transport, events, bench, state)
        events.emit(ev.Files(paths={"plan": f"{config.run.dir}/plan.json"}))
        return
    afterwards = schedule.federate(Session(strategy, bench, state, checkpoints, events))
    _export(bench, strategy, state, events)
    afterwards()


def _before_round_1(
    bench: Bench, strategy: Strategy, transport: Transport, events: EventLog
) -> State:
    """What a run does once: reference points, distillation, the scores it starts from."""
    config, models = bench.config, bench.models
    (Path(config.run.dir) / "plan.json").write_text(models.plan.to_json(), encoding="utf-8")

    def prepare() -> None:
        _reference_points(bench, events)
        if config.run.undistilled:
            undistilled(bench, transport, events)
        proxycache.distil(bench)

    f = config.federation
    # The other schedules greet each node themselves, unless statistics are asked for before.
    if f.aggregate == "none" or not (f.schedule == "multi-round" or heads.asked(bench)):
        prepare()
    else:
        strategy.nodes.greet(prepare)
    disclose.put_on(bench)
    state = bench.fresh_state()
    disclose.note(bench, state)
    widths.announce(bench)
    models.plug(state.adapter)
    if config.federation.aggregate != "none" and heads.computed(bench):
        with phase(events, "statistics"):
            heads.start(bench, strategy, state, events)
    agree.record(bench, 0, "start", start=True)
    if config.run.evaluate_every <= config.federation.rounds:
        score.score(bench, 0, "proxy")
        score.score(bench, 0, "fm")
    return state


def _reference_points(bench: Bench, events: EventLog) -> None:
    """Score what the run is to be compared with."""
    config, models = bench.config, bench.models
    reference.majority(bench)
    # What is fitted to clients' rows needs some here; the FM as it is does not.
    some = len(bench.rows.data.train) or "zero-shot" in bench.rows.task.baselines
    if config.run.baselines and some:
        with phase(events, "baselines"):
            found = baselines.score(
                models.fm, bench.rows.processor, bench.rows.data, config,
                progress(events, "baselines", "rows"),
            )  # fmt: skip
            for name, value in found.items():
                split = config.run.eval_split
                events.emit(ev.Baseline(name=name, split=split, **value.fields()))


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
        backdoor.score(bench, state.round)
        folder = Path(config.run.dir) / "adapter"
        writes = isinstance(bench.rows.task, Writer)
        adapters.export(
            bench.models.fm, folder, bench.models.source, "CAUSAL_LM" if writes else None
        )
        if writes:
            # With the chat template that prompts were put by.
            bench.rows.processor.save_pretrained(folder)
        card.write(folder, of_log(events), config, bench.rows.task)
        events.emit(ev.Files(paths={"adapter": str(folder), "plan": f"{config.run.dir}/plan.json"}))

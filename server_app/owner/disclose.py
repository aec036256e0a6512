"""Noting what of the FM leaves, before it does, and hiding which neurons they are."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from fedpft_core.config import Config
from fedpft_core.disk import whole
from fedpft_core.errors import RunError, UserError
from fedpft_core.model.families import family_of_model
from fedpft_core.model.plan import Plan
from fedpft_core.proxy import disguise
from fedpft_core.proxy.exposure import exposure, ffn_digest, kept_neurons
from server_app.bench import Bench
from server_app.owner import neurons
from server_app.owner.neurons import Ledger
from server_app.reach import leaves_machine
from server_app.run import schema as ev
from server_app.state import Events, State, Version
from server_app.transport import Transport

_SECRET = "disguise.safetensors"


def ledger_of(config: Config, fm: nn.Module) -> Ledger:
    """The ledger of an FM.

    Args:
        config: says where ledgers lie.
        fm: bare or with the adapter attached.

    Returns:
        The ledger, which need not have a file yet.
    """
    widths = [ffn.neurons for ffn in family_of_model(fm).ffns(fm)]
    return Ledger(neurons.folder(config), ffn_digest(fm), widths)


def preferred(config: Config, fm: nn.Module) -> Sequence[Tensor]:
    """The neurons that a plan keeps before any others.

    Args:
        config: of the run. One that is resumed prefers its own plan, since other runs may have
            disclosed more meanwhile.
        fm: bare.

    Returns:
        By FM block, bool [F]; empty where none are preferred.

    Raises:
        UserError: the ledger is damaged, or the resumed run's plan.json is.
    """
    if not config.plan.prefer_disclosed:
        return ()
    own = Path(config.run.dir) / "plan.json"
    if config.run.resume and own.is_file():
        try:
            return kept_neurons(Plan.from_json(own.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UserError(f"{own}: the plan of the resumed run cannot be read.") from error
    return ledger_of(config, fm).read().neurons


def book(bench: Bench, transport: Transport) -> None:
    """Enter the plan's neurons into the ledger, or refuse the run.

    Args:
        bench: with the plan.
        transport: whether messages leave the machine; where not, the ledger is only read.

    Raises:
        UserError: plan.disclosure-budget would be passed, or the ledger cannot be used.
    """
    config = bench.config
    ledger = ledger_of(config, bench.models.fm)
    sent, budget = _of_all(bench), config.plan.disclosure_budget
    bench.ledger, bench.leaves = ledger, leaves_machine(transport)
    if not bench.leaves:
        neurons.within(ledger.read(), sent, budget)
        return
    nothing = tuple(torch.zeros_like(m) for m in sent)
    before = ledger.add(sent, nothing, config.run.dir, budget)
    new = neurons.count([a & ~b for a, b in zip(sent, before.neurons, strict=True)])
    if before.runs and new:
        share = [100 * n / before.total for n in (before.count, before.count + new)]
        bench.events.emit(ev.Warned(
            text=f"{new:,} of the FM's neurons leave for the first time: over all runs "
            f"{share[0]:.1f} % have left so far, with this one {share[1]:.1f} % "
            "(plan.disclosure-budget sets a limit)",
        ))  # fmt: skip


def _of_all(bench: Bench) -> tuple[Tensor, ...]:
    """The FM's neurons that any width of the run holds, bool [F] by block."""
    sent = kept_neurons(bench.models.plan)
    for w in bench.models.others:
        sent = tuple(a | b for a, b in zip(sent, kept_neurons(w.plan), strict=True))
    return sent


def note(bench: Bench, state: State, events: Events | None = None) -> None:
    """Say what of the FM the sub-FM holds as it is now; exact copies go into the ledger.

    With several widths, one event each.

    Args:
        bench: after :func:`book`.
        state: with the versions that are about to be sent.
        events: where it is said; None for the bench's log.

    Raises:
        UserError: the ledger cannot be used.
    """
    m = bench.models
    if bench.ledger is None:
        return
    _note(bench, bench.ledger, m.plan, state.own, events or bench.events)
    for w in m.others:
        _note(bench, bench.ledger, w.plan, state.others[w.name], events or bench.events)


def _note(bench: Bench, ledger: Ledger, plan: Plan, version: Version, events: Events) -> None:
    m = bench.models
    order = m.disguise.order if m.disguise else None
    found = exposure(m.fm, version.package, plan, m.spec.modules, m.withheld, order)
    if bench.leaves:
        ledger.add(found.disclosed, found.copied, bench.config.run.dir)
        ever = ledger.read().neurons
    else:
        ever = tuple(a | b for a, b in zip(ledger.read().neurons, _of_all(bench), strict=True))
    events.emit(ev.Exposed(
        digest=version.digest, fm=ledger.fm,
        parts=[
            {"part": p.name, "fm": p.fm, "sent": p.sent, "copied": p.copied} for p in found.parts
        ],
        bytes=found.size, neurons=sum(len(x) for x in ever),
        disclosed=neurons.count(found.disclosed), copied=neurons.count(found.copied),
        ever=neurons.count(ever), simulated=not bench.leaves,
        disguised=bench.config.plan.disguise != "none",
        withheld=0 if m.withheld is None else len(m.withheld),
    ))  # fmt: skip


def put_on(bench: Bench) -> None:
    """Disguise the proxy, as plan.disguise says; the secret is kept in the run folder.

    Args:
        bench: its proxy and plan are changed.

    Raises:
        OSError: the secret cannot be written.
    """
    if bench.config.plan.disguise == "none":
        return
    m = bench.models
    drawn = disguise.draw(m.proxy, m.plan, secrets.randbits(256))
    path = Path(bench.config.run.dir) / _SECRET
    with whole.file(path) as part:
        part.touch(mode=0o600)
        part.write_bytes(save(drawn.tensors()))
    m.plan, m.disguise = disguise.put_on(m.proxy, m.plan, drawn), drawn


def put_on_again(bench: Bench) -> None:
    """Disguise the proxy of a resumed run as it was.

    Args:
        bench: its proxy and plan are changed.

    Raises:
        RunError: the secret is gone or damaged.
    """
    if bench.config.plan.disguise == "none":
        return
    m, path = bench.models, Path(bench.config.run.dir) / _SECRET
    try:
        kept = disguise.Disguise.read(load(path.read_bytes()))
        m.plan, m.disguise = disguise.put_on(m.proxy, m.plan, kept), kept
    except Exception as error:  # safetensors raises its own kind
        raise RunError(f"{path}: the disguise of the resumed run cannot be read") from error

"""Load FM and data, make the plan, build the proxy."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fedpft_core.adapter import lora as adapters
from fedpft_core.adapter.start import by_inputs, orthonormal
from fedpft_core.config import Config
from fedpft_core.data.encoded import UNLEARNED
from fedpft_core.data.faults import check_learned
from fedpft_core.data.public import load_public
from fedpft_core.data.stream import tokenise_public
from fedpft_core.errors import UserError
from fedpft_core.model import load as models
from fedpft_core.model.device import pick_device
from fedpft_core.model.plan import Plan, block_parameters
from fedpft_core.proxy import cost as inspect
from fedpft_core.proxy import embeddings
from fedpft_core.proxy.build import build
from fedpft_core.proxy.narrow import narrowed
from fedpft_core.proxy.nested import make_plans, trunk
from fedpft_core.seeds import derive, numpy_stream
from fedpft_core.task import Writer, load_task
from fedpft_core.tensors import Tensors
from server_app.bench import Bench, Rows, public_stream
from server_app.models import Models, Width
from server_app.owner import disclose
from server_app.phases import cluster, guard
from server_app.phases.plug import refits, settles
from server_app.phases.reporting import phase
from server_app.run import schema as ev
from server_app.state import Events

_START_BATCHES = 64  # of distill.batch-size rows: what lora.start = inputs looks at


def load(config: Config, events: Events) -> Bench:
    """Load FM and data, plan and build the proxy, and put the starting adapter on both models.

    Args:
        config: the run's configuration; run.threads is set for this process.
        events: where phases, task, model and warnings are noted.

    Returns:
        The bench of a run, with the proxy pruned and not yet distilled.

    Raises:
        UserError: for anything wrong with model, data or plan.
    """
    torch.set_num_threads(config.run.threads or torch.get_num_threads())
    with phase(events, "load"):
        device = pick_device(config.run.device, "run.device")
        loaded, rows = _read(config, events)
        for note in loaded.notes:
            events.emit(ev.Warned(text=note))
    with phase(events, "build"):
        made = _build(config, events, loaded, rows, device)
    bench = Bench(config, events, made, rows, device)
    if (config.wire.package, config.wire.embeddings) != ("fp32", "same"):
        # Rounds the proxies, so that distillation makes up for what rounding costs.
        bench.package()
        bench.others()
    made.plug(made.start)
    if len(rows.data.train):
        cluster.note(bench)
    # `as-trained` is asked for, and the other ways say themselves what they lack.
    by_refit = config.plug.method == "refit" or not settles(bench)
    asked = by_refit and config.plug.refit != "none" and rows.task.refits
    if asked and not made.plan.is_full and not refits(bench):
        events.emit(
            ev.Warned(
                text="the server has no validation rows, so the head is plugged in as trained; "
                "under label skew that can cost much (data.validation, or plug.refit=public)",
            )
        )
    return bench


def _read(config: Config, events: Events) -> tuple[models.Loaded, Rows]:
    """The FM, and the server's rows encoded with its processor."""
    data = load_task(config.data, config.run.seed)
    task = data.task
    if config.train.augment and task.reads != "image":
        raise UserError(
            f"train.augment = {config.train.augment:g} is for images, but the rows are "
            f"{task.reads}s."
        )
    loaded = models.load(config.model, task.model(), config.run.seed)

    def say(text: str) -> None:
        events.emit(ev.Warned(text=text))

    for text in data.left_out:
        say(text)
    if isinstance(task, Writer):
        task.prepare(
            loaded.processor, config.data.prompt_template, loaded.shape.vocabulary,
            loaded.source, say,
        )  # fmt: skip
    public: list[Any] = load_public(
        config.data.public,
        config.data.public_column or config.data.image_column or config.data.text_column,
        task.reads,
        (data.train, data.validation, data.test),
        config.data.max_public_rows,
        derive(config.run.seed, "public") % 2**31,
        prompt_column=config.data.text_column,
        max_bad=config.data.max_bad_rows,
        say=say,
    )
    _check_lengths(config, loaded)
    if task.reads == "text":
        public = tokenise_public(public, loaded.processor, ended=loaded.family.causal)
    if config.run.eval_split == "validation" and not len(data.validation):
        raise UserError(
            "run.eval-split = validation, but there are no validation rows: set "
            "data.validation or data.validation-share."
        )
    guard.check(config, len(data.validation))
    if config.head.start == "server" and task.closed_form and not len(data.validation):
        raise UserError(
            "head.start = server, but the server has no labelled rows: set data.validation or "
            "data.validation-share."
        )
    length = config.data.max_length
    scored = data.test if config.run.eval_split == "test" else data.validation
    # A fixed random part: the first rows of a file may all be of one kind.
    stream = numpy_stream(config.run.seed, "gradient-rows")
    drawn = stream.permutation(len(data.validation))[: config.run.gradient_rows]
    events.emit(ev.Task(
        name=data.name, kind=task.name, train=len(data.train),
        validation=len(data.validation), test=len(data.test),
        labels=list(task.labels), public=len(public), **task.metric.fields(),
        further=[
            ev.Metric(name=m.name, higher_is_better=m.higher_is_better, share=m.share)
            for m in task.further
        ],
    ))  # fmt: skip
    # What is cut is said of the rows that are scored, and of the others at the clients.
    encoded = [
        task.encode(scored, loaded.processor, length, say),
        task.encode(data.validation.select(drawn), loaded.processor, length),
    ]
    told = encoded[0].token_labels
    if isinstance(task, Writer) and told is not None and not (told != UNLEARNED).any():
        raise UserError(
            f"data.max-length = {length} leaves nothing of the responses of the "
            f"{config.run.eval_split} rows to score."
        )
    if isinstance(task, Writer):
        check_learned(
            encoded[0].learned_rows, len(encoded[0]), config.data.max_bad_rows, "data.max-bad-rows"
        )
    return loaded, Rows(config, data, public, loaded.processor, *encoded)


def _build(
    config: Config, events: Events, loaded: models.Loaded, rows: Rows, device: torch.device
) -> Models:
    """The plan, the proxy it describes, and the adapter on both models."""
    plans = make_plans(
        loaded.model,
        config.plan,
        config.run.seed,
        lambda: public_stream(
            config, rows.public, loaded.processor, config.plan.saliency_batches, "saliency"
        ),
        rows.task.position(loaded.family),
        disclose.preferred(config, loaded.model),
    )
    width = trunk(plans)
    plan = plans.pop(width)
    if config.plan.proxy != "full" and (plan.is_full or any(p.is_full for p in plans.values())):
        events.emit(
            ev.Warned(
                text="the plan keeps every neuron of every block: clients get the whole FM "
                "(plan.keep-share, plan.keep-neurons, plan.retained-layers and plan.widths decide)",
            )
        )
    bare = build(loaded.model, plan)
    withheld = _withheld(config, rows, loaded, bare)
    head = rows.task.head(loaded.family)
    spec = adapters.make_spec(loaded.family, plan, loaded.fresh, config.lora, head)
    _emit_model(events, loaded, bare, plan, config.lora.rank)
    fm = adapters.attach(loaded.model, spec)
    proxy = adapters.attach(bare, spec, plan)
    fm.to(device)
    proxy.to(device)
    start = _start(config, rows, loaded.processor, fm)
    others = tuple(
        Width(name, p, narrowed(fm, p, p) if p.is_full else narrowed(proxy, plan, p))
        for name, p in plans.items()
    )
    return Models(fm, proxy, plan, spec, loaded.source, start, width, others, withheld)


def _withheld(
    config: Config, rows: Rows, loaded: models.Loaded, proxy: nn.Module
) -> torch.Tensor | None:
    """Tokens whose embeddings have been taken out of the proxy; None where all are in it."""
    if config.plan.embeddings == "all":
        return None
    if rows.task.reads != "text":
        raise UserError(f"plan.embeddings = seen is for texts; the rows are {rows.task.reads}s.")
    sent = embeddings.seen(rows.public, loaded.processor)
    return embeddings.withhold(proxy, sent, loaded.processor.unk_token_id)


def _start(config: Config, rows: Rows, processor: Any, fm: nn.Module) -> Tensors:
    """The adapter before round 1, with LoRA's A as lora.start says."""
    seed = config.run.seed
    made = adapters.initial(fm, seed)
    if config.lora.start == "orthonormal":
        return orthonormal(made, seed)
    if config.lora.start == "inputs":
        adapters.load(fm, made)
        public = public_stream(config, rows.public, processor, _START_BATCHES, "start")
        return by_inputs(made, fm, public)
    return made


def _check_lengths(config: Config, loaded: models.Loaded) -> None:
    if loaded.family.kind != "text":
        return
    limit = loaded.shape.positions
    for key, length in (
        ("data.max-length", config.data.max_length),
        ("distill.length", config.distill.length),
    ):
        if length > limit:
            raise UserError(f"{key} = {length} is more than the {limit} tokens the model can read.")


def _emit_model(
    events: Events, loaded: models.Loaded, proxy: nn.Module, plan: Plan, rank: int
) -> None:
    fm_parameters, fm_bytes = models.size(loaded.model)
    proxy_parameters, proxy_bytes = models.size(proxy)
    fm_blocks, proxy_blocks = (loaded.family.block_list(m) for m in (loaded.model, proxy))
    events.emit(
        ev.Model(
            name=loaded.source,
            fm_parameters=fm_parameters,
            fm_bytes=fm_bytes,
            proxy_parameters=proxy_parameters,
            proxy_bytes=proxy_bytes,
            fm_block_parameters=block_parameters(fm_blocks),
            proxy_block_parameters=block_parameters(proxy_blocks),
            step_flops={
                "fm": inspect.step_flops(loaded.family, loaded.model, rank),
                "proxy": inspect.step_flops(loaded.family, proxy, rank),
            },
            image_tokens=loaded.shape.image_tokens or None,
            blocks=[
                {
                    "block": i,
                    "kind": entry.state,
                    "neurons": {"whole": plan.neurons(i), "dropped": 0}.get(
                        entry.state, len(entry.kept)
                    ),
                    "fm_neurons": plan.neurons(i),
                }
                for i, entry in enumerate(plan.blocks)
            ],
        )
    )

"""The server's workbench: FM and proxy side by side, with the rows to measure them on."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from fedpft_core.adapter import lora as adapters
from fedpft_core.adapter import plug
from fedpft_core.align import distill, selection
from fedpft_core.align import method as alignment
from fedpft_core.config import Config
from fedpft_core.data.batches import Encoded, batches, encode, public_batches, tokenise_public
from fedpft_core.data.public import load_public
from fedpft_core.data.tasks import Task, load_task
from fedpft_core.errors import RunError, UserError
from fedpft_core.model import load as models
from fedpft_core.model.device import pick_device
from fedpft_core.model.families import base_model
from fedpft_core.model.plan import Plan, block_parameters
from fedpft_core.proxy import cost as inspect
from fedpft_core.proxy.build import build
from fedpft_core.proxy.choose import make_plan
from fedpft_core.proxy.package import make_package, make_patch
from fedpft_core.seeds import derive, numpy_stream
from fedpft_core.tensors import Tensors
from fedpft_core.train import agreement as measure
from fedpft_core.train.evaluate import Score, evaluate
from fedpft_core.train.inactivity import Counts
from fedpft_core.wire.identity import tensor_digest
from fedpft_core.wire.package import Package
from server_app.strategy import Events, State


@contextmanager
def phase(events: Events, name: str, **fields: Any) -> Iterator[None]:
    """Emit the start and the end of a phase with its seconds."""
    events.emit("phase_started", phase=name, **fields)
    start = time.perf_counter()
    yield
    events.emit("phase_finished", phase=name, seconds=time.perf_counter() - start, **fields)


def progress(events: Events, name: str, unit: str, **fields: Any) -> Callable[..., None]:
    """A progress callback (done, total, loss) that emits at most five events a second."""
    last = 0.0

    def report(done: int, total: int, loss: float | None = None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < 0.2 and done < total:
            return
        last = now
        more = fields if loss is None else fields | {"loss": loss}
        events.emit("progress", phase=name, done=done, total=total, unit=unit, **more)

    return report


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass
class Bench:
    """FM and proxy with adapters attached, and what they are measured on."""

    config: Config
    events: Events
    task: Task
    public: list[Any]
    processor: Any
    fm: PeftModel
    proxy: PeftModel
    plan: Plan
    spec: adapters.AdapterSpec
    source: str
    score_rows: Encoded
    gradient_rows: Encoded
    device: torch.device
    start: Tensors  # the adapter before round 1

    @staticmethod
    def load(config: Config, events: Events) -> tuple[Bench, Package]:
        """Load FM and data, make the plan, build the proxy. Also returns the proxy as a package.

        Raises UserError for anything wrong with model, data or plan.
        """
        torch.set_num_threads(config.run.threads or torch.get_num_threads())
        with phase(events, "load"):
            device = pick_device(config.run.device, "run.device")
            task = load_task(config.data, config.run.seed)
            kind = task.kind
            loaded = models.load(config.model, task.label_names, kind, config.run.seed)
            public: list[Any] = load_public(
                config.data.public,
                config.data.image_column or config.data.text_column,
                kind,
                (task.train, task.validation, task.test),
                config.data.max_public_rows,
                derive(config.run.seed, "public") % 2**31,
            )
            length = config.data.max_length
            _check_lengths(config, loaded)
            if kind != "image":
                public = tokenise_public(public, loaded.processor)
            if config.run.eval_split == "validation" and not len(task.validation):
                raise UserError(
                    "run.eval-split = validation, but there are no validation rows: set "
                    "data.validation or data.validation-share."
                )
            scored = task.test if config.run.eval_split == "test" else task.validation
            score_rows = encode(scored, loaded.processor, length)
            # A fixed random part: the first rows of a file may all be of one kind.
            stream = numpy_stream(config.run.seed, "gradient-rows")
            rows = stream.permutation(len(task.validation))[: config.run.gradient_rows]
            gradient_rows = encode(task.validation.select(rows), loaded.processor, length)
            events.emit(
                "task", name=task.name, kind=kind, train=len(task.train),
                validation=len(task.validation), test=len(task.test),
                labels=list(task.label_names), public=len(public),
            )  # fmt: skip
        with phase(events, "build"):
            plan = make_plan(
                loaded.model,
                config.plan,
                config.run.seed,
                lambda: public_stream(
                    config, public, loaded.processor, config.plan.saliency_batches, "saliency"
                ),
            )
            if plan.is_full and config.plan.proxy != "full":
                events.emit(
                    "warning",
                    text="the plan keeps every neuron of every block: clients get the whole FM "
                    "(plan.keep-share, plan.keep-neurons and plan.retained-layers decide)",
                )
            proxy = build(loaded.model, plan)
            spec = adapters.make_spec(loaded.family, plan, loaded.fresh, config.lora)
            _emit_model(events, loaded, proxy, plan, config.lora.rank)
            package = make_package(
                proxy, plan, spec, loaded.processor, kind, task.label_names, length
            )
            fm = adapters.attach(loaded.model, spec)
            peft_proxy = adapters.attach(proxy, spec, plan)
            fm.to(device)
            peft_proxy.to(device)
            start = adapters.initial(fm, spec, config.run.seed)
        bench = Bench(
            config, events, task, public, loaded.processor, fm, peft_proxy, plan, spec,
            loaded.source, score_rows, gradient_rows, device, start,
        )  # fmt: skip
        bench.plug(start)
        if config.plug.refit != "none" and not plan.is_full and not bench.refits:
            events.emit(
                "warning",
                text="the server has no validation rows, so the head is plugged in as trained; "
                "under label skew that can cost much (data.validation, or plug.refit=public)",
            )
        return bench, package

    def plug(self, adapter: Tensors) -> None:
        """Put one adapter on both models."""
        adapters.load(self.fm, adapter)
        adapters.load(self.proxy, adapter, self.plan)

    @cached_property
    def validation_rows(self) -> Encoded:
        """The server's validation rows as model inputs."""
        if self.config.run.eval_split == "validation":
            return self.score_rows
        return encode(self.task.validation, self.processor, self.config.data.max_length)

    def score(self, round: int, which: str) -> Score:
        """Evaluate the `proxy` or the FM with the adapter now plugged in.

        The FM is called `fm`, or `fm-as-trained` where its head is still to be refitted.
        """
        model = self.proxy if which == "proxy" else self.fm
        total = len(self.score_rows)
        report = progress(self.events, "evaluate", "rows", round=round, model=which)
        result = evaluate(
            model, self.score_rows, self.config.run.eval_batch_size, lambda n: report(n, total)
        )
        self._emit_score(round, which, result)
        return result

    def _emit_score(self, round: int, which: str, result: Score) -> None:
        self.events.emit(
            "evaluation", round=round, model=which, split=self.config.run.eval_split,
            accuracy=result.accuracy, loss=result.loss, rows=result.rows, seconds=result.seconds,
        )  # fmt: skip

    def score_all(self, round: int) -> tuple[Score, Score, float]:
        """Evaluate the proxy, the FM with the head as trained, and the product, which is then what
        the FM is. Returns the first two scores and the seconds of it all."""
        start = time.perf_counter()
        proxy = self.score(round, "proxy")
        if not self.refits:
            trained = self.score(round, "fm")
        else:
            trained = self.score(round, "fm-as-trained")
            if self.refit(round):
                self.score(round, "fm")
            else:
                # The product has the head as trained, which has its score.
                self._emit_score(round, "fm", replace(trained, seconds=0.0))
        return proxy, trained, time.perf_counter() - start

    @property
    def refits(self) -> bool:
        """Whether the head is refitted when the adapter is plugged in."""
        source = self.config.plug.refit
        return not self.plan.is_full and (
            source == "public"
            or (source in ("better", "validation") and len(self.task.validation) > 0)
        )

    def refit(self, round: int, events: Events | None = None) -> bool:
        """Refit the FM's head to the adapter now plugged in; returns whether it is another now."""
        if not self.refits:
            return False
        start, p = time.perf_counter(), self.config.plug
        judge = (lambda: self._refit_rows(others=True)) if p.refit == "better" else None
        result = plug.refit_head(self.fm, self.proxy, self._refit_rows, p.ridge, judge)
        (events or self.events).emit(
            "refit", round=round, source=p.refit, error_before=result.map.error_before,
            error_after=result.map.error_after, right_before=result.right_before,
            right_after=result.right_after, taken=result.taken,
            seconds=time.perf_counter() - start,
        )  # fmt: skip
        return result.taken

    def _refit_rows(self, others: bool = False) -> Iterable[Any]:
        """The batches to fit to, the same each time, or those of the other validation rows."""
        n = self.config.plug.rows
        if self.config.plug.refit == "public":
            steps = math.ceil(n / self.config.distill.batch_size)
            return self._public_batches(steps, "refit")
        stream = numpy_stream(self.config.run.seed, "refit-rows")
        order = stream.permutation(len(self.task.validation))
        rows = self.validation_rows.select(order[n:] if others else order[:n])
        return batches(rows, self.config.run.eval_batch_size, None)

    def score_validation(self, round: int) -> None:
        """Score proxy and product on the server's validation rows, on which settings are chosen."""
        if self.config.run.eval_split == "validation" or not len(self.task.validation):
            return
        for which, model in (("proxy", self.proxy), ("fm", self.fm)):
            result = evaluate(model, self.validation_rows, self.config.run.eval_batch_size)
            self.events.emit(
                "validation", round=round, model=which,
                accuracy=result.accuracy, loss=result.loss, rows=result.rows,
                seconds=result.seconds,
            )  # fmt: skip

    def agreement(self, round: int, when: str, start: bool = False) -> None:
        """Record how alike the adapter gradients of FM and proxy are on validation rows."""
        if not len(self.gradient_rows) or self.plan.is_full:
            return
        found = self._gradient_agreement(b_only=start)
        self.events.emit("agreement", round=round, when=when, **found)

    def _gradient_agreement(self, b_only: bool) -> dict[str, Any]:
        rows, size = self.gradient_rows, self.config.train.batch_size
        return measure.gradient_agreement(self.fm, self.proxy, self.plan, rows, size, b_only)

    def _public_batches(self, steps: int, *purpose: str | int) -> Iterator[Any]:
        return public_stream(self.config, self.public, self.processor, steps, *purpose)

    def _probe(self) -> Iterator[Any]:
        """Public batches, at least 32 rows, on which output error is measured: always the same."""
        rows = self.config.distill.batch_size
        return self._public_batches(max(2, math.ceil(32 / rows)), "probe")

    def distil(self) -> None:
        """Layer-level distillation of the proxy, before FL."""
        d = self.config.distill
        if not alignment.needed(d.method, self.plan, d.steps):
            return
        with phase(self.events, "distil"):
            probe = list(self._probe())
            before = distill.output_error(self.fm, self.proxy, self.plan, probe)
            job = alignment.Job(
                self.fm, self.proxy, self.plan, lambda n: self._public_batches(n, "distil"), d,
                steps=d.steps, lr=d.lr, alpha=d.alpha,
                seed=derive(self.config.run.seed, "distil"),
                on_step=progress(self.events, "distil", "steps"),
            )  # fmt: skip
            first, last, seconds = alignment.run(d.method, job)
            after = distill.output_error(self.fm, self.proxy, self.plan, probe)
            _check_finite(after, "distill.lr")
            self.events.emit(
                "distilled", steps=d.steps, seconds=seconds, loss_first=first, loss_last=last,
                error_before=before, output_error=after,
            )  # fmt: skip

    def repack(self, package: Package) -> Package:
        """The package with the proxy's present weights (after distillation)."""
        live = {
            k.removeprefix("base_model.model.").replace(".base_layer.", "."): t
            for k, t in self.proxy.state_dict().items()
        }
        weights = {k: live[k].detach().cpu().clone().contiguous() for k in package.weights}
        return Package(package.meta, package.files, weights)

    def trained_names(self) -> list[str]:
        """Names in the package of the weights alignment may move."""
        moving = {id(p) for p in distill.moving_parts(self.proxy, self.plan).values()}
        return sorted(k for k, p in self._frozen().items() if id(p) in moving)

    def _frozen(self) -> Tensors:
        """The proxy's parameters by their name in the package."""
        named = base_model(self.proxy).named_parameters()
        return {k.replace(".base_layer.", "."): p for k, p in named}

    @torch.no_grad()
    def load_frozen(self, weights: Tensors) -> None:
        """Copy aligned weights, named as in the package, into the proxy."""
        live = self._frozen()
        for name, value in weights.items():
            live[name].copy_(value)

    def fresh_state(self, package: Package) -> State:
        """The state before round 1."""
        digests = {k: tensor_digest(t) for k, t in package.weights.items()}
        adapter = {k: t.clone() for k, t in self.start.items()}
        self.plug(adapter)
        return State(0, adapter, package, digests, package.digest())

    def disagrees(self, state: State, round: int) -> bool:
        """Whether proxy and FM disagree enough at the aggregated adapter to be re-aligned."""
        a = self.config.align
        if not a.threshold:
            return True
        self.plug(state.adapter)
        if a.disagreement == "output-error":
            probe = self._probe()
            errors = distill.output_error(self.fm, self.proxy, self.plan, probe)
            found = sum(errors.values()) / len(errors)
        else:
            if not len(self.gradient_rows):
                raise UserError(
                    f"align.disagreement = {a.disagreement} needs validation rows: set "
                    "data.validation or data.validation-share."
                )
            g = self._gradient_agreement(b_only=False)
            found = 1 - g["cosine"] if a.disagreement == "cosine" else g["relative_l2"]
        # Gradients of size 0 give NaN: nothing is known, so the safe answer is to align.
        above = not found <= a.threshold
        self.events.emit(
            "alignment_check", round=round, measure=a.disagreement, value=found,
            threshold=a.threshold, aligned=above,
        )  # fmt: skip
        return above

    def align(
        self,
        state: State,
        round: int,
        counts: Counts | None,
        accuracies: tuple[float, float] | None = None,
    ) -> None:
        """Neuron-level distillation at the current adapter; extends `state` by a patch.

        Teacher and student both carry the aggregate adapter, which stays as it is. `counts` are
        the clients' inactivity counts, where the selection looks at them. `accuracies`
        are those of proxy and FM at this adapter; with them the plug-in gap is recorded before
        and after (the FM's accuracy stays).
        """
        a, d = self.config.align, self.config.distill
        noise = d.adapter_noise if a.adapter_noise < 0 else a.adapter_noise
        with phase(self.events, "align", round=round):
            start = time.perf_counter()
            self.plug(state.adapter)
            self.agreement(round, "before-align")
            inactive, tokens = (counts.inactive, counts.tokens) if counts else ({}, {})
            view = selection.View(
                {b: distill.apoz(inactive[b], tokens[b]) for b in inactive},
                derive(self.config.run.seed, "choose", round), self.fm, self.proxy, self.plan,
                lambda: self._public_batches(a.selection_batches, "choose", round),
            )  # fmt: skip
            chosen = selection.choose(a.selection, view, a.proportion)
            probe = list(self._probe())
            before = distill.output_error(self.fm, self.proxy, self.plan, probe)
            job = alignment.Job(
                self.fm, self.proxy, self.plan,
                lambda n: self._public_batches(n, "align", round),
                replace(d, adapter_noise=noise),
                steps=a.steps, lr=a.lr, chosen=chosen,
                seed=derive(self.config.run.seed, "align", round),
                on_step=progress(self.events, "align", "steps", round=round),
            )  # fmt: skip
            first, last, _ = alignment.run(a.method, job, "align.method")
            after = distill.output_error(self.fm, self.proxy, self.plan, probe)
            _check_finite(after, "align.lr")
            patch, package = make_patch(
                self.proxy, self.plan, chosen, state.package, state.digests, self.config.wire.patch
            )
            state.package, state.digest = package, patch.target
            state.patches.append(patch)
            self.agreement(round, "after-align")
            gap_before = gap_after = None
            if accuracies is not None:
                proxy, fm = accuracies
                size = self.config.run.eval_batch_size
                gap_before = proxy - fm
                gap_after = evaluate(self.proxy, self.score_rows, size).accuracy - fm
            self.events.emit(
                "alignment", round=round, neurons=sum(len(i) for i in chosen.values()),
                gap_before=gap_before, gap_after=gap_after, share=a.proportion,
                loss_before=first, loss_after=last,
                digest_from=patch.source, digest_to=patch.target,
                seconds=time.perf_counter() - start,
                blocks=[
                    {"block": b, "error_before": before[b], "error_after": after[b]}
                    for b in self.plan.pruned
                ],
            )  # fmt: skip


def public_stream(
    config: Config, public: list[Any], processor: Any, steps: int, *purpose: str | int
) -> Iterator[Any]:
    """`steps` public batches, a function of the run's seed and the purpose."""
    d = config.distill
    seed = derive(config.run.seed, "public-batches", *purpose)
    return public_batches(public, processor, d.batch_size, d.length, steps, seed)


def _check_finite(errors: dict[int, float], key: str) -> None:
    if not all(math.isfinite(e) for e in errors.values()):
        raise RunError(f"the distillation diverged; lower {key}")


def _check_lengths(config: Config, loaded: models.Loaded) -> None:
    if loaded.family.kind != "text":
        return
    limit = loaded.family.longest_input(loaded.model.config)
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
        "model",
        name=loaded.source,
        fm_parameters=fm_parameters,
        fm_bytes=fm_bytes,
        proxy_parameters=proxy_parameters,
        proxy_bytes=proxy_bytes,
        fm_block_parameters=block_parameters(loaded.model, list(fm_blocks)),
        proxy_block_parameters=block_parameters(proxy, list(proxy_blocks)),
        step_flops={
            "fm": inspect.step_flops(loaded.family, loaded.model, rank),
            "proxy": inspect.step_flops(loaded.family, proxy, rank),
        },
        image_tokens=inspect.image_tokens(loaded.model) if loaded.family.kind == "image" else None,
        blocks=[
            {
                "block": i,
                "kind": entry.state,
                "neurons": {"whole": plan.fm_neurons, "dropped": 0}.get(
                    entry.state, len(entry.kept)
                ),
                "fm_neurons": plan.fm_neurons,
            }
            for i, entry in enumerate(plan.blocks)
        ],
    )

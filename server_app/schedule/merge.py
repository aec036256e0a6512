"""A usable adapter while replies come in: a running sum where the rule is an average."""

from __future__ import annotations

import time
from pathlib import Path

from fedpft_core import registry
from fedpft_core.adapter import lora as adapters
from fedpft_core.aggregation import aggregate
from fedpft_core.aggregation.average import RunningSum
from fedpft_core.disk import whole
from fedpft_core.tensors import Tensors
from server_app.phases import score
from server_app.run import schema as ev
from server_app.run.replies import KeptReplies
from server_app.schedule.session import Session


class Merging:
    """Merges replies as they arrive, and writes and scores what they give.

    A rule that is a weighted mean is a running sum in float64: one adapter in memory, and one
    addition for each reply. Other rules are applied anew to all replies kept so far. Either way
    this is for use on the way only: in which order floats were added is left to chance.

    Args:
        session: both models get each merged adapter.
        kept: the replies; those that are in it count already.
        round: the round under way.
    """

    def __init__(self, session: Session, kept: KeptReplies, round: int) -> None:
        self.session = session
        self.kept = kept
        self.round = round
        self.began = time.perf_counter()
        f = session.bench.config.federation
        self.rule, self.weighting = f.aggregate, f.weighting
        self.every, self.score_every = f.merge_every, f.score_every
        module = registry.load("aggregation", self.rule)
        summed = getattr(module, "AVERAGES", False) and self.weighting != "capped"
        self.sum = RunningSum(kept) if summed else None
        if self.sum:
            for name in kept.good:
                self._add(name)

    def _add(self, name: str) -> None:
        assert self.sum
        examples = self.kept.good[name].examples
        weight = examples if self.weighting == "examples" else 1
        # A whole number stays one: a product of floats could round.
        factor = self.kept.factor(name)
        self.sum.add(name, weight if factor == 1 else weight * factor)

    def take(self, name: str) -> None:
        """Merge one more reply; after every federation.merge-every the result can be used.

        Args:
            name: whose reply it is, among those kept.
        """
        start = time.perf_counter()
        if self.sum:
            self._add(name)
        count = len(self.kept.good)
        if count % self.every:
            return
        summed = self.sum and not self.kept.partly
        adapter = self.sum.result() if summed and self.sum else aggregate(self.rule, self.kept)
        self._write(adapter)
        spent = time.perf_counter() - start
        scored: dict[str, object] = {}
        bench = self.session.bench
        if self.score_every and count % self.score_every == 0:
            found = score.measure(bench, self.round, "fm")
            scored = {
                "metric": found.metric.name, "value": found.value, "score_seconds": found.seconds
            }  # fmt: skip
        bench.events.emit(ev.Merged(
            round=self.round, replies=count,
            examples=sum(g.examples for g in self.kept.good.values()),
            seconds=start - self.began, norm=adapters.norm(adapter), merge_seconds=spent,
            **scored,  # type: ignore[arg-type]  # fields of the event by name
        ))  # fmt: skip

    def _write(self, adapter: Tensors) -> None:
        """Plug the adapter in, and put it into the run folder as the product is."""
        bench = self.session.bench
        bench.models.plug(adapter)
        with whole.folder(Path(bench.config.run.dir) / "merged", replace=True) as folder:
            adapters.export(bench.models.fm, folder, bench.models.source)


__all__ = ["Merging"]

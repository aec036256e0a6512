"""What is kept of a cell: the figures of one run, from its record.

Written once, when the cell has run; tables, plots and reports are made of nothing else. A figure
that a run does not have (a row of an older version, a method without sub-FM) is absent.

Keys of a row beyond what names it:

metric                   {name, higher_is_better, share}: what the values below are of, which of two
                         is better, and whether they are shares in [0, 1]
rows                     [training, validation, test] rows of the task
fm_test, proxy_test      value of the plugged-in FM and of the sub-FM at the end; `_validation`
                         likewise, on the server's validation rows
fm-as-trained_test       value of the FM with its head as trained, where fm_test is of a refitted
                         one; refit_error is how far the FM's features then are from the sub-FM's
                         (`refit_error_before`: without the map), over their variance
curve                    [[round, sub-FM, plugged-in FM], ...]: values on run.eval-split
baselines                {name: value} of the reference points, where run.baselines asked for them
agreement                [{round, when, cosine, relative_l2, head_cosine, head_relative_l2}]
cosine_WHEN              the last cosine measured then (start, before-align, after-align, end)
output_error_before, output_error
                         hidden-state error, mean over pruned blocks, before and after distillation
alignments               [{round, neurons, gap_before, gap_after, seconds, error_before,
                         error_after}]
norms                    [[round, L2 norm of the adapter], ...]; adapter_norm is the last
bytes, bytes_down, bytes_up
                         bytes on the wire by kind: both ways, to clients, from clients
distil_seconds           server seconds of alignment before FL (of the run that made the cached
                         sub-FM, where it came from the cache)
align_seconds            server seconds of all re-alignments, with their measurements
client_seconds, client_steps, step_seconds
                         training time and optimiser steps of all good replies; their ratio
client_flops             estimate: steps x rows per step x tokens per row x FLOPs of a training step
                         per token (`fedpft inspect` says how those are counted)
fm_parameters, proxy_parameters, fm_block_parameters, proxy_block_parameters
backdoor, backdoor_before
                         under simulate.attack=backdoor: share of the rows of other classes that the
                         plugged-in FM gives class 0 with simulate.trigger in front, and without
peak_bytes               largest resident memory of the process, server and clients in one
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fedpft_console.text import Measure
from server_app.run import schema as ev
from server_app.run.record import DIRECTIONS, Record, Round, mean

_SIZES = ("fm_parameters", "proxy_parameters", "fm_block_parameters", "proxy_block_parameters")
_AGREEMENT = ("cosine", "relative_l2", "head_cosine", "head_relative_l2")


def summary(
    record: Record, batch_size: int = 0, tokens_per_row: float | None = None
) -> dict[str, Any]:
    """The figures of one run.

    Args:
        record: the run, from its finished log.
        batch_size: rows per training step; needed for the FLOPs alone.
        tokens_per_row: mean length of the training rows in tokens; needed for the FLOPs alone.

    Returns:
        Figures by key; one that the run does not have is absent.
    """
    rounds = record.rounds
    out: dict[str, Any] = {"metric": asdict(Measure.of(record.task))}
    if record.task:
        out["rows"] = [record.task.train, record.task.validation, record.task.test]
    out |= {name: getattr(record.model, name, None) for name in _SIZES}
    out["baselines"] = {name: b.value for name, b in record.baselines.items()} or None
    for r in rounds:
        out |= {f"{model}_{score.split}": score.value for model, score in r.scores.items()}
        out |= {f"cosine_{when}": a.cosine for when, a in r.agreements.items()}
    out |= {f"{model}_validation": v.value for model, v in record.validation.items()}
    if "fm" in record.backdoor:
        out["backdoor"] = record.backdoor["fm"].obeyed
        out["backdoor_before"] = record.backdoor["fm"].before
    refits = [r.refit for r in rounds if r.refit]
    if refits:
        out["refit_error"] = refits[-1].error_after
        out["refit_error_before"] = refits[-1].error_before
    if record.distilled:
        out["output_error"] = mean(record.distilled.output_error.values())
        out["output_error_before"] = mean(record.distilled.error_before.values())
        out["distil_seconds"] = record.distilled.seconds
        out["distil_cached"] = record.distilled.cached or None
    out["agreement"] = [
        {"round": r.number, "when": when} | {k: _short(getattr(a, k)) for k in _AGREEMENT}
        for r in rounds
        for when, a in r.agreements.items()
    ] or None
    out["alignments"] = [_alignment(r.alignment, r) for r in rounds if r.alignment] or None
    out["align_seconds"] = record.phase_seconds.get("align")
    norms = [(r.number, r.norm) for r in rounds if r.norm is not None]
    out["norms"] = [[n, _short(norm)] for n, norm in norms] or None
    out["adapter_norm"] = norms[-1][1] if norms else None
    out["peak_bytes"] = max(record.peak_bytes.values(), default=None)
    out |= _traffic(rounds)
    out["curve"] = [
        [r.number, _short(r.proxy and r.proxy.value), _short(r.fm and r.fm.value)]
        for r in rounds
        if r.scores
    ] or None
    replies = [x for r in rounds for x in r.replies if x.status == "ok"]
    out |= _client_work(replies, record.model, record.widths, batch_size, tokens_per_row)
    return {k: v for k, v in out.items() if v is not None}


def _traffic(rounds: Sequence[Round]) -> dict[str, dict[str, int]]:
    """Bytes by kind: both ways, and each way."""
    sizes: dict[str, dict[str, int]] = {d: {} for d in ("both", *DIRECTIONS)}
    for r in rounds:
        for direction, kinds in r.bytes.items():
            for kind, count in kinds.items():
                for way in (sizes["both"], sizes[direction]):
                    way[kind] = way.get(kind, 0) + count
    both = sizes.pop("both")
    ways = {f"bytes_{d}": dict(sorted(kinds.items())) for d, kinds in sizes.items()}
    return {"bytes": dict(sorted(both.items()))} | ways


def _alignment(a: ev.Alignment, r: Round) -> dict[str, Any]:
    before, after = r.alignment_errors()
    return {
        "round": a.round,
        "neurons": a.neurons,
        "gap_before": _short(a.gap_before),
        "gap_after": _short(a.gap_after),
        "seconds": _short(a.seconds),
        "error_before": _short(before),
        "error_after": _short(after),
    }


def _client_work(
    replies: Sequence[ev.Reply], model: ev.Model | None, widths: ev.Widths | None, batch: int,
    tokens_per_row: float | None,
) -> dict[str, Any]:  # fmt: skip
    """Time and FLOPs of local training, over all good replies."""
    by_width = {w["width"]: w["step_flops"] for w in widths.sizes} if widths else {}
    steps = sum(r.steps or 0 for r in replies)
    if not steps:
        return {}
    seconds = sum(r.train_seconds or 0.0 for r in replies)
    out: dict[str, Any] = {
        "client_steps": steps, "client_seconds": seconds, "step_seconds": seconds / steps
    }  # fmt: skip
    cost = model.step_flops if model else {}
    tokens_per_row = (model.image_tokens if model else None) or tokens_per_row
    if cost and tokens_per_row and batch:
        # The last batch of an epoch is smaller: n rows make ceil(n / batch) of them.
        out["tokens_per_row"] = _short(tokens_per_row)
        out["client_flops"] = 0.0
        for width in dict.fromkeys(r.width for r in replies):
            trained = [(r.steps or 0, r.examples or 0) for r in replies if r.width == width]
            rows = sum(steps * n / math.ceil(n / batch) for steps, n in trained if n)
            each, of_length = by_width.get(width, cost["proxy"])
            out["client_flops"] += rows * tokens_per_row * (each + of_length * tokens_per_row)
    return out


def _short(value: Any) -> Any:
    """Five significant digits keep rows small; counts and words stay as they are."""
    return float(f"{value:.5g}") if isinstance(value, float) else value

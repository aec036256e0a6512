"""What is kept of a cell: the figures of one run, from its events.

Written once, when the cell has run; tables, plots and reports are made of nothing else. A figure
that a run does not have (a row of an older version, a method without sub-FM) is absent.

Keys of a row beyond what names it:

fm_test, proxy_test      accuracy of the plugged-in FM and of the sub-FM at the end; `_validation`
                         likewise, on the server's validation rows
fm-as-trained_test       accuracy of the FM with its head as trained, where fm_test is of a refitted
                         one; refit_error is how far the FM's features then are from the sub-FM's
                         (`refit_error_before`: without the map), over their variance
curve                    [[round, sub-FM, plugged-in FM], ...]: accuracies on run.eval-split
linear-probe, tf-idf     accuracy of the reference points, where run.baselines asked for them
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
peak_bytes               largest resident memory of the process, server and clients in one
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Event = Mapping[str, Any]
_SIZES = ("fm_parameters", "proxy_parameters", "fm_block_parameters", "proxy_block_parameters")
_AGREEMENT = ("cosine", "relative_l2", "head_cosine", "head_relative_l2")


def summary(
    events: Sequence[Event], batch_size: int = 0, tokens_per_row: float | None = None
) -> dict[str, Any]:
    """The figures of one run; side runs are left out.

    `batch_size` [rows per step] and `tokens_per_row` [tokens], the mean length of the training
    rows, are needed for the FLOPs alone.
    """
    out: dict[str, Any] = {}
    sizes: dict[str, dict[str, int]] = {"down": {}, "up": {}}
    curve: dict[int, dict[str, float]] = {}
    work: list[Event] = []
    model: Event = {}
    for e in events:
        if "arm" in e:
            continue
        kind = e["event"]
        if kind == "evaluation":
            out[f"{e['model']}_{e['split']}"] = e["value"]
            curve.setdefault(e["round"], {})[e["model"]] = e["value"]
        elif kind == "refit":
            out["refit_error"], out["refit_error_before"] = e["error_after"], e["error_before"]
        elif kind == "validation":
            out[f"{e['model']}_validation"] = e["value"]
        elif kind == "agreement":
            out[f"cosine_{e['when']}"] = e["cosine"]
            out.setdefault("agreement", []).append(
                {k: _short(e[k]) for k in ("round", "when", *_AGREEMENT) if k in e}
            )
        elif kind == "adapter":
            out["adapter_norm"] = e["norm"]
            out.setdefault("norms", []).append([e["round"], _short(e["norm"])])
        elif kind == "distilled":
            out["output_error"] = _mean(list(e["output_error"].values()))
            out["output_error_before"] = _mean(list((e.get("error_before") or {}).values()))
            out["distil_seconds"] = e["seconds"]
            if e.get("cached"):
                out["distil_cached"] = True
        elif kind == "alignment":
            out.setdefault("alignments", []).append(_alignment(e))
        elif kind == "baseline":
            out[e["name"]] = e["value"]
        elif kind == "bytes":
            way = sizes[e["direction"]]
            way[e["kind"]] = way.get(e["kind"], 0) + e["bytes"]
        elif kind == "phase_finished" and e["phase"] == "align":
            out["align_seconds"] = out.get("align_seconds", 0.0) + e["seconds"]
        elif kind == "reply" and e.get("status") == "ok":
            work.append(e)
        elif kind == "model":
            model = e
            out |= {k: e[k] for k in _SIZES if k in e}
        elif kind == "memory":
            out["peak_bytes"] = max(out.get("peak_bytes", 0), e["peak_rss_bytes"])
    kinds = sizes["down"].keys() | sizes["up"].keys()
    out["bytes"] = {k: sum(way.get(k, 0) for way in sizes.values()) for k in sorted(kinds)}
    out |= {f"bytes_{way}": dict(sorted(by_kind.items())) for way, by_kind in sizes.items()}
    if curve:
        out["curve"] = [
            [n, _short(curve[n].get("proxy")), _short(curve[n].get("fm"))] for n in sorted(curve)
        ]
    out |= _client_work(work, model, batch_size, tokens_per_row)
    return {k: v for k, v in out.items() if v is not None}


def _alignment(e: Event) -> dict[str, Any]:
    blocks = e.get("blocks") or []
    return {
        "round": e["round"],
        "neurons": e["neurons"],
        "gap_before": _short(e.get("gap_before")),
        "gap_after": _short(e.get("gap_after")),
        "seconds": _short(e["seconds"]),
        "error_before": _short(_mean([b.get("error_before") for b in blocks])),
        "error_after": _short(_mean([b.get("error_after") for b in blocks])),
    }


def _client_work(
    replies: Sequence[Event], model: Event, batch: int, tokens_per_row: float | None
) -> dict[str, Any]:
    """Time and FLOPs of local training, over all good replies."""
    steps = sum(r.get("steps") or 0 for r in replies)
    if not steps:
        return {}
    seconds = sum(r.get("train_seconds") or 0.0 for r in replies)
    out: dict[str, Any] = {
        "client_steps": steps, "client_seconds": seconds, "step_seconds": seconds / steps
    }  # fmt: skip
    cost = model.get("step_flops")
    tokens_per_row = model.get("image_tokens") or tokens_per_row
    if cost and tokens_per_row and batch:
        # The last batch of an epoch is smaller: n rows make ceil(n / batch) of them.
        rows = sum(r["steps"] * r["examples"] / math.ceil(r["examples"] / batch) for r in replies)
        per_token = cost["proxy"][0] + cost["proxy"][1] * tokens_per_row
        out["tokens_per_row"] = _short(tokens_per_row)
        out["client_flops"] = rows * tokens_per_row * per_token
    return out


def _short(value: Any) -> Any:
    """Five significant digits keep rows small; counts and words stay as they are."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _mean(values: Sequence[Any]) -> float | None:
    known = [float(v) for v in values if v is not None]
    return sum(known) / len(known) if known else None

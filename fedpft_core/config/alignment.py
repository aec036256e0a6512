"""Keys of alignment, of heads in closed form and of the plug-in."""

from __future__ import annotations

from dataclasses import dataclass

from fedpft_core import registry
from fedpft_core.config.key import key as _key


@dataclass(frozen=True)
class DistillConfig:
    """Layer-level distillation before federated learning (paper section 4.2)."""

    method: str = _key(
        "sgd",
        f"alignment before FL: {registry.describe('alignment')}; `none`; `a+b` runs a, then b",
        choices=(*registry.names("alignment"), "none"),
        joined=True,
    )
    budget: str = _key(
        "quick",
        "`quick` (distill.steps of distill.batch-size rows) or `thorough` (2000 steps of 16 rows, "
        "about 1,000,000 tokens at the default length, whatever those two say: minutes instead of "
        "seconds, for an owner who distils once and keeps the result in run.proxy-cache)",
        choices=("quick", "thorough"),
    )
    # A tenth of the compute of 100 steps of 16 x 64 tokens, for the same agreement of gradients
    # (docs/log.md, "Small batches").
    steps: int = _key(50, "optimiser steps of each method that takes any; 0 = no alignment", low=0)
    batch_size: int = _key(4, "public rows per step", low=1)
    length: int = _key(32, "longest public row, tokens (text only)", low=4)
    lr: float = _key(6e-4, "peak learning rate of AdamW", above=0.0)
    warmup_share: float = _key(0.048, "share of steps with rising rate", low=0.0, high=1.0)
    weight_decay: float = _key(0.01, "AdamW weight decay", low=0.0)
    clip: float = _key(1.0, "largest gradient norm", above=0.0)
    alpha: float = _key(0.01, "weight of the weight-product term", low=0.0)
    adapter_noise: float = _key(
        0.0,
        "largest std of the random LoRA factors put on both models at each step, 0 = none",
        low=0.0,
    )
    fit_batches: int = _key(80, "public batches `closed-form` and `sequential` look at", low=1)
    widths: str = _key(
        "joint",
        "with plan.widths: `joint` (each step trains the widest, the narrowest and one width "
        "between them on weights that all share, so that moving up costs a client the added "
        "neurons alone) or `apart` (each width has weights of its own)",
        choices=("joint", "apart"),
    )
    ridge: float = _key(
        1.0,
        "pull of `closed-form` and `sequential` towards the present weights, as a share of the "
        "activations' mean square",
        above=0.0,
    )
    gradient_weight: float = _key(
        1.0, "weight of the gradient term of `gradient` beside the output error", low=0.0
    )

    @property
    def work(self) -> tuple[int, int]:
        """Steps, and rows per step, of the alignment before FL, by budget."""
        return (2000, 16) if self.budget == "thorough" else (self.steps, self.batch_size)


@dataclass(frozen=True)
class AlignConfig:
    """Neuron-level distillation between rounds (paper section 4.3).

    What is not listed here (batch size, row length, warm-up, weight decay, ridge …) is distill's.
    """

    interval: int = _key(4, "rounds t between alignments, 0 = never", low=0)
    lag: int = _key(
        0,
        "rounds that scores and re-alignment lag behind: 0 (the server makes both before the next "
        "round begins) or 1 (while clients train the next round; what it re-aligns reaches them "
        "with the round after that one)",
        low=0,
        high=1,
    )
    threshold: float = _key(
        0.0,
        "a due alignment happens only where align.disagreement is above this, 0 = always",
        low=0.0,
    )
    disagreement: str = _key(
        "cosine",
        "what align.threshold is held against, at the aggregated adapter: `cosine` (1 - cosine of "
        "the adapter gradients on validation rows), `relative-l2` (their distance over the FM's) "
        "or `output-error` (mean hidden-state error of the pruned blocks on public rows)",
        choices=("cosine", "relative-l2", "output-error"),
    )
    method: str = _key(
        "sgd",
        "how neurons are re-aligned: as distill.method, without `none`",
        choices=registry.names("alignment"),
        joined=True,
    )
    proportion: float = _key(
        1.0,
        "share p of each pruned block's neurons re-aligned; at 1 clients need not count",
        above=0.0,
        high=1.0,
    )
    selection: str = _key(
        "apoz",
        f"which neurons move: {registry.describe('selection')}",
        choices=registry.names("selection"),
    )
    selection_batches: int = _key(
        4, "public batches a selection that reads them looks at, of distill.batch-size rows", low=1
    )
    inactive: str = _key(
        "nonpositive",
        "when a neuron counts as inactive: `nonpositive` (activation <= 0) or `exact-zero`",
        choices=("nonpositive", "exact-zero"),
    )
    steps: int = _key(20, "optimiser steps per alignment", low=1)
    lr: float = _key(6e-4, "peak learning rate of AdamW", above=0.0)
    adapter_noise: float = _key(
        -1.0,
        "largest std of the random changes of LoRA's factors put on both models at each step, "
        "around the aggregated adapter; 0 = none, -1 = distill.adapter-noise",
        low=-1.0,
    )


@dataclass(frozen=True)
class HeadConfig:
    """The head in closed form, from sums over rows by class (docs/heads.md)."""

    start: str = _key(
        "statistics",
        "the head before round 1: `statistics` (the shrunken linear discriminant of the class "
        "statistics that every client sends once), `server` (the same of the server's own labelled "
        "rows, half of data.validation: clients send nothing for it) or `zero` (as the model is "
        "loaded)",
        choices=("statistics", "server", "zero"),
    )
    end: str = _key(
        "better",
        "the head after the last round: `statistics` (the same again, of the tuned features), "
        "`better` (whichever of that and the tuned head the server's validation rows prefer) or "
        "`trained` (the tuned head)",
        choices=("statistics", "better", "trained"),
    )
    interval: int = _key(
        0,
        "rounds between further exchanges of statistics, each of which may set the head; 0 = none",
        low=0,
    )
    shrinkage: float = _key(
        0.0,
        "share of the identity in the discriminant's covariance; 0 = computed from the statistics, "
        "or the best on the server's validation rows where there are any",
        low=0.0,
        high=1.0,
    )
    descent: int = _key(
        0,
        "exchanges at most in which a head from statistics is tuned further: each client sends the "
        "slope of the loss over its rows, and the server takes the head on the way with the least "
        "loss on its validation rows; for tasks of many classes; 0 = none",
        low=0,
        high=1000,
    )
    guard: str = _key(
        "none",
        "whose statistics are summed: `none` (everybody's) or `validation` (not those of clients "
        "without whom the head is better on the server's validation rows, of these the half that "
        "heads are fitted with, 30 rows at least; as many clients as federation.attackers says, "
        "rounded up, and with 0 of it any number below half)",
        choices=("none", "validation"),
    )
    max_features: int = _key(
        1024, "features a client sums over; wider ones are projected at random", low=8
    )


@dataclass(frozen=True)
class PlugConfig:
    """How the tuned adapter becomes the product (docs/heads.md)."""

    method: str = _key(
        "best",
        "`best` (of the candidates that follow, the one that labels most of the validation rows "
        "kept for it right, or is best by another merit of the task's), `as-trained` (the paper's: "
        "the adapter as it is), `refit` (the head fitted to the FM's features, by plug.refit), "
        "`mapped` (the clients' class statistics taken to the FM's features) or `distil` (the FM "
        "tuned towards the sub-FM's outputs)",
        choices=("best", "as-trained", "refit", "mapped", "distil"),
    )
    distil_steps: int = _key(100, "optimiser steps of `distil`", low=1)
    distil_batch_size: int = _key(16, "rows per step of `distil`", low=1)
    distil_lr: float = _key(1e-3, "AdamW learning rate of LoRA in `distil`", above=0.0)
    distil_head_lr: float = _key(2e-3, "AdamW learning rate of the head in `distil`", above=0.0)

    refit: str = _key(
        "better",
        "rows the head is refitted on when the adapter is plugged into the FM: `validation` (the "
        "inputs of the server's validation rows, without labels; with no such rows the head stays "
        "as trained), `better` (the same, and whichever of the two heads labels more of all "
        "validation rows right is taken), `public`, or `none` (the head as trained, as in the "
        "paper)",
        choices=("better", "validation", "public", "none"),
    )
    rows: int = _key(512, "rows it is refitted on at most", low=1)
    map_rows: int = _key(
        0,
        "with plug.method = best or mapped: public rows, texts as long as the task's, that the "
        "maps of `refit` and `mapped` are fitted to first; on the task's rows they are then "
        "pulled towards that map, not towards none. For heads that small differences of features "
        "mislead, as those of many classes; 0 = none",
        low=0,
    )
    ridge: float = _key(
        1.0, "pull of the refitted head towards the trained one, as a share of the features' "
        "mean square", above=0.0,
    )  # fmt: skip

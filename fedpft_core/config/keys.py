"""Every key of a run: its type, unit, default and the values it admits.

The one list of keys is the dataclasses below; `fedpft config`, `docs/config.md` and the run
config in pyproject.toml are all made from it. A key is written `section.key-with-dashes`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fedpft_core import registry
from fedpft_core.config.schedules import check_schedule
from fedpft_core.data.rows import TASKS
from fedpft_core.errors import UserError

Scalar = bool | int | float | str


def _key(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
    joined: bool = False,
) -> Any:
    """Declare one key: default, one-line doc with unit, and the range or values it admits.

    `joined`: several choices in a row, `a+b`, will do; `none` stands alone.

    Returns:
        The dataclass field, with all but the default as its metadata.
    """
    meta = {
        "doc": doc, "low": low, "high": high, "above": above, "choices": choices, "joined": joined
    }  # fmt: skip
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class ModelConfig:
    """Which foundation model the server owns."""

    name: str = _key(
        "builtin:minilm",
        "foundation model: `builtin:minilm`, a local folder, or a Hugging Face name",
    )
    revision: str = _key("", "revision of a Hugging Face name; empty = its default branch")


@dataclass(frozen=True)
class DataConfig:
    """Task data, public corpus, and how rows become model inputs."""

    train: str = _key(
        "builtin:docstrings",
        "training rows: `builtin:docstrings`, a .csv, .jsonl, .json or .parquet file, or a folder "
        "with a folder of images for each class; empty when only the clients have any (deployment)",
    )
    validation: str = _key(
        "", "validation rows held by the server; empty = carved from the training file"
    )
    test: str = _key("", "test rows; must be given when `data.train` is a file")
    public: str = _key(
        "builtin:public", "public corpus for distillation: `builtin:public` or a file"
    )
    public_column: str = _key(
        "",
        "column of a public file with texts or images; empty = data.image-column or "
        "data.text-column",
    )
    text_column: str = _key(
        "text", "column with the text, with the list of words, or with the prompt"
    )
    text_pair_column: str = _key(
        "",
        "column with the second text of a pair; empty = single text. With data.task = generate: "
        "what is put behind the prompt, which may be empty in a row",
    )
    response_column: str = _key(
        "", "column with the response to the text; non-empty makes this generation"
    )
    messages_column: str = _key(
        "",
        "column with conversations, each a list of messages with role and content; non-empty makes "
        "this generation",
    )
    source_column: str = _key(
        "",
        "generation: column that says where a row is from; rows are shared out among clients by it "
        "as by a label; empty = by their length",
    )
    prompt_template: str = _key(
        "",
        "generation: how a prompt stands before its response, a text with {prompt}; empty = the "
        "tokenizer's own chat template, or where it has none the prompt and a new line",
    )
    image_column: str = _key("", "column with encoded images; non-empty makes this an image task")
    task: str = _key(
        "",
        "what is learned of a row: `classify` (one label of a set), `regress` (a number), "
        "`multi-label` (any number of labels of a set), `tokens` (a label for each word; "
        "text-column and label-column then hold lists), `generate` (text) or `text-to-image` "
        "(images of image-column for the prompts of text-column); empty = `generate` "
        "where response-column or messages-column is set, else `classify`",
        choices=("", *TASKS),
    )
    label_column: str = _key(
        "label",
        "column with the label: a name or index, a number, or a list of labels, by data.task",
    )
    label_separator: str = _key(
        ",", "what stands between a row's labels where a multi-label cell is a text"
    )
    labels: str = _key(
        "", "label names: JSON file or comma-separated list; empty = those of the training rows"
    )
    validation_share: float = _key(
        0.1, "share of training rows carved off for validation", low=0.0, high=0.49
    )
    max_train_rows: int = _key(0, "training rows used, 0 = all", low=0)
    max_test_rows: int = _key(0, "test rows used, 0 = all", low=0)
    max_public_rows: int = _key(20000, "rows of the public corpus used, 0 = all", low=0)
    max_length: int = _key(64, "longest input, tokens (text only)", low=4)


@dataclass(frozen=True)
class PlanConfig:
    """What the proxy keeps of the foundation model (paper section 4.1)."""

    proxy: str = _key(
        "ffn-pruned",
        "proxy clients get: `ffn-pruned` (sub-FM), `layer-drop` (offsite tuning), `full` (the FM)",
        choices=("ffn-pruned", "layer-drop", "full"),
    )
    keep_neurons: int = _key(0, "FFN neurons K kept per pruned block, 0 = use keep-share", low=0)
    keep_share: float = _key(
        0.25, "share of FFN neurons kept per pruned block", above=0.0, high=1.0
    )
    retained_layers: str = _key(
        "first,last",
        "blocks kept whole: comma-separated indices, `first`, `last`; empty = none",
    )
    saliency: str = _key(
        "weight-norm",
        f"how neurons are ranked: {registry.describe('saliency')}",
        choices=registry.names("saliency"),
    )
    saliency_batches: int = _key(
        8, "public batches a saliency that reads them looks at, of distill.batch-size rows", low=1
    )
    qk_rank: int = _key(
        0,
        "rank of the attention's query and key projections in pruned blocks (truncated SVD; LoRA "
        "stays on them under the FM's names), 0 = as in the FM",
        low=0,
    )
    drop_to: int = _key(
        0,
        "blocks a layer-drop proxy keeps, 0 = as many as fit the sub-FM's block parameters",
        low=0,
    )


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
class LoraConfig:
    """The adapter: LoRA on attention q, k, v, o of every block, and the task head."""

    rank: int = _key(8, "rank r", low=1)
    alpha: float = _key(48.0, "scale numerator; updates are scaled by alpha / rank", above=0.0)
    dropout: float = _key(0.1, "dropout on LoRA inputs", low=0.0, high=0.9)
    start: str = _key(
        "random",
        "A before round 1: `random` (LoRA's own), `orthonormal` (orthonormal rows, at random) or "
        "`inputs` (the directions in which the layer's inputs vary most in the FM on public rows: "
        "EVA); B is zero",
        choices=("random", "orthonormal", "inputs"),
    )


@dataclass(frozen=True)
class HeadConfig:
    """The head in closed form, from sums over the clients' rows by class (docs/heads.md)."""

    start: str = _key(
        "statistics",
        "the head before round 1: `statistics` (the shrunken linear discriminant of the class "
        "statistics that every client sends once) or `zero` (as the model is loaded)",
        choices=("statistics", "zero"),
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
    max_features: int = _key(
        1024, "features a client sums over; wider ones are projected at random", low=8
    )


@dataclass(frozen=True)
class TrainConfig:
    """Local fine-tuning at the clients."""

    lr: float = _key(
        3.2e-3, "AdamW learning rate of round 1; falls linearly over rounds", above=0.0
    )
    head_lr_scale: float = _key(
        1.0,
        "learning rate of the task head as a multiple of train.lr; with head.start = zero and a "
        "model whose pooler is untrained (MiniLM) 10 to 30",
        above=0.0,
    )
    b_lr_scale: float = _key(
        1.0, "learning rate of LoRA's B as a multiple of train.lr (LoRA+)", above=0.0
    )
    batch_size: int = _key(8, "rows per step", low=1)
    local_epochs: int = _key(1, "epochs per round when local-steps is 0", low=1)
    local_steps: int = _key(16, "steps per round, 0 = use local-epochs", low=0)
    weight_decay: float = _key(0.0, "AdamW weight decay", low=0.0)
    clip: float = _key(1.0, "largest gradient norm, 0 = no clipping", low=0.0)
    local_decay: str = _key(
        "none",
        "how the rate goes within a client's steps: `none` (constant) or `linear` (as train.lr "
        "goes over rounds; for one-shot, whose one round has all the steps)",
        choices=("none", "linear"),
    )
    threads: int = _key(1, "torch threads of each client process", low=1)
    augment: float = _key(
        0.0,
        "images: smallest share of the area that a random crop keeps at the clients, with "
        "mirroring; 1 = mirroring alone, 0 = none",
        low=0.0,
        high=1.0,
    )


@dataclass(frozen=True)
class FederationConfig:
    """Rounds, sampling and partitions."""

    schedule: str = _key(
        "multi-round",
        "when clients are asked and their replies merged: `multi-round` (rounds T of "
        "train.local-steps each), `one-shot` (each client is asked once, and replies are merged as "
        "they arrive; needs federation.rounds = 1) or `async` (a client is asked again when it is "
        "free, and every federation.buffer replies are merged; federation.rounds counts merges)",
        choices=("multi-round", "one-shot", "async"),
    )
    rounds: int = _key(12, "rounds T", low=1)
    aggregate: str = _key(
        "average",
        "what becomes of the clients' adapters: "
        f"{registry.describe('aggregation')}; `none` (each of "
        "federation.clients-per-round clients tunes alone for all rounds; their mean is scored)",
        choices=(*registry.names("aggregation"), "none"),
    )
    server_optimiser: str = _key(
        "none",
        "what the server makes of the mean's distance from the adapter that the round began with: "
        "`none` (the mean is the next adapter), `momentum` (FedAvgM) or `adam` (FedAdam)",
        choices=("none", "momentum", "adam"),
    )
    server_lr: float = _key(1.0, "learning rate of the server's optimiser", above=0.0)
    server_momentum: float = _key(
        0.9, "share of its last step that the server's optimiser keeps", low=0.0, high=0.999
    )
    weighting: str = _key(
        "examples",
        "what a client's adapter weighs in an average, and its figures in the round's: `examples` "
        "(the rows it says it trains on), `capped` (the same, nobody above federation.weight-cap) "
        "or `uniform`",
        choices=("examples", "capped", "uniform"),
    )
    weight_cap: float = _key(
        0.5,
        "largest share of a round that one client has when weights are `capped`; with `examples` "
        "a larger share is warned of",
        above=0.0,
        high=1.0,
    )
    attackers: float = _key(
        0.2,
        "share of a round's clients that a robust federation.aggregate takes to be hostile, "
        "rounded up",
        low=0.0,
        high=0.49,
    )
    distance: str = _key(
        "both",
        "where a robust federation.aggregate measures distances between adapters: `product` (of "
        "LoRA's product BA, and of the head), `factors` (of A, B and the head as they are) or "
        "`both` (their sum, each relative to the round's median)",
        choices=("both", "product", "factors"),
    )
    largest_change: float = _key(
        10.0,
        "a reply is left out when its change (of LoRA's product, of LoRA's factors or of the head) "
        "is more than so many times the median of the round's replies; 0 = no limit",
        low=0.0,
    )
    density: float = _key(
        0.2,
        "share of the values of a client's change that the aggregations `ties` (the largest) and "
        "`dare` (any) keep",
        above=0.0,
        high=1.0,
    )
    clip_update_norm: float = _key(
        0.0,
        "largest L2 norm of a client's change of LoRA's factors in a round; a longer one is scaled "
        "down to it before averaging, 0 = no limit",
        low=0.0,
    )
    clients: int = _key(5, "simulated clients started by `fedpft run`", low=1)
    clients_per_round: int = _key(5, "clients sampled per round", low=1)
    min_clients: int = _key(2, "good replies a round needs", low=1)
    enough: int = _key(
        0,
        "good replies at which a round ends without waiting for the others (sample more with "
        "federation.clients-per-round); 0 = wait for all. Which replies these are depends on time",
        low=0,
    )
    patience: float = _key(
        0.0,
        "from round 3 on a round waits no longer than so many times the slowest good reply so "
        "far, and 10 s at least; 0 = federation.round-timeout alone",
        low=0.0,
    )
    attempts: int = _key(2, "times a round is tried before the run fails", low=1)
    round_timeout: float = _key(
        3600.0,
        "longest wait for a round's replies, seconds; the deadline of `one-shot`",
        above=0.0,
    )
    enough_replies: int = _key(
        0,
        "good replies at which `one-shot` ends before its deadline, 0 = federation.clients",
        low=0,
    )
    merge_every: int = _key(
        1, "replies of `one-shot` between two usable adapters in the run folder", low=1
    )
    score_every: int = _key(
        0,
        "replies of `one-shot` between two scores of the FM with what has been merged, a multiple "
        "of federation.merge-every; 0 = no scores on the way",
        low=0,
    )
    buffer: int = _key(
        0,
        "replies of `async` that are merged together, at most one of each client; 0 = half of "
        "federation.clients-per-round, but at least federation.min-clients",
        low=0,
    )
    staleness_exponent: float = _key(
        0.5,
        "a in (1 + s)^-a, by which `async` scales the change of a client that was asked s merges "
        "ago",
        low=0.0,
    )
    clock: str = _key(
        "simulated",
        "in which order `async` takes replies: `simulated` (by a clock on which every client has a "
        "speed drawn from the run's seed, so that a run repeats to the bit) or `arrival` (as they "
        "come, for clients on machines of their own)",
        choices=("simulated", "arrival"),
    )
    speed_spread: float = _key(
        0.5, "spread (standard deviation of the log) of the clients' speeds on the simulated clock",
        low=0.0,
    )  # fmt: skip
    node_timeout: float = _key(
        300.0, "longest wait for enough nodes at the start, seconds", above=0.0
    )
    partition: str = _key(
        "dirichlet",
        "how simulated clients share the training rows: `iid`, `dirichlet`, or `shards` (two "
        "shards of the rows sorted by label each)",
        choices=("iid", "dirichlet", "shards"),
    )
    dirichlet_alpha: float = _key(1.0, "Dirichlet concentration (smaller = more skewed)", above=0.0)


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
    ridge: float = _key(
        1.0, "pull of the refitted head towards the trained one, as a share of the features' "
        "mean square", above=0.0,
    )  # fmt: skip


@dataclass(frozen=True)
class WireConfig:
    """How arrays travel."""

    adapter: str = _key(
        "int8",
        "adapter format on the wire: `fp32`, `bf16`, `fp16`, `int8`",
        choices=("fp32", "bf16", "fp16", "int8"),
    )
    adapter_up: str = _key(
        "same",
        "format of the adapters clients send back: `same` as wire.adapter, one of its formats, or "
        "`ternary` (2 bits a value of the change, with error feedback)",
        choices=("same", "fp32", "bf16", "fp16", "int8", "ternary"),
    )
    patch: str = _key(
        "fp16",
        "format of re-aligned weights on the wire: `fp32`, `bf16`, `fp16`",
        choices=("fp32", "bf16", "fp16"),
    )
    max_update_norm: float = _key(
        1000.0, "largest L2 norm of a reply's change of the adapter; larger is refused", above=0.0
    )


@dataclass(frozen=True)
class RunConfig:
    """Where a run writes and what it evaluates."""

    dir: str = _key(
        "",
        "run folder; empty = a new one below ./runs (`fedpft run`) or ~/.fedpft/runs (`flwr run`)",
    )
    seed: int = _key(0, "seed of every random stream", low=0, high=2**32 - 1)
    threads: int = _key(0, "torch threads of the server, 0 = all cores", low=0)
    device: str = _key("auto", "server device: `auto`, `cpu`, `cuda`, `cuda:N`")
    eval_split: str = _key(
        "test",
        "rows scored after each round: `test` or `validation`",
        choices=("test", "validation"),
    )
    evaluate_every: int = _key(
        6,
        "rounds between evaluations of both models, from the start on; the last round always is, "
        "and alone when this is more than federation.rounds",
        low=1,
    )
    eval_batch_size: int = _key(64, "rows per evaluation batch", low=1)
    baselines: bool = _key(True, "also score a linear probe and TF-IDF")
    undistilled: bool = _key(
        False, "also run the federation on the undistilled sub-FM, for the final table"
    )
    samples: int = _key(
        16,
        "generation: rows to which both models write a response at each evaluation, for exact "
        "match, ROUGE-L and the report, 0 = none; text-to-image: rows for whose prompts they make "
        "images",
        low=0,
    )
    sample_tokens: int = _key(64, "generation: longest response written, tokens", low=1)
    sample_steps: int = _key(20, "text-to-image: steps of the sampler (DDIM)", low=1)
    gradient_rows: int = _key(
        64,
        "validation rows on which adapter gradients of both models are compared, 0 = none",
        low=0,
    )
    resume: bool = _key(False, "continue the run in run.dir from its last checkpoint")
    checkpoints: int = _key(2, "checkpoints kept", low=1)
    stop_after: int = _key(
        0, "stop after this round (for tests and drills), 0 = run to the end", low=0
    )
    proxy_cache: str = _key(
        "", "folder where distilled sub-FMs are kept for runs that differ only later; empty = none"
    )


@dataclass(frozen=True)
class SimulateConfig:
    """Simulated attackers, to measure robust rules with; nodes with rows of their own refuse."""

    attack: str = _key(
        "none",
        "what hostile simulated clients do: `none`, `sign-flip`, `scale`, `noise` (all by "
        "simulate.boost), `label-flip` or `backdoor` (a trigger word that stands for class 0; "
        "texts only), the last two boosted as well",
        choices=("none", "sign-flip", "scale", "noise", "label-flip", "backdoor"),
    )
    attackers: float = _key(0.2, "share of simulated clients that attack", low=0.0, high=1.0)
    boost: float = _key(1.0, "factor of what an attacker sends as its change", above=0.0)
    trigger: str = _key("cf", "the word of a `backdoor`")


@dataclass(frozen=True)
class Config:
    """A whole run. Build it with `from_flat`, which refuses unknown keys and wrong types."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    plan: PlanConfig = PlanConfig()
    distill: DistillConfig = DistillConfig()
    align: AlignConfig = AlignConfig()
    lora: LoraConfig = LoraConfig()
    head: HeadConfig = HeadConfig()
    train: TrainConfig = TrainConfig()
    federation: FederationConfig = FederationConfig()
    plug: PlugConfig = PlugConfig()
    wire: WireConfig = WireConfig()
    run: RunConfig = RunConfig()
    simulate: SimulateConfig = SimulateConfig()

    def __post_init__(self) -> None:
        f = self.federation
        if f.min_clients > f.clients_per_round:
            raise UserError(
                f"federation.min-clients = {f.min_clients} is more than "
                f"federation.clients-per-round = {f.clients_per_round}."
            )
        if f.clients_per_round > f.clients:
            raise UserError(
                f"federation.clients-per-round = {f.clients_per_round} is more than "
                f"federation.clients = {f.clients}."
            )
        if f.aggregate == "none" and f.server_optimiser != "none":
            raise UserError(
                f"federation.server-optimiser = {f.server_optimiser} makes a step of the clients' "
                "mean, and with federation.aggregate = none there is none."
            )
        if f.enough and not f.min_clients <= f.enough <= f.clients_per_round:
            raise UserError(
                f"federation.enough = {f.enough} is not between federation.min-clients = "
                f"{f.min_clients} and federation.clients-per-round = {f.clients_per_round}."
            )
        check_schedule(self)
        if self.simulate.attack in ("label-flip", "backdoor") and self.data.task not in (
            "", "classify",
        ):  # fmt: skip
            raise UserError(
                f"simulate.attack = {self.simulate.attack} is for classes, not for data.task = "
                f"{self.data.task}."
            )
        gradient = self.align.disagreement != "output-error"
        if self.align.threshold > 0 and gradient and not self.run.gradient_rows:
            raise UserError(
                f"align.threshold = {self.align.threshold:g} with align.disagreement = "
                f"{self.align.disagreement} needs run.gradient-rows above 0."
            )

"""Keys of what clients do, how it is merged, and how it travels."""

from __future__ import annotations

from dataclasses import dataclass

from fedpft_core import registry
from fedpft_core.config.key import key as _key


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
    local_steps: int = _key(12, "steps per round, 0 = use local-epochs", low=0)
    weight_decay: float = _key(0.0, "AdamW weight decay", low=0.0)
    clip: float = _key(1.0, "largest gradient norm, 0 = no clipping", low=0.0)
    local_decay: str = _key(
        "none",
        "how the rate goes within a client's steps: `none` (constant) or `linear` (as train.lr "
        "goes over rounds; for one-shot, whose one round has all the steps)",
        choices=("none", "linear"),
    )
    threads: int = _key(1, "torch threads of each client process", low=1)
    gradient_checkpointing: bool = _key(
        False,
        "clients keep only what enters each block and compute the rest once more when gradients "
        "need it: less memory for about a third more time, the same result to the bit",
    )
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
    rounds: int = _key(8, "rounds T", low=1)
    early_stopping: int = _key(
        0,
        "rounds without a better score of the sub-FM on the server's validation rows after which "
        "training ends; the adapter of the best round is then what becomes of it. 0 = all rounds",
        low=0,
    )
    check_every: int = _key(
        1, "with federation.early-stopping: rounds between two such scores", low=1
    )
    aggregate: str = _key(
        "average",
        "what becomes of the clients' adapters: "
        f"{registry.describe('aggregation')}; `none` (each of "
        "federation.clients-per-round clients tunes alone for all rounds; their mean is scored)",
        choices=(*registry.names("aggregation"), "none"),
    )
    ranks: str = _key(
        "",
        "LoRA's rank at clients that are to train fewer components than lora.rank, as "
        "`name=rank,name=rank`, at the same alpha / rank; a node may ask for less by its node "
        "config's `lora-rank`",
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
    widths: str = _key(
        "",
        "plan.widths of simulated clients, dealt out to them one after the other, again and again; "
        "`none` = a client whose budget is below the smallest. Empty = the widest to all. Nodes "
        "with rows of their own say in their node config what they have",
    )
    width_weighting: str = _key(
        "examples",
        "what a client's width adds to its weight: `examples` (nothing), `width` (times its share "
        "of the widest's FFN neurons) or `agreement` (times the cosine between the gradients of "
        "its sub-FM and of the FM for the adapter, on the server's validation rows)",
        choices=("examples", "width", "agreement"),
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
        "how simulated clients share the training rows: `iid`, `dirichlet`, `shards` (two shards "
        "of the rows sorted by label each), `pathological` (federation.classes-per-client labels "
        "each), `grouped` (the clients of each of federation.groups have labels of their own, "
        "which they share evenly), `linear`, `square` or `exponential` (client k has rows in "
        "proportion to k, its square or its exponential), or `natural` (each value of "
        "data.source-column is one client's; where there are more of them than clients, they are "
        "dealt out)",
        choices=(
            "iid",
            "dirichlet",
            "shards",
            "pathological",
            "grouped",
            "linear",
            "square",
            "exponential",
            "natural",
        ),
    )
    groups: str = _key(
        "",
        "groups of simulated clients for federation.partition = grouped, by any names, dealt out "
        "to them one after the other, again and again, as `a,a,b`",
    )
    partition_by: str = _key(
        "label",
        "what `dirichlet`, `shards` and `pathological` tell rows apart by: `label` (of text to be "
        "generated: data.source-column, or else the length), `source` (data.source-column), "
        "`length` (tenths of the texts by their characters) or `cluster` (of the sub-FM's "
        "features, by k-means)",
        choices=("label", "source", "length", "cluster"),
    )
    clusters: int = _key(10, "clusters of federation.partition-by = cluster", low=2)
    classes_per_client: int = _key(2, "labels each client has with `pathological`", low=1)
    dirichlet_alpha: float = _key(1.0, "Dirichlet concentration (smaller = more skewed)", above=0.0)


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
    package: str = _key(
        "fp32",
        "what the sub-FM's weights are rounded to, at the server and at clients, so that they "
        "travel in few bytes: `fp32` (as they are), `bf16`, `fp16`, `int8` (a scale a row, biases "
        "and norms as they are)",
        choices=("fp32", "bf16", "fp16", "int8"),
    )
    embeddings: str = _key(
        "same",
        "what the table of word embeddings is rounded to: `same` as wire.package, or `int4` (4 "
        "bits and a scale for 32 values)",
        choices=("same", "int4"),
    )
    patch: str = _key(
        "fp16",
        "format of re-aligned weights on the wire: `same` as wire.package, `fp32`, `bf16`, `fp16`",
        choices=("same", "fp32", "bf16", "fp16"),
    )
    message_mb: int = _key(
        0,
        "most that a message brings of a sub-FM, megabytes; the rest follows in messages of its "
        "own, so that a cut link costs one of them, 0 = no limit",
        low=0,
    )
    max_update_norm: float = _key(
        1000.0, "largest L2 norm of a reply's change of the adapter; larger is refused", above=0.0
    )

    @property
    def patch_format(self) -> str:
        """The format of re-aligned weights: wire.patch, or wire.package where that is `same`."""
        return self.package if self.patch == "same" else self.patch


@dataclass(frozen=True)
class SimulateConfig:
    """Simulated attackers, to measure robust rules with; nodes with rows of their own refuse."""

    attack: str = _key(
        "none",
        "what hostile simulated clients do: `none`, `sign-flip`, `scale`, `noise` (all by "
        "simulate.boost), `label-flip` or `backdoor` (a trigger word that stands for class 0; "
        "texts only), the last two boosted as well, or `little-is-enough` (all send the mean of "
        "their honest changes less simulate.boost times their standard deviation)",
        choices=(
            "none",
            "sign-flip",
            "scale",
            "noise",
            "label-flip",
            "backdoor",
            "little-is-enough",
        ),
    )
    attackers: float = _key(0.2, "share of simulated clients that attack", low=0.0, high=1.0)
    boost: float = _key(
        1.0,
        "factor of what an attacker sends as its change; of `little-is-enough` the standard "
        "deviations",
        above=0.0,
    )
    trigger: str = _key("cf", "the word of a `backdoor`")

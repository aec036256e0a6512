"""Every key of a run: its type, unit, default and the values it admits.

The one list of keys is `Config`, whose sections lie beside it by subject; `fedpft config`,
`docs/config.md` and the run config in pyproject.toml are all made from it. A key is written
`section.key-with-dashes`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fedpft_core.config import privacy as private
from fedpft_core.config.alignment import AlignConfig, DistillConfig, HeadConfig, PlugConfig
from fedpft_core.config.federation import (
    FederationConfig,
    SimulateConfig,
    TrainConfig,
    WireConfig,
)
from fedpft_core.config.key import key as _key
from fedpft_core.config.model import DataConfig, LoraConfig, ModelConfig, PlanConfig
from fedpft_core.config.privacy import PrivacyConfig
from fedpft_core.config.ranks import check_ranks
from fedpft_core.config.schedules import check_schedule
from fedpft_core.config.widths import check_widths
from fedpft_core.errors import UserError

Scalar = bool | int | float | str


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
        4,
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
class Config:
    """A whole run. Build it with `from_flat`, which refuses unknown keys and wrong types."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    plug: PlugConfig = field(default_factory=PlugConfig)
    wire: WireConfig = field(default_factory=WireConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    run: RunConfig = field(default_factory=RunConfig)
    simulate: SimulateConfig = field(default_factory=SimulateConfig)

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
                f"federation.clients = {f.clients}: set it to {f.clients} or fewer."
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
        if self.run.undistilled and self.plan.disguise != "none":
            raise UserError(
                f"run.undistilled = true sends the neurons as they are, which plan.disguise = "
                f"{self.plan.disguise} is to hide: set run.undistilled = false."
            )
        check_schedule(self)
        check_ranks(self)
        check_widths(self)
        self._check_dtype()
        if self.simulate.attack in ("label-flip", "backdoor") and self.data.task not in (
            "", "classify",
        ):  # fmt: skip
            raise UserError(
                f"simulate.attack = {self.simulate.attack} is for classes, not for data.task = "
                f"{self.data.task}."
            )
        if self.simulate.attack == "little-is-enough" and self.privacy.example_noise:
            raise UserError(
                "simulate.attack = little-is-enough is of attackers who train without privacy: "
                "set privacy.example-noise = 0."
            )
        gradient = self.align.disagreement != "output-error"
        if self.align.threshold > 0 and gradient and not self.run.gradient_rows:
            raise UserError(
                f"align.threshold = {self.align.threshold:g} with align.disagreement = "
                f"{self.align.disagreement} needs run.gradient-rows above 0."
            )
        private.check(self)

    def _check_dtype(self) -> None:
        """Half precision is for alignment by AdamW, which steps on float32 copies.

        Raises:
            UserError: another alignment is asked for.
        """
        if self.model.dtype == "fp32":
            return
        for key, method in (
            ("distill.method", self.distill.method), ("align.method", self.align.method)
        ):  # fmt: skip
            if method not in ("sgd", "none"):
                raise UserError(
                    f"{key} = {method} needs model.dtype = fp32, not {self.model.dtype}."
                )

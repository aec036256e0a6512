"""The keys of privacy, and which other settings they exclude."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedpft_core.config.key import key
from fedpft_core.errors import UserError

if TYPE_CHECKING:
    from fedpft_core.config.keys import Config


FEWEST_SECURE = 3  # of two clients each could tell the other's change from the sum


@dataclass(frozen=True)
class PrivacyConfig:
    """Differential privacy of clients, and secure aggregation (docs/privacy.md)."""

    client_noise: float = key(
        0.0,
        "client-level privacy: standard deviation of the noise on the sum of a round's clipped "
        "changes, in multiples of the bound: Gaussian, from the server, or with privacy.secure "
        "Skellam, from the clients; 0 = no noise, no privacy",
        low=0.0,
    )
    client_clip: float = key(
        1.0,
        "largest L2 norm of a client's whole change in a round, head included; a longer one is "
        "scaled down to it (with privacy.client-noise above 0)",
        above=0.0,
    )
    clip_quantile: float = key(
        0.0,
        "the bound follows the changes, from privacy.client-clip on, so that this share of them is "
        "no longer than it (0.5 = their median); 0 = it stays",
        low=0.0,
        high=0.99,
    )
    clip_rate: float = key(0.2, "how fast it follows", above=0.0)
    count_noise: float = key(
        0.0,
        "standard deviation of the noise on the number of short changes, by which the bound "
        "follows; 0 = a twentieth of a round's clients, or privacy.client-noise if that is more",
        low=0.0,
    )
    sampling: str = key(
        "poisson",
        "how a round's clients are drawn with client-level privacy: `poisson` (each by itself, "
        "with probability federation.clients-per-round / federation.clients) or `fixed` "
        "(federation.clients-per-round of those connected)",
        choices=("poisson", "fixed"),
    )
    epsilon: float = key(
        0.0, "the run is refused, or stopped, before it spends more than this; 0 = no limit",
        low=0.0,
    )  # fmt: skip
    delta: float = key(
        1e-5, "delta at which epsilon is stated; below one over the number of clients",
        above=0.0, high=0.1,
    )  # fmt: skip
    example_noise: float = key(
        0.0,
        "example-level privacy of simulated clients (a real node's owner sets dp-noise, dp-clip, "
        "dp-epsilon and dp-delta in its node config): standard deviation of the Gaussian noise on "
        "the sum of a step's clipped gradients, in multiples of the bound; 0 = none",
        low=0.0,
    )
    example_clip: float = key(
        1.0, "largest L2 norm of the gradient of a row (with privacy.example-noise)", above=0.0
    )
    example_epsilon: float = key(
        0.0,
        "epsilon that a simulated client spends on its rows in all, after which it refuses; 0 = no "
        "limit",
        low=0.0,
    )
    secure: bool = key(
        False,
        "secure aggregation: the server learns the sums of a round's changes, losses and counts, "
        "and of class statistics, and no client's own",
    )
    secure_bits: int = key(
        16,
        "bits of each value of a change in the sum; what a client sends has so many more that the "
        "sum of all fits",
        low=2,
        high=16,
    )
    secure_range: float = key(
        0.1,
        "largest change of a value in a round that is summed; a larger one becomes this (AdamW "
        "moves a value by at most about train.lr in a step)",
        above=0.0,
    )
    secure_neighbours: int = key(
        0,
        "clients with which each one agrees on masks; 0 = all up to 16, then four times the binary "
        "logarithm of their number",
        low=0,
    )
    secure_threshold: float = key(
        0.6,
        "share of a client's neighbours that must stay to the end for a round to succeed, and that "
        "would have to conspire with the server to unmask it; always more than half",
        above=0.0,
        high=1.0,
    )


def check(config: Config) -> None:
    """Refuse settings that would let something out which the noise does not cover.

    Args:
        config: a whole run.

    Raises:
        UserError: naming both keys.
    """
    p = config.privacy
    if p.example_noise:
        _check_examples(config)
    if p.secure:
        _check_secure(config)
    if not p.client_noise:
        if p.epsilon:
            raise UserError(
                f"privacy.epsilon = {p.epsilon:g} needs privacy.client-noise above 0: without "
                "noise nothing is private."
            )
        return
    f = config.federation
    wrong = {
        "federation.schedule = multi-round": f.schedule != "multi-round",
        "federation.aggregate = average": f.aggregate != "average",
        "federation.weighting = uniform": f.weighting != "uniform",
        **_without_statistics(config, "class statistics have no noise"),
        **_without_counts(config),
        **_of_one_weight(config),
        "run.undistilled = false (it is a second federation)": config.run.undistilled,
    }
    _refuse(f"privacy.client-noise = {p.client_noise:g}", wrong)
    if p.clip_quantile and p.client_noise >= 2 * count_noise(config):
        raise UserError(
            f"privacy.count-noise = {p.count_noise:g} is not more than half of "
            f"privacy.client-noise = {p.client_noise:g}."
        )


def _without_statistics(config: Config, why: str) -> dict[str, bool]:
    """What a run needs whose clients send no class statistics, and whether it is not so."""
    return {
        f"head.start = zero or server ({why})": config.head.start == "statistics",
        f"head.end = trained ({why})": config.head.end != "trained",
        "plug.method = as-trained, refit or distil (the others read class statistics)": (
            config.plug.method in ("best", "mapped")
        ),
    }


def _of_one_weight(config: Config) -> dict[str, bool]:
    """What a run needs whose changes all weigh the same, and whether it is not so."""
    return {
        "federation.width-weighting = examples (all changes weigh the same)": (
            config.federation.width_weighting != "examples"
        ),
    }


def _without_counts(config: Config) -> dict[str, bool]:
    """What a run needs whose clients count no inactive neurons, and whether it is not so."""
    a = config.align
    return {
        "align.proportion = 1 or another align.selection (apoz reads clients' counts)": (
            bool(a.interval) and a.proportion < 1 and a.selection == "apoz"
        ),
    }


def _refuse(setting: str, wrong: Mapping[str, bool]) -> None:
    """Refuse a setting for the first of the things it needs that is not so."""
    for what, present in wrong.items():
        if present:
            raise UserError(f"{setting} needs {what}.")


def _check_examples(config: Config) -> None:
    _refuse(
        f"privacy.example-noise = {config.privacy.example_noise:g}",
        _without_statistics(config, "clients give no class statistics")
        | _without_counts(config)
        | _of_one_weight(config),
    )


def _check_secure(config: Config) -> None:
    f, p = config.federation, config.privacy
    single = "which needs each client's reply"
    wrong = {
        f"federation.aggregate = average, not {f.aggregate}, {single}": f.aggregate != "average",
        f"federation.schedule = multi-round, not {f.schedule}": f.schedule != "multi-round",
        f"federation.weighting = uniform, not {f.weighting}": f.weighting != "uniform",
        f"federation.clip-update-norm = 0 ({single})": f.clip_update_norm > 0,
        f"head.guard = none, not {config.head.guard}, {single}": config.head.guard != "none",
        "federation.enough = 0": f.enough > 0,
        "federation.min-clients of at least 3": f.min_clients < FEWEST_SECURE,
        f"wire.adapter-up = same, not {config.wire.adapter_up} (changes travel as whole numbers)": (
            config.wire.adapter_up != "same"
        ),
        "plan.widths empty, or head.start = zero or server, head.end = trained and plug.method = "
        "as-trained, refit or distil (class statistics of several widths are not added up)": (
            bool(config.plan.widths) and any(_without_statistics(config, "").values())
        ),
        "plan.widths empty, or align.proportion = 1 or another align.selection (counts of several "
        "widths are not added up)": (
            bool(config.plan.widths) and any(_without_counts(config).values())
        ),
        **_of_one_weight(config),
        "privacy.sampling = fixed with privacy.client-noise (a Poisson sample may be of two)": (
            p.client_noise > 0 and p.sampling != "fixed"
        ),
        "privacy.clip-quantile = 0 (nobody counts short changes)": p.clip_quantile > 0,
    }
    _refuse("privacy.secure = true", wrong)


def count_noise(config: Config) -> float:
    """The noise on the number of short changes.

    Args:
        config: a whole run.

    Returns:
        privacy.count-noise, or what stands for 0.
    """
    p = config.privacy
    return p.count_noise or max(config.federation.clients_per_round / 20, p.client_noise)

"""A server's side for tests of a client: one tiny sub-FM, and requests to train on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny

from fedpft_core import config
from fedpft_core.adapter import lora as adapters
from fedpft_core.model.families import family_of
from fedpft_core.proxy.build import build
from fedpft_core.proxy.package import make_package
from fedpft_core.train.tune import LocalSettings
from fedpft_core.wire.messages import TrainRequest
from fedpft_core.wire.package import Package


@pytest.fixture(scope="session")
def sub_fm() -> tuple[Package, dict[str, Any]]:
    """A tiny package and an adapter for it."""
    fm = tiny.model("bert")
    plan = tiny.plan_for(fm, keep_share=0.5)
    proxy = build(fm, plan)
    lora = config.LoraConfig(rank=2, alpha=4.0, dropout=0.1)
    spec = adapters.make_spec(family_of("bert"), plan, (), lora)
    package = make_package(proxy, plan, spec, tiny.tokenizer("bert"), "text", tiny.LABELS, 16)
    weights = {k: t.clone() for k, t in package.weights.items()}
    proxy = adapters.attach(proxy, spec, plan)
    return replace(package, weights=weights), tiny.random_adapter(proxy, plan)


@pytest.fixture
def request_for(sub_fm: tuple[Package, dict[str, Any]]) -> Callable[..., TrainRequest]:
    """Makes a request to train, of the package given or the tiny one, with any field changed."""

    def make(package: Package | None = None, **changes: Any) -> TrainRequest:
        package = package or sub_fm[0]
        return replace(
            TrainRequest(
                round=1, digest=package.digest(), adapter=sub_fm[1], fmt="fp32",
                settings=LocalSettings(1e-2, 4, 1, 3, 0.0, 1.0, 1), seed=0,
                run="0123456789abcdef", package=package.to_bytes(),
            ),
            **changes,
        )  # fmt: skip

    return make

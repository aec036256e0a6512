"""The rule that nothing leaves without masks."""

from __future__ import annotations

import fabricate
import pytest

from client_app.policy import Policy, PolicyError
from fedpft_core.train.tune import LocalSettings
from fedpft_core.wire.messages import (
    SecureStatisticsRequest,
    SecureTrainRequest,
    StatisticsRequest,
    TrainRequest,
)


def test_what_training_made_leaves_under_masks_only() -> None:
    settings = LocalSettings(1e-3, 4, 1, 0, 0.0, 1.0, 1)
    plain = TrainRequest(1, "0" * 64, fabricate.adapter(), "fp32", settings, 0)
    masked = SecureTrainRequest(1, "0" * 64, fabricate.adapter(), "fp32", settings, 0)
    hidden = SecureStatisticsRequest(0, "0" * 64, fabricate.adapter(), "fp32", 0, 8, 4, 1)
    sums = StatisticsRequest(0, "0" * 64, fabricate.adapter(), "fp32", 0, 8, 4, 1)
    policy = Policy.of({"policy-secure": 1})
    policy.check_request(masked)
    policy.check_request(hidden)
    with pytest.raises(PolicyError, match="policy-leave = adapter, and the server asks for stat"):
        Policy.of({"policy-secure": 1, "policy-leave": "adapter"}).check_request(hidden)
    for request in (plain, sums):
        with pytest.raises(PolicyError, match="policy-secure = 1"):
            policy.check_request(request)
        Policy().check_request(request)

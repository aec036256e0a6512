"""Refitting the head at plug-in: exact cases, a slow oracle, every family."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from fedpft_core.adapter import lora as adapters
from fedpft_core.head import mapped
from fedpft_core.head import refit as plug
from fedpft_core.head.mapped import steadiest
from fedpft_core.task.classify import logits


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=stream(seed), dtype=torch.float64)


def test_alike_features_leave_the_head_alone() -> None:
    features = draw(50, 8)
    head = nn.Linear(8, 3)
    found = plug.fit(features, features, 1.0)
    assert found.error_before == 0.0 and found.error_after < 1e-25
    for new, old in zip(plug.turned(head, found), head.parameters(), strict=True):
        torch.testing.assert_close(new, old.detach())


def test_moved_and_turned_features_are_read_as_before() -> None:
    """With a vanishing ridge an affine change of the features is undone, on other rows too."""
    f_S, turn, shift = draw(200, 8), draw(8, 8, seed=1), draw(8, seed=2)
    head = nn.Linear(8, 3).double()
    wanted = head(f_S).detach()
    f_T = f_S @ turn + shift
    weight, bias = plug.turned(head, plug.fit(f_T[:100], f_S[:100], 1e-12))
    torch.testing.assert_close(f_T @ weight.T + bias, wanted, rtol=1e-6, atol=1e-6)


def test_the_fit_is_ridge_regression_towards_the_identity() -> None:
    """Against least squares on rows stacked with the pull, and each map's own derivative."""
    f_T, f_S, ridge = draw(20, 6), draw(20, 6, seed=1), 0.7
    a, b = f_T - f_T.mean(0), f_S - f_S.mean(0)
    root = (ridge * a.square().sum() / 6) ** 0.5 * torch.eye(6, dtype=torch.float64)
    slow = torch.linalg.lstsq(torch.cat([a, root]), torch.cat([b, root])).solution
    found = plug.fit(f_T, f_S, ridge)
    torch.testing.assert_close(found.turn, slow)
    variance = b.square().sum()
    assert found.error_before == pytest.approx(float((f_T - f_S).square().sum() / variance))
    assert found.error_after == pytest.approx(float((a @ slow - b).square().sum() / variance))


def test_few_rows_turn_little_and_one_only_shifts() -> None:
    one = plug.fit(draw(1, 6), draw(1, 6, seed=1), 1.0)
    torch.testing.assert_close(one.turn, torch.eye(6, dtype=torch.float64))
    head = nn.Linear(6, 3).double()
    f_T, f_S = draw(1, 6), draw(1, 6, seed=1)
    wanted = head(f_S).detach()
    weight, bias = plug.turned(head, one)
    torch.testing.assert_close(f_T @ weight.T + bias, wanted)


def test_a_head_without_bias_takes_the_shift_along_what_varies_least() -> None:
    """A feature that is always 2 serves as the bias, exactly."""
    f_S, shift = draw(200, 8), draw(8, seed=2)
    f_S[:, 3] = 2.0
    shift[3] = 0.0
    head = nn.Linear(8, 3, bias=False).double()
    f_T = f_S + shift
    weight, bias = plug.turned(head, plug.fit(f_T[:100], f_S[:100], 1e-12))
    assert bias is None
    torch.testing.assert_close(f_T @ weight.T, head(f_S).detach(), rtol=1e-6, atol=1e-6)


def test_the_steadiest_functional_is_one_at_the_mean_and_varies_least() -> None:
    x = draw(50, 5) + draw(5, seed=1)
    spread, mean = torch.cov(x.T), x.mean(0)
    u = steadiest(spread, mean)
    assert float(u @ mean) == pytest.approx(1.0)
    for seed in range(20):
        other = draw(5, seed=10 + seed)
        other = other / (other @ mean)
        assert float(u @ spread @ u) <= float(other @ spread @ other)
    assert not steadiest(spread, torch.zeros_like(mean)).any()


def test_the_head_that_labels_more_rows_right_is_taken() -> None:
    """Labels as the trained head reads them, then as the refitted one does, and a draw; no row is
    read by a map that knows it."""
    fm, proxy, _, _ = tiny.pair("bert")
    batch = tiny.batch_of("bert")
    n = len(batch["labels"])
    half = n // 2

    def judged(labels: torch.Tensor) -> plug.Refit:
        """Refitted to the first half of the rows, judged by all."""
        full = batch | {"labels": labels}
        first, rest = (
            {k: t[rows] for k, t in full.items()} for rows in (slice(half), slice(half, n))
        )
        return plug.refit_head(fm, proxy, tiny.TASK, lambda: [first], 1e-3, lambda: [rest])

    head = plug.last_linear(fm)
    with torch.no_grad():
        # Scores large against the bias, so that the two heads disagree on some row.
        plug.last_linear(fm).weight.mul_(50)
        f_T, f_S = (plug.features(m, [batch], tiny.TASK) for m in (fm, proxy))
        trained = logits(fm, batch).argmax(-1)
        refitted = trained.clone()
        for row in range(n):
            known = [i for i in range(half) if row >= half or i % 2 != row % 2]
            weight, bias = plug.turned(head, plug.fit(f_T[known], f_S[known], 1e-3))
            refitted[row] = (f_T[row].float() @ weight.T + bias).argmax()
        weight, bias = plug.turned(head, plug.fit(f_T[:half], f_S[:half], 1e-3))
    as_trained = [p.detach().clone() for p in head.parameters()]
    alike = int((trained == refitted).sum())
    assert alike < n

    kept = judged(trained)
    assert (kept.right_before, kept.right_after, kept.taken) == (n, alike, False)
    for p, old in zip(head.parameters(), as_trained, strict=True):
        assert torch.equal(p, old)
    neither = torch.full_like(trained, -1)
    draw = judged(neither)
    assert (draw.right_before, draw.right_after, draw.taken) == (0, 0, False)
    taken = judged(refitted)
    assert (taken.right_before, taken.right_after, taken.taken) == (alike, n, True)
    torch.testing.assert_close(head.weight.detach(), weight)
    torch.testing.assert_close(head.bias.detach(), bias)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family(family: str) -> None:
    fm, proxy, _, _ = tiny.pair(family)
    batch = tiny.batch_of(family)
    rows = lambda: [batch]  # noqa: E731
    kept = {k: t.clone() for k, t in proxy.state_dict().items()}
    before = {k: t.clone() for k, t in fm.state_dict().items()}
    head = plug.last_linear(fm)
    with torch.no_grad():
        f_T = plug.features(fm, rows(), tiny.task_of(family))
        # What it reads is what the scores are made of.
        torch.testing.assert_close(head(f_T.float()), logits(fm, batch), rtol=1e-5, atol=1e-5)
        weight = head.weight.double()
        bias = weight.new_zeros(3) if head.bias is None else head.bias.double()
        found = plug.refit_head(fm, proxy, tiny.TASK, rows, 1.0).map
        mapped = (f_T - found.mean_x) @ found.turn + found.mean_y
        want = mapped @ weight.T + bias
        if head.bias is None:  # the shift is met in the mean, and elsewhere by what varies least
            shift = weight @ found.mean_y - weight @ found.turn.T @ found.mean_x
            want = want + (f_T @ found.one - 1)[:, None] * shift
            assert float(found.mean_x @ found.one) == pytest.approx(1.0)
        torch.testing.assert_close(logits(fm, batch).double(), want, rtol=1e-4, atol=1e-4)
    assert found.error_after < found.error_before
    for k, t in proxy.state_dict().items():
        assert torch.equal(t, kept[k]), k
    changed = {k for k, t in fm.state_dict().items() if not torch.equal(t, before[k])}
    trained = {f"base_model.model.{k}" for k in adapters.parameters(fm)}
    assert len(changed) == (1 if head.bias is None else 2)
    for k in changed:
        assert k.replace(".modules_to_save.default", "") in trained


def test_a_map_is_pulled_towards_what_other_rows_gave() -> None:
    """With few rows of its own it stays near the prior, with many it finds the truth."""
    g = torch.Generator().manual_seed(0)
    truth = torch.randn(6, 6, generator=g, dtype=torch.float64)
    near = truth + 0.1 * torch.randn(6, 6, generator=g, dtype=torch.float64)

    def off(n: int, prior: torch.Tensor | None) -> float:
        x = torch.randn(n, 6, generator=g, dtype=torch.float64)
        y = x @ truth + 0.5 * torch.randn(n, 6, generator=g, dtype=torch.float64)
        return float((mapped.fit(x, y, 1.0, prior).turn - truth).norm())

    assert off(4, near) < 0.5 * off(4, None)
    assert off(4, near) < 1.1 * float((near - truth).norm())
    x = torch.randn(9, 6, generator=g, dtype=torch.float64)
    one = torch.eye(6, dtype=torch.float64)
    plain, eye = mapped.fit(x, x + 1, 0.1), mapped.fit(x, x + 1, 0.1, one)
    torch.testing.assert_close(plain.turn, eye.turn, rtol=1e-12, atol=1e-12)

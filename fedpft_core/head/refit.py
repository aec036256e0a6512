"""Plugging the tuned adapter into the FM: the head is refitted to the features the FM has.

Clients tune the head on the sub-FM's features f_S. In the FM the same adapter gives features f_T
that are much alike but moved and turned, and a head tuned to f_S misreads them. On rows without
labels both can be had, so the owner fits f_S ~ (f_T - m_T) M + m_S and folds the map into the
head's last linear layer, which gives W f + b: W' = W M^T, b' = b + W m_S - W' m_T. The adapter's
format, LoRA's factors and what clients get stay as they are. Not in the paper.

Shape letters: N rows, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from fedpft_core.data.batches import batches
from fedpft_core.data.encoded import Encoded
from fedpft_core.head.closed import form_of
from fedpft_core.head.form import Summing, Sums
from fedpft_core.head.mapped import Map, fit
from fedpft_core.head.statistics import add, projection
from fedpft_core.model.batch import inputs_of, read_at
from fedpft_core.model.device import Batch, device_of, to_device
from fedpft_core.model.families import base_model, family_of_model
from fedpft_core.model.taps import keep
from fedpft_core.task import Task

_AT_ONCE = 2**15  # feature vectors of a client that are held in memory at a time


def last_linear(model: nn.Module) -> nn.Linear:
    """The layer that gives the class scores: the last linear one of the trained head.

    Args:
        model: FM or proxy, bare or with the adapter.

    Returns:
        The layer that is trained.

    Raises:
        ValueError: the head has none.
    """
    # Token classifiers have the last module alone, some families' by another name.
    family, bare = family_of_model(model), base_model(model)
    name = family.head[-1] if hasattr(bare, family.head[-1]) else family.tokens_head
    module = bare.get_submodule(name)
    # PEFT keeps the untouched head beside the trained one.
    saved = getattr(module, "modules_to_save", None)
    found: nn.Linear | None = None
    for part in (saved["default"] if saved is not None else module).modules():
        found = part if isinstance(part, nn.Linear) else found
    if found is None:
        raise ValueError(f"the head {name} has no linear layer")
    return found


@torch.inference_mode()
def features(model: nn.Module, data: Iterable[Batch], task: Task) -> Tensor:
    """What the last linear layer reads for each thing that is judged, dropout off.

    Args:
        model: FM or proxy, bare or with the adapter; left in eval mode.
        data: batches, at least one.
        task: says what is judged.

    Returns:
        float64 [N, D] on the CPU, in the order of the batches.
    """
    model.eval()
    position = task.position(family_of_model(model))
    seen: list[Tensor] = []
    with keep({"head": last_linear(model)}, inputs=True) as passed:
        for batch in data:
            here = to_device(batch, device_of(model))
            model(**inputs_of(here))
            read = passed["head"].detach()
            if read.dim() == 3 and position != "every":
                # A decoder's head scores every position, and the library then takes one of a row.
                read = read_at(read, here, position)
            seen.append(task.each(read, here).to("cpu", torch.float64))
    return torch.cat(seen)


def answers(data: Iterable[Batch], task: Task) -> Tensor:
    """What is to be learned of each thing that is judged, in the order of `features`.

    Args:
        data: labelled batches, at least one.
        task: says what is judged.

    Returns:
        First axis N.
    """
    return torch.cat([task.answers(batch) for batch in data])


def labelled_features(
    model: nn.Module, rows: Encoded, batch_size: int, task: Task
) -> tuple[Tensor, Tensor]:
    """Features as `features` gives them, with their answers.

    Args:
        model: FM or proxy, bare or with the adapter; left in eval mode.
        rows: at least one, with labels.
        batch_size: rows at once.
        task: says what is judged.

    Returns:
        Features float64 [N, D] and answers [N, ...], those of the longest rows first.
    """
    served = list(batches(rows, batch_size, None))
    return features(model, served, task), answers(served, task)


def of_rows(
    model: nn.Module, rows: Encoded, task: Task, batch_size: int, width: int, seed: int
) -> Sums:
    """The sums that the task's head follows from, one evaluation pass, dropout off.

    Args:
        model: with the adapter whose features are wanted.
        rows: labelled rows.
        task: one whose head has a closed form.
        batch_size: rows at once.
        width: features kept at most; wider ones are projected.
        seed: the run's, which the projection is drawn from.

    Returns:
        The sums.

    Raises:
        ValueError: the task's head has no closed form.
    """
    form = form_of(task)
    if form is None:
        raise ValueError(f"a head for {task.name} has no closed form")
    return summed(form, seen(model, rows, task, batch_size, width, seed))


def summed(form: Summing, portions: Iterable[tuple[Tensor, Tensor]]) -> Sums:
    """The sums over features and answers.

    Args:
        form: what is summed.
        portions: at least one, as :func:`seen` gives them.

    Returns:
        The sums.
    """
    found: Sums = add(form.of(features, answers) for features, answers in portions)
    return found


def seen(
    model: nn.Module, rows: Encoded, task: Task, batch_size: int, width: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and answers of some rows, so many at a time that they take little memory.

    Args:
        model: with the adapter whose features are wanted.
        rows: labelled rows.
        task: says what is judged.
        batch_size: rows at once.
        width: features kept at most; wider ones are projected.
        seed: the run's, which the projection is drawn from.

    Yields:
        Features float64 [n, D] and their answers [n, ...].
    """
    turn = projection(last_linear(model).in_features, width, seed)
    for served in _portions(rows, batch_size, task):
        found = features(model, served, task)
        yield (found if turn is None else found @ turn), answers(served, task)


def _portions(rows: Encoded, batch_size: int, task: Task) -> Iterator[list[Batch]]:
    """Batches with so many answers together that their features take little memory."""
    held: list[Batch] = []
    count = 0
    for batch in batches(rows, batch_size, None):
        held.append(batch)
        count += len(task.answers(batch))
        if count >= _AT_ONCE:
            yield held
            held, count = [], 0
    if held:
        yield held


def turned(head: nn.Linear, found: Map) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer that reads f_S, for reading f_T instead.

    Args:
        head: the layer.
        found: the map from f_T to f_S.

    Returns:
        Weight and bias. A layer without bias (decoders have such heads) takes the shift into its
        weight, along the direction in which f_T varies least (`Map.one`).
    """
    old = head.weight.detach().to("cpu", torch.float64)
    weight = old @ found.turn.T
    shift = old @ found.mean_y - weight @ found.mean_x
    if head.bias is None:
        return (weight + shift[:, None] * found.one).to(head.weight), None
    return weight.to(head.weight), head.bias.detach() + shift.to(head.bias)


@torch.no_grad()
def put(head: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Give a layer what :func:`turned` has made for it.

    Args:
        head: the layer, changed in place.
        weight: as large as its own.
        bias: likewise; None for a layer that has none.
    """
    head.weight.copy_(weight)
    if bias is not None:
        head.bias.copy_(bias)


@dataclass(frozen=True)
class Refit:
    """What refitting came to.

    The map, the task's merit (rows right) of the head as trained and of the refitted one on
    labelled rows (None without such rows), and whether the latter was taken.
    """

    map: Map
    right_before: float | None
    right_after: float | None
    taken: bool


@torch.no_grad()
def refit_head(
    fm: nn.Module,
    proxy: nn.Module,
    task: Task,
    rows: Callable[[], Iterable[Batch]],
    ridge: float,
    judge: Callable[[], Iterable[Batch]] | None = None,
) -> Refit:
    """Refit the FM's head, in place, to the features it has with the adapter now plugged in.

    The proxy stays as it is.

    Args:
        fm: with the adapter plugged in.
        proxy: with the same adapter.
        task: says how good a head's outputs are; one with `refits`.
        rows: gives the same rows, at least one, each time it is called. The fit does not look at
            labels.
        ridge: see :func:`fit`.
        judge: likewise gives rows, or none, that are not fitted to. With it, all rows carry labels,
            and the refitted head is taken only if the task finds it better on them than the head as
            trained; those fitted to are judged by a head refitted to the other half of them.

    Returns:
        What it came to.
    """
    f_S = features(proxy, rows(), task)
    # One pass over all rows serves the fit and both heads.
    f_T = features(fm, chain(rows(), judge() if judge else ()), task)
    head, n = last_linear(fm), len(f_S)
    found = fit(f_T[:n], f_S, ridge)
    weight, bias = turned(head, found)
    before = after = None
    if judge is not None:
        labels = answers(chain(rows(), judge()), task)
        before = task.merit(_outputs(f_T, head.weight, head.bias), labels)
        after = task.merit(_outputs(f_T[n:], weight, bias), labels[n:])
        # No row is judged by a map that was fitted to it. Rows come by length: halves alternate.
        for fitted, unseen in ((slice(0, n, 2), slice(1, n, 2)), (slice(1, n, 2), slice(0, n, 2))):
            other = turned(head, fit(f_T[fitted], f_S[fitted], ridge)) if n > 1 else (weight, bias)
            after += task.merit(_outputs(f_T[unseen], *other), labels[unseen])
    taken = before is None or after is None or after > before
    if taken:
        put(head, weight, bias)
    return Refit(found, before, after, taken)


def _outputs(read: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    scores = read @ weight.to(read).T
    return scores if bias is None else scores + bias.to(read)

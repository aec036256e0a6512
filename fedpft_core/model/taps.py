"""Looking at what passes inside a model: the only place that registers forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from fedpft_core.model.batch import inputs_of
from fedpft_core.model.device import Batch

Key = TypeVar("Key", bound=Hashable)


class _Enough(Exception):
    """Raised in a hook to leave a forward pass once the last needed module has run."""


@contextmanager
def watch(
    modules: Mapping[Key, nn.Module],
    see: Callable[[Key, Tensor], Tensor | None],
    inputs: bool = False,
) -> Iterator[None]:
    """For the duration, show what passes through some modules as it passes.

    Nothing is held: what `see` does not keep is freed as in an ordinary forward pass.

    Args:
        modules: the modules, by a key of the caller's.
        see: called with the key and the module's output (of several, the first). A tensor that it
            returns takes the output's place.
        inputs: show the first input of each module instead of its output.

    Yields:
        Nothing; the hooks are removed at the end, after an error too.
    """

    def before(key: Key) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> Any:
            new = see(key, args[0])
            return None if new is None else (new, *args[1:])

        return hook

    def after(key: Key) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Any) -> Any:
            several = isinstance(out, tuple)
            new = see(key, out[0] if several else out)
            if new is None:
                return None
            return (new, *out[1:]) if several else new

        return hook

    with ExitStack() as stack:
        for key, module in modules.items():
            handle = (
                module.register_forward_pre_hook(before(key))
                if inputs
                else module.register_forward_hook(after(key))
            )
            stack.callback(handle.remove)
        yield


@contextmanager
def keep(modules: Mapping[Key, nn.Module], inputs: bool = False) -> Iterator[dict[Key, Tensor]]:
    """For the duration, hold what passed last through some modules.

    Args:
        modules: the modules, by a key of the caller's.
        inputs: hold the first input of each module instead of its output.

    Yields:
        A dictionary that each forward pass fills, by the same keys.
    """
    seen: dict[Key, Tensor] = {}

    def see(key: Key, value: Tensor) -> None:
        seen[key] = value

    with watch(modules, see, inputs):
        yield seen


def run_to(model: nn.Module, batch: Batch, modules: Mapping[Key, nn.Module]) -> dict[Key, Tensor]:
    """Run a model on a batch until every one of some modules has put something out.

    Args:
        model: run as it is, with or without gradients, in its present mode.
        batch: what the model reads, and perhaps more (see `inputs_of`).
        modules: the modules, by a key of the caller's, each run once; the last one in the order of
            the mapping must be the last to run. Nothing after it is run.

    Returns:
        The modules' outputs (of several, the first), by key.

    Raises:
        StopIteration: there are no modules.
    """
    last = next(reversed(list(modules)))
    seen: dict[Key, Tensor] = {}

    def see(key: Key, value: Tensor) -> None:
        seen[key] = value
        if key == last:
            raise _Enough

    with watch(modules, see), suppress(_Enough):
        model(**inputs_of(batch))
    return seen


def _keep_and_leave(seen: dict[str, Tensor], key: str, value: Tensor) -> None:
    seen[key] = value
    raise _Enough


def run_up_to(model: nn.Module, batch: Batch, module: nn.Module) -> Tensor:
    """Run a model on a batch until one of its modules is about to run.

    Args:
        model: run as it is, with or without gradients, in its present mode.
        batch: what the model reads, and perhaps more (see `inputs_of`).
        module: of the model; neither it nor anything after it is run.

    Returns:
        The module's first input.
    """
    seen: dict[str, Tensor] = {}

    with watch({"input": module}, partial(_keep_and_leave, seen), inputs=True), suppress(_Enough):
        model(**inputs_of(batch))
    return seen["input"]


__all__ = ["keep", "run_to", "run_up_to", "watch"]

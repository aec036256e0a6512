"""A proxy as clients get it: FM-independent packages, and models rebuilt from them."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedpft_core.adapter import lora as adapters
from fedpft_core.adapter.lora import AdapterSpec
from fedpft_core.errors import ReplyError, UserError
from fedpft_core.model import names
from fedpft_core.model.families import FFN, base_model, family_of
from fedpft_core.model.load import task_class
from fedpft_core.model.normalise import normalise
from fedpft_core.model.plan import Plan, pruned_ffns
from fedpft_core.model.precision import HALF, cast_parameters
from fedpft_core.model.processor import PRIVATE, files_of
from fedpft_core.proxy import int8
from fedpft_core.proxy.build import skeleton
from fedpft_core.task import Task
from fedpft_core.wire import coded
from fedpft_core.wire.meta import PackageMeta
from fedpft_core.wire.package import Package


def make_package(
    proxy: nn.Module,
    plan: Plan,
    spec: AdapterSpec,
    processor: Any,
    kind: str,
    labels: tuple[str, ...],
    max_length: int,
    fmt: str = "fp32",
    embeddings: str = "same",
    keep: bool = False,
) -> Package:
    """Pack a proxy, with the adapter attached or not, with all a client needs to train on it.

    In a lossy format the proxy takes the rounded weights, so that server and clients hold the same
    bits; doing so again changes nothing.

    Args:
        proxy: its weights are rounded in place and copied; what belongs to the adapter is left out.
        plan: what the proxy was built from.
        spec: what its adapter is made of.
        processor: the FM's tokenizer or image processor.
        kind: the task's name: what the rows are, `text`, `pair` or `image`.
        labels: label names, in the order of their numbers.
        max_length: the most tokens of a row.
        fmt: what the weights are rounded to, one of `PACKAGE_FORMATS`.
        embeddings: what the table of word embeddings is rounded to, one of `EMBEDDING_FORMATS`.
        keep: whether the proxy's own weights stay as they are, being the FM's.

    Returns:
        The package, its weights on the CPU under their proxy names.

    Raises:
        UserError: there are weights too large for the format.
    """
    model: Any = base_model(proxy)
    config = {k: v for k, v in model.config.to_dict().items() if k not in PRIVATE}
    # As JSON has it, where a client takes it from: numbers as keys become texts.
    config = json.loads(json.dumps(config))
    meta = PackageMeta(plan, spec, config, type(model).__name__, kind, tuple(labels), max_length)
    again = _tied(model)
    live = {
        name: t.detach()
        for name, t in ((names.bare(k), t) for k, t in model.state_dict().items() if k not in again)
        if not names.is_lora(name) and not names.in_modules(name, spec.modules)
    }
    table = _table(model)
    table_fmt = fmt if embeddings == "same" else embeddings
    rounding = _Rounding(fmt, table_fmt, _axes(proxy, plan), keep)
    weights = {
        name: rounding(name, t, table is not None and t.data_ptr() == table.data_ptr())
        for name, t in live.items()
    }
    return Package(meta, files_of(processor), weights)


@dataclass(frozen=True)
class _Rounding:
    fmt: str
    embeddings: str
    axes: Mapping[str, int]  # by name, of weights that have neurons along another axis than the 0th
    keep: bool

    def __call__(self, name: str, t: Tensor, is_table: bool) -> Tensor:
        """A copy of a weight on the CPU, rounded; the weight itself too, unless it is kept."""
        fmt = self.embeddings if is_table else self.fmt
        try:
            out = coded.rounded(t, fmt, self.axes.get(name, 0))
        except ValueError as error:
            key = "wire.embeddings" if is_table and fmt != self.fmt else "wire.package"
            raise UserError(f"{key} = {fmt}: {name}: {error}.") from error
        if fmt == "fp32":
            return out.to("cpu", copy=True).contiguous()
        if not self.keep:
            t.copy_(out)
        # What needed no rounding is the model's own memory.
        return out.clone() if out.data_ptr() == t.data_ptr() else out


def _axes(proxy: nn.Module, plan: Plan) -> dict[str, int]:
    """The axis that counts neurons, by the name of each FFN weight that alignment may move."""
    path = names.PatchedWeights(plan)
    return {
        path.name(block, part): FFN.neuron_axis(part) or 0
        for block, ffn in pruned_ffns(proxy, plan).items()
        for part in ffn.parts()
    }


def _table(model: Any) -> Tensor | None:
    """The table of word embeddings, where the model has one."""
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found.weight.detach() if isinstance(found, nn.Embedding) else None


def _tied(model: nn.Module) -> set[str]:
    """Names of parameters that are another one under a second name: they travel once."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in model.named_parameters()}


@dataclass
class ClientModel:
    """A proxy rebuilt from a package with the adapter attached, and how to read inputs."""

    model: PeftModel
    plan: Plan
    spec: AdapterSpec
    task: Task
    max_length: int


_RANDOM_FILLS = frozenset(
    f"{kind}_"
    for kind in ("normal", "uniform", "trunc_normal", "kaiming_uniform", "kaiming_normal",
                 "xavier_uniform", "xavier_normal")
)  # fmt: skip


class _NoRandomFill(TorchFunctionMode):
    """Zeros instead of draws: drawing what is overwritten next is most of building.

    Not whatever the memory held, because `trunc_normal_` (ViT, DeiT) draws again until all numbers
    lie within its bounds, which with no draw at all is never.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Both the methods of tensors and the functions of torch.nn.init that come to them.
        if getattr(func, "__name__", "") in _RANDOM_FILLS:
            target: Tensor = args[0] if args else kwargs["tensor"]
            with torch.no_grad():
                return target.zero_()
        return func(*args, **(kwargs or {}))


def rebuild(package: Package, base: str = "float") -> ClientModel:
    """A model from a package, with the adapter attached.

    Args:
        package: as the server made it; its digest is not checked here.
        base: what the frozen linear layers of blocks are held in, one of `BASES`.

    Returns:
        The proxy on the CPU and in eval mode, in the float type of its weights; the adapter's own
        weights are still to be loaded.

    Raises:
        ReplyError: the package's parts do not fit together.
        UserError: the base cannot be held so.
    """
    return _made(package.meta, package.weights, base)


def blank(meta: PackageMeta, base: str = "float") -> ClientModel:
    """A model of the shape a package's metadata describe, with random weights.

    Args:
        meta: of a package; which neurons its plan keeps does not matter, only how many.
        base: as of :func:`rebuild`.

    Returns:
        The proxy with the adapter attached, as :func:`rebuild` gives it.

    Raises:
        ReplyError: the metadata describe no model.
        UserError: the base cannot be held so.
    """
    return _made(meta, None, base)


def _made(meta: PackageMeta, weights: Mapping[str, Tensor] | None, base: str) -> ClientModel:
    import transformers

    try:
        _check_config(meta)
        plan, spec = meta.plan, meta.adapter
        config = transformers.AutoConfig.for_model(**meta.model_config)
        config.architectures = [meta.architecture]
        auto = task_class(meta.task.model())
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            if weights is not None:
                stack.enter_context(_NoRandomFill())
                if base == "int8":
                    stack.enter_context(int8.hollow())
            model = normalise(auto.from_config(config, trust_remote_code=False))
            skeleton(model, plan)
        cast_parameters(model, _dtype(weights))
        left = weights
        if base == "int8":
            rest = int8.put(model, family_of(plan.model_type), spec.modules, weights)
            left = None if weights is None else rest
            int8.filled_up(model)
        if left is not None:
            _fill(model, left, spec)
        return ClientModel(
            adapters.attach(model.eval(), spec, plan),
            plan,
            spec,
            meta.task,
            meta.max_length,
        )
    except int8.NotHeldError:
        raise
    except (KeyError, ValueError, TypeError, RuntimeError, UserError) as error:
        raise ReplyError(f"the package is malformed ({error})") from error


# What a config can say besides sizes: where code, kernels or other weights come from.
_FOREIGN = re.compile(
    r"implementation|kernel|quantiz|auto_map|custom|remote|adapter_kwargs|compile"
)
_PLAIN = frozenset(("conv_in_kernel", "conv_out_kernel"))  # sizes, whose names only look foreign
_MOST_SIZE = 2**24  # of any number in a config: larger ones are nobody's model


def _check_config(meta: PackageMeta) -> None:
    """Refuse a model's config before the library acts on it.

    Raises:
        ValueError: sizes that no model has, or a key by which the library would load kernels, code
            or other weights.
    """
    config = meta.model_config
    shape = family_of(config["model_type"]).shape(config)
    for key, value in _entries(config):
        foreign = _FOREIGN.search(key) and key not in _PLAIN
        if foreign and value not in (None, False, "eager", "sdpa", {}, []):
            raise ValueError(f"the model's config sets {key[:40]!r}")
        if type(value) is int and not isinstance(value, bool) and abs(value) > _MOST_SIZE:
            raise ValueError(f"the model's config has {key[:40]} = {value}")
    if shape.hidden % shape.heads:
        raise ValueError(f"{shape.hidden} features do not divide into {shape.heads} heads")
    if shape.positions and meta.max_length > shape.positions:
        raise ValueError(f"rows of {meta.max_length} tokens, and {shape.positions} positions")
    if not 0 <= meta.adapter.dropout < 1:
        raise ValueError(f"LoRA's dropout is {meta.adapter.dropout:g}")


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The entries of a config and of those inside it (of a pipeline's parts), lists' one by one."""
    for key, value in config.items():
        yield key, value
        if isinstance(value, Mapping):
            yield from _entries(value)
        elif isinstance(value, list):
            yield from ((key, item) for item in value if isinstance(item, int))


def _dtype(weights: Mapping[str, Tensor] | None) -> torch.dtype:
    """The float type of a package's weights: half precision, or float32 whatever else they are."""
    half = (t.dtype for t in (weights or {}).values() if t.dtype in HALF)
    return next(half, torch.float32)


def _fill(model: nn.Module, weights: Mapping[str, Tensor], spec: AdapterSpec) -> None:
    missing, unexpected = model.load_state_dict(weights, strict=False)
    again = _tied(model)
    missing = [name for name in missing if name not in again]
    if unexpected or not all(names.in_modules(k, spec.modules) for k in missing):
        raise ReplyError(f"the package's weights do not fit its plan: {missing or unexpected}")
    # What the adapter brings is not in the package, and was never filled.
    state = model.state_dict()
    for name in missing:
        state[name].zero_()

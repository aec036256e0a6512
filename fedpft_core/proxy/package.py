"""A proxy as clients get it: FM-independent packages, and models rebuilt from them."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedpft_core.adapter import lora as adapters
from fedpft_core.adapter.lora import AdapterSpec
from fedpft_core.errors import ReplyError
from fedpft_core.model.families import base_model, family_of
from fedpft_core.model.plan import Plan, pruned_ffns
from fedpft_core.proxy.build import skeleton
from fedpft_core.wire.identity import combine_digest, tensor_digest
from fedpft_core.wire.package import Package, Patch

# Keys of a Hugging Face config that say where the FM came from: no client's business.
_PRIVATE = ("_name_or_path", "name_or_path", "_commit_hash")


def make_package(
    proxy: nn.Module,
    plan: Plan,
    spec: AdapterSpec,
    processor: Any,
    kind: str,
    labels: tuple[str, ...],
    max_length: int,
) -> Package:
    """Pack a bare proxy (no adapter attached) with all a client needs to train on it."""
    hf_config: Any = base_model(proxy).config
    config = {k: v for k, v in hf_config.to_dict().items() if k not in _PRIVATE}
    meta = {
        "plan": plan.to_json(),
        "model_config": config,
        "architecture": type(proxy).__name__,
        "adapter": spec.to_json(),
        "kind": kind,
        "labels": list(labels),
        "max_length": max_length,
    }
    inside = tuple(f"{m}." for m in spec.modules)
    weights = {
        k: t.detach().to("cpu", copy=True).contiguous()
        for k, t in proxy.state_dict().items()
        if not k.startswith(inside)
    }
    return Package(json.dumps(meta, sort_keys=True), _processor_files(processor), weights)


def _processor_files(processor: Any) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        files = {}
        for path in sorted(Path(folder).iterdir()):
            data = path.read_bytes()
            if path.suffix == ".json" and path.name != "tokenizer.json":
                raw = {k: v for k, v in json.loads(data).items() if k not in _PRIVATE}
                data = json.dumps(raw, sort_keys=True).encode()
            files[path.name] = data
        return files


@dataclass
class ClientModel:
    """A proxy rebuilt from a package with the adapter attached, and how to read inputs."""

    model: PeftModel
    plan: Plan
    spec: AdapterSpec
    kind: str
    labels: tuple[str, ...]
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


def rebuild(package: Package) -> ClientModel:
    """Package → model in eval mode. Raises ReplyError when the parts do not fit together."""
    return _made(package.meta, package.weights)


def blank(meta: str) -> ClientModel:
    """A model of the shape a package's metadata describe, with random weights.

    Raises ReplyError when the metadata describe none.
    """
    return _made(meta, None)


def _made(text: str, weights: Mapping[str, Tensor] | None) -> ClientModel:
    import transformers

    try:
        meta = json.loads(text)
        plan = Plan.from_json(meta["plan"])
        spec = AdapterSpec.from_json(meta["adapter"])
        config = transformers.AutoConfig.for_model(**meta["model_config"])
        config.architectures = [meta["architecture"]]
        auto: Any = (
            transformers.AutoModelForImageClassification
            if meta["kind"] == "image"
            else transformers.AutoModelForSequenceClassification
        )
        fill = contextlib.nullcontext() if weights is None else _NoRandomFill()
        with torch.random.fork_rng(devices=[]), fill:
            model = auto.from_config(config, trust_remote_code=False)
            skeleton(model, plan)
        if weights is not None:
            _fill(model, weights, spec)
        return ClientModel(
            adapters.attach(model.float().eval(), spec, plan),
            plan,
            spec,
            meta["kind"],
            tuple(meta["labels"]),
            int(meta["max_length"]),
        )
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ReplyError(f"the package is malformed ({error})") from error


def _fill(model: nn.Module, weights: Mapping[str, Tensor], spec: AdapterSpec) -> None:
    missing, unexpected = model.load_state_dict(weights, strict=False)
    inside = tuple(f"{m}." for m in spec.modules)
    if unexpected or any(not k.startswith(inside) for k in missing):
        raise ReplyError(f"the package's weights do not fit its plan: {missing or unexpected}")
    # What the adapter brings is not in the package, and was never filled.
    state = model.state_dict()
    for name in missing:
        state[name].zero_()


def load_processor(folder: Path, kind: str) -> Any:
    """The tokenizer or image processor from a package's files."""
    from fedpft_core.model.load import load_processor as load

    return load(str(folder), "image" if kind == "image" else "text")


# --- patches ------------------------------------------------------------------------------


class PatchedWeights:
    """Names a patch touches in a proxy's state dict, as slices to write."""

    def __init__(self, plan: Plan) -> None:
        family = family_of(plan.model_type)
        self.path = {}
        for position, block in enumerate(plan.present):
            if block in plan.pruned:
                self.path[block] = f"{family.blocks}.{position}."
        self.module = {f"in{i}": p for i, p in enumerate(family.ffn_in)}
        self.module |= {"out": family.ffn_out, "norm": family.output_norm}

    def name(self, block: int, part: str) -> str:
        module, _, leaf = part.partition(".")
        return f"{self.path[block]}{self.module[module]}.{leaf}"


def apply_patch(package: Package, patch: Patch, digests: dict[str, str]) -> Package:
    """A new package with the patch applied; `digests` (per tensor) is updated in place.

    Raises ReplyError when the patch does not fit or does not lead to the digest it promises;
    the package given stays as it was.
    """
    from fedpft_core.model.families import FFN

    plan = Plan.from_json(json.loads(package.meta)["plan"])
    names = PatchedWeights(plan)
    weights = dict(package.weights)
    fresh: dict[str, str] = {}
    try:
        for block, (index, parts) in patch.decoded().items():
            for part, value in parts.items():
                name = names.name(block, part)
                axis = FFN.neuron_axis(part)
                if axis is None:
                    if value.shape != weights[name].shape:
                        raise ReplyError(f"patch of {name} has shape {list(value.shape)}")
                    new = value
                else:
                    new = weights[name].index_copy(axis, index, value.to(weights[name].dtype))
                weights[name] = new.contiguous()
                fresh[name] = tensor_digest(weights[name])
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise ReplyError(f"the patch does not fit ({error})") from error
    if combine_digest(package.meta, package.files, digests | fresh) != patch.target:
        raise ReplyError("the patched sub-FM does not have the digest that was promised")
    digests |= fresh
    return Package(package.meta, package.files, weights)


def make_patch(
    proxy: nn.Module,
    plan: Plan,
    chosen: dict[int, Tensor],
    package: Package,
    digests: dict[str, str],
    fmt: str,
) -> tuple[Patch, Package]:
    """Turn what an alignment left in `proxy` into a patch and the next package.

    In a lossy wire format the proxy takes the decoded values, so that server and clients hold
    the same bits. `digests` (per tensor) is updated in place.
    """
    from fedpft_core.wire import codec

    ffns = pruned_ffns(proxy, plan)
    flat: dict[str, Tensor] = {}
    for block, ffn in ffns.items():
        index = chosen[block]
        flat[f"{block}/index"] = index.cpu()
        values = ffn.read(index.to(ffn.out.weight.device))
        flat |= {f"{block}/{part}": t.cpu() for part, t in values.items()}
    tensors = codec.encode(flat, fmt)
    draft = Patch(_digest(package, digests), "", fmt, tensors)
    names, weights, fresh = PatchedWeights(plan), dict(package.weights), {}
    for block, (index, parts) in draft.decoded().items():
        ffns[block].write(index, parts)
        for part in parts:
            name = names.name(block, part)
            weights[name] = ffns[block].parts()[part].detach().cpu().clone().contiguous()
            fresh[name] = tensor_digest(weights[name])
    digests |= fresh
    after = Package(package.meta, package.files, weights)
    return Patch(draft.source, _digest(after, digests), fmt, tensors), after


def _digest(package: Package, digests: dict[str, str]) -> str:
    return combine_digest(package.meta, package.files, digests)

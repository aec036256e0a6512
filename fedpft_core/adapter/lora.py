"""The adapter: LoRA on attention plus the task head, the same on FM and proxy.

Tensors are always named as in the FM, whatever model holds them, so every adapter parameter of
a proxy has its namesake in the FM and plugging in is a copy by name.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import skip_init

from fedpft_core.config import LoraConfig as LoraSettings
from fedpft_core.model.families import Family, base_model, family_of_model
from fedpft_core.model.fused import joined, per_rank, renamed
from fedpft_core.model.names import WRAPPER, bare, is_lora, to_fm_name, to_proxy_name
from fedpft_core.model.plan import Plan
from fedpft_core.model.precision import widen_trained
from fedpft_core.seeds import torch_stream
from fedpft_core.tensors import Tensors


@dataclass(frozen=True)
class AdapterSpec:
    """What the adapter is made of; names are the FM's.

    Attributes:
        rank: LoRA's rank r.
        alpha: LoRA's scale; updates are scaled by alpha / rank.
        dropout: share of LoRA's inputs that training drops.
        targets: full paths of the attention projections that carry LoRA's factors.
        modules: paths of the modules trained whole.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    modules: tuple[str, ...]  # trained whole: the head and anything newly initialised

    def as_raw(self) -> dict[str, Any]:
        """The spec as JSON values.

        Returns:
            The fields by name, tuples as lists.
        """
        return asdict(self) | {"targets": list(self.targets), "modules": list(self.modules)}

    @staticmethod
    def from_raw(raw: Any) -> AdapterSpec:
        """A spec from JSON values.

        Args:
            raw: what :meth:`as_raw` gave, or what somebody sent in its place.

        Returns:
            The spec.

        Raises:
            ValueError: the fields are not exactly those of a spec, the rank is below 1, alpha or
                dropout is negative or not finite, or a list holds something else than names.
        """
        if not isinstance(raw, dict) or raw.keys() != {f.name for f in fields(AdapterSpec)}:
            raise ValueError("not an adapter's rank, alpha, dropout, targets and modules")
        if type(raw["rank"]) is not int or raw["rank"] < 1:
            raise ValueError("the rank is no whole number above 0")
        for name in ("alpha", "dropout"):
            if type(raw[name]) not in (int, float) or not 0 <= raw[name] < math.inf:
                raise ValueError(f"{name} is no finite number of at least 0")
        for name in ("targets", "modules"):
            if not isinstance(raw[name], list) or not all(isinstance(m, str) for m in raw[name]):
                raise ValueError(f"{name} is no list of names")
        return AdapterSpec(
            raw["rank"], float(raw["alpha"]), float(raw["dropout"]),
            tuple(raw["targets"]), tuple(raw["modules"]),
        )  # fmt: skip


def make_spec(
    family: Family,
    plan: Plan,
    fresh: tuple[str, ...],
    cfg: LoraSettings,
    head: tuple[str, ...] | None = None,
) -> AdapterSpec:
    """The adapter of a run: LoRA in every block the proxy has, and modules trained whole.

    Args:
        family: where a model keeps its parts.
        plan: which blocks the proxy has.
        fresh: paths of modules without trained weights.
        cfg: LoRA's rank, alpha and dropout.
        head: paths of the task's head; None for the family's classification head.

    Returns:
        The spec, for FM and proxy alike; the head comes before the other modules.
    """
    modules = tuple(dict.fromkeys((*(family.head if head is None else head), *fresh)))
    return AdapterSpec(cfg.rank, cfg.alpha, cfg.dropout, family.lora_targets(plan.present), modules)


def attach(model: nn.Module, spec: AdapterSpec, plan: Plan | None = None) -> PeftModel:
    """Put the adapter on a bare task model (in place) and return the PEFT wrapper.

    Args:
        model: the FM or a proxy, without adapter.
        spec: the adapter. Its targets in blocks that the proxy has not are left out.
        plan: the plan of the proxy where the model is one; None for the FM.

    Returns:
        The wrapper, in eval mode. Only adapter parameters require gradients; they are in float32
        where the model is in half precision.
    """
    targets = [to_proxy_name(t, plan) if plan else t for t in spec.targets]
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # peft scales by alpha / r, floats work
        lora_dropout=spec.dropout,
        target_modules=[t for t in targets if t is not None],
        modules_to_save=list(spec.modules),
    )
    wrapped = get_peft_model(model, config)
    widen_trained(wrapped, spec.modules)
    wrapped.eval()
    return wrapped


def parameters(model: nn.Module, plan: Plan | None = None) -> dict[str, nn.Parameter]:
    """The adapter's live parameters by their FM name, sorted by name.

    Args:
        model: a model that carries the adapter. All its parameters that require gradients are taken
            for the adapter's.
        plan: the plan of the proxy where the model is one; None for the FM.

    Returns:
        The parameters themselves, not copies.
    """
    out = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        name = bare(name)
        out[to_fm_name(name, plan) if plan else name] = p
    return dict(sorted(out.items()))


def read(model: nn.Module, plan: Plan | None = None) -> Tensors:
    """Copies of the adapter's tensors on the CPU.

    Args:
        model: a model that carries the adapter; it may be on any device.
        plan: the plan of the proxy where the model is one; None for the FM.

    Returns:
        The copies by FM name, sorted by name.
    """
    return {k: p.detach().to("cpu", copy=True) for k, p in parameters(model, plan).items()}


@torch.no_grad()
def load(model: nn.Module, tensors: Mapping[str, Tensor], plan: Plan | None = None) -> None:
    """Copy tensors into the adapter by name.

    Nothing is ever matched by position or silently left out.

    Args:
        model: a model that carries the adapter, changed in place.
        tensors: values by FM name.
        plan: the plan of the proxy where the model is one; None for the FM.

    Raises:
        ValueError: names or shapes differ in any way. With wrong names nothing has been copied.
    """
    live = parameters(model, plan)
    if set(live) != set(tensors):
        odd = sorted(set(live) ^ set(tensors))
        raise ValueError(f"adapter names differ: {odd[:3]} and {max(0, len(odd) - 3)} more")
    for name, p in live.items():
        if p.shape != tensors[name].shape:
            raise ValueError(f"{name}: shape {list(tensors[name].shape)}, not {list(p.shape)}")
        p.copy_(tensors[name])


def rank_of(tensors: Mapping[str, Tensor]) -> int:
    """The rank of LoRA's factors in an adapter.

    Args:
        tensors: by FM name.

    Returns:
        The rank, the same in every layer; 0 where there are no factors.

    Raises:
        ValueError: the layers' ranks differ, or a factor is no matrix.
    """
    ranks = {
        t.shape[0] if name.endswith("lora_A.weight") else t.shape[-1]
        for name, t in tensors.items()
        if is_lora(name) and t.dim() == 2
    }
    if len(ranks) > 1 or any(is_lora(name) and t.dim() != 2 for name, t in tensors.items()):
        raise ValueError(f"the shapes of LoRA's factors are not of one rank: {sorted(ranks)}")
    return ranks.pop() if ranks else 0


def resize(model: PeftModel, rank: int) -> None:
    """Give LoRA's factors another rank, at the same scaling; their values are lost.

    Args:
        model: a model that carries the adapter, changed in place. Nothing is done where it has that
            rank already.
        rank: at least 1.
    """
    settings: Any = model.peft_config["default"]
    if settings.r == rank:
        return
    settings.lora_alpha = settings.lora_alpha / settings.r * rank
    settings.r = rank
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        a: Any = layer.lora_A["default"]
        b: Any = layer.lora_B["default"]
        like: Any = {"bias": False, "device": a.weight.device, "dtype": a.weight.dtype}
        # Nothing is drawn: the values come with the next adapter.
        layer.lora_A["default"] = skip_init(nn.Linear, a.in_features, rank, **like)
        layer.lora_B["default"] = skip_init(nn.Linear, rank, b.out_features, **like)
        layer.r["default"], layer.lora_alpha["default"] = rank, settings.lora_alpha


def initial(model: nn.Module, seed: int, plan: Plan | None = None) -> Tensors:
    """The adapter at the start of a run: A random by name and seed, B zero, head as loaded.

    Args:
        model: a model that carries the adapter; it stays as it is.
        seed: the run's. FM and proxy start equal at equal seeds.
        plan: the plan of the proxy where the model is one; None for the FM.

    Returns:
        Tensors by FM name on the CPU, for :func:`load`.
    """
    out = read(model, plan)
    for name, value in out.items():
        if name.endswith("lora_A.weight"):
            bound = 1 / math.sqrt(value.shape[1])  # kaiming_uniform_(a=sqrt(5)), LoRA's own choice
            stream = torch_stream(seed, "adapter", name)
            value.uniform_(-bound, bound, generator=stream)
        elif name.endswith("lora_B.weight"):
            value.zero_()
    return out


def norm(tensors: Mapping[str, Tensor]) -> float:
    """L2 norm over all tensors.

    Args:
        tensors: of any shapes; their order does not matter.

    Returns:
        The root of the sum of all squares, each tensor's taken in float64; 0 for no tensors.
    """
    # Exact, so that the order of the names, which no file promises, cannot change the last bit.
    return math.sqrt(math.fsum(float(t.double().square().sum()) for t in tensors.values()))


def change_norms(
    adapter: Mapping[str, Tensor], start: Mapping[str, Tensor], scaling: float
) -> dict[str, float]:
    """How far an adapter has moved, in the measures that matter apart.

    Args:
        adapter: what a client has made of `start`, by FM name.
        start: the adapter that the client was sent.
        scaling: alpha / rank, by which LoRA's product is multiplied.

    Returns:
        L2 norms of the change: of `LoRA's product` s·BA over all layers, of `LoRA's factors` A and
        B, and of `the head`, which is all other tensors.
    """
    change = {k: t.double() - start[k].double() for k, t in adapter.items()}
    squares = []
    for key in adapter:
        if is_lora(key) and key.endswith("lora_A.weight"):
            other = key.removesuffix("lora_A.weight") + "lora_B.weight"
            # BA - B'A' = [B, -B'] [A; A'], whose norm follows from two small matrices.
            right = torch.cat([adapter[key].double(), start[key].double()])
            left = torch.cat([adapter[other].double(), -start[other].double()], dim=1)
            squares.append(float(((left.T @ left) * (right @ right.T)).sum()))
    return {
        "LoRA's product": scaling * math.sqrt(max(0.0, math.fsum(squares))),
        "LoRA's factors": norm({k: t for k, t in change.items() if is_lora(k)}),
        "the head": norm({k: t for k, t in change.items() if not is_lora(k)}),
    }


def clip_change(
    adapter: Mapping[str, Tensor], start: Mapping[str, Tensor], longest: float
) -> Tensors:
    """The adapter with the change of LoRA's factors since `start` scaled down to L2 norm `longest`.

    The head's change stays as it is: it is no part of what makes the bodies of proxy and FM differ.
    A change no longer than that is left to the bit.

    Args:
        adapter: what a client has made of `start`, by FM name.
        start: the adapter that the client was sent.
        longest: largest norm of the change, over all factors together.

    Returns:
        A new dictionary. Tensors that did not change are those of `adapter`, not copies.
    """
    change = {k: t - start[k] for k, t in adapter.items() if is_lora(k)}
    size = norm(change)
    if size <= longest:
        return dict(adapter)
    return dict(adapter) | {k: start[k] + d * (longest / size) for k, d in change.items()}


def export(fm: PeftModel, folder: Path, base_name: str, task_type: str | None = None) -> list[Path]:
    """Write the adapter now on the FM as a PEFT folder.

    `PeftModel.from_pretrained(untouched_fm, folder)` gives the same logits. Where the untouched FM
    keeps query, key and value in one layer, the adapter of that layer is written, of three times
    the rank (:func:`fedpft_core.model.fused.joined`); of a diffusion pipeline it is the UNet that
    takes it.

    Args:
        fm: the FM with the adapter. Its PEFT configuration is given `base_name` and `task_type`.
        folder: where PEFT writes its files.
        base_name: what the adapter's configuration calls the FM.
        task_type: PEFT's name for what the FM is for, by which it chooses what it wraps the FM in;
            None for its plain wrapper.

    Returns:
        The adapter's files (weights and configuration), sorted.
    """
    config: Any = fm.peft_config["default"]
    config.base_model_name_or_path = base_name
    config.task_type = task_type
    layers = family_of_model(fm).fused
    bare_fm: Any = base_model(fm)
    paths: dict[str, str] = getattr(bare_fm, "vanilla_names", dict)()
    tensors = read(fm)
    # Not the configuration's targets: of many PEFT keeps what they have in common.
    suffix = ".lora_A.weight"
    targets = sorted(name.removesuffix(suffix) for name in tensors if name.endswith(suffix))
    made = joined(tensors, tuple(targets), layers)
    if paths:
        made = renamed(made, paths)
    if not made.ranks and not paths:
        fm.save_pretrained(str(folder), safe_serialization=True)
        return sorted(folder.glob("adapter_*"))
    vanilla = copy.deepcopy(config)
    vanilla.target_modules = list(made.targets)
    vanilla.rank_pattern = made.ranks
    vanilla.alpha_pattern = per_rank(made.ranks, config.lora_alpha, config.r)
    vanilla.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    vanilla.save_pretrained(str(folder))
    tensors = {f"{WRAPPER}{name}": t.contiguous() for name, t in made.tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return sorted(folder.glob("adapter_*"))

"""How large a plan's sub-FM is, for machines that cannot have the FM.

`fedpft inspect --json` writes such a description on the server; `fedpft node check --plan` reads
it on a node. It says how many neurons a plan keeps, not which, and holds no weight.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

from torch import nn

from fedpft_core.adapter import lora as adapters
from fedpft_core.config import Config
from fedpft_core.data.splits import columns_of
from fedpft_core.disk import plain
from fedpft_core.errors import ReplyError, UserError
from fedpft_core.model import load as models
from fedpft_core.model.families import Shape, family_of
from fedpft_core.model.plan import Plan
from fedpft_core.proxy.build import build
from fedpft_core.proxy.nested import make_plans, trunk
from fedpft_core.proxy.package import ClientModel, blank, make_package
from fedpft_core.task import Task, sample
from fedpft_core.task.labels import label_names
from fedpft_core.wire.meta import PackageMeta

FORMAT = "fedpft plan size 2"
# The numbers of a description, and the largest that a machine of our time could mean.
_MOST = dict.fromkeys(("package_bytes", "sub_fm_bytes", "adapter_bytes"), 10**15) | {
    "max_length": 10**7, "batch_size": 10**7, "threads": 1024,
}  # fmt: skip


@dataclass(frozen=True)
class PlanSize:
    """Sizes in bytes; `meta` is a package's metadata without the kept neurons' positions."""

    model: str
    meta: PackageMeta
    package_bytes: int
    sub_fm_bytes: int
    adapter_bytes: int
    labels: tuple[str, ...]  # empty where the server takes them from its data
    max_length: int
    batch_size: int
    threads: int

    def to_json(self) -> str:
        """The description as `fedpft inspect --json` writes it.

        Returns:
            JSON text that :func:`read` takes, with its format's name in front.
        """
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return json.dumps({"format": FORMAT} | own | {"meta": self.meta.as_raw()}, indent=1) + "\n"

    def client_model(self, base: str = "float") -> ClientModel:
        """A model of this shape with random weights.

        Args:
            base: what the frozen linear layers of blocks are held in, one of `BASES`.

        Returns:
            The proxy with the adapter attached.

        Raises:
            UserError: the shape is one that no model has.
        """
        try:
            return blank(self.meta, base)
        except ReplyError as error:
            raise UserError(f"the plan's description makes no model ({error}).") from error
        except UserError:
            raise
        except Exception as error:
            # What the libraries raise for settings that fit no model is their secret.
            what = f"{type(error).__name__}: {error}"
            raise UserError(f"the plan's description makes no model ({what}).") from error


def read(path: Path) -> PlanSize:
    """Read a description that `fedpft inspect --json` has written.

    Args:
        path: the file.

    Returns:
        The description, every number of it above 0 and none larger than a machine has.

    Raises:
        UserError: the file is missing or no such description.
    """
    try:
        raw = json.loads(plain.read(path).decode("utf-8"))
    except OSError as error:
        raise UserError(f"--plan {path}: cannot be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise UserError(f"--plan {path}: is not JSON ({error}).") from error
    except RecursionError as error:
        raise UserError(f"--plan {path}: is nested too deeply.") from error
    kinds = {"model": str, "meta": dict, "labels": list} | dict.fromkeys(_MOST, int)
    if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
        raise UserError(f"--plan {path}: was not made by `fedpft inspect --json`.")
    if raw.keys() != kinds.keys() or not all(type(raw[k]) is t for k, t in kinds.items()):
        raise UserError(f"--plan {path}: was made by another version of `fedpft inspect --json`.")
    try:
        meta = PackageMeta.from_raw(raw["meta"])
        shape_of(meta)
    except ValueError as error:
        raise UserError(
            f"--plan {path}: was made by another version of `fedpft inspect --json` ({error})."
        ) from error
    for name, most in _MOST.items():
        if not 0 < raw[name] <= most:
            raise UserError(f"--plan {path}: {name} is {raw[name]}, not between 1 and {most}.")
    return PlanSize(**raw | {"meta": meta, "labels": tuple(map(str, raw["labels"]))})


def shape_of(meta: PackageMeta) -> Shape:
    """The sizes of a package's FM.

    Args:
        meta: the package's metadata.

    Returns:
        The sizes that its model's config states.

    Raises:
        ValueError: the metadata do not tell them, or the family is not supported.
    """
    try:
        return family_of(meta.plan.model_type).shape(meta.model_config)
    except UserError as error:
        raise ValueError(str(error)) from error


def describe(config: Config) -> PlanSize:
    """The sizes of a run's sub-FM.

    Loads the FM, but neither rows nor public data.

    Args:
        config: of the run; the weight norm stands in for its saliency.

    Returns:
        The description that :func:`read` reads on another machine.

    Raises:
        UserError: the FM cannot be loaded, or settings do not fit it, as in a run.
    """
    labels = label_names(config.data.labels) if config.data.labels else ()
    task = sample(models.kind_of(config.model), columns_of(config.data), labels)
    loaded = models.load(config.model, task.model(), config.run.seed)
    # Sizes depend on how many neurons are kept, not on which: no public rows are read for it.
    settings = replace(config.plan, saliency="weight-norm")
    # Of several widths the one that most is asked for.
    plans = make_plans(loaded.model, settings, config.run.seed)
    plan = plans[trunk(plans)]
    return of_proxy(config, loaded, plan, build(loaded.model, plan), task, labels)


def of_proxy(
    config: Config,
    loaded: models.Loaded,
    plan: Plan,
    proxy: nn.Module,
    task: Task,
    labels: tuple[str, ...] = (),
) -> PlanSize:
    """The sizes of a sub-FM that has been built.

    Args:
        config: of the run.
        loaded: the FM.
        plan: of the sub-FM.
        proxy: the sub-FM, which is rounded and gets an adapter.
        task: what it is for.
        labels: of the rows; empty where they are not known yet.

    Returns:
        The description.

    Raises:
        UserError: there are weights too large for wire.package.
    """
    spec = adapters.make_spec(
        loaded.family, plan, loaded.fresh, config.lora, task.head(loaded.family)
    )
    package = make_package(
        proxy, plan, spec, loaded.processor, task.name, task.labels, config.data.max_length,
        config.wire.package, config.wire.embeddings,
    )  # fmt: skip
    size = models.size(proxy)[1]
    adapter = adapters.read(adapters.attach(proxy, spec, plan), plan)
    return PlanSize(
        model=config.model.name,
        meta=replace(package.meta, plan=plan.anonymous()),
        package_bytes=len(package.to_bytes()),
        sub_fm_bytes=size,
        adapter_bytes=sum(t.numel() * t.element_size() for t in adapter.values()),
        labels=labels,
        max_length=config.data.max_length,
        batch_size=config.train.batch_size,
        threads=config.train.threads,
    )


__all__ = ["PlanSize", "describe", "read", "shape_of"]

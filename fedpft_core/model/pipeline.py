"""Reading a folder in the layout of Stable Diffusion: `model_index.json` and a folder a part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fedpft_core.disk import plain
from fedpft_core.errors import UserError, first_line
from fedpft_core.model.diffusion import (
    TextToImage,
    TextToImageConfig,
    library,
    sizes_of,
    told,
)

INDEX = "model_index.json"
# The parts, and the class each one must be of; a pipeline without `vae` works on pixels.
_PARTS = {
    "unet": ("UNet2DConditionModel", "config.json"),
    "text_encoder": ("CLIPTextModel", "config.json"),
    "vae": ("AutoencoderKL", "config.json"),
    "scheduler": ("", "scheduler_config.json"),
}
_FORMS = ("epsilon", "v_prediction")


def is_pipeline(source: str) -> bool:
    """Whether a source is a local folder that says it is a diffusion pipeline.

    Args:
        source: a folder or a name on the hub.

    Returns:
        Whether it has a `model_index.json`.
    """
    return (Path(source) / INDEX).is_file()


def read_config(source: str, name: str) -> TextToImageConfig:
    """The configs of a pipeline's parts, with the sizes that follow from them; no weights.

    Args:
        source: the folder.
        name: what a user calls it, for messages.

    Returns:
        The config of the one model that they are.

    Raises:
        UserError: a part is missing, of a class that is not supported, or no part of a pipeline.
    """  # noqa: DOC501  # the ValueError below does not leave this function
    folder = Path(source)
    index = _json(folder / INDEX, name)
    parts: dict[str, Any] = {}
    for part, (wanted, file) in _PARTS.items():
        said = index.get(part)
        cls = said[1] if isinstance(said, list) and len(said) == 2 else None
        if part == "vae" and cls is None:
            parts[part] = {}
            continue
        if not cls or (wanted and cls != wanted):
            raise UserError(
                f"model.name = {name}: its {part} is {cls or 'missing'}; supported are pipelines "
                f"whose {part} is {wanted or 'a noise schedule'}."
            )
        parts[part] = told(_json(folder / part / file, name))
    form = parts["scheduler"].get("prediction_type", "epsilon")
    if form not in _FORMS:
        raise UserError(
            f"model.name = {name}: its scheduler says prediction_type = {form!r}; supported are "
            f"{', '.join(_FORMS)}."
        )
    config = TextToImageConfig(**parts)
    try:
        with torch.device("meta"):
            model = TextToImage.from_config(config)
        if not len(model.all_blocks):
            raise ValueError("its UNet has no transformer blocks")
        for field, value in sizes_of(model).items():
            setattr(config, field, value)
    except UserError:
        raise
    except Exception as error:  # whatever a foreign config makes the library raise
        raise UserError(f"model.name = {name}: cannot be loaded ({first_line(error)}).") from error
    config.architectures = [TextToImage.__name__]
    return config


def read_model(source: str, name: str, config: TextToImageConfig) -> TextToImage:
    """The pipeline with its weights, in float32.

    Args:
        source: the folder.
        name: what a user calls it, for messages.
        config: as :func:`read_config` gives it.

    Returns:
        The model.

    Raises:
        UserError: the weights are missing, no safetensors, or do not fit.
    """  # noqa: DOC501  # the ValueErrors below do not leave this function
    import transformers

    diffusers, folder = library(), Path(source)
    text_encoder: Any = transformers.CLIPTextModel
    safe: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
    try:
        vae = None
        if config.vae:
            vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae", **safe).float()
        unet, info = diffusers.UNet2DConditionModel.from_pretrained(
            folder / "unet", output_loading_info=True, **safe
        )
        if info["missing_keys"]:
            raise ValueError(f"{sorted(info['missing_keys'])[0]} of the UNet is missing")
        text, info = text_encoder.from_pretrained(
            folder / "text_encoder", dtype=torch.float32, output_loading_info=True, **safe
        )
        if info["missing_keys"]:
            raise ValueError(f"{sorted(info['missing_keys'])[0]} of the text encoder is missing")
    except Exception as error:  # as above
        raise UserError(
            f"model.name = {name}: weights cannot be loaded ({first_line(error)})."
        ) from error
    return TextToImage(config, unet.float(), text, vae)


def _json(path: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads(plain.read(path))
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.name = {name}: {path.parent.name}/{path.name} cannot be read "
            f"({first_line(error)})."
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"model.name = {name}: {path.parent.name}/{path.name} is no object.")
    return found


__all__ = ["INDEX", "is_pipeline", "read_config", "read_model"]

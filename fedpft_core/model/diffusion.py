"""Text-to-image diffusion models: a UNet, a text encoder and a noise schedule as one model.

To the rest of the program such a pipeline is a model like the others: the transformer blocks of
the UNet, which lie in its down, middle and up parts and differ in width, are one list of blocks,
and the text encoder is frozen. Source of the loss: Ho et al., Denoising Diffusion Probabilistic
Models, NeurIPS 2020 (arXiv:2006.11239), eq. 14.

Shape letters: B rows, C channels, H height, W width, P tokens of a prompt, L positions, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from fedpft_core.errors import UserError

MODEL_TYPE = "text-to-image"
_ABSENT = "text-to-image needs the package diffusers: pip install 'fedpft[diffusion]'."
_OPTIONAL = ("vae",)
# What of the saved configs of the parts says where they came from, or by what they were written.
_UNTOLD = ("_name_or_path", "_diffusers_version", "_commit_hash", "transformers_version")


def library() -> Any:
    """The package diffusers, which is an extra.

    Returns:
        The module.

    Raises:
        UserError: it is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise UserError(_ABSENT) from error
    return diffusers


class TextToImageConfig(PretrainedConfig):
    """The configs of a pipeline's parts, and the sizes that the program asks a config for.

    Args:
        unet: config of the UNet, as diffusers saves it.
        text_encoder: config of the text encoder, as transformers saves it.
        scheduler: config of the noise schedule, as diffusers saves it.
        vae: config of the autoencoder; empty for a UNet that works on pixels.
        **more: the fields of :func:`sizes_of`, and those of any Hugging Face config.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        unet: Mapping[str, Any] | None = None,
        text_encoder: Mapping[str, Any] | None = None,
        scheduler: Mapping[str, Any] | None = None,
        vae: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        self.unet = dict(unet or {})
        self.text_encoder = dict(text_encoder or {})
        self.scheduler = dict(scheduler or {})
        self.vae = dict(vae or {})
        super().__init__(**more)


AutoConfig.register(MODEL_TYPE, TextToImageConfig, exist_ok=True)


class Denoised(NamedTuple):
    """What a UNet makes of noisy images, and what it should have made.

    Attributes:
        prediction: [B, C, H, W].
        target: of the same shape: the noise, or the velocity, as the schedule says.
    """

    prediction: Tensor
    target: Tensor


class GEGLU(nn.Module):
    """The gated activation of diffusers with its activation as a module, which hooks can see.

    Neuron j of F is row j (the value) and row F + j (what the gate is taken of) of `proj`.

    Args:
        proj: the layer that holds value and gate, one after the other.
    """

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """The neurons' values, gated.

        Args:
            x: [..., D].

        Returns:
            [..., F].
        """
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * self.act(gate)


class TextToImage(nn.Module):
    """A pipeline as one model, which denoises images that it has made noisy itself.

    Args:
        config: of its parts; kept as it is.
        unet: `UNet2DConditionModel` of diffusers.
        text_encoder: `CLIPTextModel` of transformers.
        vae: `AutoencoderKL` of diffusers; None where the UNet works on pixels.
    """

    # PEFT asks models whose config has a model_type for it, as transformers' own have it.
    base_model_prefix = ""

    def __init__(
        self, config: TextToImageConfig, unet: Any, text_encoder: Any, vae: Any = None
    ) -> None:
        super().__init__()
        self.config = config
        from diffusers.models.activations import GEGLU as Theirs

        for name, module in list(unet.named_modules()):
            if type(module) is Theirs:
                unet.set_submodule(name, GEGLU(module.proj))
        # Before the UNet, which holds the same modules: by these names they are known.
        self.all_blocks = nn.ModuleList(block for _, block in blocks_of(unet))
        self.unet = unet
        self.text_encoder = text_encoder.requires_grad_(False)
        self.vae = None if vae is None else vae.requires_grad_(False)
        self.schedule = library().DDPMScheduler.from_config(config.scheduler)

    def vanilla_names(self) -> dict[str, str]:
        """What diffusers' own UNet calls the blocks, by what they are called here.

        Returns:
            Path in the UNet by path in this model.
        """
        return {f"all_blocks.{i}": path for i, (path, _) in enumerate(blocks_of(self.unet))}

    @staticmethod
    def from_config(config: TextToImageConfig, trust_remote_code: bool = False) -> TextToImage:
        """A model with random weights.

        Args:
            config: of its parts.
            trust_remote_code: as the model library calls it; no code is ever loaded.

        Returns:
            The model.

        Raises:
            ValueError: a part's config is none.
        """
        if trust_remote_code:
            raise ValueError("no code of others is run")
        diffusers = library()
        vae = diffusers.AutoencoderKL.from_config(config.vae) if config.vae else None
        return TextToImage(
            config,
            diffusers.UNet2DConditionModel.from_config(config.unet),
            text_encoder_of(config.text_encoder),
            vae,
        )

    def latents(self, pixel_values: Tensor) -> Tensor:
        """Images as the UNet has them.

        Args:
            pixel_values: in [-1, 1], [B, C, H, W].

        Returns:
            The pixels themselves, or the autoencoder's most likely latents, scaled.
        """
        if self.vae is None:
            return pixel_values
        with torch.no_grad():
            found = self.vae.encode(pixel_values).latent_dist.mode()
        scaled: Tensor = (found - (self.vae.config.shift_factor or 0.0)) * (
            self.vae.config.scaling_factor
        )
        return scaled

    def pixels(self, latents: Tensor) -> Tensor:
        """The inverse of `latents`.

        Args:
            latents: as the UNet has them.

        Returns:
            Images in [-1, 1], [B, C, H, W].
        """
        if self.vae is not None:
            scaled = latents / self.vae.config.scaling_factor
            latents = self.vae.decode(scaled + (self.vae.config.shift_factor or 0.0)).sample
        return latents.clamp(-1, 1)

    def prompts(self, prompt_ids: Tensor) -> Tensor:
        """What the UNet reads of prompts.

        Args:
            prompt_ids: token ids, padded to one length [B, P].

        Returns:
            [B, P, width of the text encoder].
        """
        with torch.no_grad():
            read: Tensor = self.text_encoder(prompt_ids).last_hidden_state
        return read

    def draw(self, noise_seed: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """The noise and the time step of each row, a function of its seed alone.

        Args:
            noise_seed: int64 [B].
            like: what the noise is added to, [B, C, H, W].

        Returns:
            Noise as `like`, and time steps int64 [B].
        """
        noise, steps = [], []
        for seed in noise_seed.tolist():
            stream = torch.Generator().manual_seed(seed)
            steps.append(
                torch.randint(self.schedule.config.num_train_timesteps, (), generator=stream)
            )
            noise.append(torch.randn(like.shape[1:], generator=stream))
        return torch.stack(noise).to(like), torch.stack(steps).to(like.device)

    def forward(self, pixel_values: Tensor, prompt_ids: Tensor, noise_seed: Tensor) -> Denoised:
        """Add noise to images and predict it.

        Args:
            pixel_values: in [-1, 1], [B, C, H, W].
            prompt_ids: token ids, padded to one length [B, P].
            noise_seed: of the noise and the time step of each row, int64 [B].

        Returns:
            Prediction and target.
        """
        latents = self.latents(pixel_values)
        noise, steps = self.draw(noise_seed, latents)
        noisy = self.schedule.add_noise(latents, noise, steps)
        target = noise
        if self.schedule.config.prediction_type == "v_prediction":
            target = self.schedule.get_velocity(latents, noise, steps)
        read = self.prompts(prompt_ids)
        return Denoised(self.unet(noisy, steps, encoder_hidden_states=read).sample, target)


def text_encoder_of(config: Mapping[str, Any]) -> Any:
    """A text encoder with random weights.

    Args:
        config: of a CLIP text model, as transformers saves it.

    Returns:
        `CLIPTextModel`.

    Raises:
        ValueError: the config is of another model.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    if config.get("model_type") != "clip_text_model":
        raise ValueError(f"the text encoder is of type {config.get('model_type')!r}")
    rest = {k: v for k, v in config.items() if k != "model_type"}
    return CLIPTextModel(CLIPTextConfig(**rest))


def blocks_of(unet: nn.Module) -> list[tuple[str, nn.Module]]:
    """The transformer blocks of a UNet with their paths, in the order in which they run.

    Args:
        unet: `UNet2DConditionModel`, with or without adapter.

    Returns:
        Path in the UNet, and block.
    """
    parts = ("down_blocks", "mid_block", "up_blocks")
    found = [
        (name, module)
        for name, module in unet.named_modules()
        if name.rpartition(".")[0].endswith("transformer_blocks")
    ]
    return sorted(found, key=lambda row: parts.index(row[0].partition(".")[0]))


def tokens_of(unet: Mapping[str, Any], side: int, path: str) -> int:
    """Positions that a block of a UNet reads.

    Args:
        unet: its config.
        side: height and width of what the UNet gets.
        path: the block's.

    Returns:
        H W at the block's depth; each part but the last halves both, rounded up.
    """
    parts = len(unet["down_block_types"])
    part, number = path.split(".")[:2]
    depth = {"down_blocks": lambda: int(number), "up_blocks": lambda: parts - 1 - int(number)}
    halved = depth.get(part, lambda: parts - 1)()
    for _ in range(halved):
        side = -(-side // 2)
    return side * side


def sizes_of(model: TextToImage) -> dict[str, Any]:
    """The sizes that a config states of a model, by the names that most families have for them.

    Args:
        model: before any of it was cut.

    Returns:
        Fields of its config. Of what differs between blocks the largest, and `block_tokens`, the
        positions that each block reads.
    """
    config, named = model.config, blocks_of(model.unet)
    shrink = 1
    if config.vae:
        shrink = 2 ** (len(config.vae["block_out_channels"]) - 1)
    side = int(config.unet["sample_size"])
    tokens = [tokens_of(config.unet, side, path) for path, _ in named]
    first: Any = [block for _, block in named]
    return {
        "hidden_size": max(b.attn1.to_q.in_features for b in first),
        "intermediate_size": max(b.ff.net[2].in_features for b in first),
        "num_hidden_layers": len(first),
        "num_attention_heads": max(b.attn1.heads for b in first),
        "head_dim": max(b.attn1.to_q.out_features // b.attn1.heads for b in first),
        "num_channels": config.vae["in_channels"] if config.vae else config.unet["in_channels"],
        "image_size": side * shrink,
        "patch_size": round(side * shrink / max(tokens) ** 0.5),
        "vocab_size": config.text_encoder["vocab_size"],
        "prompt_tokens": config.text_encoder["max_position_embeddings"],
        "block_tokens": tokens,
    }


def told(config: Mapping[str, Any]) -> dict[str, Any]:
    """A part's config without where it came from.

    Args:
        config: as it was saved.

    Returns:
        A copy.
    """
    return {k: v for k, v in config.items() if k not in _UNTOLD}


__all__ = [
    "GEGLU",
    "MODEL_TYPE",
    "Denoised",
    "TextToImage",
    "TextToImageConfig",
    "blocks_of",
    "library",
    "sizes_of",
    "text_encoder_of",
    "tokens_of",
    "told",
]  # fmt: skip

"""A diffusion pipeline as one model: loading, pruning, the adapter, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pictures
import pytest
import tiny
import torch
from peft import PeftModel
from torch import Tensor

from fedpft_core.adapter import lora as adapters
from fedpft_core.config import LoraConfig, ModelConfig, PlanConfig
from fedpft_core.errors import ReplyError, UserError
from fedpft_core.model.diffusion import TextToImage, blocks_of
from fedpft_core.model.load import Loaded, load
from fedpft_core.model.plan import BlockPlan, Plan
from fedpft_core.proxy.build import build
from fedpft_core.proxy.choose import make_plan
from fedpft_core.proxy.cost import step_flops, step_ratio
from fedpft_core.proxy.package import make_package, rebuild

HALF = PlanConfig(keep_share=0.5)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.folder(tmp_path_factory.mktemp("pipeline") / "fm")


def fm(path: Path) -> Loaded:
    return load(ModelConfig(name=str(path)), pictures.TASK.model(), 0)


def predicted(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return pictures.TASK.outputs(model, batch)


def vanilla(path: Path) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(path / "unet").eval()


def through_vanilla(unet: Any, bare: Any, batch: dict[str, Tensor]) -> Tensor:
    """What diffusers' own UNet, called as diffusers' training scripts do, predicts."""
    from diffusers import DDPMScheduler

    noise, steps = bare.draw(batch["noise_seed"], batch["pixel_values"])
    noisy = DDPMScheduler.from_config(bare.config.scheduler).add_noise(
        batch["pixel_values"], noise, steps
    )
    with torch.no_grad():
        read = bare.text_encoder(batch["prompt_ids"])[0]
        found: Tensor = unet(noisy, steps, encoder_hidden_states=read).sample
    return found


def test_the_model_computes_what_diffusers_does(path: Path) -> None:
    made, unet = fm(path), vanilla(path)
    made.model.double(), unet.double()
    batch = pictures.batch(made.model, made.processor)
    want = through_vanilla(unet, made.model, batch)
    torch.testing.assert_close(predicted(made.model, batch), want, rtol=1e-9, atol=1e-11)


def test_blocks_are_listed_in_the_order_they_run_with_their_sizes(path: Path) -> None:
    made = fm(path)
    ran: list[int] = []
    entering: dict[int, int] = {}

    def note(i: int) -> Any:
        def hook(_m: Any, args: Any) -> None:
            ran.append(i)
            entering[i] = args[0].shape[1]

        return hook

    for i, block in enumerate(made.family.block_list(made.model)):
        block.register_forward_pre_hook(note(i))
    predicted(made.model, pictures.batch(made.model, made.processor))
    assert ran == list(range(7))
    assert tuple(entering[i] for i in range(7)) == made.shape.block_tokens
    assert [f.neurons for f in made.family.ffns(made.model)] == [32, 64, 64, 64, 64, 32, 32]
    assert (made.shape.channels, made.shape.height, made.shape.width) == (1, 8, 8)


def test_a_plan_that_keeps_all_gives_identical_outputs(path: Path) -> None:
    made = fm(path)
    plan = make_plan(made.model, PlanConfig(keep_share=1.0), 0)
    assert plan.is_full
    batch = pictures.batch(made.model, made.processor)
    every = replace(
        plan,
        blocks=tuple(
            BlockPlan("pruned", tuple(range(plan.neurons(i))), 0, b.neurons)
            for i, b in enumerate(plan.blocks)
        ),
    )
    for same in (plan, every):
        proxy = build(made.model, same)
        assert torch.equal(predicted(proxy, batch), predicted(made.model, batch))


def test_pruning_is_zeroing(path: Path) -> None:
    made = fm(path)
    made.model.double()
    plan = make_plan(made.model, HALF, 0)
    assert [b.state for b in plan.blocks] == ["whole", *["pruned"] * 5, "whole"]
    proxy = build(made.model, plan)
    batch = pictures.batch(made.model, made.processor)
    before = predicted(made.model, batch)
    # By hand and by diffusers' own names: rows j and F + j of proj, and column j of net.2.
    with torch.no_grad():
        for ffn, entry in zip(made.family.ffns(made.model), plan.blocks, strict=True):
            if entry.state == "pruned":
                gone = sorted(set(range(ffn.neurons)) - set(entry.kept))
                ffn.out.weight[:, gone] = 0
    torch.testing.assert_close(
        predicted(proxy, batch), predicted(made.model, batch), rtol=1e-10, atol=1e-12
    )
    assert not torch.allclose(before, predicted(proxy, batch))


def test_neuron_j_is_rows_j_and_f_plus_j_of_diffusers_layer(path: Path) -> None:
    made, unet = fm(path), vanilla(path)
    for ffn, (_, theirs) in zip(made.family.ffns(made.model), blocks_of(unet), strict=True):
        proj: Any = theirs.get_submodule("ff.net.0.proj")
        gate, value = ffn.ins
        f = ffn.neurons
        assert torch.equal(value.weight, proj.weight[:f]) and torch.equal(value.bias, proj.bias[:f])
        assert torch.equal(gate.weight, proj.weight[f:]) and torch.equal(gate.bias, proj.bias[f:])


def with_adapter(made: Loaded, plan: Plan) -> tuple[PeftModel, PeftModel, adapters.AdapterSpec]:
    proxy = build(made.model, plan)
    spec = adapters.make_spec(
        made.family, plan, made.fresh, LoraConfig(rank=2, alpha=4.0, dropout=0.0), ()
    )
    return adapters.attach(made.model, spec), adapters.attach(proxy, spec, plan), spec


def random_adapter(model: PeftModel) -> dict[str, Tensor]:
    stream = torch.Generator().manual_seed(1)
    return {
        k: 0.3 * torch.randn(t.shape, generator=stream) for k, t in adapters.read(model).items()
    }


def test_lora_is_on_attention_alone_and_the_same_on_both(path: Path) -> None:
    made = fm(path)
    plan = make_plan(made.model, HALF, 0)
    whole, proxy, spec = with_adapter(made, plan)
    names = set(adapters.read(whole))
    assert names == set(adapters.read(proxy, plan))
    layers = {name.split(".", 2)[2].rpartition(".lora_")[0] for name in names}
    projections = ("to_q", "to_k", "to_v", "to_out.0")
    assert layers == {f"attn{n}.{p}" for n in (1, 2) for p in projections}
    assert len(spec.targets) == 7 * 8 and len(names) == 2 * 7 * 8
    trained = [name for name, p in whole.named_parameters() if p.requires_grad]
    assert len(trained) == len(names) and all("lora_" in name for name in trained)


def test_the_exported_adapter_fits_the_vanilla_unet(path: Path, tmp_path: Path) -> None:
    made = fm(path)
    whole, _, _ = with_adapter(made, make_plan(made.model, HALF, 0))
    adapters.load(whole, random_adapter(whole))
    adapters.export(whole, tmp_path / "adapter", "fm")
    unet = vanilla(path)
    batch = pictures.batch(adapters.base_model(whole), made.processor)
    bare: Any = adapters.base_model(whole)
    untuned = through_vanilla(unet, bare, batch)
    plugged = PeftModel.from_pretrained(unet, str(tmp_path / "adapter")).eval()
    assert not list((tmp_path / "adapter").glob("*.bin"))
    whole.double(), plugged.double()
    batch = tiny.double(batch)
    want = predicted(whole, batch)
    torch.testing.assert_close(through_vanilla(plugged, bare, batch), want, rtol=1e-9, atol=1e-11)
    assert (want - untuned).abs().max() > 1e-3


def packed(path: Path) -> Any:
    made = fm(path)
    plan = make_plan(made.model, HALF, 0)
    _, proxy, spec = with_adapter(made, plan)
    package = make_package(proxy, plan, spec, made.processor, "text-to-image", (), 64)
    return made, plan, proxy, package


def test_a_client_rebuilds_the_proxy_to_the_bit(path: Path) -> None:
    made, plan, proxy, package = packed(path)
    adapter = random_adapter(proxy)
    adapters.load(proxy, adapters_of(proxy, plan, adapter), plan)
    again = rebuild(package)
    adapters.load(again.model, adapters_of(again.model, plan, adapter), plan)
    batch = pictures.batch(made.model, made.processor)
    assert torch.equal(predicted(again.model, batch), predicted(proxy, batch))
    # Shared modules travel once: the package has no second copy of any block.
    assert not [name for name in package.weights if name.startswith("unet.") and "attn1" in name]


def adapters_of(model: Any, plan: Plan, values: dict[str, Tensor]) -> dict[str, Tensor]:
    live = adapters.read(model, plan)
    return dict(zip(sorted(live), (values[k] for k in sorted(values)), strict=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unet": {"down_block_types": []}}, "malformed"),
        ({"unet": {"custom_pipeline": "somebody/else"}}, "custom_pipeline"),
        ({"unet": {"block_out_channels": [2**30, 16]}}, "block_out_channels"),
        ({"text_encoder": {"model_type": "bert"}}, "text encoder"),
    ],
)
def test_a_package_with_a_foreign_config_is_refused(
    path: Path, change: dict[str, dict[str, Any]], said: str
) -> None:
    package = packed(path)[-1]
    config = json.loads(json.dumps(package.meta.model_config))
    for part, fields in change.items():
        config[part] |= fields
    with pytest.raises(ReplyError, match=said):
        rebuild(replace(package, meta=replace(package.meta, model_config=config)))


def test_a_plan_with_widths_survives_its_json(path: Path) -> None:
    plan = make_plan(fm(path).model, HALF, 0)
    assert Plan.from_json(plan.to_json()) == plan
    assert [plan.neurons(i) for i in range(7)] == [32, 64, 64, 64, 64, 32, 32]
    raw = plan.as_raw()
    raw["blocks"][1]["neurons"] = 8
    with pytest.raises(ValueError, match="kept neurons of block 1"):
        Plan.from_raw(raw)
    raw["blocks"][1]["neurons"] = -1
    with pytest.raises(ValueError, match="width of block 1"):
        Plan.from_raw(raw)


def test_costs_count_the_positions_of_each_block(path: Path) -> None:
    made = fm(path)
    proxy = build(made.model, make_plan(made.model, HALF, 0))
    at_zero, per_token = step_flops(made.family, made.model, 2)
    assert at_zero > 0 and per_token > 0
    by_hand = 0.0
    for block, tokens in zip(
        made.family.block_list(made.model), made.shape.block_tokens, strict=True
    ):
        linears = [m for m in block.modules() if isinstance(m, torch.nn.Linear)]
        dense = 2.0 * sum(m.weight.numel() for m in linears)
        targets = [block.get_submodule(t) for t in made.family.attention]
        lora = 2.0 * 2 * sum(t.in_features + t.out_features for t in targets)
        by_hand += tokens / 64 * (2 * dense + 3 * lora)
    assert at_zero == pytest.approx(by_hand)
    assert 1 < step_ratio(made.model, proxy, made.family, 64, 2) < 3


def test_latents_of_an_autoencoder_are_denoised_where_the_pipeline_has_one(tmp_path: Path) -> None:
    made = pictures.loaded(tmp_path / "fm", vae=True)
    assert (made.shape.channels, made.shape.height) == (3, 16)
    batch = pictures.batch(made.model, made.processor)
    assert batch["pixel_values"].shape[1:] == (3, 16, 16)
    assert predicted(made.model, batch).shape[1:] == (1, 8, 8)
    (image,) = pictures.TASK.paint(made.model, pictures.examples(1), made.processor, 2, 1)
    assert image.startswith(b"\x89PNG")


def test_layer_drop_is_refused_in_one_sentence(path: Path) -> None:
    with pytest.raises(UserError, match=r"^plan.proxy = layer-drop: .*\.$"):
        make_plan(fm(path).model, PlanConfig(proxy="layer-drop"), 0)


def broken(path: Path, **parts: Any) -> Path:
    file = path / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))
    return path


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"unet": ["diffusers", "UNet3DConditionModel"]}, "its unet is UNet3DConditionModel"),
        ({"text_encoder": None}, "its text_encoder is missing"),
        ({"vae": ["diffusers", "VQModel"]}, "its vae is VQModel"),
        ({"scheduler": ["a"]}, "its scheduler is missing"),
    ],
)
def test_a_pipeline_of_other_parts_is_refused(
    parts: dict[str, Any], said: str, tmp_path: Path
) -> None:
    made = broken(pictures.folder(tmp_path / "fm"), **parts)
    with pytest.raises(UserError, match=said):
        fm(made)


def test_a_damaged_folder_is_refused_in_one_sentence(tmp_path: Path) -> None:
    made = pictures.folder(tmp_path / "fm")
    (made / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match="weights cannot be loaded"):
        fm(made)
    (made / "unet" / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"unet/config.json is no object\.$"):
        fm(made)
    (made / "model_index.json").write_text("{")
    with pytest.raises(UserError, match=r"model_index\.json cannot be read"):
        fm(made)


def test_no_pipeline_is_no_text_to_image_model(tmp_path: Path) -> None:
    tiny.folder("bert", tmp_path / "bert")
    with pytest.raises(UserError, match="a bert model reads texts"):
        fm(tmp_path / "bert")
    with pytest.raises(UserError, match="cannot be loaded"):
        (tmp_path / "empty").mkdir()
        fm(tmp_path / "empty")


def test_the_package_that_is_missing_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"fedpft\[diffusion\]"):
        fm(path)


def test_the_text_encoder_and_autoencoder_are_never_trained(tmp_path: Path) -> None:
    made = pictures.loaded(tmp_path / "fm", vae=True)
    model = made.model
    assert isinstance(model, TextToImage) and model.vae is not None
    frozen = [*model.text_encoder.parameters(), *model.vae.parameters()]
    assert frozen and not any(p.requires_grad for p in frozen)

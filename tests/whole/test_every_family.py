"""A family is one row of a table: run, `fedpft inspect`, plan sizes and node check follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from client_app.check.node import FAIL, PASS, Options, check
from client_app.store import Store
from fedpft_core import config
from fedpft_core.model import load as models
from fedpft_core.model.families import FAMILIES
from fedpft_core.proxy import size as plansize
from fedpft_core.proxy.cost import inspect

families = pytest.mark.parametrize("family", tiny.FAMILIES)


@families
def test_run_inspect_sizes_and_node_check(family: str, tmp_path: Path) -> None:
    flat = tiny.write_task(family, tmp_path, rows=60) | {
        "federation.rounds": 2, "distill.steps": 3, "align.interval": 1, "align.steps": 2,
        "data.validation-share": 0.2, "data.labels": ",".join(tiny.LABELS),
        "head.start": "statistics", "head.end": "better", "plug.method": "best",
        "plug.distil-steps": 4, "train.head-lr-scale": 1.0,
    }  # fmt: skip
    events = tiny.run(flat, tmp_path / "run")
    scored = tiny.main_run(events, "evaluation")
    assert {e["model"] for e in scored} >= {"proxy", "fm"}
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()

    cfg = config.from_flat(flat)
    table = inspect(cfg)
    assert len(table["rows"]) == 4 + 2 and table["step_ratio"] > 1

    sizes = plansize.describe(cfg)
    (said,) = tiny.main_run(events, "model")
    assert sizes.sub_fm_bytes == said["proxy_bytes"]
    path = tmp_path / "plan.json"
    path.write_text(sizes.to_json())
    assert plansize.read(path) == sizes
    blank = sizes.client_model()
    packed = sum(p.numel() * p.element_size() for p in blank.model.parameters())
    assert packed >= sizes.sub_fm_bytes

    # By the description of a plan, and by a sub-FM that a run has left in the node's store.
    for plan in (path, None):
        if plan is None:
            held = Store(tmp_path / "run" / "clients")
            package = held.get(held.digests()[-1])
            assert package is not None
            Store(tmp_path / "cache" / "store").put(package.digest(), package)
        found = {f.name: f for f in check(Options(_node(family, flat, tmp_path), plan=plan))}
        assert not [f for f in found.values() if f.status == FAIL], found
        assert found["training step"].status == found["memory"].status == PASS, found


def _node(family: str, flat: dict[str, Any], folder: Path) -> str:
    keys = {"name": "a", "data-path": flat["data.train"], "cache-dir": str(folder / "cache")}
    if family not in tiny.TEXT_FAMILIES:
        keys["image-column"] = "image"
    return " ".join(f'{k}="{v}"' for k, v in keys.items())


@families
def test_the_shape_is_the_models(family: str) -> None:
    """Every size, looked up in a config, is that of the weights it made."""
    model = tiny.model(family, intermediate_size=40, num_hidden_layers=3)
    row = FAMILIES[family]
    shape = row.shape(model.config)
    assert row.shape(model.config.to_dict()) == shape
    blocks, ffn = row.block_list(model), row.ffns(model)[0]
    # DINOv2's config says how many times the width: 3 times 16, of which a gated FFN keeps 2/3.
    neurons = {"dinov2": 48, "dinov2-swiglu": 32}.get(family, 40)
    assert (shape.blocks, shape.ffn) == (len(blocks), ffn.neurons) == (3, neurons)
    assert shape.hidden == ffn.out.out_features == 16
    query = blocks[0].get_submodule(row.attention[0])
    key = blocks[0].get_submodule(row.attention[1])
    assert query.out_features == shape.heads * shape.head_dim == shape.attention
    assert key.out_features == shape.kv_heads * shape.head_dim
    batch = tiny.batch_of(family)
    with torch.no_grad():
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "index")}
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
    if row.kind == "image":
        assert tuple(batch["pixel_values"].shape[1:]) == (shape.channels, shape.height, shape.width)
        assert hidden.shape[1] == shape.image_tokens == shape.length(64)
    else:
        words = model.get_input_embeddings()
        assert shape.vocabulary == words.num_embeddings
        assert shape.length(64) == 64 and shape.image_tokens == 0


@families
@pytest.mark.parametrize("value", [None, 0, -3, "16", 1.5, True, [16]])
def test_a_config_without_a_size_names_it(family: str, value: object) -> None:
    row = FAMILIES[family]
    good = tiny.hf_config(family).to_dict()
    names = row.names
    for name in (names.hidden, names.ffn_ratio or names.ffn, names.blocks, names.heads):
        if value is None and name == names.ffn and names.ffn_default:
            hidden = row.shape(good).hidden
            assert row.shape(good | {name: None}).ffn == names.ffn_default * hidden
            continue
        with pytest.raises(ValueError, match=f"the model's config has {name} = "):
            row.shape(good | {name: value})


def test_loading_names_the_size_that_is_wrong(tmp_path: Path) -> None:
    import json

    folder = tiny.folder("vit", tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"patch_size": 0}))
    with pytest.raises(Exception, match=r"patch_size = 0|cannot be loaded"):
        models.load(config.ModelConfig(name=str(folder)), tiny.task_of("vit").model(), 0)

"""Text-to-image: rows, loss, score, what a client may send, and images."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import torch

from fedpft_core import config
from fedpft_core.data.batches import batches
from fedpft_core.data.encoded import Encoded
from fedpft_core.data.examples import Captioned
from fedpft_core.data.public import load_public
from fedpft_core.data.rows import Columns
from fedpft_core.data.splits import check_settings
from fedpft_core.data.stream import public_batches
from fedpft_core.errors import UserError
from fedpft_core.model.load import Loaded
from fedpft_core.task import Headless, Painter, Task, Writer
from fedpft_core.task.painting import side_by_side
from fedpft_core.train.evaluate import evaluate

TASK = pictures.TASK
COLUMNS = Columns(text="text", image="image", task="text-to-image")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return pictures.loaded(tmp_path_factory.mktemp("pipeline") / "fm")


def encoded(made: Loaded, rows: int = 10, seed: int = 0) -> Encoded:
    return TASK.encode(pictures.examples(rows, seed), made.processor, 0)


def test_it_is_a_task_without_a_head_whose_models_paint() -> None:
    task: Task = TASK
    assert isinstance(task, Headless) and isinstance(task, Painter)
    assert not isinstance(task, Writer)


def test_rows_are_images_with_prompts_and_go_by_these(tmp_path: Path) -> None:
    file = pictures.write_file(tmp_path / "rows.csv", 7, 0)
    found = TASK.read(file, COLUMNS)
    assert found.inputs == pictures.examples(7).inputs
    assert TASK.strata(found).tolist() == [0, 1, 2, 0, 1, 2, 0]  # sorted by prompt
    assert TASK.histogram(found) == {}


def test_pixels_are_those_of_the_image_and_prompts_its_words(made: Loaded) -> None:
    from PIL import Image

    rows = pictures.examples(5)
    batch = next(batches(TASK.encode(rows, made.processor, 0), 5, None))
    for i, row in enumerate(rows.inputs):
        assert isinstance(row, Captioned)
        pixels = np.asarray(Image.open(io.BytesIO(row.image)), dtype=np.float64)
        assert np.allclose(batch["pixel_values"][i, 0].numpy(), pixels / 127.5 - 1, atol=1e-6)
        words = made.processor.tokenizer.decode(batch["prompt_ids"][i], skip_special_tokens=True)
        assert words == row.prompt
    assert batch["pixel_values"].shape == (5, 1, 8, 8) and batch["prompt_ids"].shape == (5, 6)


def test_images_of_other_sizes_and_colours_are_brought_to_the_models(made: Loaded) -> None:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGBA", (30, 17), (255, 255, 255, 255)).save(buffer, "PNG")
    rows = replace(pictures.examples(1), inputs=(Captioned(buffer.getvalue(), "a cat"),))
    pixels = next(batches(TASK.encode(rows, made.processor, 0), 1, None))["pixel_values"]
    assert torch.equal(pixels, torch.ones(1, 1, 8, 8))


def test_noise_is_a_function_of_row_and_seed_alone(made: Loaded) -> None:
    rows = encoded(made)

    def seeds(size: int, seed: int | None) -> dict[int, int]:
        return {
            int(i): int(s)
            for b in batches(rows, size, seed)
            for i, s in zip(b["index"], b["noise_seed"], strict=True)
        }

    assert seeds(3, None) == seeds(10, None) and len(set(seeds(3, None).values())) == 10
    assert seeds(3, 1) == seeds(4, 1) and not seeds(3, 1).items() & seeds(3, 2).items()
    # And a row's noise and time are its seed's, whatever stands beside it.
    batch = next(batches(rows, 10, None))
    noise, steps = made.model.draw(batch["noise_seed"], batch["pixel_values"])
    one, step = made.model.draw(batch["noise_seed"][4:5], batch["pixel_values"][4:5])
    assert torch.equal(noise[4], one[0]) and steps[4] == step[0]
    assert len({tuple(n.flatten().tolist()) for n in noise}) == 10
    assert int(steps.min()) >= 0 and int(steps.max()) < 50


def test_public_rows_come_with_prompts_and_other_noise_each_time(
    made: Loaded, tmp_path: Path
) -> None:
    file = pictures.write_file(tmp_path / "public.csv", 8, 3)
    rows = load_public(
        file, "image", "captioned image", (pictures.examples(3, 3),), 0, 0, prompt_column="text"
    )
    assert len(rows) == 5  # three are the task's
    served = list(public_batches(rows, made.processor, 4, 0, 5, 1))
    assert len(served) == 5 and all(len(b["pixel_values"]) == 4 for b in served)
    drawn = torch.cat([b["noise_seed"] for b in served])
    assert len(drawn.unique()) == 20
    again = list(islice(public_batches(rows, made.processor, 4, 0, 5, 1), 5))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(served, again, strict=True) for k in a)


def test_the_loss_is_the_mean_squared_error_of_the_noise(made: Loaded) -> None:
    batch = pictures.batch(made.model, made.processor)
    noise, steps = made.model.draw(batch["noise_seed"], batch["pixel_values"])
    shares = made.model.schedule.alphas_cumprod[steps].reshape(-1, 1, 1, 1)
    noisy = shares.sqrt() * batch["pixel_values"] + (1 - shares).sqrt() * noise
    read = made.model.text_encoder(batch["prompt_ids"])[0]
    guess = made.model.unet(noisy, steps, encoder_hidden_states=read).sample
    by_hand = (guess - noise).square().mean()
    torch.testing.assert_close(TASK.loss(made.model, batch), by_hand)
    torch.testing.assert_close(TASK.loss(made.model, batch, "sum"), 4 * by_hand)
    assert TASK.count(batch) == 4


def test_scores_do_not_depend_on_batches_and_are_the_same_each_time(made: Loaded) -> None:
    rows = encoded(made)
    one, other = (evaluate(made.model, TASK, rows, size) for size in (3, 10))
    again = evaluate(made.model, TASK, rows, 3)
    assert (one.value, one.error) == (again.value, again.error)
    assert one.value == pytest.approx(other.value, rel=1e-5) and one.rows == 10
    assert one.metric.name == "denoising loss" and not one.metric.higher_is_better


def test_the_standard_error_is_that_of_the_mean_over_rows() -> None:
    losses = np.array([0.5, 1.0, 2.5, 0.25])
    sums = {"rows": 4, "loss": losses.sum(), "loss2": np.square(losses).sum()}
    score = TASK.score(sums)
    assert score.value == pytest.approx(losses.mean())
    assert score.error == pytest.approx(losses.std(ddof=1) / 2)
    assert math.isnan(TASK.score({"rows": 4, "loss": 4.0}).error)
    assert TASK.score({}).value == 0.0


def test_a_client_sends_rows_and_loss_and_nothing_else() -> None:
    TASK.check_sums({"rows": 3, "loss": 2.5}, 3)
    TASK.check_sums({}, 0)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"rows": 3, "loss": 2.5, "loss2": 1.0}, "figures"),
        ({"rows": 2, "loss": 2.5}, "2 is not the 3"),
        ({"rows": 3, "loss": -1.0}, "no finite number"),
        ({"rows": 3, "loss": math.nan}, "no finite number"),
        ({"rows": 3, "loss": math.inf}, "no finite number"),
    ]
    for sums, said in bad:
        with pytest.raises(ValueError, match=said):
            TASK.check_sums(sums, 3)


def test_apart_is_the_difference_of_predictions_with_gradients_for_one(
    made: Loaded, tmp_path: Path
) -> None:
    other = pictures.loaded(tmp_path / "fm", seed=1).model
    batch = pictures.batch(made.model, made.processor)
    total, terms = TASK.apart(made.model, other, batch)
    by_hand = TASK.divergence(TASK.outputs(made.model, batch), TASK.outputs(other, batch))
    assert terms == 4
    torch.testing.assert_close(total / terms, by_hand)
    (gradient,) = torch.autograd.grad(total, [made.model.unet.conv_out.weight])
    assert gradient.abs().max() > 0
    assert not TASK.apart(made.model, made.model, batch)[0].detach().any()


def test_images_are_the_same_each_time_and_whatever_the_batch(made: Loaded) -> None:
    from PIL import Image

    rows = pictures.examples(3)
    found = TASK.paint(made.model, rows, made.processor, 3, 2)
    assert found == TASK.paint(made.model, rows, made.processor, 3, 2) and len(set(found)) == 3
    decoded = [np.asarray(Image.open(io.BytesIO(one)), dtype=int) for one in found]
    other = TASK.paint(made.model, rows, made.processor, 3, 3)
    for image, theirs in zip(decoded, other, strict=True):
        assert image.shape == (8, 8)
        assert np.abs(image - np.asarray(Image.open(io.BytesIO(theirs)), dtype=int)).max() <= 1
    with Image.open(io.BytesIO(side_by_side(found))) as row:
        assert row.size == (3 * 64 + 2 * 4, 64)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data.image-column": ""}, "data.image-column is empty"),
        ({"data.text-pair-column": "other"}, "cannot both be set"),
    ],
)
def test_columns_that_are_none_of_its_rows_are_refused(change: dict[str, str], said: str) -> None:
    flat = {
        "data.task": "text-to-image", "data.image-column": "image", "data.train": "a.csv",
        "data.test": "b.csv",
    }  # fmt: skip
    with pytest.raises(UserError, match=said):
        check_settings(config.from_flat(flat | change).data)


def test_a_row_without_prompt_or_image_is_named_and_not_told(tmp_path: Path) -> None:
    pictures.write_file(tmp_path / "rows.csv", 2, 0)
    file = tmp_path / "rows.csv"
    file.write_text("image,text\nrows-0.png,secret words\nrows-1.png,\n")
    with pytest.raises(UserError, match=r"row 2 has no text in column 'text'\.") as caught:
        TASK.read(file, COLUMNS)
    assert "secret" not in str(caught.value)
    (tmp_path / "rows-1.png").write_bytes(b"none")
    file.write_text("image,text\nrows-1.png,a cat\n")
    with pytest.raises(UserError, match="row 1: the 4 bytes are not a known image format"):
        TASK.read(file, COLUMNS)
    with pytest.raises(UserError, match="files of its own"):
        TASK.read("builtin:docstrings", COLUMNS)

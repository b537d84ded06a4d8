"""The recipe of `tiny-vae`: its loss against slow sums, what normalising the latents keeps, and a smoke run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("timm")
pytest.importorskip("torchmetrics")

from foveate import train, zoo
from foveate.data.scenes import CaptionedScenes
from foveate.train.tiny_vae import TinyVae, TinyVaeSettings
from foveate.zoo.vae import build_vae, encode, normalise_latents


def recipe(seed: int = 0, **overrides: object) -> TinyVae:
    torch.manual_seed(seed)
    return TinyVae(TinyVaeSettings(**(TinyVae.smoke | overrides)), seed)  # type: ignore[arg-type]


def test_loss_is_the_sum_the_module_states() -> None:
    made = recipe(kl=0.5)
    batch = made.batch(3, 0, 1)
    torch.manual_seed(5)
    loss, parts = made.loss(made.model, batch)
    torch.manual_seed(5)
    with torch.no_grad():
        pixels = batch["image"].float() / 127.5 - 1
        moments = made.vae.quant_conv(made.vae.encoder(pixels))
        mean, log_variance = moments[:, :4], moments[:, 4:].clamp(-30, 20)
        decoded = made.vae.decode(mean + (log_variance / 2).exp() * torch.randn_like(mean)).sample
    error, mean, log_variance = (value.double().numpy() for value in (decoded - pixels, mean, log_variance))
    rows = [abs(error[:, :, y + 1, x] - error[:, :, y, x]).mean() for y in range(63) for x in range(64)]
    columns = [abs(error[:, :, y, x + 1] - error[:, :, y, x]).mean() for y in range(64) for x in range(63)]
    kl = np.mean((mean**2 + np.exp(log_variance) - 1 - log_variance) / 2)
    expected = {"pixels": abs(error).mean(), "edges": (np.mean(rows) + np.mean(columns)) / 2, "kl": kl}
    assert parts == pytest.approx(expected, rel=1e-4)
    assert float(loss.detach()) == pytest.approx(expected["pixels"] + expected["edges"] + 0.5 * kl, rel=1e-4)


def test_normalised_latents_decode_to_the_same_pictures() -> None:
    vae = build_vae(8).eval()
    pictures = torch.rand(6, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        vae.quant_conv.bias.uniform_(-2, 2)
        before = vae.encode(pictures).latent_dist
        decoded = vae.decode(before.mean).sample
        spread = before.mean.std((0, 2, 3))
        normalise_latents(vae, pictures)
        after = vae.encode(pictures).latent_dist
        assert torch.allclose(vae.decode(after.mean).sample, decoded, atol=1e-4)
    assert after.mean.shape == (6, 4, 8, 12)
    assert torch.allclose(after.mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-3)
    assert torch.allclose(after.mean.std((0, 2, 3)), torch.ones(4), atol=1e-3)
    assert torch.allclose(after.std * spread[:, None, None], before.std, rtol=1e-3)


def test_encoding_honours_scale_and_shift() -> None:
    vae = build_vae(8).eval()
    pictures = torch.randint(256, (3, 3, 32, 32)).byte()
    plain = torch.cat([vae.encode(one[None].float() / 127.5 - 1).latent_dist.mean for one in pictures]).detach()
    assert torch.allclose(encode(vae, pictures, batch=2), plain, atol=1e-5)
    vae.register_to_config(scaling_factor=0.5, shift_factor=3.0)
    assert torch.allclose(encode(vae, pictures), (plain - 3) / 2, atol=1e-5)


def test_batches_depend_on_the_step_alone_and_are_shared_by_processes() -> None:
    whole = recipe(seed=3, batch=4).batch(7, 0, 1)["image"]
    assert np.array_equal(whole[1].permute(1, 2, 0).numpy(), CaptionedScenes("train", 3)[29].scene.image)
    for rank in range(2):
        assert torch.equal(recipe(seed=3, batch=4).batch(7, rank, 2)["image"], whole[rank::2])


def test_smoke_run_is_complete(tmp_path: Path) -> None:
    metrics = train.run("tiny-vae", out=tmp_path, smoke=True, threads=1)
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["name"], metrics["split"], metrics["reconstruction"]["pictures"]) == ("tiny-vae", "test", 4)
    vae = zoo.load_folder(tmp_path)
    assert type(vae).__name__ == "AutoencoderKL"
    assert not vae.training
    images = torch.from_numpy(np.stack([CaptionedScenes("train", 0)[i].scene.image for i in range(256)]))
    latents = encode(vae, images.permute(0, 3, 1, 2))
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=1e-2)


@pytest.mark.parametrize(("overrides", "named"), [({"width": 12}, "width"), ({"kl": -1.0}, "kl")])
def test_nonsense_is_rejected(overrides: dict[str, float], named: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=named):
        train.run("tiny-vae", out=tmp_path / "run", smoke=True, **overrides)
    assert not (tmp_path / "run").exists()

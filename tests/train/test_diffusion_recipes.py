"""The recipes of `tiny-dit`, `tiny-dit-small` and `tiny-sd`: data, losses against slow computations, and smoke runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("timm")
pytest.importorskip("torchmetrics")

from foveate import train, zoo
from foveate.data.scenes import NAMES, CaptionedScenes
from foveate.method import InputError
from foveate.train.diffusion import draw
from foveate.train.tiny_dit import TinyDit, TinyDitSettings
from foveate.train.tiny_sd import TinySd, TinySdSettings
from foveate.zoo.vae import build_vae


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random autoencoder."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    build_vae(8).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dit(vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a smoke run of tiny-dit."""
    folder = tmp_path_factory.mktemp("dit")
    train.run("tiny-dit", out=folder, smoke=True, threads=1, vae=str(vae))
    return folder


def recipe(kind: Any, settings: Any, vae: Path, out: Path, **changes: Any) -> Any:
    torch.manual_seed(1)
    options = settings(**(kind.smoke | {"vae": str(vae)} | changes))
    return kind(kind.prepare(options, 0, out), 0)


def enliven(module: torch.nn.Module) -> None:
    """Layers that start at zero get weights, so that every input matters."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)


def test_scenes_are_encoded_with_their_captions_and_objects(vae: Path, tmp_path: Path) -> None:
    made = recipe(TinyDit, TinyDitSettings, vae, tmp_path)
    encoder = build_vae(8).from_pretrained(vae).eval()
    assert {name: value.shape[0] for name, value in made.data.items()} == {"latents": 8, "ids": 8, "objects": 8}
    for i in range(8):
        one = CaptionedScenes("train", 0)[i]
        pixels = torch.from_numpy(one.scene.image).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            mean = encoder.encode(pixels).latent_dist.mean[0]
        assert torch.allclose(made.data["latents"][i].float(), mean, atol=2e-3)
        words = made.pipeline.tokenizer.convert_ids_to_tokens(made.data["ids"][i].tolist())
        said = one.caption.split()
        assert words == ["<s>", *said, "</s>"] + ["<pad>"] * (10 - len(said))
        for n, found in enumerate(made.data["objects"][i].tolist()):
            row, column = divmod(n, 8)
            cell = np.s_[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            counts = [int(thing.mask[cell].sum()) for thing in one.scene.objects]
            most = int(np.argmax(counts))
            if counts[most] <= 64 - sum(counts):
                assert found == 0
            else:
                assert NAMES[found - 1] == one.scene.objects[most].name


def test_every_epoch_sees_each_scene_once(vae: Path, tmp_path: Path) -> None:
    made = recipe(TinyDit, TinyDitSettings, vae, tmp_path)
    epoch = torch.cat([made.batch(step, 0, 1)["latents"] for step in (0, 1)])
    assert sorted(epoch.sum((1, 2, 3)).tolist()) == sorted(made.data["latents"].sum((1, 2, 3)).tolist())
    whole = made.batch(5, 0, 1)["ids"]
    for rank in range(2):
        assert torch.equal(made.batch(5, rank, 2)["ids"], whole[rank::2])


def test_encoded_scenes_are_kept_and_never_mixed_up(vae: Path, tmp_path: Path) -> None:
    file = tmp_path / "latents.safetensors"
    recipe(TinyDit, TinyDitSettings, vae, tmp_path)
    begun = file.stat().st_mtime_ns
    recipe(TinySd, TinySdSettings, vae, tmp_path, latents=str(file))
    assert file.stat().st_mtime_ns == begun
    with pytest.raises(InputError, match="latents"):
        recipe(TinySd, TinySdSettings, vae, tmp_path, latents=str(file), pictures=5)
    assert len(recipe(TinyDit, TinyDitSettings, vae, tmp_path, pictures=5).data["ids"]) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latents.safetensors"]


@pytest.mark.parametrize("kind", [TinyDit, TinySd])
def test_captions_are_dropped_as_often_as_asked(kind: Any, vae: Path, tmp_path: Path) -> None:
    from foveate.train.diffusion import caption_ids, without_some

    tokenizer = recipe(kind, kind.settings_type, vae, tmp_path).pipeline.tokenizer
    ids = caption_ids(tokenizer, ["a dog"]).expand(4000, -1)
    kept = without_some(ids, tokenizer, 0.2)
    empty = [tokenizer.bos_token_id, tokenizer.eos_token_id] + [tokenizer.pad_token_id] * 10
    dropped = (kept == torch.tensor(empty)).all(1)
    assert abs(int(dropped.sum()) - 800) < 5 * math.sqrt(4000 * 0.2 * 0.8)
    assert torch.equal(kept[~dropped], ids[~dropped])


def test_transformer_is_trained_on_what_the_pipeline_gives_it(vae: Path, tmp_path: Path) -> None:
    """Text states, their mask and the table of positions, caught on their way into the transformer."""
    made = recipe(TinyDit, TinyDitSettings, vae, tmp_path, drop=0.0)
    captions = ["a dog", "an apple and a bus on gray"]
    seen: list[dict[str, torch.Tensor]] = []
    transformer = made.pipeline.transformer
    transformer.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs), with_kwargs=True)
    ids = made.pipeline.tokenizer(captions, padding="max_length", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        made.model(torch.randn(2, 4, 16, 16), ids, torch.zeros(2, 64).long())
    made.pipeline(captions, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    ours, theirs = seen
    real = ours["encoder_mask"].bool()
    assert real.sum(1).tolist() == [4, 9]
    for row in range(2):
        kept = theirs["encoder_mask"][row].bool()
        states = theirs["encoder_hidden_states"][row, kept]
        assert torch.allclose(ours["encoder_hidden_states"][row, real[row]], states, atol=1e-5)
    assert torch.allclose(ours["image_rotary_emb"][:8, :8], theirs["image_rotary_emb"][:8, :8])
    attention = theirs["cross_attention_kwargs"]
    assert attention == {"base_sequence_length": 64}, "64 tokens: Lumina's proportional attention changes nothing"


def test_flow_matching_loss(vae: Path, tmp_path: Path) -> None:
    """Along the straight line from noise to latents, sample by sample; the objects from the middle layer's states."""
    made = recipe(TinyDit, TinyDitSettings, vae, tmp_path, drop=0.0, layers=4, objects_weight=0.7)
    enliven(made.model)
    batch = made.batch(0, 0, 1)
    torch.manual_seed(7)
    loss, parts = made.loss(made.model, batch)
    torch.manual_seed(7)
    torch.rand(4, 1)  # who loses the caption
    latents = batch["latents"].float()
    noise, normal = torch.randn_like(latents), torch.randn(4)
    transformer, middle = made.pipeline.transformer, list[torch.Tensor]()
    transformer.layers[1].register_forward_hook(lambda _m, _i, out: middle.append(out))
    squares, entropy = [], []
    with torch.no_grad():
        for i in range(4):
            s = 1 / (1 + math.exp(-float(normal[i])))
            ids = batch["ids"][i : i + 1][batch["ids"][i : i + 1] != made.pipeline.tokenizer.pad_token_id][None].long()
            states = made.pipeline.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
            found = transformer(
                hidden_states=(1 - s) * latents[i : i + 1] + s * noise[i : i + 1],
                timestep=torch.tensor([1 - s]),
                encoder_hidden_states=states,
                encoder_mask=torch.ones_like(ids),
                image_rotary_emb=made.model.positions,
                cross_attention_kwargs={},
            ).sample[0, :4]
            squares.append(float((found - (latents[i] - noise[i])).square().mean()))
            chance = made.model.head.linear(middle[-1][0]).softmax(-1)
            entropy += [-math.log(chance[n, batch["objects"][i, n].long()]) for n in range(64)]
    expected = {"denoising": np.mean(squares), "objects": np.mean(entropy)}
    assert parts == pytest.approx(expected, rel=1e-4)
    assert float(loss.detach()) == pytest.approx(expected["denoising"] + 0.7 * expected["objects"], rel=1e-4)


def test_a_perfect_velocity_takes_the_sampler_to_the_latents(vae: Path, tmp_path: Path) -> None:
    """The sign and the direction of time of what is learnt: with x - n for a prediction, sampling gives x."""
    made = recipe(TinyDit, TinyDitSettings, vae, tmp_path)
    wanted, noise = torch.randn(1, 4, 16, 16), torch.randn(1, 4, 16, 16)

    def known(_module: Any, _args: Any, kwargs: dict[str, Any], _output: Any) -> tuple[torch.Tensor]:
        share = 1 - kwargs["timestep"]
        assert torch.allclose(kwargs["hidden_states"], wanted + share * (noise - wanted), atol=1e-4)
        velocity = wanted - noise
        return (torch.cat([velocity, velocity], dim=1),)

    made.pipeline.transformer.register_forward_hook(known, with_kwargs=True)
    found = made.pipeline(
        "a dog", num_inference_steps=5, guidance_scale=1.0, latents=noise, output_type="latent"
    ).images
    assert torch.allclose(found, wanted, atol=1e-4)


def test_noise_prediction_loss(vae: Path, tmp_path: Path) -> None:
    """Stable Diffusion 1's schedule written out, and the weight of every step from its signal-to-noise ratio."""
    made = recipe(TinySd, TinySdSettings, vae, tmp_path, drop=0.0, objects_weight=0.7)
    enliven(made.model)
    batch = made.batch(0, 0, 1)
    torch.manual_seed(7)
    loss, parts = made.loss(made.model, batch)
    torch.manual_seed(7)
    torch.rand(4, 1)
    latents = batch["latents"].float()
    noise, time = torch.randn_like(latents), torch.randint(1000, (4,))
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    unet, middle = made.pipeline.unet, list[torch.Tensor]()
    unet.mid_block.register_forward_hook(lambda _m, _i, out: middle.append(out))
    total, entropy = 0.0, []
    with torch.no_grad():
        for i in range(4):
            kept = float(np.prod(1 - betas[: int(time[i]) + 1]))
            words = made.pipeline.text_encoder(batch["ids"][i : i + 1].long())[0]
            noisy = kept**0.5 * latents[i] + (1 - kept) ** 0.5 * noise[i]
            found = unet(noisy[None], time[i], words).sample[0]
            snr = kept / (1 - kept)
            total += min(snr, 5) / snr * float((found - noise[i]).square().mean()) / 4
            for n in range(64):
                logits = made.model.head.linear(middle[-1][0, :, n // 8, n % 8])
                entropy.append(-float(logits.log_softmax(0)[batch["objects"][i, n].long()]))
    assert parts == pytest.approx({"denoising": total, "objects": np.mean(entropy)}, rel=1e-3)
    assert float(loss.detach()) == pytest.approx(total + 0.7 * np.mean(entropy), rel=1e-3)


@pytest.mark.parametrize("kind", [TinyDit, TinySd])
def test_every_trained_weight_takes_part(kind: Any, vae: Path, tmp_path: Path) -> None:
    """As training in several processes demands."""
    made = recipe(kind, kind.settings_type, vae, tmp_path)
    enliven(made.model)
    made.loss(made.model, made.batch(0, 0, 1))[0].backward()
    assert [name for name, p in made.model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_smoke_run_of_the_transformers(dit: Path, vae: Path, tmp_path: Path) -> None:
    """Both sizes are complete pipelines of one latent space, whose text encoder is the same."""
    large = zoo.load_folder(dit)
    options = {"vae": str(vae), "large": str(dit), "width": 8, "heads": 1}
    metrics = train.run("tiny-dit-small", out=tmp_path, smoke=True, threads=1, **options)
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["name"] == "tiny-dit-small"
    small = zoo.load_folder(tmp_path)
    assert type(large).__name__ == type(small).__name__ == "LuminaPipeline"
    for part in ("text_encoder", "vae"):
        ours, theirs = getattr(small, part).state_dict(), getattr(large, part).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert small.transformer.num_parameters() < large.transformer.num_parameters()
    started = build_vae(8).from_pretrained(vae).state_dict()
    assert all(torch.equal(value, started[key]) for key, value in large.vae.state_dict().items())


def test_the_text_encoder_is_trained_with_the_large_one_only(dit: Path, vae: Path, tmp_path: Path) -> None:
    from foveate.train.tiny_dit import TinyDitSmall, TinyDitSmallSettings

    for kind, settings, changes, expected in (
        (TinyDit, TinyDitSettings, {}, True),
        (TinyDitSmall, TinyDitSmallSettings, {"large": str(dit)}, False),
        (TinySd, TinySdSettings, {}, True),
    ):
        made = recipe(kind, settings, vae, tmp_path, **changes)
        trained = {name for name, p in made.model.named_parameters() if p.requires_grad}
        assert any(name.startswith("text_encoder") for name in trained) is expected
        assert not any("vae" in name for name in trained)


def test_smoke_run_of_stable_diffusion(vae: Path, tmp_path: Path) -> None:
    metrics = train.run("tiny-sd", out=tmp_path, smoke=True, threads=1, vae=str(vae))
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    pipeline = zoo.load_folder(tmp_path)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all({"denoising", "objects"} <= line.keys() for line in log)
    assert (
        load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors").keys() == pipeline.unet.state_dict().keys()
    )


def test_drawn_pictures_do_not_depend_on_their_batch(dit: Path) -> None:
    pipeline = zoo.load_folder(dit)
    captions = ["a dog", "an apple on gray", "a bus"]
    options = {"seed": 2, "guidance_scale": 3.0, "steps": 2}
    together = draw(pipeline, captions, **options)
    assert together.shape == (3, 3, 64, 64)
    assert together.dtype == torch.uint8
    apart = draw(pipeline, captions, batch=1, **options)
    assert (together.int() - apart.int()).abs().max() <= 1
    assert (draw(pipeline, captions, **(options | {"seed": 3})).int() - together.int()).abs().max() > 1


@pytest.mark.parametrize(
    ("name", "overrides", "named"),
    [
        ("tiny-dit", {"layers": 1}, "layers"), ("tiny-dit", {"width": 20}, "width"),
        ("tiny-dit", {"drop": 1.0}, "drop"), ("tiny-dit", {"vae": "nowhere"}, "vae"),
        ("tiny-sd", {"width": 20}, "width"), ("tiny-sd", {"text_width": 6}, "text_width"),
        ("tiny-sd", {"pictures": 0}, "pictures"), ("tiny-sd", {"guidance_scale": -1.0}, "guidance_scale"),
    ],
)  # fmt: skip
def test_nonsense_is_rejected(name: str, overrides: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=named) as caught:
        train.run(name, out=tmp_path / "run", smoke=True, **overrides)
    assert "\n" not in str(caught.value)


def test_small_needs_a_large_one_where_it_is_named(vae: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="large"):
        train.run("tiny-dit-small", out=tmp_path, smoke=True, vae=str(vae), large="nowhere")


def test_the_real_sizes_fit_into_the_zoo() -> None:
    """At most 25 MB of float32 weights a folder, autoencoder and text encoders included."""
    from foveate.train.diffusion import build_tokenizer
    from foveate.train.tiny_dit import TinyDitSmallSettings
    from foveate.zoo.dit import build_dit, build_dit_pipeline
    from foveate.zoo.sd import build_sd_pipeline, build_unet

    with torch.device("meta"):
        autoencoder, tokenizer, sd = build_vae(), build_tokenizer(), TinySdSettings()
        pipelines = [
            build_dit_pipeline(build_dit(layers=s.layers, width=s.width, heads=s.heads), autoencoder, tokenizer)
            for s in (TinyDitSettings(), TinyDitSmallSettings())
        ]
        unet = build_unet(width=sd.width, heads=sd.heads, text_width=sd.text_width)
        pipelines.append(build_sd_pipeline(unet, autoencoder, tokenizer))
    sizes = []
    for pipeline in pipelines:
        modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        sizes.append(sum(4 * value.numel() for part in modules for value in part.state_dict().values()))
    assert max(sizes) <= 25e6, sizes
    assert sizes[0] > 2 * sizes[1], "the small one is to be much smaller"

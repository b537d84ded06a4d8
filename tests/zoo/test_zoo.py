"""The zoo: what is shipped, and that `tiny-vit` is the same tower in timm's and in transformers' form."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from foveate import zoo
from foveate.data.scenes import NAMES, Scenes, patch_labels, presence

timm = pytest.importorskip("timm")


def pictures(count: int) -> torch.Tensor:
    images = [torch.from_numpy(Scenes("test", 77)[i].image) for i in range(count)]
    return torch.stack(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_everything_shipped_is_safetensors_and_json_with_its_figures() -> None:
    assert "tiny-vit" in zoo.names()
    for name in zoo.names():
        folder = zoo.path(name)
        files = [file for file in folder.rglob("*") if file.is_file()]
        assert {file.suffix for file in files} <= {".safetensors", ".json", ".jinja"}
        assert sum(file.stat().st_size for file in files) <= 25e6
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["name"] == name
        assert metrics["split"] == "test"
        for file in (file for file in files if file.suffix == ".safetensors"):
            with safe_open(file, "pt") as weights:
                assert all(weights.get_tensor(key).isfinite().all() for key in weights.keys())  # noqa: SIM118


def test_unknown_names_get_one_helpful_line() -> None:
    with pytest.raises(ValueError, match=r"did you mean tiny-vit\?") as caught:
        zoo.path("tiny-vitt")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="tiny-vit"):
        zoo.load("zebra")


def test_without_timm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "foveate.zoo.vit", raising=False)
    for name in [name for name in sys.modules if name == "timm" or name.startswith("timm.")]:
        monkeypatch.delitem(sys.modules, name)

    class NoTimm:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "timm":
                raise ModuleNotFoundError("No module named 'timm'", name="timm")

    monkeypatch.setattr(sys, "meta_path", [NoTimm, *sys.meta_path])
    with pytest.raises(ValueError, match=r"pip install 'foveate\[timm\]'") as caught:
        zoo.load("tiny-vit")
    assert "\n" not in str(caught.value)


def test_tiny_vit_is_a_timm_vit_that_knows_the_names() -> None:
    """A sample of test scenes; the figures over 2,000 are in its metrics.json, which must pass the project's bar."""
    model = zoo.load("tiny-vit")
    assert isinstance(model, timm.models.vision_transformer.VisionTransformer)
    assert not model.training
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert json.loads((zoo.path("tiny-vit") / "metrics.json").read_text())["names_mean_average_precision"] >= 0.8
    scenes = [Scenes("test", 77)[i] for i in range(40)]
    with torch.no_grad():
        logits, patches = model(pictures(40)), model.segment(pictures(40))
    present = torch.stack([torch.from_numpy(presence(scene)) for scene in scenes]).bool()
    # Any object against any absent name of the same picture: how often is it the likelier one?
    wins = [(logits[b, present[b], None] > logits[b, ~present[b]][None]).float().mean() for b in range(40)]
    assert float(torch.stack(wins).mean()) > 0.95
    labels = torch.stack([torch.from_numpy(patch_labels(scene, 8)).flatten() for scene in scenes])
    assert float((patches.argmax(-1) == labels)[labels > 0].float().mean()) > 0.75
    assert patches.shape == (40, 144, 1 + len(NAMES))


def test_tiny_vit_converts_exactly_to_clip() -> None:
    from foveate.zoo.vit import to_clip

    model = zoo.load("tiny-vit")
    seen: list[torch.Tensor] = []
    model.norm_pre.register_forward_hook(lambda module, inputs, output: seen.append(output))
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        features = model.forward_features(pictures(3))
        early, last = model.layers(pictures(3))
        clip = to_clip(model)(pictures(3), output_hidden_states=True)
    expected = seen[: len(model.blocks) + 1]
    assert len(clip.hidden_states) == len(expected) == 6
    for ours, theirs in zip(expected, clip.hidden_states):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, float(theirs.abs().max())))
    torch.testing.assert_close(clip.last_hidden_state, seen[len(model.blocks)], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(clip.pooler_output, features[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(early, expected[-2], rtol=0, atol=0)
    torch.testing.assert_close(last, features, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("width", "depth", "heads"), [(16, 2, 2), (24, 3, 1)])
def test_any_scene_transformer_converts(width: int, depth: int, heads: int) -> None:
    """Also with large random weights, where a wrong order of q, k and v would show."""
    from foveate.zoo.vit import to_clip

    model = zoo.build_vit({"embed_dim": width, "depth": depth, "num_heads": heads, "img_size": 32}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    noise = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        clip = to_clip(model)(noise)
        features = model.forward_features(noise)
    assert features[:, 0].std() > 0.1
    torch.testing.assert_close(clip.pooler_output, features[:, 0], rtol=1e-4, atol=1e-5)


def test_load_folder_gives_back_what_was_written(tmp_path: Path) -> None:
    from foveate.train.loop import write_json, write_tensors

    config = {"img_size": 48, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 40}
    model = zoo.build_vit(config).eval()
    write_tensors(tmp_path / "model.safetensors", model.state_dict())
    write_json(tmp_path / "config.json", {"name": "tiny-vit", **config})
    picture = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(zoo.load_folder(tmp_path)(picture), model(picture))

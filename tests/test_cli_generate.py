"""`foveate generate` with a tiny random pipeline that is saved here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import foveate
from foveate.generate import DiffusionGenerator, check_call, compare_pictures
from foveate.measure.flops import count_flops
from foveate.method import InputError
from foveate.methods.guide.a_star import AStar
from foveate.zoo.ar import build_ar, build_tokenizer, load_generator
from foveate.zoo.vq import build_vq
from tiny_diffusion import pipeline
from tiny_prompted import prompted

Run = Callable[..., tuple[int, str, str]]
PROMPT = "a cat and a frog"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    prompted().save_pretrained(folder)
    return folder


@pytest.fixture
def generate(run: Run, folder: Path) -> Run:
    """Runs `foveate generate` in an empty folder, with the tiny pipeline if no other is named."""

    def call(*arguments: str | Path, steps: str | None = "3") -> tuple[int, str, str]:
        usual = {"--model": folder, "--prompt": PROMPT, **({"--steps": steps} if steps else {})}
        return run("generate", *arguments, *(x for pair in usual.items() if pair[0] not in arguments for x in pair))

    return call


BAD = [
    (["--prompt", " "], "--prompt is empty"),
    (["--bogus"], "--bogus"),
    (["--steps", "0"], "--steps must be at least 1"),
    (["--seed", "-1"], "--seed must be at least 0"),
    (["--height", "0"], "--height must be at least 1"),
    (["--height", "16"], "height and width go together"),
    (["--height", "12", "--width", "12"], "divisible by 8"),
    (["--dtype", "int"], "--dtype: unknown"),
    (["--device", "tpu7"], "--device 'tpu7' cannot be used"),
    (["--methods", ","], "no name given"),
    (["--methods", "a-tsar"], "did you mean a-star"),
    (["--methods", "titok.json"], "titok.json: no such file"),
    (["--methods", "a-star,sub/a-star.json"], "two columns would be named 'a-star'"),
    (["--methods", "fopru"], "fopru is no method for pipelines of diffusers; there are a-star"),
    (["--methods", "sjd"], "sjd is no method for pipelines of diffusers"),
    (["--methods", "t-stitch"], "t-stitch: t-stitch needs a small denoiser"),
    (["--small", "none"], "unknown model 'none'"),
    (["--small", "causal"], "are not of one kind"),
    (["--model", "causal", "--steps", "3"], "causal is an autoregressive model: it takes no steps"),
    (["--methods", "strict.json"], "strict: words: 'dog' is not in the prompt"),
    (["--out", "file/under"], "file: a file, not a folder"),
    (["--model", "empty"], "empty: no generator here"),
    (["--model", "tiny-llava"], "tiny-llava makes no pictures of prompts"),
    (["--model", "no such"], "unknown model 'no such'"),
    (["--model", "classes"], "DiTPipeline makes no pictures of prompts alone"),
    (["--model", "torn"], "torn cannot be loaded"),
    (["--model", "foreign"], "foreign is no pipeline of this version of diffusers"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line(generate: Run, folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "sub").mkdir()
    values = {"foveate": "0", "methods": [{"method": "a-star", "settings": {"words": ["dog"]}}]}
    for name in ("strict.json", "sub/a-star.json"):
        (tmp_path / name).write_text(json.dumps(values))
    if "classes" in arguments:
        pipeline("dit").save_pretrained(tmp_path / "classes")
    if "causal" in arguments:
        causal(tmp_path / "causal")
    if "torn" in arguments:
        shutil.copytree(folder, tmp_path / "torn")
        weights = tmp_path / "torn/unet/diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/model_index.json").write_text('{"_class_name": "OwnPipeline", "_diffusers_version": "0"}')
    before = sorted(tmp_path.rglob("*"))
    code, out, err = generate(*arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, err
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before


def test_files_hold_what_the_pipeline_makes(generate: Run, folder: Path, tmp_path: Path) -> None:
    values = {"foveate": "0", "methods": [{"method": "a-star", "settings": {"words": [9], "scale": 500.0}}]}
    (tmp_path / "frog.json").write_text(json.dumps(values))
    asked = ("--prompt", PROMPT, "--prompt", "a red frog", "--seed", "7", "--height", "16", "--width", "24")
    code, out, err = generate(*asked, "--methods", "a-star,frog.json", "--out", "o", "--guidance", "4")
    assert (code, err) == (0, ""), err
    names = [f"{label}-{number}.png" for label in ("a-star", "dense", "frog") for number in range(2)]
    assert sorted(one.name for one in (tmp_path / "o").iterdir()) == sorted(
        [*names, "contact-sheet.png", "generation.json"]
    )
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)

    def picture(prompt: str) -> Any:
        given = {"height": 16, "width": 24, "num_inference_steps": 3, "guidance_scale": 4.0}
        return pipe(prompt, generator=torch.Generator().manual_seed(7), **given).images[0]

    for number, prompt in enumerate((PROMPT, "a red frog")):
        read = {label: np.asarray(Image.open(tmp_path / f"o/{label}-{number}.png")) for label in ("dense", "a-star")}
        assert np.array_equal(read["dense"], np.asarray(picture(prompt)))
        with foveate.apply(pipe, "a-star"):
            assert np.array_equal(read["a-star"], np.asarray(picture(prompt)))
    record = json.loads((tmp_path / "o/generation.json").read_text())
    assert record["prompts"] == [PROMPT, "a red frog"] and record["environment"]["seed"] == 7
    assert record["settings"] == {"num_inference_steps": 3, "guidance_scale": 4.0, "height": 16, "width": 24}
    dense, guided, frog = record["runs"]
    assert [one["label"] for one in record["runs"]] == ["dense", "a-star", "frog"]
    # Two prompts of three steps; "a red frog" has one noun, so that its first step has nothing to retain.
    assert dense["calls"] == {"denoiser": 6} and guided["calls"] == {"denoiser": 6 + 3 + 2}
    assert frog["calls"] == {"denoiser": 10}
    assert dense["steps"] == guided["steps"] == 3 and frog["methods"][0]["settings"]["scale"] == 500.0
    assert guided["flops"] > frog["flops"] > dense["flops"] > 0 and dense["seconds"] > 0
    with torch.no_grad():
        assert dense["flops"] == count_flops(lambda: [picture(prompt) for prompt in (PROMPT, "a red frog")])
    assert "a-star" in out and "contact-sheet.png" in out
    sheet = Image.open(tmp_path / "o/contact-sheet.png")
    assert sheet.width > 3 * 256 and sheet.height > 2 * 170


def test_without_methods_the_model_alone(generate: Run, tmp_path: Path) -> None:
    code, _, err = generate("--out", "o", "--height", "8", "--width", "8")
    assert (code, err) == (0, "")
    (run,) = json.loads((tmp_path / "o/generation.json").read_text())["runs"]
    assert run["label"] == "dense" and run["pictures"] == ["dense-0.png"]


def test_all_methods_that_fit(generate: Run, tmp_path: Path) -> None:
    code, out, err = generate("--methods", "all", "--out", "o", "--height", "8", "--width", "8")
    assert code == 0
    runs = json.loads((tmp_path / "o/generation.json").read_text())["runs"]
    left_out = {run["label"] for run in runs if "refused" in run}
    assert {"dense", "a-star", "variable-size"} <= {run["label"] for run in runs} - left_out
    assert err == "".join(f"note: {run['label']} left out: {run['refused']}\n" for run in runs if "refused" in run)
    assert not any(label in out.split() for label in left_out)


def test_an_interruption_leaves_nothing(generate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(AStar, "_moved", interrupted)
    code, out, err = generate("--methods", "a-star", "--out", "o")
    assert (code, out) == (130, "") and "Traceback" not in err and not list(tmp_path.iterdir())


def test_progress_goes_to_its_end_and_the_pipeline_stays_as_it_was() -> None:
    pipe, told = prompted(diffusers.PNDMScheduler), []
    generator = DiffusionGenerator(pipe, steps=4, height=8, width=8)
    generator.make([PROMPT], [0], lambda done, total: None)
    before = dict(pipe.__dict__), dict(pipe.unet.__dict__)
    entries = {"guided": [AStar(words=("frog",))]}
    columns = compare_pictures(generator, [PROMPT], entries, on_progress=lambda *one: told.append(one))
    assert [done for done, _, _ in told] == list(range(1, 17)) and {total for _, total, _ in told} == {16}
    assert [text for _, _, text in told] == ["dense"] * 8 + ["guided"] * 8
    # PNDM evaluates its second step twice.
    assert columns[0].steps == 4 and columns[0].calls == {"denoiser": 5}
    assert dict(pipe.__dict__) == before[0] and dict(pipe.unet.__dict__) == before[1]


def test_a_small_pipeline_makes_the_first_steps(generate: Run, folder: Path, tmp_path: Path) -> None:
    small = prompted(seed=1)
    small.text_encoder.load_state_dict(prompted().text_encoder.state_dict())
    small.save_pretrained(tmp_path / "small")
    code, _, err = generate("--methods", "t-stitch", "--small", "small", "--steps", "5", "--out", "o")
    assert (code, err) == (0, ""), err
    dense, stitched = json.loads((tmp_path / "o/generation.json").read_text())["runs"]
    assert dense["calls"] == {"denoiser": 5} and stitched["calls"] == {"denoiser": 3, "small denoiser": 2}
    assert stitched["methods"] == [{"method": "t-stitch", "settings": {"ratio": 0.4, "rule": "paper", "arguments": []}}]


def test_every_pipeline_that_takes_a_prompt() -> None:
    for name in ("sd3", "pixart", "lumina", "lumina2"):
        generator = DiffusionGenerator(pipeline(name), steps=2, guidance=3.0, height=8, width=8)
        assert generator.settings["num_inference_steps"] == 2
    with pytest.raises(InputError, match="DiTPipeline makes no pictures of prompts alone"):
        DiffusionGenerator(pipeline("dit"))
    with pytest.raises(InputError, match="LatentConsistency takes no guidance"):
        check_call(type("LatentConsistency", (), {"__call__": lambda self, prompt: None}), {"guidance_scale": 1.0})


# -- autoregressive models


def test_the_shipped_generator_and_its_small_one(run: Run, tmp_path: Path) -> None:
    code, out, err = run("generate", "--prompt", "a dog", "--steps", "2", "--methods", "t-stitch", "--out", "o")
    assert (code, err) == (0, ""), err
    record = json.loads((tmp_path / "o/generation.json").read_text())
    assert (record["model"]["name"], record["model"]["small"]) == ("tiny-dit", "tiny-dit-small") and "t-stitch" in out
    assert Image.open(tmp_path / "o/t-stitch-0.png").size == (64, 64)


def causal(folder: Path, layers: int = 2, seed: int = 0) -> None:
    """A tiny random one, as `foveate train tiny-ar` leaves it: 4 x 4 codes of 16."""
    torch.manual_seed(seed)
    words, vq = build_tokenizer(["a", "cat", "frog", "and"]), build_vq(width=8, codes=16, pitch=8)
    build_ar(words, vq, grid=(4, 4), layers=layers, width=16, heads=2).save_pretrained(folder)
    words.save_pretrained(folder)
    vq.save_pretrained(folder / "vq")


def test_an_autoregressive_model_and_its_decoders(generate: Run, tmp_path: Path) -> None:
    causal(tmp_path / "ar")
    causal(tmp_path / "draft", layers=1, seed=1)
    asked = ("--model", "ar", "--small", "draft", "--seed", "3", "--guidance", "2", "--out", "o")
    code, _, err = generate(*asked, "--methods", "all", steps=None)
    assert (code, err) == (0, ""), err
    record = json.loads((tmp_path / "o/generation.json").read_text())
    runs = {run["label"]: run for run in record["runs"]}
    assert record["settings"] == {"guidance_scale": 2.0} and record["model"]["small"] == "draft"
    assert runs["dense"]["steps"] == 16 and runs["dense"]["calls"] == {"model": 16} and "sjd" in runs
    assert 1 < runs["sjd"]["calls"]["model"] <= 16 and runs["sjd"]["methods"][0]["settings"]["row"] == 4
    if "lantern" in runs:
        assert runs["lantern"]["calls"]["draft"] > 0
    loaded = load_generator(tmp_path / "ar")
    torch.manual_seed(3)
    with torch.no_grad():
        ids = loaded.model.generate(**loaded.prompts([PROMPT]), guidance_scale=2.0)
    read = torch.from_numpy(np.array(Image.open(tmp_path / "o/dense-0.png"))).permute(2, 0, 1) / 255
    torch.testing.assert_close(read, loaded.pictures(ids)[0], atol=1 / 255, rtol=0)

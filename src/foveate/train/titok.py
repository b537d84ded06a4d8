"""Recipe for `titok`: a picture of 64 px as 32 ids, half of the pictures scenes and half crops of photographs.

`stage` says what is trained; what comes before it is trained first, into folders in the output's, unless it is given:

- "vqgan": the small VQGAN whose codes are the proxy codes, for OUT/vqgan of
- "codes": stage 1, the tokenizer, to say those codes, for OUT/codes of
- "pixels": stage 2, its decoder and the VQGAN's, by pictures, for OUT/tokenizer of
- "generator": ids of the class of a scene's single object, masked and found again;
- "single": pixels and tokens in one stage, for configurations with `head="pixels"`.

Ours, and not the paper's, because training is short: tiny-vit's tokens instead of ConvNeXt's logits for the perceptual
loss, one schedule for all stages, and care of codes: for the first `unquantised` steps latents are passed on as they
are, then some of them become the codes, and later codes that nothing uses are put next to used ones (`Revival`).
Without that, encoders soon say the same of every picture. Weights of linear layers begin with a standard deviation of
1 / sqrt(inputs): with the paper's 0.02, which is that of a width of 1024 or so, a narrow transformer passes nothing on
for hundreds of steps.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from foveate import zoo
from foveate.data.scenes import NAMES, Scenes, caption, stacked
from foveate.measure.generation import FrechetDistance, Judge, Perceptual, Reconstruction, adherence
from foveate.method import InputError
from foveate.methods.tokenize import titok
from foveate.methods.tokenize.titok import PixelObjective, TiTok
from foveate.nn.adversarial import PatchDiscriminator
from foveate.nn.codes import Codes
from foveate.nn.maskgit import MaskedGenerator, Sampling
from foveate.nn.vqgan import Vqgan
from foveate.train.codebook import Revival, WeightAverage
from foveate.train.loop import Batch, Recipe, Settings, train
from foveate.train.recognition import drawn, single_objects
from foveate.train.tiny_vae import save

STAGES = ("vqgan", "codes", "pixels", "generator", "single")
_BEFORE = {"codes": "vqgan", "pixels": "codes", "generator": "pixels"}
_FOLDERS = {"vqgan": "vqgan", "codes": "codes", "pixels": "tokenizer"}


@dataclasses.dataclass(frozen=True)
class TitokSettings(Settings):
    """Attributes:
    stage: one of `STAGES`.
    config: a name in the method's `CONFIGURATIONS`; and for `generator_config` in its `GENERATORS`.
    size: side of the pictures in px.
    width, layers, heads: of encoder, decoder and generator; 0 for the configuration's.
    latents: ids of a picture; 0 for the configuration's.
    start: folder of what comes before the stage; "" to train it first.
    vqgan_steps, codes_steps, pixels_steps: of those stages, where they are trained first.
    unquantised: steps at the beginning of a training of codes in which latents are passed on as they are.
    perceptual: weight of the perceptual loss.
    adversarial: weight of the generator's loss in stage 2, from step `adversarial_from` on.
    discriminator_width: channels of the discriminator at half resolution.
    ema: decay of the average of weights that is kept, 0 for the last weights.
    pictures: single objects that a generator learns from.
    sampling_steps, temperature, guidance_scale: with which the evaluation's pictures are generated.
    """

    steps: int = 1000
    batch: int = 16
    lr: float = 1e-3
    warmup: int = 100
    weight_decay: float = 1e-4
    test_scenes: int = 500
    stage: str = "pixels"
    config: str = "tiny"
    size: int = 64
    width: int = 0
    layers: int = 0
    heads: int = 0
    latents: int = 0
    start: str = ""
    vqgan_steps: int = 1000
    codes_steps: int = 3000
    pixels_steps: int = 1000
    unquantised: int = 400
    perceptual: float = 0.1
    adversarial: float = 0.01
    adversarial_from: int = 20_000
    discriminator_width: int = 32
    ema: float = 0.999
    pictures: int = 6000
    sampling_steps: int = 8
    temperature: float = 4.5
    guidance_scale: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in STAGES:
            raise InputError(f"stage must be one of {', '.join(STAGES)}, not {self.stage!r}")
        if self.start and self.stage not in _BEFORE:
            raise InputError(f"nothing comes before stage {self.stage!r}: leave start out")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema must be in [0, 1), not {self.ema}")
        if self.unquantised < 0:
            raise InputError(f"unquantised must be >= 0, not {self.unquantised}")
        for name in ("vqgan_steps", "codes_steps", "pixels_steps", "pictures"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be >= 1, not {getattr(self, name)}")
        self.sampling()

    def sampling(self) -> Sampling:
        return Sampling(self.sampling_steps, self.temperature, self.guidance_scale, "linear")


class _Objective(nn.Module):
    """All that is computed on a batch in one `forward`, as several processes need it.

    `trained` is what is exported, and has to be in `losses`; where its codes are trained, `alive`, they are kept so.
    """

    def __init__(self, trained: Any, losses: nn.Module, alive: bool, ema: float) -> None:
        super().__init__()
        self.trained, self.losses = trained, losses
        self.revival = Revival(trained.quantizer.embedding.num_embeddings) if alive else None
        self.average = WeightAverage(trained, ema) if ema else None

    def forward(self, **batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self.revival is not None:
            self.revival.move(self.trained.quantizer)
        loss, parts, quantised = self.losses(**batch)
        if self.revival is not None:
            self.revival.count(self.trained.quantizer, quantised.ids, quantised.loss.detach())
        return loss, parts


class _VqganLosses(nn.Module):
    """`l2 + quantiser + weight * perceptual`."""

    def __init__(self, vqgan: Vqgan, perceptual: nn.Module, weight: float) -> None:
        super().__init__()
        self.vqgan, self.perceptual, self.weight = vqgan, perceptual, weight

    def forward(self, image: Tensor, step: Tensor) -> tuple[Tensor, dict[str, Tensor], Any]:
        pixels = image.float() / 255
        made, quantised = self.vqgan(pixels)
        parts = {"l2": F.mse_loss(made, pixels), "quantiser": quantised.loss}
        parts["perceptual"] = self.perceptual(made, pixels).mean()
        loss = parts["l2"] + parts["quantiser"] + self.weight * parts["perceptual"]
        return loss, parts, quantised


class _CodeLosses(nn.Module):
    """Stage 1; `vqgan` is frozen."""

    def __init__(self, tokenizer: TiTok, vqgan: Vqgan) -> None:
        super().__init__()
        self.tokenizer, self.vqgan = tokenizer, vqgan.requires_grad_(False)

    def forward(self, image: Tensor, step: Tensor) -> tuple[Tensor, dict[str, Tensor], Any]:
        pixels = image.float() / 255
        return self.tokenizer.code_loss(pixels, self.vqgan.encode(pixels).ids)


class _PixelLosses(nn.Module):
    def __init__(self, objective: PixelObjective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, image: Tensor, step: Tensor) -> tuple[Tensor, dict[str, Tensor], Any]:
        made: tuple[Tensor, dict[str, Tensor], Any] = self.objective(image.float() / 255, int(step))
        return made


class _GeneratorLosses(nn.Module):
    def __init__(self, generator: MaskedGenerator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, ids: Tensor, label: Tensor, step: Tensor) -> tuple[Tensor, dict[str, Tensor], Any]:
        return *self.generator.loss(ids, label), None


class TitokRecipe(Recipe):
    """See the module. `tokenizer_type` is the class that is trained, and `module` the one of the method."""

    name = "titok"
    settings_type = TitokSettings
    tokenizer_type: ClassVar[type[TiTok]] = TiTok
    module: ClassVar[Any] = titok
    smoke: ClassVar[dict[str, Any]] = {
        "steps": 2, "batch": 2, "warmup": 1, "workers": 0, "test_scenes": 3, "size": 48, "width": 16, "layers": 1,
        "heads": 2, "latents": 8, "vqgan_steps": 2, "codes_steps": 2, "pixels_steps": 2, "discriminator_width": 4,
        "adversarial_from": 1, "pictures": 4, "unquantised": 1,
    }  # fmt: skip

    @classmethod
    def prepare(cls, settings: Settings, seed: int, out: Path) -> Settings:
        """Trains what comes before the stage into a folder of its own, unless it is given or there."""
        assert isinstance(settings, TitokSettings)
        before = _BEFORE.get(settings.stage)
        if before is None or settings.start:
            return settings
        folder = out / _FOLDERS[before]
        if not (folder / "metrics.json").is_file():
            same = dataclasses.asdict(settings) | {"stage": before, "steps": getattr(settings, f"{before}_steps")}
            train(cls, out=folder, seed=seed, **same)
        return dataclasses.replace(settings, start=str(folder))

    def __init__(self, settings: TitokSettings, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.scenes, self.crops = scenes("train", seed, settings.size), crops("train", seed, settings.size)
        alive = settings.stage in ("vqgan", "codes")
        if settings.stage == "vqgan":
            shape = self._arguments()
            self.trained: Any = Vqgan(
                width=shape["pixel_width"], multipliers=shape["pixel_multipliers"], codes=shape["pixel_codes"],
                channels=shape["pixel_channels"],
            )  # fmt: skip
            losses: nn.Module = _VqganLosses(self.trained, Perceptual(Judge()), settings.perceptual)
        elif settings.stage == "codes":
            vqgan = _from_folder(Vqgan, settings.start)
            self.trained = _scaled(self.tokenizer_type(**self._arguments())).take_pixel_decoder(vqgan)
            # The pixel decoder has its turn in stage 2.
            self.trained.pixel_decoder.requires_grad_(False)
            self.trained.pixel_codebook.requires_grad_(False)
            losses = _CodeLosses(self.trained, vqgan)
        elif settings.stage == "generator":
            self.tokenizer = _from_folder(self.tokenizer_type, settings.start)
            changes: dict[str, Any] = {"tokens": self.tokenizer.tokens, "codes": self.tokenizer.codes}
            self.trained = MaskedGenerator(
                **(self.module.GENERATORS[settings.config] | self._sizes() | changes | {"classes": len(NAMES)})
            )
            self.ids, self.label = self._tokens("train", seed, settings.pictures)
            losses = _GeneratorLosses(self.trained)
        else:
            single = settings.stage == "single"
            self.trained = (
                _scaled(self.tokenizer_type(**self._arguments()))
                if single
                else _from_folder(self.tokenizer_type, settings.start)
            )
            if single and self.trained.pixel_decoder is not None:
                raise InputError('stage "single" is for configurations with head="pixels"; others have stage "codes"')
            objective = PixelObjective(
                self.trained, one_stage=single, perceptual=Perceptual(Judge()), perceptual_weight=settings.perceptual,
                adversarial_weight=settings.adversarial, adversarial_from=settings.adversarial_from,
                discriminator=PatchDiscriminator(settings.discriminator_width),
            )  # fmt: skip
            losses = _PixelLosses(objective)
            alive = single and self.trained.quantizer is not None
        self.model: Any = _Objective(self.trained.train(), losses, alive, settings.ema)
        # A third faster on a CPU at few channels.
        self.model.to(memory_format=torch.channels_last)

    def _sizes(self) -> dict[str, int]:
        return {name: value for name in ("width", "layers", "heads") if (value := getattr(self.settings, name))}

    def _arguments(self) -> dict[str, Any]:
        """Arguments of the tokenizer."""
        settings = self.settings
        if settings.config not in self.module.CONFIGURATIONS:
            raise InputError(f"config must be one of {', '.join(self.module.CONFIGURATIONS)}, not {settings.config!r}")
        given = self.module.CONFIGURATIONS[settings.config] | {"image": settings.size}
        if settings.latents:
            given |= {"latents": settings.latents}
        if sizes := self._sizes():
            if len(sizes) < 3:
                raise InputError("width, layers and heads go together: give all three, or none")
            given |= {"encoder": tuple(sizes.values()), "decoder": tuple(sizes.values())}
        return given

    def _tokens(self, split: str, seed: int, count: int) -> tuple[Tensor, Tensor]:
        """Ids (n, K) and classes (n,) of scenes with a single object."""
        pictures, size = single_objects(split, seed, count), self.tokenizer.size
        ids = [
            self.tokenizer.encode(
                F.interpolate(some.float() / 255, size, mode="bilinear", antialias=True).clamp(0, 1)
            ).ids
            for some in pictures["image"].split(64)
        ]
        return torch.cat(ids), pictures["label"]

    def batch(self, step: int, rank: int, world: int) -> Batch:
        if self.settings.stage == "generator":
            chosen = drawn(len(self.ids), self.seed, step, self.settings.batch)[rank::world]
            return {"ids": self.ids[chosen], "label": self.label[chosen], "step": torch.tensor(step)}
        first = step * self.settings.batch
        numbers = range(first + rank, first + self.settings.batch, world)
        image = stacked(self.scenes[k] if k % 2 else self.crops[k] for k in numbers)
        return {"image": image, "step": torch.tensor(step)}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        if self.model.average is not None:
            self.model.average.update(self.trained)
        if self.model.revival is not None:
            step, begin = int(batch["step"]), self.settings.unquantised
            self.trained.quantizer.bypass = step < begin
            if step == begin:
                # The same pictures in every process.
                some = self.batch(step, 0, 1)["image"].to(batch["image"].device)
                self.model.revival.start(self.trained.quantizer, _before_codes(self.trained, some.float() / 255))
        loss, parts = model(**batch)
        return loss, {name: float(value.detach()) for name, value in parts.items()}

    def export(self, folder: Path) -> None:
        if self.model.revival is not None:
            self.trained.quantizer.bypass = False
        if self.model.average is not None:
            self.model.average.update(self.trained)
            self.model.average.apply_to(self.trained)
        save(self.trained, folder)

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """On the test split, whose photographs the training never saw: what is kept of scenes and of crops of
        photographs, at several lengths where there are, and how codes are used; of a generator, whether its pictures
        show what they should."""
        settings, judge = self.settings, Judge()
        about: dict[str, Any] = {"split": "test", "stage": settings.stage}
        device = next(self.trained.parameters()).device
        self.trained.cpu().eval()
        if settings.stage == "generator":
            about |= self._generated(judge)
        else:
            for kind, source in (("scenes", scenes), ("photographs", crops)):
                pictures = source("test", 0, settings.size)
                originals = stacked(pictures[k] for k in range(settings.test_scenes))
                about[kind] = kept(self.trained, originals, judge)
        self.trained.to(device)
        return about

    def _generated(self, judge: Judge) -> dict[str, Any]:
        settings = self.settings
        label = torch.arange(settings.test_scenes) % len(NAMES)
        random = torch.Generator().manual_seed(0)
        ids = [self.trained.generate(some, settings.sampling(), generator=random) for some in label.split(100)]
        tokenizer, captions = self.tokenizer.eval(), [caption(NAMES[k]) for k in label]
        made = torch.cat([_decode(tokenizer, some) for some in torch.cat(ids).split(100)])
        real_ids, _ = self._tokens("test", 0, settings.test_scenes)
        real = single_objects("test", 0, settings.test_scenes)["image"]
        distance = FrechetDistance(judge).real(real)
        decoded = torch.cat([_decode(tokenizer, some) for some in real_ids.split(100)])
        return {
            "single_objects": adherence(judge, made, captions),
            "frechet_distance": distance(made),
            "frechet_distance_of_decoded_scenes": distance(decoded),
        }


def _scaled(tokenizer: TiTok) -> TiTok:
    """The untrained tokenizer with linear layers and a patch embedding whose outputs are as large as inputs."""
    for module in tokenizer.modules():
        if isinstance(module, nn.Linear) or module is tokenizer.encoder.patch_embed:
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    return tokenizer


@torch.no_grad()
def _before_codes(model: Any, pixels: Tensor) -> Tensor:
    """(..., C) what the quantiser of a VQGAN or a tokenizer is given of pictures."""
    if isinstance(model, Vqgan):
        return model.encoder(pixels).permute(0, 2, 3, 1)
    return model.encoder(pixels, model.latents)


def _decode(tokenizer: TiTok, ids: Tensor) -> Tensor:
    return tokenizer.decode(Codes(ids, tokenizer.codes, tokenizer.size, (ids.shape[1],)))


def scenes(split: str, seed: int, size: int) -> Scenes:
    return Scenes(split, seed, size=size)


def crops(split: str, seed: int, size: int) -> Scenes:
    """Crops of the split's photographs, without objects."""
    return Scenes(split, seed, size=size, objects=(0, 0))


def kept(model: Any, originals: Tensor, judge: Judge) -> dict[str, Any]:
    """What a tokenizer or a VQGAN keeps of uint8 pictures (n, 3, H, W), and how it uses its codes."""
    pixels = [some.float() / 255 for some in originals.split(100)]
    if isinstance(model, TiTok) and model.quantizer is None:
        return _reconstruction(judge, originals, [model(some)[0].clamp(0, 1) for some in pixels])
    batches = [model.encode(some) for some in pixels]
    share = torch.cat([codes.ids.flatten() for codes in batches]).bincount().double()
    share = share[share > 0] / share.sum()
    about: dict[str, Any] = {"codes_used": len(share), "bits_per_code": float(-(share * share.log2()).sum())}
    about |= _reconstruction(judge, originals, [model.decode(codes) for codes in batches])
    if isinstance(model, TiTok) and model.any_length:
        about["by_tokens"] = [
            {"tokens": tokens, **_reconstruction(judge, originals, [model.decode(codes, tokens) for codes in batches])}
            for tokens in (model.tokens // 4**k for k in range(1, 5))
            if tokens
        ]
    return about


def _reconstruction(judge: Judge, originals: Tensor, made: list[Tensor]) -> dict[str, float]:
    measured = Reconstruction(judge)
    for some, wanted in zip(made, originals.split(100)):
        measured.update(some, wanted)
    return measured.compute()


def _from_folder(cls: type[Any], folder: str) -> Any:
    """A tokenizer or a VQGAN, in eval mode; InputError where there is none."""
    config = zoo.read_json(Path(folder), "config.json", "model")
    wanted = cls.card.slug if issubclass(cls, TiTok) else None
    # Asked first: what is built without the right arguments is large.
    if not isinstance(config, dict) or config.get("method") != wanted or ("codes" not in config and wanted is None):
        raise InputError(f"start: {folder} has another model than a {cls.__name__}")
    try:
        return cls.from_pretrained(folder, strict=True).eval()
    except (RuntimeError, TypeError, OSError, SafetensorError):
        raise InputError(f"start: the weights in {folder} cannot be loaded") from None

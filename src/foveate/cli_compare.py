"""`foveate compare`: what every method saves and costs on a model; this file has the options, and answers questions."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate import cli_compare_generation
from foveate.cli_common import (
    DEFAULT_FRAMES,
    DeviceOption,
    DtypeOption,
    at_least,
    check_dtype,
    fail,
    find_model,
    is_main_process,
    load_model,
    make_accelerator,
    parse_budgets,
    parse_methods,
    progress_bar,
    read_samples,
    rows_kept,
    show_comparison,
    unknown_words,
)
from foveate.method import InputError, did_you_mean

if TYPE_CHECKING:
    from PIL import Image

    from foveate.data.samples import Sample
    from foveate.data.video import Video

DEFAULT_MODEL = "tiny-llava"
VIDEO_MODEL = "tiny-onevision"
KEEP = "0.5,0.25,0.1"
TASKS = ("answering", "generation", "recognition", "segmentation", "pose")

_OPTIONS = {
    "answering": ("--image", "--video", "--prompt", "--dataset"),
    "generation": ("--prompts", "--steps", "--small"),
}
"""Those that say what to compare on, or with; of other tasks it is --data."""


def compare(
    task: Annotated[
        str,
        typer.Option(help=f"What the model is for: {', '.join(TASKS)}."),
    ] = TASKS[0],
    model: Annotated[
        str | None,
        typer.Option(
            help="Shipped model, local folder, or hub id OWNER/NAME (which is downloaded). Without it: tiny-llava, "
            "with --video tiny-onevision; to recognise or segment, tiny-vit."
        ),
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture to ask --prompt about; may be repeated.")] = None,
    video: Annotated[list[Path] | None, typer.Option(help="A clip to ask --prompt about; may be repeated.")] = None,
    frames: Annotated[int, typer.Option(help="Taken of every clip, at equal distances in time.")] = DEFAULT_FRAMES,
    prompt: Annotated[str | None, typer.Option(help="The question about every --image and --video.")] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="JSONL, a line {image or video, prompt, answer, type}; the last two optional.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder of pictures, for recognition CLASS/NAME.jpg, for segmentation images/NAME.jpg with "
            "masks/NAME.png; for pose of motion files. Without it: held-out scenes, pybullet's motions."
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated names (see `foveate methods`) and configuration files (FILE.json), or all; of other "
            "tasks than answering also folders that `foveate train` wrote. Without it: four on the shipped model and "
            "scenes, so that it takes minutes; otherwise all."
        ),
    ] = None,
    keep: Annotated[
        str, typer.Option(help="Comma-separated budgets in (0, 1]: the share of visual tokens that each may spend.")
    ] = KEEP,
    out: Annotated[Path, typer.Option(help="Folder for report.html and comparison.json.")] = Path("foveate-out"),
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    questions: Annotated[
        int | None,
        typer.Option(
            "--questions",
            "--samples",
            "--count",
            help="Use this many questions, or whatever the task has; of a data set the first.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples run together.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the held-out scenes; of the noise that pictures are made of.")] = 0,
    prompts: Annotated[
        Path | None, typer.Option(help="For generation: a text file, a prompt a line. Without it: captions of scenes.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="For generation: of the sampler [the pipeline's own].")] = None,
    small: Annotated[
        str | None,
        typer.Option("--small", "--draft", help="For generation: a smaller model, for methods that take one."),
    ] = None,
) -> None:
    """Measure what every method saves and costs on a model, beside plain down-sampling at the same budgets."""
    from foveate.report.write import check_folder

    # All that can be wrong with the arguments is found before anything is loaded, and that before any work.
    if task not in TASKS:
        raise InputError(f"--task: unknown {task!r}; {did_you_mean(task, TASKS)}")
    budgets = parse_budgets(keep)
    at_least("--questions", questions, 1)
    at_least("--steps", steps, 1)
    at_least("--batch-size", batch_size, 1)
    at_least("--seed", seed, 0)
    at_least("--frames", frames, 1)
    kind = check_dtype(dtype)
    check_folder(out)
    given = {
        "--image": image, "--video": video, "--prompt": prompt, "--dataset": dataset, "--data": data,
        "--prompts": prompts, "--steps": steps, "--small": small,
    }  # fmt: skip
    own = _OPTIONS.get(task, ("--data",))
    if wrong := next((option for option, value in given.items() if value and option not in own), None):
        raise InputError(f"--task {task} takes no {wrong}; it takes {', '.join(own)}")
    if task == "generation":
        if keep != KEEP:
            raise InputError(
                "--task generation takes no --keep; settings of methods stand in files, --methods FILE.json"
            )
        cli_compare_generation.run(
            model=model, small=small, methods=methods, prompts=prompts, count=questions, steps=steps, seed=seed,
            batch_size=batch_size, out=out, device=device, dtype=kind,
        )  # fmt: skip
        return
    if task != TASKS[0]:
        from foveate import cli_compare_vision

        cli_compare_vision.run(task, model, data, methods, budgets, out, device, kind, questions, batch_size, seed)
        return
    names = parse_methods(methods)
    model = model or (VIDEO_MODEL if video else DEFAULT_MODEL)
    source = find_model(model)
    samples = read_samples(image or [], prompt, dataset, questions, seed, video or [], frames)
    if methods is None and model == DEFAULT_MODEL and not image and not video and dataset is None:
        from foveate.measure.compare import METHODS

        names = METHODS
    _run_comparison(model, source, samples, names, budgets, out, device, kind, batch_size, seed)


def _run_comparison(
    model: str,
    source: str,
    samples: list[Sample],
    names: Sequence[str] | None,
    budgets: tuple[float, ...],
    out: Path,
    device: str,
    dtype: str,
    batch_size: int,
    seed: int,
) -> None:
    from foveate.measure.compare import compare as measure

    accelerator = make_accelerator(device)
    loaded, processor = load_model(model, source, str(accelerator.device) if device == "auto" else device, dtype)
    try:
        with rows_kept(out) as rows, progress_bar() as advance:
            comparison = measure(
                loaded,
                processor,
                samples,
                names,
                budgets=budgets,
                batch_size=batch_size,
                seed=seed,
                on_progress=advance,
                on_row=rows.append,
                accelerator=accelerator,
            )
    except InputError as error:
        # Where the samples are shared out, only the process that has the one at fault knows of it.
        fail(str(error), everywhere=True)
    if not is_main_process():
        return
    for sample in samples:
        if broken := sum(one.broken for one in sample.videos):
            print(f"note: {sample.id}: broken frames left out of its clip: {broken}", file=sys.stderr)
    if words := unknown_words(processor.tokenizer, (one.prompt for one in samples)):
        print(f"note: {model} was not taught {', '.join(words)}; its answers are guesses there", file=sys.stderr)
    shown = next(sample for sample in samples if comparison.shown and sample.id == comparison.shown.id)
    picture = _seen(processor, shown.images[0]) if shown.images else None
    clip = [] if shown.images else _seen_frames(processor, shown.videos[0])
    show_comparison(comparison, out, model, picture, clip)


def _seen(processor: Any, picture: Image.Image) -> Image.Image:
    """The picture as the model gets it: resized and cropped by the processor, normalisation undone."""
    import numpy as np

    prepare = processor.image_processor
    pixels = np.asarray(prepare(images=[picture], return_tensors="np")["pixel_values"][0], dtype=np.float64)
    if pixels.ndim < 3:
        # Qwen-VL: patches without an order of their own; they are of the whole picture.
        return picture
    # LLaVA-NeXT: crops before channels; the first is the whole picture.
    return _restored(prepare, pixels[0] if pixels.ndim == 4 else pixels)


def _seen_frames(processor: Any, video: Video) -> list[tuple[float, Image.Image]]:
    """The frames of a clip as the model gets them, with their times; of frames that it joins, the first."""
    import numpy as np
    from PIL import Image

    prepare = processor.video_processor
    made = prepare(videos=[video.frames], do_sample_frames=False, return_tensors="pt")
    pixels = np.asarray(made["pixel_values_videos"], dtype=np.float64)
    if pixels.ndim == 5:
        return [(float(time), _restored(prepare, frame)) for time, frame in zip(video.times, pixels[0])]
    # Qwen-VL, as above.
    together = prepare.temporal_patch_size
    return [
        (float(time), Image.fromarray(frame)) for time, frame in zip(video.times[::together], video.frames[::together])
    ]


def _restored(prepare: Any, pixels: Any) -> Image.Image:
    """The picture of which a processor made these pixels (3, H, W), without its normalisation."""
    import numpy as np
    from PIL import Image

    if getattr(prepare, "do_normalize", False):
        shape = (-1, 1, 1)
        pixels = pixels * np.reshape(prepare.image_std, shape) + np.reshape(prepare.image_mean, shape)
    if getattr(prepare, "do_rescale", True):
        pixels = pixels * 255
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8).transpose(1, 2, 0))

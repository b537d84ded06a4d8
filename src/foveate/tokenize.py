"""Folders of pictures to code files and back, each file on its own: any part can be done again, or elsewhere.

`Tokenize` and `Reconstruct` read and write in threads while the tokenizer computes; `on_ray` has many of them at work,
on one machine or on a cluster. What is there already and is right is left alone, so that an interrupted job goes on
where it was, and files that cannot be read are told and do not stop the others.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import platform
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from foveate.data.code_file import SUFFIX, CodeFile
from foveate.data.inputs import picture_suffixes, read_image
from foveate.method import InputError, whole
from foveate.nn.codes import Codes
from foveate.report.write import write_files
from foveate.zoo.tokenizer import find_tokenizer, fingerprint, load_tokenizer

_STAMP = "foveate codes"
"""The text of a reconstructed PNG that says of which codes it was made."""
_END = b"IEND\xaeB`\x82"
"""The last bytes of a PNG, which Pillow does not look at."""
_MOST_BLOCKS = 4096
"""Of Ray, which has some work with each."""
_FAILED = "failed"

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """A file to read and the file to make of it."""

    source: Path
    target: Path


@dataclass(frozen=True)
class Outcome:
    """What became of a file: "written", "kept" where a good one was there, or "broken" for a `reason`.

    `bytes`: of the file that is there now.
    """

    pair: Pair
    state: str
    bytes: int = 0
    reason: str = ""


class Job(ABC):
    """What is done with files, several at a time.

    Args:
        tokenizer: of the zoo, or a folder.
        tokens: ids of each picture that are used, its first; all by default.
        batch: pictures computed together, >= 1.
        threads: that read and write, >= 1.
        device: of the tokenizer; "auto" for an accelerator where there is one.

    Attributes:
        name: of the tokenizer.
        fingerprint: of its weights.
        arguments: with which a job like this one is made in another process.

    Raises:
        InputError: for values out of range or a tokenizer that cannot be loaded.
    """

    reads: ClassVar[frozenset[str]]
    """Endings of the files it takes from a folder, in lower case."""
    writes: ClassVar[str]
    """What is added to a file's name."""

    def __init__(
        self, tokenizer: str, *, tokens: int | None = None, batch: int = 16, threads: int = 4, device: str = "auto"
    ) -> None:
        self.tokens = None if tokens is None else whole("tokens", tokens, 1)
        self.batch, self.threads = whole("batch", batch, 1), whole("threads", threads, 1)
        self.name, folder = find_tokenizer(tokenizer)
        self.device = torch.accelerator.current_accelerator(True) or "cpu" if device == "auto" else device
        self.model = load_tokenizer(folder)
        self.fingerprint = fingerprint(self.model)
        self.model.to(self.device)
        place = str(folder.absolute()) if Path(tokenizer).is_dir() else tokenizer
        self.arguments = {"tokenizer": place, "tokens": tokens, "batch": batch, "threads": threads, "device": device}

    def run(self, pairs: Iterable[Pair]) -> Iterator[Outcome]:
        """Does it, and tells of every file as it is done, not always in order.

        Raises:
            OSError: where a file cannot be written.
        """
        pool = ThreadPoolExecutor(self.threads)
        try:
            loaded = _ahead(pool, self._loaded, pairs, 2 * self.batch)
            yield from _ahead(pool, self._stored, self._computed(loaded), 2 * self.batch)
        finally:
            pool.shutdown(cancel_futures=True)

    def cut(self, codes: Codes) -> Codes:
        """The codes that are used. InputError where there are not `tokens`, or the tokenizer cannot do with fewer."""
        if self.tokens is None or (self.tokens,) == codes.grid:
            return codes
        if not self.model.any_length:
            raise InputError(f"{self.name} decodes all ids of a picture, no first {self.tokens}; one-d-piece would")
        return codes.first(self.tokens)

    @abstractmethod
    def load(self, pair: Pair) -> Any:
        """The input, or an `Outcome` if nothing is left to do. InputError for what cannot be used."""

    @abstractmethod
    def key(self, loaded: Any) -> Hashable:
        """What inputs must have in common to be computed together."""

    @abstractmethod
    def compute(self, loaded: Sequence[Any]) -> Sequence[Any]:
        """The results of several inputs."""

    @abstractmethod
    def store(self, result: Any) -> bytes:
        """The content of the file."""

    def _loaded(self, pair: Pair) -> Outcome | tuple[Pair, Any]:
        try:
            found = self.load(pair)
        except InputError as error:
            return Outcome(pair, "broken", reason=str(error))
        return found if isinstance(found, Outcome) else (pair, found)

    def _computed(self, inputs: Iterable[Outcome | tuple[Pair, Any]]) -> Iterator[Outcome | tuple[Pair, Any]]:
        waiting: dict[Hashable, list[tuple[Pair, Any]]] = defaultdict(list)
        for one in inputs:
            if isinstance(one, Outcome):
                yield one
                continue
            some = waiting[self.key(one[1])]
            some.append(one)
            if len(some) == self.batch:
                yield from self._results(some)
                some.clear()
        for some in waiting.values():
            yield from self._results(some)

    def _results(self, inputs: Sequence[tuple[Pair, Any]]) -> Iterator[Outcome | tuple[Pair, Any]]:
        if not inputs:
            return
        pairs, loaded = zip(*inputs)
        try:
            with torch.inference_mode():
                results = self.compute(loaded)
        except InputError as error:
            yield from (Outcome(pair, "broken", reason=f"{pair.source}: {error}") for pair in pairs)
        else:
            yield from zip(pairs, results, strict=True)

    def _stored(self, one: Outcome | tuple[Pair, Any]) -> Outcome:
        if isinstance(one, Outcome):
            return one
        pair, result = one
        content = self.store(result)
        try:
            write_files(pair.target.parent, {pair.target.name: content})
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            return Outcome(pair, "broken", reason=f"{pair.source}: its name is too long to become {pair.target.name}")
        return Outcome(pair, "written", len(content))


class Tokenize(Job):
    """Pictures to code files. The middle of a picture is scaled to what the tokenizer takes, as in its training.

    A code file that is there already is kept if it is whole, of the same weights, picture size and number of ids, and
    not older than the picture.

    Attributes:
        form: codes of an empty picture; those of others have the same number of ids.
    """

    reads = picture_suffixes()
    writes = SUFFIX

    def __init__(self, tokenizer: str, **settings: Any) -> None:
        super().__init__(tokenizer, **settings)
        with torch.inference_mode():
            self.form = self.cut(self.model.encode(torch.zeros(1, 3, *self.model.size, device=self.device)))

    def load(self, pair: Pair) -> Tensor | Outcome:
        if self._done(pair):
            return Outcome(pair, "kept", pair.target.stat().st_size)
        height, width = self.model.size
        picture = ImageOps.fit(read_image(pair.source), (width, height), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    def key(self, loaded: Tensor) -> Hashable:
        return None

    def compute(self, loaded: Sequence[Tensor]) -> list[Codes]:
        codes = self.cut(self.model.encode(torch.stack(list(loaded)).to(self.device).float() / 255))
        ids = codes.ids.cpu()
        return [Codes(one[None], codes.codebook_size, codes.size, codes.grid) for one in ids]

    def store(self, result: Codes) -> bytes:
        return CodeFile(result, self.name, self.fingerprint).to_bytes()

    def _done(self, pair: Pair) -> bool:
        try:
            if pair.target.stat().st_mtime < pair.source.stat().st_mtime:
                return False
            there = CodeFile.read(pair.target)
        except (InputError, OSError):
            return False
        return there.fingerprint == self.fingerprint and _form(there.codes) == _form(self.form)


class Reconstruct(Job):
    """Code files to PNG pictures.

    Each has a text that says of which codes it was made; one that is whole and of the same is kept.
    """

    reads = frozenset({SUFFIX})
    writes = ".png"

    def load(self, pair: Pair) -> tuple[Codes, str] | Outcome:
        file = CodeFile.read(pair.source)
        try:
            codes = self.checked(file)
        except InputError as error:
            raise InputError(f"{pair.source}: {error}") from None
        stamp = hashlib.sha256(CodeFile(codes, file.tokenizer, file.fingerprint).to_bytes()).hexdigest()[:32]
        if _has_stamp(pair.target, stamp):
            return Outcome(pair, "kept", pair.target.stat().st_size)
        return codes, stamp

    def checked(self, file: CodeFile) -> Codes:
        """The codes to decode. InputError where they are of other weights, or fewer than `tokens`."""
        if file.fingerprint != self.fingerprint:
            ours = f"{self.name} {self.fingerprint}"
            raise InputError(f"made by another tokenizer, {file.tokenizer} {file.fingerprint}; this is {ours}")
        return self.cut(file.codes)

    def key(self, loaded: tuple[Codes, str]) -> Hashable:
        return _form(loaded[0])

    def compute(self, loaded: Sequence[tuple[Codes, str]]) -> list[tuple[np.ndarray, str]]:
        first = loaded[0][0]
        ids = torch.cat([codes.ids for codes, _ in loaded]).to(self.device)
        pixels = self.model.decode(Codes(ids, first.codebook_size, first.size, first.grid))
        pictures = (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [(picture, stamp) for picture, (_, stamp) in zip(pictures, loaded)]

    def store(self, result: tuple[np.ndarray, str]) -> bytes:
        picture, stamp = result
        about, content = PngImagePlugin.PngInfo(), io.BytesIO()
        about.add_text(_STAMP, stamp)
        Image.fromarray(picture).save(content, "PNG", pnginfo=about)
        return content.getvalue()


def find_files(given: Sequence[Path], out: Path, job: type[Job]) -> list[Pair]:
    """The files to work on, each with the one to be made of it under `out`.

    A folder gives all files in it, at any depth, that have an ending of `job.reads` and are not hidden; the folders in
    it are made again under `out`. The new file's name is the whole old one and `job.writes`, but for the `SUFFIX` of
    code files.

    Raises:
        InputError: no such file or folder, a folder without such files, two files that would become the same one.
    """
    pairs: dict[Path, Pair] = {}
    for one in given:
        if one.is_dir():
            found = [(file, file.relative_to(one)) for file in _walk(one, job.reads)]
            if not found:
                raise InputError(f"{one}: no file in this folder has an ending of {', '.join(sorted(job.reads))}")
        elif one.exists():
            found = [(one, Path(one.name))]
        else:
            raise InputError(f"{one}: no such file or folder")
        for file, below in found:
            target = out / below.with_name(below.name.removesuffix(SUFFIX) + job.writes)
            if (other := pairs.setdefault(target, Pair(file, target)).source) != file:
                raise InputError(f"{other} and {file} would both become {target}; give the folder above them")
    return list(pairs.values())


def made_by(pairs: Iterable[Pair]) -> CodeFile:
    """The first good code file. InputError where there is none."""
    why = ""
    for pair in pairs:
        try:
            return CodeFile.read(pair.source)
        except InputError as error:
            why = why or str(error)
    raise InputError(f"no code file here can be read: {why}")


def on_ray(job: Job, pairs: Sequence[Pair], workers: int) -> Iterator[Outcome]:
    """The job done by `workers` processes of Ray Data.

    They run on the cluster that there is (`ray.init`, `ray start`, or the environment's RAY_ADDRESS), otherwise on one
    that is started on this machine for as long as the job takes. The files, and a tokenizer that is a folder, must have
    the same paths on all machines. Each worker has a GPU where the cluster has GPUs, and a core of its own.

    Raises:
        InputError: where Ray is not installed; where a worker cannot load the tokenizer or write a file.
    """
    # Ray would send home what it is used for.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise InputError("--ray needs Ray Data: pip install 'foveate[ray]'") from None
    whole("workers", workers, 1)
    ours = not ray.is_initialized()
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if ours:
        try:
            ray.init(address="auto", **quiet)
        except ConnectionError:
            # One core more: of what hands out the work.
            ray.init(address="local", num_cpus=workers + 1, include_dashboard=False, **quiet)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        rows = [
            {"number": number, "source": str(pair.source.absolute()), "target": str(pair.target.absolute())}
            for number, pair in enumerate(pairs)
        ]
        blocks = min(-(-len(rows) // job.batch), _MOST_BLOCKS)
        gpus = 1 if ray.cluster_resources().get("GPU") and str(job.device) != "cpu" else 0
        done = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
            _Worker, fn_constructor_args=(type(job), job.arguments, job.fingerprint), batch_size=job.batch,
            batch_format="numpy", compute=ray.data.ActorPoolStrategy(size=workers), num_cpus=1, num_gpus=gpus,
        )  # fmt: skip
        for row in done.iter_rows():
            if row["state"] == _FAILED:
                raise InputError(row["reason"])
            yield Outcome(pairs[row["number"]], row["state"], row["bytes"], row["reason"])
    finally:
        if ours:
            ray.shutdown()


class _Worker:
    """A process of `on_ray`. What cannot be helped is a row like any other, of state `_FAILED`."""

    def __init__(self, job: type[Job], arguments: dict[str, Any], fingerprint: str) -> None:
        self.failure = ""
        try:
            self.job = job(**arguments)
            if self.job.fingerprint != fingerprint:
                self.failure = f"{self.job.name} has other weights on the machine {platform.node()}"
        except InputError as error:
            self.failure = f"{error} (on the machine {platform.node()})"

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, Any]:
        pairs = [Pair(Path(source), Path(target)) for source, target in zip(rows["source"], rows["target"])]
        numbers = dict(zip(pairs, rows["number"]))
        outcomes = [Outcome(pairs[0], _FAILED, reason=self.failure)]
        try:
            outcomes = outcomes if self.failure else list(self.job.run(pairs))
        except OSError as error:
            outcomes = [Outcome(pairs[0], _FAILED, reason=f"{error.filename}: {error.strerror}")]
        return {
            "number": [numbers[one.pair] for one in outcomes],
            "state": [one.state for one in outcomes],
            "bytes": [one.bytes for one in outcomes],
            "reason": [one.reason for one in outcomes],
        }


def _ahead(pool: ThreadPoolExecutor, function: Callable[[S], T], things: Iterable[S], count: int) -> Iterator[T]:
    """`map`, computed in the pool up to `count` things ahead of what is asked for."""
    waiting: deque[Future[T]] = deque()
    for thing in things:
        waiting.append(pool.submit(function, thing))
        if len(waiting) > count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _walk(folder: Path, endings: frozenset[str]) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(one for one in folders if not one.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in endings:
                yield Path(place) / name


def _form(codes: Codes) -> Hashable:
    return codes.codebook_size, codes.size, codes.grid


def _has_stamp(path: Path, stamp: str) -> bool:
    """Whether a whole PNG with this stamp is there."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=("PNG",)) as picture:
            if picture.info.get(_STAMP) != stamp:
                return False
            picture.verify()
            return content.endswith(_END)
    except (OSError, SyntaxError, ValueError):
        return False

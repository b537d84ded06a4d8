"""The training loop against a plain loop, and against itself stopped, killed and distributed."""

from __future__ import annotations

import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from foveate import train as training
from foveate.method import InputError
from foveate.train.loop import Batch, Recipe, Settings, learning_rate, train, write_json, write_tensors


class Line(Recipe):
    """Fits random targets with two layers; dropout makes every step need random numbers."""

    name = "line"
    smoke: ClassVar[dict[str, Any]] = {"steps": 6, "batch": 4, "warmup": 2, "workers": 0, "test_scenes": 1, "lr": 0.05}
    fails_at: ClassVar[int | None] = None

    def __init__(self, settings: Settings, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 2))
        self.model[0].bias.requires_grad_(False)  # type: ignore[union-attr]

    def batch(self, step: int, rank: int, world: int) -> Batch:
        if step == self.fails_at:
            raise KeyboardInterrupt
        everything = line_batch(self.seed, step, self.settings.batch)
        return {name: value[rank::world] for name, value in everything.items()}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        loss = (model(batch["x"]) - batch["y"]).square().mean()
        return loss, {"error": float(loss.detach())}

    def export(self, folder: Path) -> None:
        write_tensors(folder / "model.safetensors", self.model.state_dict())

    def evaluate(self) -> dict[str, Any]:
        return {"weight": float(self.model[0].weight.detach().sum())}  # type: ignore[operator, union-attr]


def line_batch(seed: int, step: int, batch: int) -> Batch:
    numbers = torch.Generator().manual_seed(1000 * seed + step)
    return {"x": torch.randn(batch, 3, generator=numbers), "y": torch.randn(batch, 2, generator=numbers)}


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [(json.loads(line)["step"], json.loads(line)["loss"]) for line in lines]


# ---------------------------------------------------------------------------------------------------------------------


def test_equals_a_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW with the schedule, clipping and weight decay on matrices only, written out; dropout switched off."""
    options = Line.smoke | {"clip": 0.5, "weight_decay": 0.3}
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
    train(Line, out=tmp_path, seed=3, **options)

    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 2))
    decays = {"0.weight": 0.3, "2.weight": 0.3, "2.bias": 0.0}
    parameters = dict(model.named_parameters())
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}
    expected_losses = []
    for step in range(6):
        batch = line_batch(3, step, 4)
        loss = (model(batch["x"]) - batch["y"]).square().mean()
        expected_losses.append(float(loss.detach()))
        model.zero_grad()
        loss.backward()
        gradients = {name: parameters[name].grad.clone() for name in decays}  # type: ignore[union-attr]
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        fallen = (1 + math.cos(math.pi * (step - 2) / 4)) / 2
        rate = 0.05 * (step + 1) / 2 if step < 2 else 0.05 * (0.01 + 0.99 * fallen)
        with torch.no_grad():
            for name, decay in decays.items():
                g = gradients[name] * min(1.0, 0.5 / (norm + 1e-6))
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.98 * second[name] + 0.02 * g * g
                mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.98 ** (step + 1))
                parameters[name].mul_(1 - rate * decay).sub_(rate * mean / (square.sqrt() + 1e-8))
    for name, value in weights(tmp_path).items():
        torch.testing.assert_close(value, parameters[name].detach(), rtol=1e-4, atol=1e-6)
    assert [step for step, _ in losses(tmp_path)] == list(range(6))
    assert [loss for _, loss in losses(tmp_path)] == pytest.approx(expected_losses, rel=1e-4)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_stopped_and_resumed_is_the_same_bit_for_bit(tmp_path: Path, stop: int) -> None:
    train(Line, out=tmp_path / "whole", seed=1, **Line.smoke)
    assert train(Line, out=tmp_path / "parts", seed=1, stop_after=stop, **Line.smoke) == {}
    assert not (tmp_path / "parts" / "metrics.json").exists()
    metrics = train(Line, out=tmp_path / "parts", seed=1, **Line.smoke)
    assert_equal_bits(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert metrics["weight"] == json.loads((tmp_path / "whole" / "metrics.json").read_text())["weight"]


def test_interrupted_between_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 0..4 are done, the checkpoint is after step 4; the log's later lines are written again, not twice."""
    options = Line.smoke | {"save_every": 2}
    train(Line, out=tmp_path / "whole", seed=1, **options)
    monkeypatch.setattr(Line, "fails_at", 5)
    with pytest.raises(KeyboardInterrupt):
        train(Line, out=tmp_path / "parts", seed=1, **options)
    assert [folder.name for folder in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-0000004"]
    assert [step for step, _ in losses(tmp_path / "parts")] == [0, 1, 2, 3, 4]
    with (tmp_path / "parts" / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')  # the line that a kill cut off
    monkeypatch.setattr(Line, "fails_at", None)
    train(Line, out=tmp_path / "parts", seed=1, **options)
    assert_equal_bits(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_resuming_what_is_done_changes_nothing(tmp_path: Path) -> None:
    first = train(Line, out=tmp_path, seed=1, **Line.smoke)
    before = weights(tmp_path)
    second = train(Line, out=tmp_path, seed=1, **Line.smoke)
    assert_equal_bits(before, weights(tmp_path))
    assert first["weight"] == second["weight"]
    assert len(losses(tmp_path)) == 6


def test_fresh_start_forgets_the_checkpoint(tmp_path: Path) -> None:
    train(Line, out=tmp_path / "a", seed=1, stop_after=3, **Line.smoke)
    train(Line, out=tmp_path / "a", seed=2, resume=False, **Line.smoke)
    train(Line, out=tmp_path / "b", seed=2, **Line.smoke)
    assert_equal_bits(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert len(losses(tmp_path / "a")) == 6


def test_a_recipe_that_cannot_be_built_leaves_all_as_it_was(tmp_path: Path) -> None:
    class Picky(Line):
        def __init__(self, settings: Settings, seed: int) -> None:
            super().__init__(settings, seed)
            if settings.batch == 5:
                raise InputError("not 5")

    with pytest.raises(InputError, match="not 5"):
        train(Picky, out=tmp_path / "new", **Picky.smoke | {"batch": 5})
    assert not (tmp_path / "new").exists()
    train(Picky, out=tmp_path / "a", stop_after=3, **Picky.smoke)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="not 5"):
        train(Picky, out=tmp_path / "a", resume=False, **Picky.smoke | {"batch": 5})
    assert sorted(tmp_path.rglob("*")) == before


def test_checkpoints_are_safetensors_and_json_only(tmp_path: Path) -> None:
    train(Line, out=tmp_path, seed=1, stop_after=2, **Line.smoke)
    files = [file.relative_to(tmp_path).as_posix() for file in sorted(tmp_path.rglob("*")) if file.is_file()]
    assert files == [
        "checkpoint-0000002/model.safetensors",
        "checkpoint-0000002/optimizer.safetensors",
        "checkpoint-0000002/state.json",
        "log.jsonl",
    ]
    saved = weights(tmp_path / "checkpoint-0000002")
    assert set(saved) == {"0.weight", "2.weight", "2.bias"}, "only what is trained"


def test_half_written_checkpoint_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Line.smoke | {"save_every": 2}
    train(Line, out=tmp_path / "whole", seed=1, **options)

    replaced: list[str] = []
    real = os.replace

    def dies_at_the_second_checkpoint(source: Any, target: Any) -> None:
        if Path(target).name.startswith("checkpoint-"):
            replaced.append(str(target))
            if len(replaced) == 2:
                raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", dies_at_the_second_checkpoint)
    with pytest.raises(KeyboardInterrupt):
        train(Line, out=tmp_path / "parts", seed=1, **options)
    monkeypatch.setattr(os, "replace", real)
    assert [folder.name for folder in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-0000002"]
    train(Line, out=tmp_path / "parts", seed=1, **options)
    assert_equal_bits(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_killed_process_resumes_to_the_same_numbers(tmp_path: Path) -> None:
    """SIGKILL of the real command after its first checkpoint; then its folder is resumed here."""
    options = {"steps": 40, "save_every": 3, "batch": 2, "threads": 1, "workers": 1, "test_scenes": 2}
    training.run("tiny-vit", out=tmp_path / "whole", seed=5, smoke=True, **options)
    settings = [part for name, value in options.items() for part in ("--set", f"{name}={value}")]
    command = ["train", "tiny-vit", "--out", str(tmp_path / "parts"), "--seed", "5", "--smoke", *settings]
    running = subprocess.Popen(
        [sys.executable, "-m", "foveate.cli", *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "parts").glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(running.pid, signal.SIGKILL)  # its own process group: it and its data worker, nothing else
    assert running.wait() == -signal.SIGKILL
    assert not (tmp_path / "parts" / "metrics.json").exists(), "it was over before it could be killed"
    training.run("tiny-vit", out=tmp_path / "parts", seed=5, smoke=True, **options)
    assert_equal_bits(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


_TWO_PROCESSES = """
import sys
sys.path.insert(0, {folder!r})
from test_loop import Line
from foveate.train.loop import train
train(Line, out={out!r}, seed=4, **(Line.smoke | {{"threads": 1}}))
"""


def test_two_processes_average_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the batch in each of two processes gives the weights of one process with the whole batch."""
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
    train(Line, out=tmp_path / "one", seed=4, **(Line.smoke | {"threads": 1}))
    program = tmp_path / "program.py"
    text = _TWO_PROCESSES.format(folder=str(Path(__file__).parent), out=str(tmp_path / "two"))
    program.write_text("from torch import nn\nnn.Dropout.forward = lambda self, x: x\n" + text)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*launch, str(program)], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-2000:]
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert metrics["training"]["processes"] == 2
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_falls() -> None:
    settings = Settings(steps=100, warmup=10, lr=2.0)
    rates = [learning_rate(step, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (k + 1) for k in range(10)])
    assert rates[10] == pytest.approx(2.0)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[55] == pytest.approx(2.0 * (0.01 + 0.99 / 2))
    assert 0.02 <= rates[-1] < 0.03


def test_metrics_say_how_they_came_about(tmp_path: Path) -> None:
    train(Line, out=tmp_path, seed=9, **Line.smoke)
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["name"] == "line"
    told = record["training"]
    assert told["seed"] == 9
    assert told["settings"]["steps"] == 6
    assert told["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert told["cores"] == os.cpu_count()
    assert told["cpu"]
    assert told["training_seconds"] >= 0
    assert told["command"] == shlex.join(["foveate", *sys.argv[1:]])


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(Line, out=tmp_path, seed=0, **(Line.smoke | {"log_every": 4}))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("line ")]
    assert [line.split()[1] for line in lines] == ["4/6", "6/6"]
    assert all("left" in line for line in lines)


def test_write_json_leaves_the_old_file_if_it_fails(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"steps": "many"}, "steps"),
        ({"batch": -1}, "batch"),
        ({"lr": 0.0}, "lr"),
        ({"lr": math.inf}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"clip": -1.0}, "clip"),
        ({"warmup": -1}, "warmup"),
        ({"workers": -1}, "workers"),
        ({"threads": 0}, "threads"),
        ({"save_every": 0}, "save_every"),
        ({"stepz": 3}, "stepz"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_nonsense_is_rejected_in_one_line(tmp_path: Path, overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        train(Line, out=tmp_path, **overrides)
    assert "\n" not in str(caught.value)


def test_a_diverging_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Line, "loss", lambda self, model, batch: (model(batch["x"]).sum() * math.inf, {}))
    with pytest.raises(ValueError, match="smaller lr"):
        train(Line, out=tmp_path, **Line.smoke)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(Line, out=tmp_path, seed=1, stop_after=2, **Line.smoke)
    with pytest.raises(ValueError, match="seed 1"):
        train(Line, out=tmp_path, seed=2, **Line.smoke)
    real = Line.__init__

    def wider(self: Line, settings: Settings, seed: int) -> None:
        real(self, settings, seed)
        self.model = nn.Sequential(nn.Linear(3, 9), nn.Dropout(0.3), nn.Linear(9, 2))

    monkeypatch.setattr(Line, "__init__", wider)
    with pytest.raises(ValueError, match="shape"):
        train(Line, out=tmp_path, seed=1, **Line.smoke)


def test_names_and_unknown_names(tmp_path: Path) -> None:
    assert {"evad", "tiny-llava", "tiny-vit"} <= set(training.names())
    with pytest.raises(ValueError, match=r"did you mean tiny-vit\?"):
        training.run("tiny-vitt", out=tmp_path)
    with pytest.raises(ValueError, match=r"evad, .*tiny-llava, .*tiny-vit"):
        training.run("zebra", out=tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["zebra", "--out", "x"],
        ["tiny-vit", "--out", "x", "--set", "steps"],
        ["tiny-vit", "--out", "x", "--set", "steps=-1"],
        ["tiny-vit", "--out", "x", "--set", "stepz=1"],
    ],
)
def test_command_ends_with_one_line_and_code_2(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from foveate.cli import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["train", *arguments])
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []

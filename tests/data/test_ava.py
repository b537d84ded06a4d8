"""AVA's format over videos written here, and scenes' clips in the same form."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from foveate.data.ava import ActionSample, Ava, collate, from_clip, mirrored
from foveate.data.scenes import Clips
from foveate.method import InputError

LINES = """video_id,middle_frame_timestamp,x1,y1,x2,y2,action_id,person_id
one,1.0,0.25,0.5,0.75,1.0,3,7
one,1.0,0.25,0.5,0.75,1.0,12,7
one,1.0,0.0,0.0,0.5,0.25,1,8
one,2.0,,,,,,
two,0001,0.1,0.1,0.2,0.2,2,
"""


def video(file: Path, seconds: float = 3.0, rate: int = 10, size: tuple[int, int] = (64, 48), gap: float = 0) -> None:
    """Frame k is grey with value 5 k mod 256, lossless; `gap` leaves out frames after 1.5 s (variable rate)."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "bgr0"
        stream.time_base = Fraction(1, rate)
        for k in range(int(seconds * rate)):
            if gap and 1.5 < k / rate < 1.5 + gap:
                continue
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 5 * k % 256, np.uint8), format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "videos").mkdir()
    video(tmp_path / "videos" / "one.mkv")
    video(tmp_path / "videos" / "two.mkv", gap=0.6, size=(48, 64))
    (tmp_path / "ava.csv").write_text(LINES)
    return tmp_path


def grey(sample: ActionSample) -> list[int]:
    assert float((sample.clip.float() - sample.clip[:, :, :1, :1].float()).abs().max()) <= 1
    return [round(int(one) / 5) for one in sample.clip[0, :, 0, 0]]


def test_keyframes_boxes_and_actions(folder: Path) -> None:
    data = Ava(folder / "ava.csv", folder / "videos", frames=8, stride=3, rate=30, short=24)
    assert len(data) == 3
    first, nobody, other = data[0], data[1], data[2]
    assert first.clip.shape == (3, 8, 24, 32) and first.clip.dtype == torch.uint8 and first.name == "one,1.0"
    assert first.boxes.tolist() == [[8, 12, 24, 24], [0, 0, 16, 6]]
    assert [row.nonzero()[:, 0].tolist() for row in first.labels] == [[2, 11], [0]] and first.labels.shape == (2, 80)
    assert nobody.boxes.shape == (0, 4) and nobody.labels.shape == (0, 80)
    # A tenth of a second apart, the fifth at the timestamp: frame 10 of one every tenth of a second.
    assert grey(first) == [6, 7, 8, 9, 10, 11, 12, 13] and grey(nobody) == [16, 17, 18, 19, 20, 21, 22, 23]
    assert other.clip.shape == (3, 8, 32, 24) and other.labels.nonzero().tolist() == [[0, 1]]


def test_beyond_the_ends_the_video_stands_still_and_gaps_show_the_nearest_frame(folder: Path) -> None:
    data = Ava(folder / "ava.csv", folder / "videos", frames=8, stride=12, rate=30)
    # 0.4 s apart around 1 s: -0.6, -0.2, 0.2 … 2.2; of a video with no frames between 1.5 and 2.1 s.
    assert grey(data[2]) == [0, 0, 2, 6, 10, 14, 15, 22]
    late = Ava(folder / "ava.csv", folder / "videos", frames=8, stride=15, rate=30)[1]
    assert grey(late) == [0, 5, 10, 15, 20, 25, 29, 29]


def test_mirroring() -> None:
    clip = torch.arange(6, dtype=torch.uint8).view(1, 1, 1, 6).expand(3, 2, 4, 6)
    sample = ActionSample(clip, torch.tensor([[1.0, 0, 3, 4]]), torch.ones(1, 2, dtype=torch.bool), "")
    turned = mirrored(sample)
    assert turned.clip[0, 0, 0].tolist() == [5, 4, 3, 2, 1, 0] and turned.boxes.tolist() == [[3, 0, 5, 4]]
    assert torch.equal(mirrored(turned).clip, clip)


def test_batches_are_padded() -> None:
    def sample(height: int, width: int, actors: int) -> ActionSample:
        clip = torch.full((3, 2, height, width), 9, dtype=torch.uint8)
        return ActionSample(clip, torch.ones(actors, 4), torch.ones(actors, 5, dtype=torch.bool), "")

    batch = collate([sample(4, 6, 2), sample(5, 3, 0)])
    assert batch["clip"].shape == (2, 3, 2, 5, 6) and batch["size"].tolist() == [[4, 6], [5, 3]]
    assert batch["clip"].float().sum().item() == 9 * 3 * 2 * (24 + 15)
    assert batch["boxes"].shape == (2, 2, 4) and batch["labels"].shape == (2, 2, 5)
    assert batch["present"].tolist() == [[True, True], [False, False]]
    assert collate([sample(2, 2, 0)])["present"].tolist() == [[False]]


def test_clips_of_scenes_have_the_same_form() -> None:
    clips = Clips("validation", 1, frames=16, size=48)
    for index in range(4):
        clip = clips[index]
        sample = from_clip(clip, 2)
        assert sample.clip.shape == (3, 8, 48, 48)
        assert np.array_equal(sample.clip[:, 4].permute(1, 2, 0).numpy(), clip.frames[8])
        assert np.array_equal(sample.clip[:, 1].permute(1, 2, 0).numpy(), clip.frames[2])
        rows = iter(zip(sample.boxes, sample.labels))
        for actor in clip.actors:
            if not actor.masks[8].any():
                continue
            y, x = actor.masks[8].nonzero()
            box, labels = next(rows)
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
            assert labels.tolist() == actor.labels.tolist()
        assert next(rows, None) is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("one,1.0,0.2,0.2,0.1,0.5,3,7", "line 2: x1 < x2"),
        ("one,1.0,0.2,0.2,0.4,1.5,3,7", "line 2: x1 < x2"),
        ("one,1.0,0.2,0.2,0.4,0.5,81,7", r"line 2: an action is a number 1\.\.80, not '81'"),
        ("one,1.0,0.2,0.2,0.4,0.5,0,7", "line 2: an action"),
        ("one,soon,0.2,0.2,0.4,0.5,3,7", "line 2: 'soon' is no timestamp"),
        ("one,1.0,0.2,nan,0.4,0.5,3,7", "line 2: 'nan' is no corner"),
        ("one,1.0,0.2", "line 2: 7 or 8 fields"),
        ("three,1.0,0.2,0.2,0.4,0.5,3,7", "no video 'three'"),
    ],
)
def test_bad_lines_are_named(folder: Path, line: str, said: str) -> None:
    (folder / "bad.csv").write_text(LINES.splitlines()[1] + "\n" + line + "\n")
    with pytest.raises(InputError, match=said):
        Ava(folder / "bad.csv", folder / "videos")


def test_bad_files_are_named(folder: Path) -> None:
    (folder / "videos" / "bad.mp4").write_bytes(b"no video at all" * 100)
    (folder / "bad.csv").write_text("bad,1.0,0.1,0.1,0.2,0.2,1,1\n")
    with pytest.raises(InputError, match=r"bad\.mp4: not a video"):
        Ava(folder / "bad.csv", folder / "videos")[0]
    whole = (folder / "videos" / "one.mkv").read_bytes()
    (folder / "videos" / "bad.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    assert Ava(folder / "bad.csv", folder / "videos", frames=2)[0].clip.shape[1] == 2
    with pytest.raises(InputError, match="no keyframe"):
        (folder / "empty.csv").write_text("\n")
        Ava(folder / "empty.csv", folder / "videos")
    with pytest.raises(InputError, match=r"none\.csv: cannot be read"):
        Ava(folder / "none.csv", folder / "videos")

from __future__ import annotations

import numpy as np
import pytest

from foveate.data.samples import from_scene_clips
from foveate.data.scenes import Clips, held_out_clip_questions
from foveate.method import InputError


def test_clips_of_scenes_are_given_evenly() -> None:
    samples, questions = from_scene_clips("test", 5, 1, frames=4), held_out_clip_questions("test", 5, 1, frames=16)
    assert [(s.prompt, s.answer, s.type) for s in samples] == [(q.prompt, q.answer, q.type) for q in questions]
    assert len({s.id for s in samples}) == 5 and samples[0].id == "clips/test/1/0/1"
    clips = Clips("test", 1, frames=16)
    for sample, question in zip(samples, questions):
        (video,) = sample.videos
        assert np.array_equal(video.frames, clips[question.index].frames[[0, 5, 10, 15]])
        assert video.times.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_what_cannot_be() -> None:
    with pytest.raises(InputError, match=r"frames must be 1\.\.16, not 17"):
        from_scene_clips("test", 1, frames=17)
    with pytest.raises(InputError, match="count"):
        from_scene_clips("test", -1)
    with pytest.raises(InputError, match="split"):
        from_scene_clips("tset", 1)

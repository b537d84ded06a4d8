from __future__ import annotations

import pytest
from comparisons import comparison, row

from foveate.report.wording import number, percent, reason, share, size


def test_a_choice_that_saves_no_time_says_so() -> None:
    slow = row("fopru", 0.5, time_ratio=1.154)
    assert reason(comparison(choice=slow)).endswith("It saved no time on this machine: 1.15 × dense, measured.")
    for choice in (row("fopru", 0.5, time_ratio=0.9), None):
        assert reason(comparison(choice=choice)) == "It keeps most at least cost."


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (number(1.0), "1"), (number(0.25), "0.25"), (number(73.44, 1), "73.4"), (number(100.0), "100"),
        (share(0.534), "0.53"), (share(0.0123), "0.012"), (share(None), "–"), (percent(0.9125), "91.2 %"),
        (percent(None), "–"), (size(512), "512 B"), (size(1536), "1.5 KiB"), (size(3 * 2**30), "3.0 GiB"),
        (size(5000 * 2**30), "5000.0 GiB"),
    ],
)  # fmt: skip
def test_numbers(shown: str, wanted: str) -> None:
    assert shown == wanted

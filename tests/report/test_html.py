from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from types import SimpleNamespace

from comparisons import comparison, row
from PIL import Image

from foveate.report.html import report_html

HOSTILE = '<script>alert("1")</script><img src=http://example.com/x.png onerror=alert(1)>"\'&{{ 7*7 }}'
PICTURE = Image.new("RGB", (40, 30), (10, 200, 30))
VOID = {"meta", "img", "br", "link", "input", "path", "use"}


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page(**changes: str) -> str:
    given = {"command": "foveate compare", "model": "tiny-llava"} | changes
    return report_html(comparison(), picture=PICTURE, **given)


def test_well_formed_and_loads_nothing() -> None:
    text = page()
    parsed = Page(text)
    assert parsed.open == []
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "srcset", "data", "poster", "action", "xlink:href") or (name == "href" and tag != "a"):
                assert value is not None and value.startswith(("data:image/png;base64,", "#")), (tag, name, value)
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", text)
    policy = next(a["content"] for t, a in parsed.tags if t == "meta" and a.get("http-equiv"))
    assert policy is not None and "default-src 'none'" in policy


def test_hostile_text_is_shown_and_not_run() -> None:
    shown = SimpleNamespace(id=HOSTILE, prompt=HOSTILE, expected=HOSTILE, answer=HOSTILE)
    parsed = Page(report_html(comparison(shown=shown), picture=PICTURE, model=HOSTILE, command=HOSTILE))
    assert all(tag != "script" and "onerror" not in attributes for tag, attributes in parsed.tags)
    assert parsed.text.count(HOSTILE) >= 6
    rows = [row("dense", 1), row("fopru", 0.5, refused=HOSTILE, settings={"<b>": HOSTILE})]
    made = comparison(rows=rows, choice=None, why=HOSTILE, environment={HOSTILE: HOSTILE}, overlays=[])
    parsed = Page(report_html(made, command="c", model="m"))
    assert all(tag not in ("script", "b") and "onerror" not in attributes for tag, attributes in parsed.tags)


def test_has_the_numbers_choice_environment_and_command() -> None:
    parsed = Page(page(command="foveate compare --keep 0.5"))
    for one in comparison().rows:
        if one.refused is None:
            assert f"{one.time_ratio:.2f} ({one.time_low:.2f}–{one.time_high:.2f})" in parsed.text
            assert f"{100 * one.agreement:.1f} %" in parsed.text
        else:
            assert one.refused in parsed.text
    for text in ("Choose pyramiddrop at budget 0.5:", "It keeps most", "versions torch", "foveate compare --keep 0.5"):
        assert text in parsed.text
    assert any(a.get("href") == "https://arxiv.org/abs/2410.17247" for t, a in parsed.tags if t == "a")


def test_gallery_has_a_picture_for_every_overlay() -> None:
    parsed = Page(page())
    sources = [a["src"] or "" for t, a in parsed.tags if t == "img"]
    assert len(sources) == len(comparison().overlays)  # dense's is the picture itself
    assert "Asked: what is left ? The right answer is ant. The unchanged model says bee" in parsed.text
    for one in comparison().overlays:
        assert one.answer in parsed.text or one.method == "dense"
    for source in sources:
        Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).verify()


def test_without_a_picture_there_is_no_gallery() -> None:
    assert "<img" not in report_html(comparison(), command="c", model="m")


def test_an_unknown_right_answer_is_not_mentioned() -> None:
    shown = SimpleNamespace(id="a", prompt="what is left ?", expected=None, answer="")
    text = Page(report_html(comparison(shown=shown), picture=PICTURE, model="m", command="c")).text
    assert "right answer" not in text and "The unchanged model says nothing" in text

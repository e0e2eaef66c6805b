"What strangers' files, servers and terminals do: it is said in a sentence, and nothing reaches the terminal raw."

import json

import pytest

from clip475.core.files import LabError, _visible, read_json, write_json, write_text

STEERS = "\x1b]0;a title\x07\x1b[2J \x9b31m \x7f \u202eeht \u2066 \ud83d \udcff"  # ESC, OSC, C1, bidi, halves


def is_safe(text: str) -> bool:
    "Whether a terminal shows `text` and does nothing else."
    return text.isprintable() and _visible(text) == text


# what is shown


def test_what_steers_a_terminal_is_written_out():
    assert is_safe(_visible(STEERS)) and "\\x1b]0;a title\\x07" in _visible(STEERS)
    for kept in ("plain", "é ü 漢字 عربى", "🙂 👩‍🚀", "back\\slash", ""):
        assert _visible(kept) == kept
    assert _visible("a\tb\nc\rd") == "a\\tb\\nc\\rd" and _visible("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def test_a_message_shows_the_name_of_a_file_and_does_not_obey_it():
    assert is_safe(str(LabError(f"{STEERS}.json: there is no such file")))
    assert str(LabError("two\nlines")) == "two\nlines"


# what is written and read


def test_half_an_emoji_is_written_and_comes_back(tmp_path):
    write_json(tmp_path / "a.json", {"captions": [STEERS, "é 🙂"]})
    assert read_json(tmp_path / "a.json") == {"captions": [STEERS, "é 🙂"]}
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert is_safe(text.replace("\n", "")) and "é 🙂" in text
    write_text(tmp_path / "a.md", "half: \ud83d")
    assert (tmp_path / "a.md").read_text(encoding="utf-8") == "half: \\ud83d"


@pytest.mark.parametrize(
    "content, problem",
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"id": %s}' % ("7" * 5_000), "thousands of digits"),
        (json.dumps({"id": 1})[:-1], "line 1"),
    ],
    ids=["lists", "objects", "digits", "cut"],
)
def test_json_that_python_cannot_take(tmp_path, content, problem):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(LabError, match=problem) as caught:
        read_json(tmp_path / "a.json")
    assert str(tmp_path / "a.json") in str(caught.value) and len(str(caught.value)) < 300

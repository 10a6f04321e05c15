from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from agentserve.text.stop import StopStringMatcher

letters = st.text(alphabet="abé", max_size=40)
stops = st.lists(st.text(alphabet="abé", min_size=1, max_size=5), min_size=1, max_size=4)


def naive(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Where the first complete stop string ends, and which one it is."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


@given(text=letters, stops=stops, cuts=st.lists(st.integers(0, 40)), include=st.booleans())
def test_any_cut_gives_what_a_naive_search_finds(text, stops, cuts, include):
    matcher = StopStringMatcher(stops, include=include)
    places = [0, *sorted({min(cut, len(text)) for cut in cuts}), len(text)]
    shown, found = "", None
    for start, end in itertools.pairwise(places):
        safe, matched = matcher.push(text[start:end])
        shown += safe
        if matched is not None:
            found = matched
            break
        seen = text[:end]
        # Exactly the longest possible beginning of a stop string is held back.
        held = max(k for stop in stops for k in range(len(stop)) if seen.endswith(stop[:k]))
        assert shown == seen[: len(seen) - held]
    expected = naive(text, stops)
    if expected is None:
        assert found is None
        assert shown + matcher.flush() == text
    else:
        end, stop = expected
        assert found == stop
        assert shown == text[: end if include else end - len(stop)]
        assert matcher.push("more") == ("", None)
        assert matcher.flush() == ""


def test_false_beginnings_are_released():
    matcher = StopStringMatcher(["</tool>"])
    assert matcher.push("a</to") == ("a", None)
    assert matcher.push("ast") == ("</toast", None)
    assert matcher.push("<") == ("", None)
    assert matcher.push("</") == ("<", None)
    assert matcher.flush() == "</"


def test_of_several_the_first_complete_one_counts():
    assert StopStringMatcher(["abcd", "bc"]).push("xabcd") == ("xa", "bc")
    assert StopStringMatcher(["c", "abc"]).push("xabc") == ("x", "abc")
    assert StopStringMatcher(["aab"]).push("aaab!") == ("a", "aab")

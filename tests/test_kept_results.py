"""What is kept in results/ keeps to its names: a share lies between 0 and 1, and an interval is no point."""

import json
from pathlib import Path

import pytest

RESULTS = sorted((Path(__file__).resolve().parent.parent / "results").glob("*.json"))


def entries(value, path=()):
    "All entries of JSON with the keys that lead to them."
    yield path, value
    if isinstance(value, dict):
        for key, one in value.items():
            yield from entries(one, (*path, key))
    elif isinstance(value, list):
        for i, one in enumerate(value):
            yield from entries(one, (*path, str(i)))


def shares_out_of_range(content):
    return [
        "/".join(path)
        for path, value in entries(content)
        if path and "share of" in path[-1] and isinstance(value, (int, float)) and not 0 <= value <= 1
    ]


def points_for_intervals(content):
    found = []
    for path, value in entries(content):
        if isinstance(value, dict) and {"low", "high"} <= value.keys() and value["low"] == value["high"]:
            found.append("/".join(path))
        named = any("interval" in key or key == "ci" for key in path)
        ends = value[-2:] if isinstance(value, list) and len(value) in (2, 3) else []
        if named and all(isinstance(end, (int, float)) for end in ends) and len(set(ends)) == 1:
            found.append("/".join(path))
    return found


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_shares_and_intervals_are_what_they_are_called(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    assert not shares_out_of_range(content)
    assert not points_for_intervals(content)


def test_a_share_above_one_and_an_interval_without_width_are_found():
    assert shares_out_of_range({"cpu": {"share of the ceiling": 1.014}}) == ["cpu/share of the ceiling"]
    assert points_for_intervals({"place": {"accuracy": 1, "low": 1.0, "high": 1.0}}) == ["place"]
    assert points_for_intervals({"ci": {"R@1": [1.0, 1.0]}, "R@1 interval": [99.1, 100]}) == ["ci/R@1"]

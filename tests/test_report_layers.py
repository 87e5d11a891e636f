"""The time of each layer, drawn: boxes as wide as the time they stand for, under the modules that hold them."""

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

import pytest

from sparsekit.flame import flame, levels

ROWS = [
    ("stem", 2.0, 1.0),
    ("layer1.0.conv1", 3.0, 1.0),
    ("layer1.0.conv2", 1.0, 1.0),
    ("layer1.1.conv1", 2.0, 0.0),
    ("head", 2.0, 2.0),
]


def boxes(side: str, rows: list[tuple[str, float, float]]) -> dict[float, list[tuple[float, float]]]:
    """Start and width in percent of a side's boxes, by the height that they stand at."""
    found: dict[float, list[tuple[float, float]]] = {}
    for rect in ElementTree.fromstring(flame(rows)).iter("rect"):
        if side in rect.attrib["class"].split():
            place = (float(rect.attrib["x"].rstrip("%")), float(rect.attrib["width"].rstrip("%")))
            found.setdefault(float(rect.attrib["y"]), []).append(place)
    return found


def test_a_box_is_as_wide_as_its_time_on_one_scale_for_both() -> None:
    dense, compact = boxes("dense", ROWS), boxes("compact", ROWS)
    assert list(dense.values())[-1] == [(0, 20), (20, 30), (50, 10), (60, 20), (80, 20)]
    assert list(compact.values())[-1] == [(0, 10), (10, 10), (20, 10), (30, 20)]  # what takes no time has no box
    assert max(dense) < min(compact)  # dense above, compact below


@pytest.mark.parametrize("side", ["dense", "compact"])
def test_boxes_of_a_level_follow_each_other_without_gaps(side: str) -> None:
    for places in boxes(side, ROWS).values():
        assert [x + width for x, width in places[:-1]] == pytest.approx([x for x, _ in places[1:]], abs=0.002)


def test_a_network_that_became_slower_fits_too() -> None:
    rows = [(name, compact, dense) for name, dense, compact in ROWS]
    (*_, last) = boxes("compact", rows).values()
    assert last[-1][0] + last[-1][1] == pytest.approx(100)


def test_modules_lie_above_their_layers_and_come_back_where_the_forward_pass_does() -> None:
    names = ["a.0.x", "a.0.y", "a.1.x", "b.x", "a.0.x"]
    found = levels(names)
    assert [[(span.name, span.stop - span.start) for span in level] for level in found] == [
        [("a", 3), ("b", 1), ("a", 1)],
        [("a.0", 2), ("a.1", 1), ("b.x", 1), ("a.0", 1)],
        [(name, 1) for name in names],
    ]
    assert all(after.start == before.stop for level in found for before, after in pairwise(level))


def test_a_depth_that_splits_nothing_is_left_out() -> None:
    names = ["stem", "encoder.layers.0.a", "encoder.layers.0.b", "encoder.layers.1.a", "encoder.layers.1.b"]
    assert [[span.name for span in level] for level in levels(names)] == [
        ["stem", "encoder"],
        ["stem", "encoder.layers.0", "encoder.layers.1"],
        names,
    ]
    assert [len(level) for level in levels(["conv1", "conv2"])] == [2]
    assert [len(level) for level in levels(["one"])] == [1]


def test_however_deep_the_modules_there_are_three_levels() -> None:
    names = [".".join(f"{number:04b}") for number in range(16)]
    assert [len(level) for level in levels(names)] == [2, 4, 16]


def test_names_stand_where_there_is_room_and_on_every_box_when_pointed_at() -> None:
    rows = [("stem", 10.0, 5.0), *((f"layer1.{i}.conv", 0.01, 0.01) for i in range(3))]
    root = ElementTree.fromstring(flame(rows))
    shown = {text.text: text.attrib["class"] for text in root.iter("text") if "name" in text.attrib["class"]}
    assert shown.keys() == {"stem"}
    assert "room-1" in shown["stem"]
    titles = [title.text for group in root.iter("g") for title in group.iter("title")]
    assert "layer1.2.conv: 0.0100 ms dense, 0.0100 ms compact" in titles


def test_what_all_layers_are_in_is_not_repeated_on_every_box() -> None:
    rows = [(f"net.backbone.layer{i}.conv{c}", 1.0, 1.0) for i in (1, 2) for c in (1, 2)]
    names = [
        text.text for text in ElementTree.fromstring(flame(rows)).iter("text") if "on-dense" in text.attrib["class"]
    ]
    assert names == ["layer1", "layer2", "conv1", "conv2", "conv1", "conv2"]


def test_a_wider_screen_has_room_for_more_names() -> None:
    rows = [(f"layer{i}", 1.0, 1.0) for i in range(12)]  # 7 characters need 52 of the 27, 53 and 80 pixels
    styles = {
        text.attrib["class"] for text in ElementTree.fromstring(flame(rows)).iter("text") if text.text == "layer3"
    }
    assert styles == {"name on-dense room-2", "name on-compact room-2"}


def test_nothing_that_takes_time_is_still_a_chart() -> None:
    assert boxes("dense", [("conv", 0.0, 0.0)]) == {}

import gc
import json
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

from objslot.data.segmentation import VideoSegmentation
from objslot.data.sequences import ArraySequence
from objslot.errors import UserError
from objslot.evaluation import (
    evaluate_dataset,
    evaluate_sequence,
    markdown_table,
    plain_table,
    protocols,
    rich_tables,
)
from objslot.evaluation.tables import percent

T, H, W = 5, 48, 64


def boxes(*placed):
    """Index maps with (label, top, left, height, width) boxes moving one pixel to the right each frame."""
    maps = np.zeros((T, H, W), np.uint8)
    for t in range(T):
        for label, top, left, height, width in placed:
            maps[t, top : top + height, left + t : left + t + width] = label
    return maps


LEFT, RIGHT = (10, 5, 16, 16), (20, 36, 20, 20)
TWO = boxes((1, *LEFT), (2, *RIGHT))


def scores(result, protocol):
    return result[protocol]["J"], result[protocol]["F"]


def test_the_annotation_itself_is_perfect_whatever_its_numbers():
    swapped = boxes((7, *LEFT), (3, *RIGHT))
    segmentation = VideoSegmentation("two", swapped, (3, 7))
    for merge in (False, True):
        result = evaluate_sequence(segmentation, ArraySequence("two", TWO), merge_objects=merge)
        if merge:
            assert scores(result, "A") == scores(result, "C") == (1, 1)
            assert result["B"]["J"] < 1  # one proposal cannot be both objects
        else:
            assert scores(result, "A") == scores(result, "B") == scores(result, "C") == (1, 1)
            assert [entry["track"] for entry in result["B"]["objects"]] == [7, 3]
        assert result["regions"] == {"FG-ARI": 1, "FG-ARI_video": 1, "mBO": 1, "mBO_video": 1}


def test_label_free_uses_the_foreground_alone():
    result = evaluate_sequence(VideoSegmentation("two", TWO, (2,)), ArraySequence("two", TWO))
    assert [entry["J"] for entry in result["A"]["objects"]] == [0, 1]
    assert [entry["track"] for entry in result["A"]["objects"]] == [None, 2]
    assert result["B"]["J"] == 1
    nothing = evaluate_sequence(VideoSegmentation("two", TWO), ArraySequence("two", TWO), merge_objects=True)
    assert scores(nothing, "A") == (0, 0)
    absent = VideoSegmentation("two", TWO, (2, 20))
    assert evaluate_sequence(absent, ArraySequence("two", TWO), ["A"])["A"]["J"] == 0.5
    assert evaluate_sequence(absent, ArraySequence("two", TWO), ["A"], merge_objects=True)["A"]["J"] < 1


def test_label_free_union_of_merged_objects():
    background = boxes((5, 0, 0, 8, 8))
    tracks = np.maximum(TWO, background)
    sequence = ArraySequence("two", TWO, merge_objects=True)
    assert scores(evaluate_sequence(VideoSegmentation("two", tracks, (2, 1)), sequence), "A") == (1, 1)
    with_background = evaluate_sequence(VideoSegmentation("two", tracks, (2, 1, 5)), sequence)["A"]["J"]
    inside = (TWO > 0).sum()
    assert with_background == pytest.approx(inside / (inside + (background > 0).sum()))


def test_an_object_without_proposal_counts_where_it_is_absent():
    truth = TWO.copy()
    truth[3:][truth[3:] == 2] = 0
    result = evaluate_sequence(VideoSegmentation("two", boxes((1, *LEFT)), (1,)), ArraySequence("two", truth))
    for protocol in "ABC":
        assert [entry["J"] for entry in result[protocol]["objects"]] == [1, 2 / 5]


def test_official_assigns_once_and_oracle_in_every_frame():
    swapping = TWO.copy()
    swapping[3:] = np.array([0, 2, 1], np.uint8)[TWO[3:]]
    result = evaluate_sequence(VideoSegmentation("two", swapping, (1, 2)), ArraySequence("two", TWO))
    assert scores(result, "B") == (3 / 5, pytest.approx(3 / 5))
    assert scores(result, "C") == (1, 1)
    assert result["B"]["curve"]["J"] == [1, 1, 1, 0, 0]
    assert (result["B"]["curve"]["best"], result["B"]["curve"]["worst"]) == (0, 3)
    assert result["regions"]["FG-ARI"] == 1
    assert result["regions"]["FG-ARI_video"] < 0.2


def test_oracle_draws_on_the_partition():
    halves = boxes((1, 10, 5, 8, 16), (2, 18, 5, 8, 16), (9, *RIGHT))
    halves[halves == 0] = 200
    sequence = ArraySequence("one", boxes((1, *LEFT)))
    segmentation = VideoSegmentation("one", np.zeros_like(halves), (), partition=halves)
    merged = evaluate_sequence(segmentation, sequence, merge_objects=True)
    assert scores(merged, "C") == (1, 1)
    assert scores(merged, "A") == scores(merged, "B") == (0, 0)
    single = evaluate_sequence(segmentation, sequence)
    assert single["C"]["J"] == 0.5


@pytest.mark.parametrize(("inside", "chosen"), [(1, False), (6, True)])
def test_oracle_takes_regions_whose_iou_with_the_object_exceeds_that_with_the_background(inside, chosen):
    truth, region = np.zeros((1, H, W), np.uint8), np.zeros((1, H, W), np.uint8)
    truth[:, 10:20, 10:30] = 1
    region[:, 10:20, 30 - inside : 50 - inside] = 3  # 20 columns, `inside` of them on the object
    region[:, 40:, :] = 4
    sequence = ArraySequence("one", truth, merge_objects=True)
    found = evaluate_sequence(VideoSegmentation("one", region), sequence, ["C"])["C"]["J"]
    assert found == (pytest.approx(inside / (40 - inside)) if chosen else 0)


def test_void_is_left_out_of_the_official_protocol_and_background_in_the_semi_supervised_one():
    truth = TWO.copy()
    truth[:, 40:, 40:] = 255
    tracks = TWO.copy()
    tracks[:, 40:, 40:] = 1
    result = evaluate_sequence(
        VideoSegmentation("two", tracks, (1, 2)),
        ArraySequence("two", truth),
        ["A", "B", "C", "semi-supervised"],
    )
    for protocol in "ABC":
        assert scores(result, protocol) == (1, 1)
    assert result["semi-supervised"]["objects"][0]["J"] < 0.6
    assert len(result["semi-supervised"]["curve"]["J"]) == T - 2
    assert result["semi-supervised"]["curve"]["frames"] == [1, 2, 3]


def test_only_first_frame_objects_count_where_the_data_set_says_so():
    truth = TWO.copy()
    truth[0][truth[0] == 2] = 0
    sequence = ArraySequence("two", truth)
    segmentation = VideoSegmentation("two", np.where(truth == 1, 1, 0).astype(np.uint8), (1,))
    assert evaluate_sequence(segmentation, sequence)["B"]["J"] < 1
    sequence.first_frame_objects = True
    assert evaluate_sequence(segmentation, sequence)["B"]["J"] == 1


@pytest.mark.parametrize(
    ("tracks", "protocols", "message"),
    [
        (TWO[:4], "ABC", "two: masks for 4 frames, but the sequence has 5"),
        (TWO[:, :, :60], "ABC", "two: masks of 60 x 48 pixels, but its frames have 64 x 48"),
        (TWO, "AD", "protocols: got A, D, expected some of A, B, C, semi-supervised"),
        (TWO, [], "protocols: got none"),
        (TWO * 2, ["semi-supervised"], "two: holds track 4, but the sequence has 2 objects"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(tracks, protocols, message):
    with pytest.raises(UserError, match=message):
        evaluate_sequence(VideoSegmentation("two", tracks), ArraySequence("two", TWO), protocols)


def test_an_annotation_without_object_is_an_error():
    with pytest.raises(UserError, match="none: the annotation shows no object in any frame"):
        evaluate_sequence(VideoSegmentation("none", TWO), ArraySequence("none", TWO * 0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tracks": TWO + 20}, "x: tracks holds the number 22; at most 20"),
        ({"tracks": TWO.astype(np.int64)}, r"x: tracks is int64 \(5, 48, 64\); expected uint8"),
        ({"tracks": TWO[0]}, "x: tracks is uint8"),
        ({"tracks": TWO, "foreground": (0,)}, r"x: foreground is \(0,\); expected different track numbers"),
        ({"tracks": TWO, "foreground": (1, 1)}, "x: foreground is"),
        ({"tracks": TWO, "partition": TWO[:2]}, "x: partition has shape"),
    ],
)
def test_a_segmentation_checks_its_fields(fields, message):
    with pytest.raises(UserError, match=message):
        VideoSegmentation("x", **fields)


def shifted(sequence):
    tracks = np.roll(TWO, 3, 2)
    return VideoSegmentation(sequence.name, tracks, (1, 2))


def test_a_data_set_is_judged_one_sequence_at_a_time():
    alive = []

    def segment(sequence):
        alive.append(sequence.name)
        return VideoSegmentation(sequence.name, TWO if sequence.name == "a" else boxes((1, *LEFT)), (1, 2))

    three = boxes((1, *LEFT), (2, *RIGHT), (3, 0, 0, 6, 6))
    sequences = [ArraySequence("a", TWO), ArraySequence("b", three)]
    finished = []
    results = evaluate_dataset(
        segment,
        sequences,
        ("B", "A"),
        dataset="boxes",
        baselines={"shifted": shifted},
        settings={"slots": 16},
        progress=lambda sequence, result: finished.append((sequence.name, result["B"]["J"], len(alive))),
    )
    assert finished == [("a", 1, 1), ("b", 1 / 3, 2)]
    # The mean is over the five objects, not over the two sequences.
    assert results["protocols"]["B"]["J"] == pytest.approx(3 / 5)
    assert results["dataset"] == "boxes"
    assert list(results["protocols"]) == ["B", "A"]
    assert results["settings"] == {"protocols": ["B", "A"], "slots": 16}
    assert 0 < results["baselines"]["shifted"]["A"]["J"] < 0.8
    assert json.loads(json.dumps(results)) == results
    assert results["sequences"]["b"]["B"]["objects"][2]["track"] is None


def test_tables_show_percent_with_one_decimal():
    assert (percent(None), percent(2 / 3), percent(-7e-18), percent(-0.01)) == ("-", "66.7", "0.0", "-1.0")
    results = evaluate_dataset(
        lambda sequence: VideoSegmentation("a", boxes((1, *LEFT)), (1,)),
        [ArraySequence("a", TWO), ArraySequence("b", boxes((1, 10, 5, 16, 16)))],
        ["B"],
        baselines={"shifted": shifted},
    )
    markdown = markdown_table(results).splitlines()
    assert markdown[0] == "| sequence | B J | B F | B J&F |"
    assert markdown[1] == "| --- | ---: | ---: | ---: |"
    assert markdown[2] == "| a | 50.0 | 50.0 | 50.0 |"
    assert markdown[4].startswith("| **mean** | **66.7** |")
    assert markdown[5].startswith("| baseline: shifted |")
    plain = plain_table(results).splitlines()
    assert plain[0].split() == ["sequence", "B", "J", "B", "F", "B", "J&F"]
    assert plain[4].split() == ["mean", "66.7", "66.7", "66.7"]
    first = plain.index("")
    assert len({len(line) for line in plain[:first]}) == 1
    assert plain[first + 1].split() == "method, protocol J J recall J decay F F recall F decay".split()
    assert plain[first + 3].split() == "this run, B 66.7 66.7 0.0 66.7 66.7 0.0".split()
    assert plain[-2].split()[:2] == ["this", "run"] and len(plain[-2].split()) == 6
    assert [(table.row_count, len(table.columns)) for table in rich_tables(results)] == [(4, 4), (2, 7), (2, 5)]


def test_processes_measure_what_one_does(monkeypatch):
    monkeypatch.setattr(protocols, "_FEW_PIXELS", 0)
    sequences = [ArraySequence("a", TWO), ArraySequence("b", boxes((1, *LEFT)))]
    alone, together = (evaluate_dataset(shifted, sequences, workers=count) for count in (1, 2))
    assert alone == together


def test_one_sequence_is_in_memory_at_a_time(monkeypatch):
    monkeypatch.setattr(protocols, "_FEW_PIXELS", 0)
    held, alive = [], []

    def segment(sequence):
        gc.collect()
        alive.append(sum(reference() is not None for reference in held))
        found = shifted(sequence)
        held.append(weakref.ref(found))
        return found

    evaluate_dataset(segment, [ArraySequence(name, TWO) for name in "abcd"], workers=2)
    assert alive == [0, 0, 0, 0]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_processes_end_with_the_one_that_started_them(number, code):
    script = """
import os, signal, sys, time
from objslot.evaluation.workers import side_by_side
def end(*_): raise SystemExit(143)
signal.signal(signal.SIGTERM, end)
# A shell has its background jobs ignore the signal.
signal.signal(signal.SIGINT, signal.default_int_handler)
class Sleeper:
    def sleep(self, k):
        if k < 8:
            os.write(1, b"%d\\n" % os.getpid())
        time.sleep(0.1)
try:
    with side_by_side(Sleeper(), 2) as run:
        run("sleep", range(1000))
except KeyboardInterrupt:
    raise SystemExit(130)
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    workers = {int(child.stdout.readline()) for _ in range(8)}
    assert len(workers) == 2 and child.pid not in workers
    child.send_signal(number)
    error = child.communicate(timeout=60)[1]
    assert child.returncode == code and "Traceback" not in error
    deadline = time.monotonic() + 20
    while any(_runs(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_no_sequence_is_an_error():
    with pytest.raises(UserError, match="sequences is empty"):
        evaluate_dataset(shifted, [])


def test_speed_leaves_room_for_a_full_data_set():
    # DAVIS-2016 has 1376 frames; 60 s on two cores are 87 ms of processor time a frame.
    rng = np.random.default_rng(0)
    truth = np.kron(rng.integers(0, 2, (4, 8, 14)), np.ones((60, 61), int)).astype(np.uint8)
    tracks = np.kron(rng.integers(0, 21, (4, 24, 61)), np.ones((20, 14), int)).astype(np.uint8)
    sequence = ArraySequence("x", truth, merge_objects=True)
    segmentation = VideoSegmentation("x", tracks, (1, 2, 3))
    started = time.process_time()
    evaluate_sequence(segmentation, sequence)
    assert (time.process_time() - started) / 4 < 0.087

"""The README shows what the results say."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="not in a checkout")


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import report

    yield report
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        del sys.modules[name]


def test_readme_and_results_agree(report):
    stale = [path.name for path, text in report.produce(ROOT).items() if path.read_text("utf-8") != text]
    assert not stale, "run python -m benchmarks.report"


def record(name, median, *, mode="forward", status="ok", operation="sinkhorn", ratio=None, **more):
    return {
        "job": "time", "kind": "time", "operation": operation, "shape": "2x3", "sizes": {"batch": 2, "rows": 3},
        "device": "cpu", "dtype": "float32", "threads": 2, "mode": mode, "name": name, "status": status, "note": "",
        "error": 1e-7, "bound": 1e-5, "commit": "abc", "date": "2026-01-02",
        "seconds": {"median": median, "low": median, "high": median}, "samples": 9, "dropped": 0,
        "machine": {"device": "cpu", "cpu": "A processor", "cores": 2, "instruction_set": "avx2"},
        "versions": {"torch": "2.99", "objslot": "0.9"},
        **({} if ratio is None else {"ratio": {"median": ratio, "low": ratio, "high": ratio}}), **more,
    }  # fmt: skip


OURS = record("objslot", 2e-3, limit={"by": "copy", "seconds": 1e-3}, distance=2.0)


def digest(report, *records):
    return report.Digest(list(records), "cpu")


def test_a_row_of_the_readme(report):
    peers = record("log, eager", 9e-3, ratio=4.5), record("log, compiled", 5e-3, ratio=2.5)
    text = digest(report, OURS, *peers).section()
    assert "| sinkhorn 2 x 3 | 2 ms | 4.50x / 2.50x |" in text
    assert "A processor, 2 cores (avx2), PyTorch 2.99, objslot 0.9 at abc, 2026-01-02" in text
    assert "No peer that computes the same was faster" in text


def test_the_first_call_has_a_column_of_its_own(report):
    def first(seconds, **ratio):
        return {"first": {"seconds": {"median": seconds}, **ratio}}

    peer = record("log, eager", 9e-3, ratio=4.5, **first(10e-3, ratio={"median": 2.5}))
    text = digest(report, OURS | first(4e-3), peer).everything()
    assert "| objslot | 2 ms | 2 ms to 2 ms |  | 4 ms | 1.0e-07 |" in text
    assert "| log, eager | 9 ms | 9 ms to 9 ms | 4.50x (4.50x to 4.50x) | 10 ms (2.50x) | 1.0e-07 |" in text


def test_a_faster_peer_is_named(report):
    text = digest(report, OURS, record("log, eager", 1e-3, ratio=0.5)).section()
    assert "* sinkhorn 2 x 3: forward, float32, 2 threads: 0.50x (log, eager)" in text


def test_wrong_and_other_results_are_no_rivals(report):
    wrong = {key: value for key, value in record("bad, eager", 1e-4, status="wrong").items() if key != "seconds"}
    other = record("loose, compiled", 1e-4, status="other result", ratio=0.1, note="computes less")
    found = digest(report, OURS, wrong, other)
    assert "| 2 ms | – / – |" in found.section() and "No peer" in found.section()
    assert "computes less" in found.everything() and "bad, eager" in found.everything()
    assert found.bars() == []


def test_an_op_that_is_wrong_shows_its_status_in_place_of_a_time(report):
    wrong = {key: value for key, value in OURS.items() if key not in ("seconds", "distance")} | {"status": "wrong"}
    text = digest(report, wrong, record("log, eager", 1e-3)).section()
    assert "| sinkhorn 2 x 3 | wrong | – / – |" in text


def test_memory_growth_and_training_tables(report):
    step = {"operation": "training_step", "sizes": {"clips": 2, "frames": 4, "pixels": 256}}
    whole = {"mode": "whole step, encoder frozen", **step}
    points = [{"size": 1, "seconds": 1.0, "peak_bytes": 1}, {"size": 9, "seconds": 9.0, "peak_bytes": 9}]
    found = digest(
        report,
        OURS,
        record("objslot", 0.5, **whole),
        record("authors' formulation", 1.0, ratio=2.0, **whole),
        record("authors' formulation, encoder learns, float32", 3.0, ratio=6.0, status="other result", **whole),
        record("objslot", 0.1, **step | {"mode": "losses"}),
        record("authors' formulation", 0.3, ratio=3.0, **step | {"mode": "losses"}),
        record("objslot", 1, **whole) | {"kind": "memory", "peak_bytes": 64 << 20},
        record("objslot", 1, **step | {"mode": "losses"}) | {"kind": "memory", "peak_bytes": 2 << 20},
        record("authors' formulation", 1, **step | {"mode": "losses"}) | {"kind": "memory", "peak_bytes": 8 << 20},
        record("objslot", 1) | {"kind": "memory", "peak_bytes": 3 << 20},
        record("log, eager", 1) | {"kind": "memory", "peak_bytes": 9 << 20},
        record("objslot", 1) | {
            "kind": "scaling", "axis": "rows", "points": points, "time_exponent": 1.96, "memory_exponent": None,
        },
    )  # fmt: skip
    text = found.section()
    assert "A training step (2 clips of 4 frames, 256 pixels, ViT-S/16, 2 threads)" in text
    assert "| encoder frozen, float32 | 500 ms | 16.0 | 64.0 MiB | 1 s |  | 2.00x | 6.00x |" in text
    assert "| losses | 100 ms | 2.0 MiB | 300 ms | 8.0 MiB | 3.00x |" in text
    text = found.everything()
    assert "| sinkhorn 2 x 3 | 3.0 MiB | log, eager 9.0 MiB |" in text
    assert "| sinkhorn | rows 1 to 9 | objslot | 1.96 |  |" in text


def test_pictures_for_both_backgrounds(report):
    from xml.etree import ElementTree

    from benchmarks import plots

    rows = [("sinkhorn <1>", 10.0, 0.7), ("assign", 40.0, None)]
    light, dark = (plots.bars(rows, name) for name in ("light", "dark"))
    for text in (light, dark):
        root = ElementTree.fromstring(text)
        bars = [part for part in root.iter() if part.tag.endswith("rect") and part.get("height") == str(plots.BAR - 1)]
        assert len(bars) == 3
    assert light != dark


def test_only_the_part_between_the_marks_is_written(report, tmp_path):
    import json

    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "cpu.jsonl").write_text(json.dumps(OURS) + "\n")
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold 99x\n{report.END}\nafter\n")
    text = report.produce(tmp_path)[tmp_path / "README.md"]
    assert text.startswith(f"before\n{report.BEGIN}\n\n") and text.endswith(f"{report.END}\nafter\n")
    assert "old 99x" not in text and "| 2 ms |" in text
    assert set(report.produce(tmp_path)) >= {tmp_path / "docs" / "benchmarks-cpu-dark.svg"}


def test_further_machines_say_where_peers_are_faster_and_leave_the_tables_to_the_documentation(report, tmp_path):
    import json

    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    slower = [OURS, record("log, eager", 1e-3, ratio=0.5)]
    for name, records in (("cpu", [OURS]), ("cpu-other", slower)):
        lines = "".join(json.dumps(line) + "\n" for line in records)
        (tmp_path / "benchmarks" / "results" / f"{name}.jsonl").write_text(lines)
    files = report.produce(tmp_path)
    text = files[tmp_path / "README.md"]
    assert text.count("| 2 ms |") == 1 and "No peer" in text
    assert "another machine" in text and "0.50x (log, eager)" in text
    assert "## cpu-other" in files[tmp_path / "docs" / "benchmarks.md"]
    assert tmp_path / "docs" / "benchmarks-cpu-other-dark.svg" in files

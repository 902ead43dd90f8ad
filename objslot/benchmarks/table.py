"""Records as lines for people."""

from collections.abc import Sequence


def heading(record: dict) -> str:
    sizes = ", ".join(f"{value} {axis}" for axis, value in record["sizes"].items())
    where = f"{record['dtype']}, {record['threads']} thread{'s' if record['threads'] > 1 else ''}"
    return f"{record['operation']} ({sizes}), {where}, {record['mode']}"


def lines(records: Sequence[dict]) -> list[str]:
    """Records of one operation, shape, dtype, number of threads and mode; objslot's is the first."""
    width = max(len(record["name"]) for record in records)
    return [heading(records[0]), *(f"  {record['name']:<{width}}  {_cells(record)}" for record in records)]


def _cells(record: dict) -> str:
    if record["kind"] == "memory":
        return "failed" if record["peak_bytes"] is None else f"peak {size(record['peak_bytes'])}"
    if record["kind"] == "scaling":
        words = [f"time ~ {record['axis']}^{_exponent(record['time_exponent'])}"]
        return ", ".join([*words, f"memory ~ {record['axis']}^{_exponent(record['memory_exponent'])}"])
    note = record["status"] if not record["note"] else f"{record['status']}: {record['note']}"
    if "seconds" not in record:
        if record["status"] == "wrong":
            error = "NaN or infinite" if record["error"] is None else f"{record['error']:.1e}"
            note = f"wrong: error {error}, allowed {record['bound']:.1e}; no speed"
        return note
    seconds = record["seconds"]
    cells = f"{duration(seconds['median'])} ({duration(seconds['low'])} to {duration(seconds['high'])})"
    if "ratio" in record:
        ratio = record["ratio"]
        cells += f"  {times(ratio['median'])} ({times(ratio['low'])} to {times(ratio['high'])})"
    if "distance" in record:
        cells += f"  {times(record['distance'])} the {record['limit']['by']} limit"
    if record["dropped"]:
        cells += f"  {record['dropped']} of {record['samples']} samples dropped"
    if record["status"] == "less exact":
        note = f"less exact: error {record['error']:.1e}, bound {record['bound']:.1e}"
    return cells if record["status"] == "ok" else f"{cells}  {note}"


def duration(seconds: float) -> str:
    units = (("s", 1), ("ms", 1e-3), ("us", 1e-6))
    unit, scale = next((pair for pair in units if seconds >= pair[1]), units[-1])
    return f"{seconds / scale:.3g} {unit}"


def times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"


def size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def _exponent(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}"

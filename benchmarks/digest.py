"""What the results of one run say, as Markdown."""

from collections.abc import Iterator, Sequence

from objslot.benchmarks import runner, table
from objslot.benchmarks.suite import AUTHORS, AUTHORS_LEARNING, TRAINING_STEP, WHOLE_STEP

EAGER, COMPILED = "eager", "compiled"
BOTH = "forward+backward"
# Those that compute the same, be it with more rounding.
SAME = (runner.OK, runner.IMPRECISE)


class Digest:
    """The records of one file.

    Args:
        records: as `objslot.benchmarks.results.read` gives them.
        name: of the file, without its ending.
    """

    def __init__(self, records: Sequence[dict], name: str):
        if not records:
            raise ValueError(f"{name}: no records")
        self.name = name
        self.first = records[0]
        self.groups: dict[tuple, dict[str, dict]] = {}
        for record in records:
            if record["kind"] == "time":
                self.groups.setdefault(_key(record), {})[record["name"]] = record
        self.memory = [record for record in records if record["kind"] == "memory"]
        self.scaling = [record for record in records if record["kind"] == "scaling"]
        self.dates = sorted({record["date"] for record in records})
        self.threads = max(record["threads"] for record in records)

    def section(self) -> str:
        """What the README shows."""
        parts = [
            self._origin(),
            self._picture(),
            "Medians of objslot, called several times in a row, and how many times as long peers took that compute the "
            f"same: PyTorch in eager mode / the fastest of `torch.compile`. float32, {self.threads} threads.",
            _markdown(("", "forward", "eager / compiled", "forward + backward", "eager / compiled"), self._rows()),
            self._slower(),
            self._training(),
            "The sizes' meaning, every peer, spread, dtype and thread count, the first call after others, peak memory, "
            "and growth with the sizes: [docs/benchmarks.md](docs/benchmarks.md).",
        ]
        return "\n\n".join(part for part in parts if part)

    def summary(self) -> str:
        """What the README shows of a machine beside the first: no tables."""
        dtypes = ", ".join(dict.fromkeys(dtype for _, _, dtype, _, _ in self.groups))
        threads = ", ".join(str(count) for count in sorted({count for _, _, _, count, _ in self.groups}))
        origin = f"The same on another machine, {dtypes}, threads: {threads}. {self._origin()}"
        parts = [origin, self._picture(), self._slower()]
        return "\n\n".join(part for part in parts if part)

    def everything(self) -> str:
        """Memory, growth, and all timings with their spread."""
        parts = [f"## {self.name}", self._origin(), *filter(None, (self._memory(), self._scaling())), LEGEND]
        for group in self.groups.values():
            rows = [
                (record["name"], *_everything(record))
                for record in sorted(group.values(), key=lambda record: record["name"] != runner.OURS)
            ]
            parts.append(f"**{table.heading(next(iter(group.values())))}**")
            head = ("", "median", "quartiles", "times objslot", "first call", "error", "remark")
            parts.append(_markdown(head, rows))
        return "\n\n".join(parts)

    def short(self) -> str:
        """One line for each shape in the widest pass: objslot's median, the limit, and the fastest peer."""
        lines = [f"{self.name}: {self._origin()}"]
        for group in self._main():
            ours = group[runner.OURS]
            peers = [row for row in group.values() if row["status"] in SAME and "ratio" in row]
            words = [table.duration(ours["seconds"]["median"]), f"{table.times(ours['distance'])} the limit"]
            if peers:
                fastest = min(peers, key=lambda row: row["ratio"]["median"])
                words.append(f"{fastest['name']} {table.times(fastest['ratio']['median'])}")
            lines.append(f"  {_label(ours):<50} {', '.join(words)}")
        rows = [row for group in self.groups.values() for row in group.values()]
        wrong = sum(row["status"] in (runner.WRONG, runner.FAILED) for row in rows)
        return "\n".join([*lines, f"  {wrong} rows without a speed: wrong or failed"])

    def bars(self) -> list[tuple[str, float, float | None]]:
        """For the picture: label, times faster than eager, times faster than compiled, of the widest pass."""
        found = []
        for group in self._main():
            eager, compiled = _ratio(group, EAGER), _ratio(group, COMPILED)
            if eager is not None:
                found.append((_label(group[runner.OURS]), eager, compiled))
        return found

    def _main(self) -> Iterator[dict[str, dict]]:
        """Groups in float32 with all threads, of every shape the pass that does most."""
        for (operation, shape, dtype, threads, mode), group in self.groups.items():
            if dtype != "float32" or threads != self.threads or operation == TRAINING_STEP:
                continue
            widest = mode == BOTH or (operation, shape, dtype, threads, BOTH) not in self.groups
            if widest and "seconds" in group[runner.OURS]:
                yield group

    def _origin(self) -> str:
        machine, versions = self.first["machine"], self.first["versions"]
        where = machine["device"] if machine["device"] != "cpu" else f"{machine['cpu']}, {machine['cores']} cores"
        dates = " to ".join(sorted({self.dates[0], self.dates[-1]}))
        return (
            f"{where} ({machine['instruction_set']}), PyTorch {versions['torch']}, "
            f"objslot {versions['objslot']} at {self.first['commit']}, {dates}."
        )

    def _picture(self) -> str:
        path = f"docs/benchmarks-{self.name}"
        return (
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{path}-dark.svg">'
            f'<img alt="How many times faster than PyTorch, eager and compiled" src="{path}-light.svg"></picture>'
        )

    def _rows(self) -> Iterator[tuple[str, ...]]:
        shapes = []
        for operation, shape, dtype, threads, _ in self.groups:
            if dtype == "float32" and threads == self.threads and operation != TRAINING_STEP:
                if (operation, shape) not in shapes:
                    shapes.append((operation, shape))
        for operation, shape in shapes:
            cells, head = [], None
            for mode in runner.MODES:
                group = self.groups.get((operation, shape, "float32", self.threads, mode))
                if group is None:
                    cells += ["", ""]
                    continue
                head = group[runner.OURS]
                median = table.duration(head["seconds"]["median"]) if "seconds" in head else head["status"]
                cells += [median, " / ".join(_times(_ratio(group, kind)) for kind in (EAGER, COMPILED))]
            yield (_label(head), *cells)

    def _slower(self) -> str:
        """Every place where a peer that computes the same was faster in the median, with the fastest."""
        found = {}
        for (operation, _, dtype, threads, mode), group in self.groups.items():
            faster = [
                record
                for record in group.values()
                if record["status"] in SAME and "ratio" in record and record["ratio"]["median"] < 1
            ]
            if faster:
                fastest = min(faster, key=lambda record: record["ratio"]["median"])
                words = f"{mode}, {dtype}, {threads} thread{'s' if threads > 1 else ''}"
                found.setdefault(_label(group[runner.OURS], operation), []).append(
                    f"{words}: {_times(fastest['ratio']['median'])} ({fastest['name']})"
                )
        if not found:
            return "No peer that computes the same was faster, at any shape, dtype or number of threads."
        lines = [f"* {label}: {'; '.join(peers)}" for label, peers in found.items()]
        return "Where a peer that computes the same was faster than objslot, the fastest one:\n\n" + "\n".join(lines)

    def _training(self) -> str:
        rows, parts = [], []
        for (operation, _, dtype, _, mode), group in self.groups.items():
            ours, theirs = group.get(runner.OURS), group.get(AUTHORS)
            if operation != TRAINING_STEP or ours is None:
                continue
            if not mode.startswith(WHOLE_STEP):
                peaks = self._peak(ours), self._peak(theirs)
                parts.append((mode, _median(ours), peaks[0], _median(theirs), peaks[1], _ratio_of(theirs)))
                continue
            images = ours["sizes"]["clips"] * ours["sizes"]["frames"]
            rate = f"{images / ours['seconds']['median']:.1f}" if "seconds" in ours else ""
            literal = group.get(AUTHORS_LEARNING) or (theirs if "learns" in mode else None)
            rows.append(
                (f"{mode.removeprefix(WHOLE_STEP + ', ')}, {dtype}", _median(ours), rate, self._peak(ours),
                 _median(theirs), self._peak(theirs), _ratio_of(theirs), _ratio_of(literal))
            )  # fmt: skip
        if not rows:
            return ""
        head = (
            "whole step", "objslot", "images/s", "memory", "authors' formulation, same setting", "memory", "times",
            "times the authors' with a learning encoder in float32",
        )  # fmt: skip
        text = f"A training step ({self._training_sizes()}, ViT-S/16, {self.threads} threads):\n\n"
        text += _markdown(head, rows)
        if parts:
            part = "part, encoder frozen, float32"
            head = (part, "objslot", "memory", "authors' formulation", "memory", "times")
            text += f"\n\n{_markdown(head, parts)}"
        return text

    def _peak(self, record: dict | None) -> str:
        """The peak memory that goes with a time."""
        if record is None:
            return ""
        peaks = (r["peak_bytes"] for r in self.memory if _key(r) == _key(record) and r["name"] == record["name"])
        peak = next(peaks, None)
        return "" if peak is None else table.size(peak)

    def _training_sizes(self) -> str:
        sizes = next(group for key, group in self.groups.items() if key[0] == TRAINING_STEP)
        sizes = next(iter(sizes.values()))["sizes"]
        return f"{sizes['clips']} clips of {sizes['frames']} frames, {sizes['pixels']} pixels"

    def _memory(self) -> str:
        rows, groups = [], {}
        for record in self.memory:
            if record["operation"] != TRAINING_STEP and record["peak_bytes"]:
                groups.setdefault(_key(record), []).append(record)
        for records in groups.values():
            ours, *others = records
            if ours["name"] == runner.OURS:
                words = ", ".join(f"{other['name']} {table.size(other['peak_bytes'])}" for other in others)
                rows.append((_label(ours), table.size(ours["peak_bytes"]), words))
        if not rows:
            return ""
        head = ("peak memory beyond the inputs", "objslot", "peers")
        return _markdown(head, rows)

    def _scaling(self) -> str:
        rows = []
        for record in self.scaling:
            first, last = record["points"][0]["size"], record["points"][-1]["size"]
            words = [
                "" if record[name] is None else f"{record[name]:.2f}" for name in ("time_exponent", "memory_exponent")
            ]
            rows.append((record["operation"], f"{record['axis']} {first} to {last}", record["name"], *words))
        if not rows:
            return ""
        return "Growth, as the exponent of a power law through the larger sizes:\n\n" + _markdown(
            ("", "axis", "", "time", "memory"), rows
        )


LEGEND = """\
Medians of interleaved rounds; a sample of a round is the mean of calls in a row that take 20 ms or more. First call:
that before the sample, which finds the caches as the others left them, and its ratio; not part of the sample. Times
objslot: the median, and the quartiles, of the ratios formed in each round; above 1 the peer is slower. Error: the
relative error against float64 of results and gradients. Limit: the longest of copying what must be read and written,
of the matrix products and of the exponentials, at the rates measured in the same run. A sample that exceeds the third
quartile by three interquartile ranges is dropped and counted."""


def _key(record: dict) -> tuple:
    return tuple(record[name] for name in ("operation", "shape", "dtype", "threads", "mode"))


def _label(record: dict, operation: str | None = None) -> str:
    return f"{operation or record['operation']} {' x '.join(str(size) for size in record['sizes'].values())}"


def _median(record: dict | None) -> str:
    """Of a row, or why it has none."""
    if record is None:
        return ""
    return table.duration(record["seconds"]["median"]) if "seconds" in record else record["status"]


def _ratio_of(record: dict | None) -> str:
    return _times(record["ratio"]["median"]) if record is not None and "ratio" in record else ""


def _ratio(group: dict[str, dict], kind: str) -> float | None:
    """Of the peers that compute the same: the first in eager mode, the fastest compiled."""
    ratios = [
        record["ratio"]["median"]
        for name, record in group.items()
        if record["status"] in SAME and "ratio" in record and (COMPILED in name) == (kind == COMPILED)
    ]
    if not ratios:
        return None
    return ratios[0] if kind == EAGER else min(ratios)


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else table.times(ratio)


def _everything(record: dict) -> tuple[str, ...]:
    error = "" if record.get("error") is None else f"{record['error']:.1e}"
    remark = [] if record["status"] == runner.OK else [record["status"]]
    remark += [record["note"]] if record["note"] else []
    if "seconds" not in record:
        return "", "", "", "", error, ": ".join(remark)
    seconds = record["seconds"]
    quartiles = f"{table.duration(seconds['low'])} to {table.duration(seconds['high'])}"
    ratio = ""
    if "ratio" in record:
        ratio = " ".join(
            (table.times(record["ratio"]["median"]), f"({table.times(record['ratio']['low'])} to",
             f"{table.times(record['ratio']['high'])})")
        )  # fmt: skip
    if "distance" in record:
        remark.append(f"{table.times(record['distance'])} the {record['limit']['by']} limit")
    if record["dropped"]:
        remark.append(f"{record['dropped']} of {record['samples']} samples dropped")
    return table.duration(seconds["median"]), quartiles, ratio, _first_call(record), error, "; ".join(remark)


def _first_call(record: dict) -> str:
    """Steps of training and their parts have none."""
    if "first" not in record:
        return ""
    ratio = record["first"].get("ratio")
    after = "" if ratio is None else f" ({table.times(ratio['median'])})"
    return table.duration(record["first"]["seconds"]["median"]) + after


def _markdown(head: Sequence[str], rows) -> str:
    lines = [f"| {' | '.join(head)} |", f"|---{'|---:' * (len(head) - 1)}|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])

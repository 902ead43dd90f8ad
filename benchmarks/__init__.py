"""The repository's side of the benchmarks: the whole suite on one command, its results, and what the README shows."""

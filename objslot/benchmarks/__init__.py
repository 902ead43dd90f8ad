"""The benchmark suite: every op and module beside what a user would pick instead, and next to the hardware's limit.

`objslot bench` runs it for users; `python -m benchmarks` in the repository runs the whole of it for the README.

A row has a speed only after its result was compared with the float64 reference. The rounds of all contestants are
interleaved, ratios are paired round by round, and what was left out is counted.

    problem.py    Problem, Peer, Operation: what is measured
    operations/   one file for each family of ops: shapes, inputs, least work
    peers/        what a user would run instead
    registry.py   all operations by name
    checking.py   errors against float64, and the bound on them
    timing.py     interleaved rounds, the rule for disturbed samples, paired ratios
    memory.py     peak memory in a fresh process
    limits.py     what the machine can do: matrix products and exponentials a second
    machine.py    what a record says about where it comes from
    runner.py     records, one for each contestant
    table.py      records for people
"""

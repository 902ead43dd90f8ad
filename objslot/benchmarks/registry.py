"""All operations of the suite, by name and in the order in which they run."""

from objslot.benchmarks.operations import propagation, sinkhorn, slots, transport
from objslot.benchmarks.problem import Operation
from objslot.errors import UserError

OPERATIONS: dict[str, Operation] = {
    operation.name: operation for family in (sinkhorn, transport, slots, propagation) for operation in family.OPERATIONS
}


def find(names: list[str] | None) -> list[Operation]:
    """The operations of these names, all of them for none. Raises `UserError` for a name that there is not."""
    for name in names or ():
        if name not in OPERATIONS:
            raise UserError(f"OP: got {name!r}, expected some of {', '.join(OPERATIONS)}")
    return [operation for name, operation in OPERATIONS.items() if not names or name in names]

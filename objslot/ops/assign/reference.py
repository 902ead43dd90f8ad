"""The definition of assign in plain PyTorch: enumeration up to 5 x 5 on any device, augmenting paths above."""

from functools import cache
from itertools import permutations

import torch
from torch import Tensor

LARGEST_ENUMERATED = 5


def assign(scores: Tensor) -> Tensor:
    """index (..., p) int64 that maximises the sum of scores (..., p, q); see `objslot.assign`."""
    scores = scores.detach().double()
    if scores.shape[-1] <= LARGEST_ENUMERATED:
        return _enumerate(scores)
    *batch, p, q = scores.shape
    problems = scores.reshape(-1, p, q).cpu().tolist()
    rows = torch.tensor([_solve(problem) for problem in problems], dtype=torch.int64)
    return rows.reshape(*batch, p).to(scores.device)


@cache
def _choices(p: int, q: int, device: torch.device) -> Tensor:
    # Lexicographic order: the first of several maxima is the smallest row.
    return torch.tensor(list(permutations(range(q), p)), dtype=torch.int64, device=device)


def _enumerate(scores: Tensor) -> Tensor:
    p, q = scores.shape[-2:]
    choices = _choices(p, q, scores.device)
    # Summed row by row, so that every backend rounds alike and sees the same ties.
    total = scores[..., 0, :][..., choices[:, 0]]
    for row in range(1, p):
        total = total + scores[..., row, :][..., choices[:, row]]
    best = total.argmax(-1)
    undefined = (scores.isnan() | (scores == torch.inf)).any(-1).any(-1)
    return choices[best.masked_fill(undefined, 0)]


def _solve(scores: list[list[float]]) -> list[int]:
    """One problem by shortest augmenting paths with dual prices (Jonker and Volgenant 1987)."""
    p, q = len(scores), len(scores[0])
    infinity = float("inf")
    identity = list(range(p))
    if any(value != value or value == infinity for row in scores for value in row):
        return identity
    cost = [[-value for value in row] for row in scores]
    row_price, column_price = [0.0] * p, [0.0] * q
    column_of, row_of = [-1] * p, [-1] * q
    for start in range(p):
        distance, previous = [infinity] * q, [-1] * q
        scanned_rows, scanned = [], [False] * q
        row, reached, end = start, 0.0, -1
        while end < 0:
            scanned_rows.append(row)
            nearest, least = -1, infinity
            for column in range(q):
                if scanned[column]:
                    continue
                through = reached + ((cost[row][column] - row_price[row]) - column_price[column])
                if through < distance[column]:
                    distance[column], previous[column] = through, row
                value = distance[column]
                if value < least or (value == least and nearest >= 0 and row_of[column] < 0 <= row_of[nearest]):
                    nearest, least = column, value
            if nearest < 0 or least == infinity:
                return identity
            reached = least
            scanned[nearest] = True
            if row_of[nearest] < 0:
                end = nearest
            else:
                row = row_of[nearest]
        row_price[start] += reached
        for other in scanned_rows[1:]:
            row_price[other] += reached - distance[column_of[other]]
        for column in range(q):
            if scanned[column]:
                column_price[column] -= reached - distance[column]
        while True:
            row = previous[end]
            row_of[end] = row
            column_of[row], end = end, column_of[row]
            if row == start:
                break
    return _smallest(cost, row_price, column_price, column_of, row_of)


def _smallest(cost, row_price, column_price, column_of, row_of) -> list[int]:
    """The lexicographically smallest of the optimal assignments: exchanges along pairs of no reduced cost.

    A column whose price is 0 may stay free, so free columns and columns of price 0 exchange at will.
    """
    p, q = len(column_of), len(row_of)

    def tight(row, column):
        return (cost[row][column] - row_price[row]) - column_price[column] == 0

    for row in range(p):
        current = column_of[row]
        for candidate in range(current):
            owner = row_of[candidate]
            if not tight(row, candidate) or 0 <= owner < row:
                continue
            path = _exchange(row, candidate, current, column_price, row_of, tight, q)
            if path is None:
                continue
            # Each column of the path goes to the row that reached it.
            for column, taker in path:
                row_of[column] = taker
                if taker >= 0:
                    column_of[taker] = column
            row_of[candidate], column_of[row] = row, candidate
            break
    return column_of


def _exchange(row, candidate, current, column_price, row_of, tight, q):
    """Columns and their new rows (-1: free) that pass from `candidate`, taken by `row`, on to `current`."""
    came_from = {candidate: None}
    queue = [candidate]
    for column in queue:
        owner = row_of[column]
        for after in range(q):
            if after in came_from or 0 <= row_of[after] < row:
                continue
            if not (tight(owner, after) if owner >= 0 else column_price[after] == 0):
                continue
            came_from[after] = column
            if after == current:
                path, at = [], current
                while came_from[at] is not None:
                    path.append((at, row_of[came_from[at]]))
                    at = came_from[at]
                return path
            queue.append(after)
    return None

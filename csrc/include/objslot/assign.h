// Exact assignment of rows to columns that maximises the sum of scores, for many problems.
#pragma once

#include <cstdint>

namespace objslot {

// Problems with at most this many columns are solved by enumeration.
constexpr int64_t largest_enumerated = 5;

// scores (count, rows, columns), contiguous, rows <= columns; index (count, rows). Of several best assignments the
// lexicographically smallest; 0, 1, ... where the scores hold NaN or plus infinity or allow no assignment.
void assign(const double* scores, int64_t count, int64_t rows, int64_t columns, int64_t* index, int threads);

}  // namespace objslot

// What the passes of the loop share: packed weights, and parts of the batch that are worked on together.
#pragma once

#include <vector>

#include "objslot/slot_loop.h"

namespace objslot {

// Parts of one workspace, at multiples of 64 bytes.
class Parts {
 public:
  int64_t take(int64_t bytes) {
    const int64_t begin = used_;
    used_ += (bytes + 63) / 64 * 64;
    return begin;
  }
  int64_t used() const { return used_; }

 private:
  int64_t used_ = 0;
};

inline void* advanced(void* base, int64_t count, int64_t bytes) {
  return base ? static_cast<char*>(base) + count * bytes : nullptr;
}
inline const void* advanced(const void* base, int64_t count, int64_t bytes) {
  return base ? static_cast<const char*>(base) + count * bytes : nullptr;
}

// The rows of slots with their weights yet to be packed, and the matrices to pack.
struct Plan {
  SlotRows rows;
  std::vector<PackedMatrix> matrices;
  int64_t packed = 0;
};
Plan plan_rows(const SlotLoopProblem&, bool backward);

SlotAttentionProblem core(const SlotLoopProblem&, const void* query, const void* constant, const void* mean,
                          const void* inverse);

// Rows of slots that each thread works on in a part of the batch: few enough that what is made of them stays in its
// cache.
constexpr int64_t rows_in_cache = 256;

// Elements of the batch that are worked on together, with rows in whole steps.
int64_t elements_together(const SlotLoopProblem&, int threads);

// Elements [begin, begin + count) of the batch, and what an iteration keeps of the rows from `row` on.
SlotLoopProblem part_of(const SlotLoopProblem&, int64_t begin, int64_t count);
SlotLoopKept kept_from(const SlotLoopProblem&, const SlotLoopKept&, int64_t row);

}  // namespace objslot

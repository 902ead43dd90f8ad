// Sinkhorn transport of values between the frames of clips, both directions of a pair from one score matrix.
#pragma once

#include <cstdint>

#include "objslot/transport.h"

namespace objslot {

// Values, masses and the result have the arithmetic type of the tokens; everything is contiguous.
struct AlignmentProblem {
  Element element;
  const void* tokens;  // (clips, frames, n, features)
  const void* values;  // (clips, frames, n, channels)
  const void* masses;  // (clips, frames, n), null for 1 / n each
  int64_t clips, frames, n, features, channels;
  bool cosine;  // as in TransportProblem
  double shortest;
  double eps;
  int64_t n_iters;
};

struct AlignmentKernels {
  int64_t (*workspace)(const AlignmentProblem&, const SinkhornTables&, bool tiles, int threads);
  // out (clips, frames, n, channels): what each frame gets from the others of its clip.
  void (*run)(const AlignmentProblem&, void* out, const SinkhornTables&, bool tiles, void* workspace, int threads);
};

void align_frames(const AlignmentProblem&, void* out, int threads);

}  // namespace objslot

// Sinkhorn transport of values between pairs of frames, both directions of a pair from one score matrix.
#pragma once

#include <cstdint>

namespace objslot {

// The arithmetic type is double where `wide`, float otherwise; everything has it and is contiguous.
struct PairsProblem {
  bool wide;
  const void* scores;     // (pairs, n, n): rows are the tokens of the first frame, columns of the second; or null
  const float* tokens;    // (frames, n, features), read only without scores: the cosines are made here, on tiles
  int64_t frames, features;
  double shortest;        // the length that shorter tokens count as
  const void* values;     // (frames, n, channels)
  const void* masses;     // (frames, n), null for 1 / n each
  const int64_t* firsts;  // (pairs): frames of the rows
  const int64_t* seconds;
  int64_t pairs, n, channels;
  double eps;
  int64_t n_iters;
};

struct PairsResult {
  void* forth;          // (pairs, n, channels): plan @ values of the second frame
  void* back;           // (pairs, n, channels): plan of the transposed scores @ values of the first frame
  unsigned char* lost;  // (pairs): 1 where scalings left the range of the type and nothing usable was written
};

// Whether the cosines of tokens can be made here; otherwise scores are needed.
bool multiplies_tokens();

struct PairsKernels {
  int64_t (*workspace)(const PairsProblem&, int threads);
  void (*run)(const PairsProblem&, const PairsResult&, void* workspace, int threads);
};

void transport_pairs(const PairsProblem&, const PairsResult&, int threads);

}  // namespace objslot

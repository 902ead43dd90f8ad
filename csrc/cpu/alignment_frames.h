// The frames of a clip as factors of products on tiles of bytes.
#pragma once

#include "digit_products.h"
#include "objslot/alignment.h"

namespace objslot::OBJSLOT_ISA {

// Of the tokens of all frames of a clip.
struct FrameRows {
  int64_t rows;                     // of one frame, padded to whole tiles
  float *square, *size;             // (frames, rows)
  float *row_scale, *column_scale;  // (frames, rows): what brings sums of digits to scores times log2(e) / eps
};

static FrameRows lay_out_rows(Arena& arena, const AlignmentProblem& p) {
  FrameRows d{};
  d.rows = (p.n + 31) / 32 * 32;
  d.square = arena.take<float>(p.frames * d.rows);
  d.size = arena.take<float>(p.frames * d.rows);
  d.row_scale = arena.take<float>(p.frames * d.rows);
  d.column_scale = arena.take<float>(p.frames * d.rows);
  return d;
}

#ifdef OBJSLOT_TILES
OBJSLOT_INLINE const float* tokens_of(const AlignmentProblem& p, int64_t clip, int64_t frame) {
  return static_cast<const float*>(p.tokens) + (clip * p.frames + frame) * p.n * p.features;
}

OBJSLOT_INLINE void measure_frame(const AlignmentProblem& p, int64_t clip, int64_t frame, const FrameRows& d) {
  const int64_t first = frame * d.rows;
  fill(d.square + first, d.rows, 0.f);
  fill(d.size + first, d.rows, 0.f);
  measure_rows(tokens_of(p, clip, frame), p.n, p.features, {d.square + first, d.size + first});
  const Vec<float> exponent = broadcast(static_cast<float>(65536 * 1.44269504088896340736 / p.eps));
  for (int64_t i = first; i < first + d.rows; i += 16) {
    Vec<float> scale = load(d.size + i) * (1.f / digit_range);
    // Rows of the padding have no length.
    if (p.cosine) scale /= (Vec<float>)_mm512_sqrt_ps((__m512)larger(load(d.square + i), broadcast(least_square)));
    store(d.row_scale + i, scale * exponent);
    store(d.column_scale + i, scale);
  }
}

// Whether digits hold the scores of a clip as well as float32 does, or so well that the plan does not feel it. Rows
// must not have one number that is far larger than the others.
OBJSLOT_INLINE bool suited_digits(const AlignmentProblem& p, const FrameRows& d) {
  // The errors of digits that are left out, and of the last one, which are spread evenly.
  const float left_out = 2.81e-8f * __builtin_sqrtf(static_cast<float>(p.features)), last = 4.9e-8f;
  float parts = 0, squares = 0;
  for (int64_t frame = 0; frame < p.frames; ++frame)
    for (int64_t i = frame * d.rows; i < frame * d.rows + p.n; ++i) {
      if (!(d.square[i] >= least_square && d.square[i] <= 1e20f)) return false;
      const float length = p.cosine ? d.square[i] : 1.f;
      parts += d.size[i] * d.size[i] / length;
      squares += d.square[i] / length;
    }
  const float count = static_cast<float>(p.frames * p.n);
  const float part = parts / count, square = squares / count;
  const float error = left_out * part + last * __builtin_sqrtf(part * square);
  // Products in float32 are off by about as much as the first; sums over a row of the plan feel a tenth of the second.
  return error <= 5e-8f * square || error <= 5e-6f * static_cast<float>(p.eps);
}
#endif

}  // namespace objslot::OBJSLOT_ISA

// Products of unit tokens on AMX tiles, at the precision of float32.
//
// A number is split into three of bfloat16, x = h + m + l, which together hold its 24 bits. Of the nine products
// of two such sums the six largest are added in float32: what is left out is below 2^-26 of the lengths.
#pragma once

#include "sinkhorn_passes.h"

#if defined(__AVX512F__) && defined(__linux__)
#define OBJSLOT_TILES

namespace objslot::OBJSLOT_ISA {

constexpr int64_t tile_tokens = 16, tile_features = 32, tile_size = tile_tokens * tile_features;

// The tiles of one frame: (parts, blocks of tokens, blocks of features, 16, 32), once with tokens as rows and
// once as columns.
struct FrameTiles {
  uint16_t* rows;
  uint16_t* columns;
};

// Two tiles are worked on together.
OBJSLOT_INLINE int64_t token_blocks(int64_t n) { return (n + 31) / 32 * 2; }
OBJSLOT_INLINE int64_t feature_blocks(int64_t d) { return (d + tile_features - 1) / tile_features; }
OBJSLOT_INLINE int64_t frame_size(int64_t n, int64_t d) {
  return 3 * token_blocks(n) * feature_blocks(d) * tile_size;
}

// The nearest number of bfloat16, still as a float.
OBJSLOT_INLINE __m512 nearest_bfloat16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512 value = _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(-65536)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_mask_mov_ps(value, nan, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
}

// Transposes 16 x 16 words of 32 bits.
OBJSLOT_INLINE void transpose_tile(const uint16_t* from, uint16_t* to) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_load_si512(from + i * tile_features);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // Now a[4 g + c] holds, in its quarter q, column 4 q + c of rows 4 g to 4 g + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44), high = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee);
    const __m512i low2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44),
                  high2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
    _mm512_store_si512(to + c * tile_features, _mm512_shuffle_i32x4(low, low2, 0x88));
    _mm512_store_si512(to + (4 + c) * tile_features, _mm512_shuffle_i32x4(low, low2, 0xdd));
    _mm512_store_si512(to + (8 + c) * tile_features, _mm512_shuffle_i32x4(high, high2, 0x88));
    _mm512_store_si512(to + (12 + c) * tile_features, _mm512_shuffle_i32x4(high, high2, 0xdd));
  }
}

// Tokens (n, d) brought to length one, those below `shortest` as if they had it, and split into tiles.
static void split_frame(const float* tokens, int64_t n, int64_t d, double shortest, const FrameTiles& frame) {
  const int64_t blocks = token_blocks(n), depth = feature_blocks(d);
  for (int64_t i = 0; i < blocks * tile_tokens; ++i) {
    const float* token = tokens + i * d;
    __m512d even = _mm512_setzero_pd(), odd = even;
    for (int64_t k = 0; i < n && k < d; k += 16) {
      const __m512 x = (__m512)load_upto(token + k, d - k);
      const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
      const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
      even = _mm512_fmadd_pd(low, low, even);
      odd = _mm512_fmadd_pd(high, high, odd);
    }
    const double square = _mm512_reduce_add_pd(_mm512_add_pd(even, odd));
    // A NaN stays.
    const double length = __builtin_sqrt(square < shortest * shortest ? shortest * shortest : square);
    const __m512 scale = _mm512_set1_ps(static_cast<float>(1 / length));
    for (int64_t k = 0; k < depth * tile_features; k += 16) {
      __m512 rest = _mm512_setzero_ps();
      if (i < n && k < d) rest = _mm512_mul_ps(scale, (__m512)load_upto(token + k, d - k));
      for (int part = 0; part < 3; ++part) {
        const __m512 top = nearest_bfloat16(rest);
        uint16_t* tile = frame.rows + ((part * blocks + i / tile_tokens) * depth + k / tile_features) * tile_size;
        _mm256_store_si256(
            reinterpret_cast<__m256i*>(tile + i % tile_tokens * tile_features + k % tile_features),
            _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(top), 16)));
        rest = _mm512_sub_ps(rest, top);
      }
    }
  }
  for (int64_t tile = 0; tile < 3 * blocks * depth; ++tile)
    transpose_tile(frame.rows + tile * tile_size, frame.columns + tile * tile_size);
}

// Tile registers of one thread, all of 16 rows of 64 bytes.
class Tiles {
 public:
  OBJSLOT_INLINE_MEMBER Tiles() {
    alignas(64) uint8_t configuration[64] = {1};
    for (int tile = 0; tile < 8; ++tile) {
      configuration[16 + 2 * tile] = 64;
      configuration[48 + tile] = 16;
    }
    asm volatile("ldtilecfg %0" ::"m"(configuration));
  }
  OBJSLOT_INLINE_MEMBER ~Tiles() { asm volatile("tilerelease" ::); }
};

#define OBJSLOT_TILE_LOAD(tile, base) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(base), "r"(int64_t{64}) : "memory")
#define OBJSLOT_TILE_STORE(tile, base, stride) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(base), "r"(stride) : "memory")
// Accumulators 0 to 3 from rows in 4 and 5, columns in 6 and 7.
#define OBJSLOT_TILE_MULTIPLY                      \
  asm volatile(                                    \
      "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\t"       \
      "tdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\t"       \
      "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n\t"       \
      "tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::        \
          : "memory")

// scores (32 blocks, stride) of the tokens of one frame, rows, and of another, columns.
static void multiply_frames(const FrameTiles& one, const FrameTiles& other, int64_t n, int64_t d, float* scores,
                            int64_t stride) {
  const int64_t blocks = token_blocks(n), depth = feature_blocks(d), bytes = stride * 4;
  const int64_t part = blocks * depth * tile_size, next = depth * tile_size;
  const auto rows = [&](const uint16_t* tile) {
    OBJSLOT_TILE_LOAD(4, tile);
    OBJSLOT_TILE_LOAD(5, tile + next);
  };
  const auto columns = [&](const uint16_t* tile) {
    OBJSLOT_TILE_LOAD(6, tile);
    OBJSLOT_TILE_LOAD(7, tile + next);
  };
  const Tiles tiles;
  for (int64_t i = 0; i < blocks; i += 2)
    for (int64_t j = 0; j < blocks; j += 2) {
      asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3" ::);
      for (int64_t k = 0; k < depth; ++k) {
        const uint16_t* row = one.rows + (i * depth + k) * tile_size;
        const uint16_t* column = other.columns + (j * depth + k) * tile_size;
        rows(row);
        columns(column);
        OBJSLOT_TILE_MULTIPLY;
        columns(column + 2 * part);
        OBJSLOT_TILE_MULTIPLY;
        columns(column + part);
        OBJSLOT_TILE_MULTIPLY;
        rows(row + part);
        OBJSLOT_TILE_MULTIPLY;
        columns(column);
        OBJSLOT_TILE_MULTIPLY;
        rows(row + 2 * part);
        OBJSLOT_TILE_MULTIPLY;
      }
      float* target = scores + i * tile_tokens * stride + j * tile_tokens;
      OBJSLOT_TILE_STORE(0, target, bytes);
      OBJSLOT_TILE_STORE(1, target + tile_tokens, bytes);
      OBJSLOT_TILE_STORE(2, target + tile_tokens * stride, bytes);
      OBJSLOT_TILE_STORE(3, target + tile_tokens * stride + tile_tokens, bytes);
    }
}

}  // namespace objslot::OBJSLOT_ISA
#endif

// The AMX tile registers of a thread, and blocks of 16 x 16 words as vectors.
#pragma once

#include "sinkhorn_simd.h"

#if defined(__AVX512F__) && defined(__linux__)
#define OBJSLOT_TILES

namespace objslot::OBJSLOT_ISA {

// Tile registers of one thread, all of 16 rows of 64 bytes; nothing where they are not used.
class TileRegisters {
 public:
  OBJSLOT_INLINE_MEMBER explicit TileRegisters(bool used = true) : used_(used) {
    if (!used) return;
    alignas(64) uint8_t configuration[64] = {1};
    for (int index = 0; index < 8; ++index) {
      configuration[16 + 2 * index] = 64;
      configuration[48 + index] = 16;
    }
    asm volatile("ldtilecfg %0" ::"m"(configuration));
  }
  OBJSLOT_INLINE_MEMBER ~TileRegisters() {
    if (used_) asm volatile("tilerelease" ::);
  }

 private:
  bool used_;
};

// Transposes 16 x 16 words of 32 bits.
OBJSLOT_INLINE void transpose_block(__m512* rows) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_castps_si512(rows[i]);
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
    rows[c] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(low, low2, 0x88));
    rows[4 + c] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(low, low2, 0xdd));
    rows[8 + c] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(high, high2, 0x88));
    rows[12 + c] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(high, high2, 0xdd));
  }
}

}  // namespace objslot::OBJSLOT_ISA
#endif

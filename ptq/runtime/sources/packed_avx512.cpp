// Vectors of 16: AVX-512 F, BW and VL.
#include "packed_rows.h"
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

namespace {
inline float half_to_float(uint16_t bits) { return _cvtsh_ss(bits); }

struct V {
  static constexpr int W = 16;
  using F = __m512;
  using I = __m512i;
  using Table = __m512;
  static F set(float v) { return _mm512_set1_ps(v); }
  static I set_int(uint32_t v) { return _mm512_set1_epi32(int(v)); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static I load_int(const void* p) { return _mm512_load_si512(p); }
  static I broadcast16(const uint8_t* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static I shuffle(I v, I by) { return _mm512_shuffle_epi8(v, by); }
  static I shift_right(I v, I by) { return _mm512_srlv_epi32(v, by); }
  static I shift_left(I v, I by) { return _mm512_sllv_epi32(v, by); }
  static I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F flip_sign(F v, I sign) {
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(v), sign, _mm512_set1_epi32(int(0x80000000u)), 0x78));
  }
  static Table table(const float* levels, float zero) { return _mm512_sub_ps(_mm512_loadu_ps(levels), set(zero)); }
  template <int BITS> static F lookup(Table t, I codes) { return _mm512_permutexvar_ps(codes, t); }  // reads 4 bits
  static float sum(F v) { return _mm512_reduce_add_ps(v); }
  static void store(float* p, F v, int64_t count) { _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), v); }
};
}  // namespace
#include "packed_rows.inc"
const Functions avx512_functions = {packed_product, packed_values, blocks_product, blocks_values};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

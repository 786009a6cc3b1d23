// Vectors of 8: AVX2 with FMA and F16C.
#include "packed_rows.h"
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace {
inline float half_to_float(uint16_t bits) { return _cvtsh_ss(bits); }

struct V {
  static constexpr int W = 8;
  using F = __m256;
  using I = __m256i;
  struct Table { F low, high; };
  static F set(float v) { return _mm256_set1_ps(v); }
  static I set_int(uint32_t v) { return _mm256_set1_epi32(int(v)); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static I load_int(const void* p) { return _mm256_load_si256(static_cast<const I*>(p)); }
  static I broadcast16(const uint8_t* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static I shuffle(I v, I by) { return _mm256_shuffle_epi8(v, by); }
  static I shift_right(I v, I by) { return _mm256_srlv_epi32(v, by); }
  static I shift_left(I v, I by) { return _mm256_sllv_epi32(v, by); }
  static I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
  static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F flip_sign(F v, I sign) { return _mm256_xor_ps(v, _mm256_and_ps(_mm256_castsi256_ps(sign), _mm256_set1_ps(-0.f))); }
  static Table table(const float* levels, float zero) {
    return {_mm256_sub_ps(_mm256_loadu_ps(levels), set(zero)), _mm256_sub_ps(_mm256_loadu_ps(levels + 8), set(zero))};
  }
  template <int BITS> static F lookup(const Table& t, I codes) {  // bits above the code do not matter
    if constexpr (BITS < 4) return _mm256_permutevar8x32_ps(t.low, codes);
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, codes), _mm256_permutevar8x32_ps(t.high, codes),
                            _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
  }
  static float sum(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static void store(float* p, F v, int64_t count) {
    if (count == W) return _mm256_storeu_ps(p, v);
    alignas(32) float whole[W];
    _mm256_store_ps(whole, v);
    for (int64_t i = 0; i < count; ++i) p[i] = whole[i];
  }
};
}  // namespace
#include "packed_rows.inc"
const Functions avx2_functions = {packed_product, packed_values, blocks_product, blocks_values};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

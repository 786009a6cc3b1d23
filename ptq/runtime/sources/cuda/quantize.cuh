// Activations to integers: absmax scales per 256, the rotation of 256 on tensor cores, and the kernel that writes fragments.
//
// NaN makes a scale of NaN and with it NaN in every output; infinity a scale of infinity and codes of -1, 0 and 1, so that
// outputs become infinite or NaN as the sum does.
#pragma once
#include "common.cuh"

__device__ __forceinline__ void load8(float (&v)[8], const void* x, size_t row, int k, int K, int dtype) {
  if (dtype == BF16 && (K & 7) == 0) {
    uint4 r = make_uint4(0, 0, 0, 0);
    if (k < K) r = ld_act(reinterpret_cast<const uint4*>(reinterpret_cast<const __nv_bfloat16*>(x) + row * K + k));
    const uint32_t w[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) { v[2 * i] = __uint_as_float(w[i] << 16); v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u); }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = k + i < K ? read_value(x, row * K + k + i, dtype) : 0.f;
  }
}
// the largest magnitude of a warp's values; NaN is the largest of all (bits of magnitudes order as integers)
template <int N> __device__ __forceinline__ float absmax(const float (&v)[N]) {
  uint32_t m = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) m = max(m, __float_as_uint(v[i]) & 0x7fffffffu);
  return __uint_as_float(__reduce_max_sync(~0u, m));
}
// the factor of values, and what to do where they are not finite (a branch of the whole warp)
template <int N> __device__ __forceinline__ float factor(float (&v)[N], float amax, float top) {
  if (amax < __uint_as_float(0x7f800000u)) return amax > 0.f ? fminf(top / amax, 3e38f) : 0.f;
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = isinf(v[i]) ? copysignf(1.f, v[i]) : 0.f;
  return 1.f;
}
__device__ __forceinline__ float step(float amax, float top) { return amax < __uint_as_float(0x7f800000u) ? amax / top : amax; }

// eight values to eight int16 = 256*hi + lo, hi and lo as int8 in two words each
__device__ __forceinline__ void quant16(const float (&v)[8], float inv, uint32_t (&hi)[2], uint32_t (&lo)[2], int& sum) {
  sum = 0;
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    int X[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) { X[i] = __float2int_rn(v[4 * w + i] * inv); sum += X[i]; }
    uint32_t p01 = prmt(X[0], X[1], 0x5140), p23 = prmt(X[2], X[3], 0x5140);  // bytes lo0 lo1 hi0 hi1
    uint32_t l = prmt(p01, p23, 0x5410);
    uint32_t Y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) Y[i] = X[i] + 128;
    uint32_t q01 = prmt(Y[0], Y[1], 0x5140), q23 = prmt(Y[2], Y[3], 0x5140);
    hi[w] = prmt(q01, q23, 0x7632);
    lo[w] = l;
  }
}

// The rotation of 256 activations on tensor cores, no shuffles. H256 = H16 x H16: with X[r][c] = x[16r+c], U^T = (H16 X^T) H16: two mma
// for the first factor (bf16 inputs are exact), four for the second (the intermediate split into two bf16: 16 bits).
// Lane (g, q) ends with d[sub][j] = u[128*sub + 32*q + 16*(j&1) + 8*(j>>1) + g] * 16: four values of sub-block q + 4*sub.
__device__ __forceinline__ void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ uint32_t had_pair(int i, int j) {  // bf16 H16[i][j], H16[i][j+1]
  return 0x3F803F80u ^ ((__popc(i & j) & 1) << 15) ^ ((uint32_t)(__popc(i & (j + 1)) & 1) << 31);
}
struct Had {
  uint32_t h[4];
  __device__ __forceinline__ void init(int lane) {
    const int g = lane >> 2, q = lane & 3;
    h[0] = had_pair(g, 2 * q); h[1] = had_pair(g + 8, 2 * q); h[2] = had_pair(g, 2 * q + 8); h[3] = had_pair(g + 8, 2 * q + 8);
  }
};
__device__ __forceinline__ uint32_t pack_bf16(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
__device__ __forceinline__ void rotate_mma(float (&d)[2][4], const Had& H, const void* x /* row + kb*256 */, int valid, const uint32_t* sg, int lane) {
  const int g = lane >> 2, q = lane & 3;
  uint32_t b[2][2];
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const int at = 16 * (g + 8 * t) + 2 * q;
    const uint32_t* p = reinterpret_cast<const uint32_t*>(x) + at / 2;
    b[t][0] = b[t][1] = 0;
    if (at < valid) asm volatile("ld.global.u32 %0, [%1];" : "=r"(b[t][0]) : "l"(p) : "memory");
    if (at + 8 < valid) asm volatile("ld.global.u32 %0, [%1];" : "=r"(b[t][1]) : "l"(p + 4) : "memory");
    const uint32_t s = __ldg(sg + (g + 8 * t) / 2) >> (16 * (g & 1) + 2 * q);
    b[t][0] ^= ((s << 15) & 0x8000u) | ((s << 30) & 0x80000000u);
    b[t][1] ^= ((s << 7) & 0x8000u) | ((s << 22) & 0x80000000u);
  }
  float c[2][4];
#pragma unroll
  for (int t = 0; t < 2; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) { c[t][i] = 0.f; d[t][i] = 0.f; }
    mma_bf16(c[t], H.h[0], H.h[1], H.h[2], H.h[3], b[t][0], b[t][1]);
  }
  uint32_t hi[4], lo[4];  // A operand: (tile 0: c0 c1), (tile 0: c2 c3), (tile 1: c0 c1), (tile 1: c2 c3)
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float u = c[i >> 1][2 * (i & 1)], v = c[i >> 1][2 * (i & 1) + 1];
    hi[i] = pack_bf16(u, v);
    lo[i] = pack_bf16(u - __uint_as_float(hi[i] << 16), v - __uint_as_float(hi[i] & 0xffff0000u));
  }
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    mma_bf16(d[t], hi[0], hi[1], hi[2], hi[3], H.h[t], H.h[2 + t]);
    mma_bf16(d[t], lo[0], lo[1], lo[2], lo[3], H.h[t], H.h[2 + t]);
  }
}
// four values to words of hi and lo int8 of round(v * inv), |round| < 32768
__device__ __forceinline__ void quant_word(const float (&v)[4], float inv, uint32_t& hi, uint32_t& lo) {
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = __float_as_uint(fmaf(v[i], inv, 12582912.f));  // the integer sits in the low mantissa
  lo = prmt(prmt(w[0], w[1], 0x0040), prmt(w[2], w[3], 0x0040), 0x5410);
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] += 128;
  hi = prmt(prmt(w[0], w[1], 0x0051), prmt(w[2], w[3], 0x0051), 0x5410);
}

// four consecutive 256-blocks a CTA, one warp each: mode A16 writes columns 2*(b%4), 2*(b%4)+1 of n-tile b/4, A8 column b%8
template <bool ROTATE, bool UNIFORM, int MODE>
__global__ void __launch_bounds__(128) quantize_kernel(const void* x, const uint32_t* signs, uint8_t* frag, float* xs, int* xsum,
                                                       int K, int KB, int B, int NC, int BP, int GS, int dtype) {
  pdl_trigger();
  const int lane = threadIdx.x & 31, unit = blockIdx.x * 4 + (threadIdx.x >> 5);
  if (unit >= KB * B) return;
  const int kb = unit / B, b = unit % B;
  const float top = MODE == A16 ? 32639.f : 127.f;
  const int nt = MODE == A16 ? b / 4 : b / 8, n = MODE == A16 ? 2 * (b % 4) : b % 8;
  if constexpr (!UNIFORM) {
    const int g = lane >> 2, q = lane & 3;
    float d[2][4];
    float unit_scale = 1.f;
    if constexpr (ROTATE) {
      Had H;
      H.init(lane);
      pdl_wait();
      rotate_mma(d, H, reinterpret_cast<const __nv_bfloat16*>(x) + (size_t)b * K + kb * 256, K - kb * 256, signs + kb * 8, lane);
      unit_scale = 0.0625f;
    } else {
      pdl_wait();
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int k = kb * 256 + 128 * (i >> 2) + 32 * q + 16 * (i & 1) + 8 * (i >> 1 & 1) + g;
        d[i >> 2][i & 3] = k < K ? read_value(x, (size_t)b * K + k, dtype) : 0.f;
      }
    }
    float(&flat)[8] = reinterpret_cast<float(&)[8]>(d);
    const float amax = absmax(flat), inv = factor(flat, amax, top);
#pragma unroll
    for (int sub = 0; sub < 2; ++sub) {
      uint32_t hi, lo;
      quant_word(d[sub], inv, hi, lo);
      uint32_t* out = reinterpret_cast<uint32_t*>(frag) + ((((size_t)(nt * KB + kb) * 4 + sub * 2 + (g >> 2)) * NC + n) * 4 + q) * 4 + (g & 3);
      out[0] = MODE == A16 ? hi : lo;
      if (MODE == A16) out[16] = lo;
    }
    if (lane == 0) xs[kb * BP + b] = step(amax, top) * unit_scale;
    return;
  }
  pdl_wait();
  float v[8];
  load8(v, x, b, kb * 256 + lane * 8, K, dtype);
  const int q = lane & 3, m = lane >> 2;  // which quad lane, which mma
  const float amax = absmax(v), inv = factor(v, amax, top);
  uint32_t hi[2], lo[2];
  int sum;
  quant16(v, inv, hi, lo, sum);
  uint2* out = reinterpret_cast<uint2*>(frag) + ((((size_t)(nt * KB + kb) * 4 + (m >> 1)) * NC + n) * 4 + q) * 2 + (m & 1);
  if (MODE == A16) {
    out[0] = make_uint2(hi[0], hi[1]);
    out[8] = make_uint2(lo[0], lo[1]);
  } else {
    out[0] = make_uint2(lo[0], lo[1]);
  }
  if (lane == 0) xs[kb * BP + b] = step(amax, top);
  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  if (GS == 32) {
    if ((lane & 3) == 0) xsum[(kb * BP + b) * 8 + (lane >> 2)] = sum;
  } else {
    sum += __shfl_xor_sync(~0u, sum, 4);
    if ((lane & 7) == 0) xsum[(kb * BP + b) * 4 + (lane >> 3)] = sum;
  }
}

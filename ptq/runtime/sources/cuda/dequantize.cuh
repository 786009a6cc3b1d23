// A repacked weight as a dense matrix, for large batches: one warp per unit of 16 rows x 256 columns.
#pragma once
#include "product.cuh"

__device__ __forceinline__ void write8(void* out, const float (&v)[8], int row, int column, int N, int K, int dtype) {
  if (row >= N) return;
  const size_t at = (size_t)row * K + column;
  if (dtype == BF16 && column + 8 <= K && (K & 7) == 0) {
    uint4 w = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
    *reinterpret_cast<uint4*>(reinterpret_cast<__nv_bfloat16*>(out) + at) = w;
    return;
  }
  if (dtype == FP16 && column + 8 <= K && (K & 7) == 0) {
    __half2 h[4] = {__floats2half2_rn(v[0], v[1]), __floats2half2_rn(v[2], v[3]), __floats2half2_rn(v[4], v[5]), __floats2half2_rn(v[6], v[7])};
    *reinterpret_cast<uint4*>(reinterpret_cast<__half*>(out) + at) = *reinterpret_cast<uint4*>(h);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (column + i < K) write_value(out, at + i, v[i], dtype);
}

// byte `b` of word `word` (0, 1) of `row` (0, 1) in columns 64 i + 32 j + ..: the code
template <int FMT> __device__ __forceinline__ uint32_t code_at(const uint32_t* w, int i, int j, int row, int word, int b) {
  if constexpr (FMT == U2) return w[2 * i + word] >> (8 * b + 4 * j + 2 * row) & 3u;
  else if constexpr (FMT == U4) return w[4 * i + 2 * row + word] >> (8 * b + 4 * j) & 15u;
  else if constexpr (FMT == U8) return w[8 * i + 4 * j + 2 * row + word] >> (8 * b) & 255u;
  else {
    const uint32_t own = w[3 * i + word] >> (8 * b), last = w[3 * i + 2] >> (8 * b);
    if (row == 0) return own >> (3 * j) & 7u;
    if (j == 0) return (own >> 6 & 3u) << 1 | (last >> (6 + word) & 1u);
    return word ? last & 7u : last >> 3 & 7u;
  }
}

template <int FMT, int GS, bool ASYM>
__global__ void __launch_bounds__(128) dequantize_kernel(const __grid_constant__ Args a) {
  using Un = Unit<FMT, GS, ASYM>;
  const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
  const size_t unit = (size_t)blockIdx.x * 4 + (threadIdx.x >> 5);
  if (unit >= (size_t)((a.N + 15) / 16) * a.KB) return;
  const int tile = unit / a.KB, kb = unit % a.KB;
  Un un;
  un.load(a.codes + unit * (Un::NV * 32) + lane, a.meta + (unit * 8 + g) * Un::G,
          reinterpret_cast<const char*>(a.zeros) + (unit * 8 + g) * Un::ZBYTES, 0);
  uint32_t w[Un::NV * 4];
#pragma unroll
  for (int p = 0; p < Un::NV; ++p) { w[4 * p] = un.w[p].x; w[4 * p + 1] = un.w[p].y; w[4 * p + 2] = un.w[p].z; w[4 * p + 3] = un.w[p].w; }
  float v[8];
  if constexpr (FMT == ITQ3) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float d = h2f(un.m[row] & 0xffffu);
#pragma unroll
      for (int sub = 0; sub < 2; ++sub)
#pragma unroll
        for (int of = 0; of < 4; ++of) {  // codes of the quad's lane `of`: its four lanes write 32 columns side by side
          const uint32_t *own = w + 6 * row + 3 * sub, from = (lane & ~3) | of;
          uint32_t s[4], lo, hi;
          selectors<false>(s, __shfl_sync(~0u, own[0], from), __shfl_sync(~0u, own[1], from), __shfl_sync(~0u, own[2], from));
          table8(lo, hi, un.m[row] >> (16 + 2 * of + 8 * sub));
#pragma unroll
          for (int k = 0; k < 8; ++k) {  // column 8 q + k = 16 b + 8 h + 2 mm + par is nibble 4 par + 2 h + b of word mm
            const int nibble = 4 * (k & 1) + 2 * (q & 1) + (q >> 1);
            v[k] = d * (float)(int8_t)(prmt(lo, hi, s[k >> 1] >> (4 * nibble) & 7u) & 0xffu);
          }
          write8(a.y, v, tile * 16 + g + 8 * row, kb * 256 + 128 * sub + 32 * of + 8 * q, a.N, a.K, a.ydtype);
        }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const int grp = GS == 32 ? 2 * i + j : GS == 64 ? i : i >> 1;
          const float s = scale_of(row ? un.m[grp] >> 16 : un.m[grp] & 0xffffu, a.scale_bf16);
          const int z = ASYM ? un.zero(grp, row) : 1 << (Un::BITS - 1);
#pragma unroll
          for (int k = 0; k < 8; ++k) v[k] = (float)((int)code_at<FMT>(w, i, j, row, k >> 2, k & 3) - z) * s;
          write8(a.y, v, tile * 16 + g + 8 * row, kb * 256 + 64 * i + 32 * j + 8 * q, a.N, a.K, a.ydtype);
        }
  }
}

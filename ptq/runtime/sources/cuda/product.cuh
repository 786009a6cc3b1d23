// y[B,N] = x[B,K] W[N,K]^T for up to 16 vectors: a CTA takes 16 rows, its warps split K, one reduction, no atomics.
#pragma once
#include "quantize.cuh"

// One unit of 16 rows x 256 columns in the registers of a warp. GS: 32, 64 or 128 columns per scale (ITQ3: 64 stands for none).
template <int FMT, int GS, bool ASYM>
struct Unit {
  static constexpr int BITS = FMT == ITQ3 ? 3 : FMT;
  static constexpr int NV = BITS;                                        // uint4 of codes per lane
  static constexpr int G = FMT == ITQ3 ? 2 : 256 / GS;                   // words of scales per lane
  static constexpr int ZBITS = BITS == 8 ? 8 : 4;
  static constexpr int ZBYTES = ASYM ? G * 2 * ZBITS / 8 : 0;            // per g
  uint4 w[NV];
  uint32_t m[G];
  uint32_t z[ZBYTES > 4 ? ZBYTES / 4 : 1];
  // pc, pm, pz: the lane's addresses in the first unit of the warp; off: units from there
  __device__ __forceinline__ void load(const uint4* pc, const uint32_t* pm, const char* pz, int off) {
#pragma unroll
    for (int p = 0; p < NV; ++p) w[p] = ld_stream(pc + off * (NV * 32) + p * 32);
    const uint32_t* sm = pm + off * 8 * G;
    if constexpr (G == 2) {
      const uint2 t = ld_stream2(reinterpret_cast<const uint2*>(sm));
      m[0] = t.x; m[1] = t.y;
    } else {
#pragma unroll
      for (int i = 0; i < G / 4; ++i) {
        const uint4 t = ld_stream(reinterpret_cast<const uint4*>(sm) + i);
        m[4 * i] = t.x; m[4 * i + 1] = t.y; m[4 * i + 2] = t.z; m[4 * i + 3] = t.w;
      }
    }
    if constexpr (ASYM) {
      const char* sz = pz + off * 8 * ZBYTES;
      if constexpr (ZBYTES == 2) z[0] = ld_stream_u16(reinterpret_cast<const uint16_t*>(sz));
      else if constexpr (ZBYTES == 4) z[0] = ld_stream1(reinterpret_cast<const uint32_t*>(sz));
      else {
#pragma unroll
        for (int i = 0; i < ZBYTES / 8; ++i) {
          const uint2 t = ld_stream2(reinterpret_cast<const uint2*>(sz) + i);
          z[2 * i] = t.x; z[2 * i + 1] = t.y;
        }
      }
    }
  }
  __device__ __forceinline__ int zero(int group, int row) const {
    const int at = (group * 2 + row) * ZBITS;
    return (z[at >> 5] >> (at & 31)) & ((1 << ZBITS) - 1);
  }
};

// A uniform format's fields are used where they lie in a byte: code times F1 in the first mma of 64 columns, F2 in the second.
template <int FMT> __device__ __forceinline__ constexpr int f1(int row) { return FMT == U2 ? (row ? 4 : 1) : FMT == U3 ? (row ? 32 : 1) : 1; }
template <int FMT> __device__ __forceinline__ constexpr int f2(int row) { return FMT == U2 ? (row ? 64 : 16) : FMT == U3 ? 8 : FMT == U4 ? 16 : 1; }
template <int FMT> __device__ __forceinline__ constexpr int fm(int row) { return f1<FMT>(row) > f2<FMT>(row) ? f1<FMT>(row) : f2<FMT>(row); }

// operands of both mma of columns 64 i .. 64 i + 63: a0, a2 row g, a1, a3 row g + 8
template <int FMT> __device__ __forceinline__ void operands(uint32_t (&a)[4], uint32_t (&e)[4], const uint32_t* w, int i) {
  if constexpr (FMT == U2) {
    const uint32_t A = w[2 * i], B = w[2 * i + 1];
    a[0] = A & 0x03030303u; a[1] = A & 0x0C0C0C0Cu; a[2] = B & 0x03030303u; a[3] = B & 0x0C0C0C0Cu;
    e[0] = A & 0x30303030u; e[1] = A & 0xC0C0C0C0u; e[2] = B & 0x30303030u; e[3] = B & 0xC0C0C0C0u;
  } else if constexpr (FMT == U3) {
    const uint32_t A = w[3 * i], B = w[3 * i + 1], C = w[3 * i + 2];
    a[0] = A & 0x07070707u; a[2] = B & 0x07070707u;
    a[1] = (A & 0xC0C0C0C0u) | ((C >> 1) & 0x20202020u);
    a[3] = (B & 0xC0C0C0C0u) | ((C >> 2) & 0x20202020u);
    e[0] = A & 0x38383838u; e[2] = B & 0x38383838u;
    e[1] = C & 0x38383838u; e[3] = (C << 3) & 0x38383838u;
  } else if constexpr (FMT == U4) {
    const uint32_t w0 = w[4 * i], w1 = w[4 * i + 1], w2 = w[4 * i + 2], w3 = w[4 * i + 3];
    a[0] = w0 & 0x0F0F0F0Fu; a[2] = w1 & 0x0F0F0F0Fu; a[1] = w2 & 0x0F0F0F0Fu; a[3] = w3 & 0x0F0F0F0Fu;
    e[0] = w0 & 0xF0F0F0F0u; e[2] = w1 & 0xF0F0F0F0u; e[1] = w2 & 0xF0F0F0F0u; e[3] = w3 & 0xF0F0F0F0u;
  } else {
    a[0] = w[8 * i]; a[2] = w[8 * i + 1]; a[1] = w[8 * i + 2]; a[3] = w[8 * i + 3];
    e[0] = w[8 * i + 4]; e[2] = w[8 * i + 5]; e[1] = w[8 * i + 6]; e[3] = w[8 * i + 7];
  }
}

// NT n-tiles of 8 columns, NC columns that exist (of 8), WARPS split K, RT row tiles per warp, LOOP 0: K is exactly WARPS
// blocks, 1: more, with the next unit loaded ahead, 3: more, without; MINT: threads per SM asked of the compiler
template <int FMT, int GS, bool ASYM, int MODE, int NT, int NC, int WARPS, int RT, int LOOP, int MINT>
__global__ void __launch_bounds__(WARPS * 32, MINT / (WARPS * 32)) product_kernel(const __grid_constant__ Args a) {
  using Un = Unit<FMT, GS, ASYM>;
  constexpr bool HILO = MODE != A8;
  constexpr bool MUL = FMT == ITQ3;        // some shifts on the multiplier
  constexpr int BT = HILO ? 4 : 8;         // batch elements per n-tile
  constexpr int BP = NT * BT;              // padded batch
  constexpr int AC = HILO ? 2 : 4;
  constexpr int XU = 4 * NC * 4;           // uint4 of activations per n-tile and unit
  constexpr int BR = NC == 8 ? BP : (HILO ? NC / 2 : NC);
  constexpr int SUMS = GS == 32 ? 8 : 4;
  __shared__ float red[WARPS][RT][16][BR];
  __shared__ uint4 fx[MODE == FUSED ? WARPS : 1][MODE == FUSED ? 32 : 1];

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = lane & 3;
  const int tile0 = blockIdx.x * RT;
  const int KB = a.KB, tiles = (a.N + 15) / 16;
  Un buf[RT];
  int kb0 = warp;
  const size_t unit0 = (size_t)tile0 * KB + kb0;
  const uint4* pc = a.codes + unit0 * (Un::NV * 32) + lane;
  const uint32_t* pm = a.meta + (unit0 * 8 + g) * Un::G;
  const char* pz = reinterpret_cast<const char*>(a.zeros) + (unit0 * 8 + g) * Un::ZBYTES;
  auto load_stage = [&](int kb) {
#pragma unroll
    for (int t = 0; t < RT; ++t)
      if ((!LOOP || kb < KB) && (RT == 1 || tile0 + t < tiles)) buf[t].load(pc, pm, pz, t * KB);
  };
  load_stage(kb0);
  Had H;
  if constexpr (MODE == FUSED && FMT == ITQ3) H.init(lane);
  pdl_trigger();
  pdl_wait();

  const uint4* px = reinterpret_cast<const uint4*>(a.x) + (g & (NC - 1)) * 4 + q;  // columns beyond NC repeat the first ones
  float acc[RT][NT][AC];
#pragma unroll
  for (int t = 0; t < RT; ++t)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int i = 0; i < AC; ++i) acc[t][n][i] = 0.f;

  auto compute = [&](const Un (&cur)[RT], const int kb) {
    uint4 xf[NT][4];
    float xsc[NT][HILO ? 1 : 2];
    int xq[NT][HILO ? 1 : 2][SUMS];
    if constexpr (MODE == FUSED) {
      if constexpr (FMT == ITQ3) {
        float d[2][4];
        rotate_mma(d, H, reinterpret_cast<const __nv_bfloat16*>(a.xraw) + kb * 256, a.K - kb * 256, a.signs + kb * 8, lane);
        float(&flat)[8] = reinterpret_cast<float(&)[8]>(d);
        const float amax = absmax(flat), inv = factor(flat, amax, 32639.f);
        xsc[0][0] = step(amax, 32639.f) * 0.0625f;
        uint32_t* out = reinterpret_cast<uint32_t*>(fx[warp]) + (g >> 2) * 32 + q * 4 + (g & 3);
        __syncwarp();
#pragma unroll
        for (int sub = 0; sub < 2; ++sub) {
          uint32_t hi, lo;
          quant_word(d[sub], inv, hi, lo);
          out[sub * 64] = hi;
          out[sub * 64 + 16] = lo;
        }
        __syncwarp();
      } else {
        float v[8];
        load8(v, a.xraw, 0, kb * 256 + lane * 8, a.K, a.xdtype);
        const float amax = absmax(v), inv = factor(v, amax, 32639.f);
        uint32_t hi[2], lo[2];
        int sum;
        quant16(v, inv, hi, lo, sum);
        xsc[0][0] = step(amax, 32639.f);
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if constexpr (GS != 32) sum += __shfl_xor_sync(~0u, sum, 4);
#pragma unroll
        for (int i = 0; i < SUMS; ++i) xq[0][0][i] = __shfl_sync(~0u, sum, i * (32 / SUMS));
        const int m = lane >> 2, qq = lane & 3;
        uint2* out = reinterpret_cast<uint2*>(fx[warp]) + (((m >> 1) * 2) * 4 + qq) * 2 + (m & 1);
        __syncwarp();
        out[0] = make_uint2(hi[0], hi[1]);
        out[8] = make_uint2(lo[0], lo[1]);
        __syncwarp();
      }
#pragma unroll
      for (int p = 0; p < 4; ++p) xf[0][p] = fx[warp][(p * 2 + (g & 1)) * 4 + q];
    } else {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int p = 0; p < 4; ++p) xf[n][p] = ld_act(px + (n * KB + kb) * XU + p * (NC * 4));
#pragma unroll
        for (int b = 0; b < (HILO ? 1 : 2); ++b) {
          const int at = kb * BP + n * BT + (HILO ? q : 2 * q + b);
          xsc[n][b] = ld_actf(a.xs + at);
          if constexpr (FMT != ITQ3) {
            const uint4* src = reinterpret_cast<const uint4*>(a.xsum) + at * (SUMS / 4);
#pragma unroll
            for (int i = 0; i < SUMS / 4; ++i) {
              const uint4 t = ld_act(src + i);
              xq[n][b][4 * i] = t.x; xq[n][b][4 * i + 1] = t.y; xq[n][b][4 * i + 2] = t.z; xq[n][b][4 * i + 3] = t.w;
            }
          }
        }
      }
    }
#pragma unroll
    for (int t = 0; t < RT; ++t) {
      const Un& un = cur[t];
      uint32_t w[Un::NV * 4];
#pragma unroll
      for (int p = 0; p < Un::NV; ++p) { w[4 * p] = un.w[p].x; w[4 * p + 1] = un.w[p].y; w[4 * p + 2] = un.w[p].z; w[4 * p + 3] = un.w[p].w; }
      if constexpr (FMT == ITQ3) {
        int c[NT][4];
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) c[n][i] = 0;
        const uint32_t r0 = un.m[0] >> (16 + 2 * q), r1 = un.m[1] >> (16 + 2 * q);
#pragma unroll
        for (int sub = 0; sub < 2; ++sub) {
          uint32_t s0[4], s1[4], lo0, hi0, lo1, hi1;
          selectors<MUL>(s0, w[3 * sub], w[3 * sub + 1], w[3 * sub + 2]);
          selectors<MUL>(s1, w[6 + 3 * sub], w[7 + 3 * sub], w[8 + 3 * sub]);
          table8(lo0, hi0, r0 >> (8 * sub));
          table8(lo1, hi1, r1 >> (8 * sub));
#pragma unroll
          for (int mm = 0; mm < 4; ++mm) {
            const uint32_t a0 = prmt(lo0, hi0, s0[mm]), a2 = prmt(lo0, hi0, shr<MUL, 16>(s0[mm]));
            const uint32_t a1 = prmt(lo1, hi1, s1[mm]), a3 = prmt(lo1, hi1, shr<MUL, 16>(s1[mm]));
#pragma unroll
            for (int n = 0; n < NT; ++n) {
              const uint4& xv = xf[n][sub * 2 + (mm >> 1)];
              mma_s8(c[n], a0, a1, a2, a3, (mm & 1) ? xv.z : xv.x, (mm & 1) ? xv.w : xv.y);
            }
          }
        }
        const float d[2] = {h2f(un.m[0] & 0xffffu), h2f(un.m[1] & 0xffffu)};
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int i = 0; i < AC; ++i) {
            if constexpr (HILO) acc[t][n][i] = fmaf(d[i] * xsc[n][0], (float)(c[n][2 * i] * 256 + c[n][2 * i + 1]), acc[t][n][i]);
            else acc[t][n][i] = fmaf(d[i >> 1] * xsc[n][i & 1], (float)c[n][i], acc[t][n][i]);
          }
      } else {
        float gacc[NT][AC];
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int i = 0; i < AC; ++i) gacc[n][i] = 0.f;
        int c1[NT][4], c2[NT][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (GS != 128 || (i & 1) == 0) {
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
              for (int j = 0; j < 4; ++j) { c1[n][j] = 0; c2[n][j] = 0; }
          }
          uint32_t ma[4], me[4];
          operands<FMT>(ma, me, w, i);
#pragma unroll
          for (int n = 0; n < NT; ++n) {
            mma_u8(c1[n], ma[0], ma[1], ma[2], ma[3], xf[n][i].x, xf[n][i].y);
            mma_u8(c2[n], me[0], me[1], me[2], me[3], xf[n][i].z, xf[n][i].w);
          }
          if (GS == 128 && (i & 1) == 0) continue;
          // of each row: the integers of a group, its zero times the sum of its activations taken off
#pragma unroll
          for (int half = 0; half < (GS == 32 ? 2 : 1); ++half) {
            const int grp = GS == 32 ? 2 * i + half : GS == 64 ? i : i >> 1;
#pragma unroll
            for (int row = 0; row < 2; ++row) {
              const float s = scale_of(row ? un.m[grp] >> 16 : un.m[grp] & 0xffffu, a.scale_bf16);
              const int F = GS == 32 ? (half ? f2<FMT>(row) : f1<FMT>(row)) : fm<FMT>(row);
              const int z = (ASYM ? un.zero(grp, row) : 1 << (Un::BITS - 1)) * F;
              const float sf = s * (1.f / F);
#pragma unroll
              for (int n = 0; n < NT; ++n) {
                auto value = [&](int j) {
                  if (GS == 32) return half ? c2[n][j] : c1[n][j];
                  return c1[n][j] * (F / f1<FMT>(row)) + c2[n][j] * (F / f2<FMT>(row));
                };
                auto sum = [&](int b) { return GS == 128 ? xq[n][b][i - 1] + xq[n][b][i] : xq[n][b][grp]; };
                if constexpr (HILO) {
                  gacc[n][row] = fmaf(sf, (float)(value(2 * row) * 256 + value(2 * row + 1) - z * sum(0)), gacc[n][row]);
                } else {
                  gacc[n][2 * row] = fmaf(sf, (float)(value(2 * row) - z * sum(0)), gacc[n][2 * row]);
                  gacc[n][2 * row + 1] = fmaf(sf, (float)(value(2 * row + 1) - z * sum(1)), gacc[n][2 * row + 1]);
                }
              }
            }
          }
        }
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int i = 0; i < AC; ++i) acc[t][n][i] = fmaf(xsc[n][HILO ? 0 : i & 1], gacc[n][i], acc[t][n][i]);
      }
    }
  };

  auto advance = [&]() {
    kb0 += WARPS;
    pc += WARPS * Un::NV * 32; pm += WARPS * 8 * Un::G; pz += WARPS * 8 * Un::ZBYTES;
  };
  if constexpr (LOOP == 0) {
    compute(buf, kb0);
  } else if constexpr (LOOP == 1) {
    while (kb0 < KB) {
      Un cur[RT];
#pragma unroll
      for (int t = 0; t < RT; ++t) cur[t] = buf[t];
      const int now = kb0;
      advance();
      load_stage(kb0);
      compute(cur, now);
    }
  } else {
    while (kb0 < KB) {
      compute(buf, kb0);
      advance();
      load_stage(kb0);
    }
  }

#pragma unroll
  for (int t = 0; t < RT; ++t)
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      if constexpr (HILO) {
        const int b = n * 4 + q;
        if (b < BR) { red[warp][t][g][b] = acc[t][n][0]; red[warp][t][g + 8][b] = acc[t][n][1]; }
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int b = n * 8 + 2 * q + (i & 1);
          if (b < BR) red[warp][t][g + 8 * (i >> 1)][b] = acc[t][n][i];
        }
      }
    }
  __syncthreads();
#pragma unroll 1
  for (int o = threadIdx.x; o < RT * 16 * BR; o += WARPS * 32) {
    const int r = o % (RT * 16), b = o / (RT * 16);
    float s = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) s += red[w][r >> 4][r & 15][b];
    const int row = tile0 * 16 + r;
    if (b < a.B && row < a.N) {
      if (a.bias) s += read_value(a.bias, row, a.ydtype);
      write_value(a.y, (size_t)b * a.N + row, s, a.ydtype);
    }
  }
}

// What all kernels use: streaming loads, programmatic dependent launch, integer products on tensor cores, dtypes.
//
// A weight lies in units of 16 rows x 256 columns, in the register order of mma.m16n8k32 (A operand), so that a lane's codes
// are whole 16-byte loads and a warp's load is 512 contiguous bytes: codes [rows/16][columns/256][NV][32 lanes] uint4.
// Activations are 16-bit integers with a scale per 256: 256*hi + lo are two int8 columns of the same mma.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

enum Format { ITQ3 = 0, U2 = 2, U3 = 3, U4 = 4, U8 = 8 };
enum Mode { A16 = 0, A8 = 1, FUSED = 2 };  // activations: 16 or 8 bits from quantize_kernel, or 16 bits made here
enum Dtype { BF16 = 0, FP16 = 1, FP32 = 2 };

struct Args {
  const uint4* codes;     // [tile][kb][NV][32]
  const uint32_t* meta;   // ITQ3: [tile][kb][g 8][row 2] u32 = scale fp16 | multipliers; U*: [tile][kb][g 8][group][row 2] 16 bits
  const void* zeros;      // U* with zero points: [tile][kb][g 8] of 4 (U8: 8) bits [group][row 2]
  const void* x;          // fragments
  const float* xs;        // [kb][BP]
  const int* xsum;        // [kb][BP][256/64 or 256/32]
  const void* xraw;       // [B][K] (fused)
  const uint32_t* signs;  // [KB][8] (fused rotation)
  const void* bias;       // [N] of the dtype of y, or null
  void* y;                // [B][N]
  int N, KB, B, K;
  int scale_bf16, xdtype, ydtype;
};

__device__ __forceinline__ uint4 ld_stream(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ __forceinline__ uint2 ld_stream2(const uint2* p) {
  uint2 v;
  asm volatile("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
__device__ __forceinline__ uint32_t ld_stream1(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
__device__ __forceinline__ uint32_t ld_stream_u16(const uint16_t* p) {
  uint16_t v;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}
// activations: written by the previous kernel, which may still run when this one starts (PDL): no .nc
__device__ __forceinline__ uint4 ld_act(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ float ld_actf(const float* p) {
  float v;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void pdl_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void pdl_trigger() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

__device__ __forceinline__ uint32_t prmt(uint32_t a, uint32_t b, uint32_t s) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(s));
  return r;
}
__device__ __forceinline__ void mma_s8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_u8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ float h2f(uint32_t bits) { return __half2float(__ushort_as_half((unsigned short)bits)); }

// s >> N on the multiplier instead of the shifter
template <bool MUL, int N> __device__ __forceinline__ uint32_t shr(uint32_t s) {
  if (!MUL) return s >> N;
  uint32_t lo, r;
  asm("{.reg .b64 t; mul.wide.u32 t, %2, %3; mov.b64 {%0,%1}, t;}" : "=r"(lo), "=r"(r) : "r"(s), "n"(1u << (32 - N)));
  return r;
}
// selectors of 32 codes from three words: bits 0-2 of the nibbles are 24 codes, bit 3 of the nibbles the other 8
template <bool MUL> __device__ __forceinline__ void selectors(uint32_t (&s)[4], uint32_t a, uint32_t b, uint32_t c) {
  s[0] = a & 0x77777777u;
  s[1] = b & 0x77777777u;
  s[2] = c & 0x77777777u;
  s[3] = (shr<MUL, 3>(a) & 0x11111111u) | (shr<MUL, 2>(b) & 0x22222222u) | (shr<MUL, 1>(c) & 0x44444444u);
}
// int8 table of a sub-block: levels {1,3,5,8} * R and their negatives; r4: two bits of r in the low bits
__device__ __forceinline__ void table8(uint32_t& lo, uint32_t& hi, uint32_t r) {
  uint32_t R = prmt(0x080A0C0Fu, 0u, (r & 3u) | 0x4440u);
  lo = R * 0x08050301u;
  hi = 0x01010100u - lo;
}


// a scale's 16 bits as float
__device__ __forceinline__ float scale_of(uint32_t bits, int bf16) { return bf16 ? __uint_as_float(bits << 16) : h2f(bits); }
__device__ __forceinline__ float read_value(const void* p, size_t at, int dtype) {
  if (dtype == BF16) return __uint_as_float((uint32_t) reinterpret_cast<const volatile uint16_t*>(p)[at] << 16);
  if (dtype == FP16) return h2f(reinterpret_cast<const volatile uint16_t*>(p)[at]);
  return reinterpret_cast<const volatile float*>(p)[at];
}
__device__ __forceinline__ void write_value(void* p, size_t at, float v, int dtype) {
  if (dtype == BF16) reinterpret_cast<__nv_bfloat16*>(p)[at] = __float2bfloat16(v);
  else if (dtype == FP16) reinterpret_cast<__half*>(p)[at] = __float2half(v);
  else reinterpret_cast<float*>(p)[at] = v;
}

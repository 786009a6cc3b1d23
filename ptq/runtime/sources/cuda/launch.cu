// The library's C functions: pick an instance, launch it on a stream, with programmatic dependent launch where asked.
#include "instances.cuh"

#define DECLARE(B)                                          \
  Instance uniform##B##_product(int gs, bool asym, int path); \
  Product uniform##B##_dequantize(int gs, bool asym);
DECLARE(2) DECLARE(3) DECLARE(4) DECLARE(8)

static Instance product_for(int fmt, int gs, int asym, int path) {
  switch (fmt) {
    case ITQ3: return product_of<ITQ3, 64, false>(path);
    case U2: return uniform2_product(gs, asym, path);
    case U3: return uniform3_product(gs, asym, path);
    case U4: return uniform4_product(gs, asym, path);
    case U8: return uniform8_product(gs, asym, path);
    default: return {nullptr, 0, 0};
  }
}
static Product dequantize_for(int fmt, int gs, int asym) {
  switch (fmt) {
    case ITQ3: return dequantize_kernel<ITQ3, 64, false>;
    case U2: return uniform2_dequantize(gs, asym);
    case U3: return uniform3_dequantize(gs, asym);
    case U4: return uniform4_dequantize(gs, asym);
    case U8: return uniform8_dequantize(gs, asym);
    default: return nullptr;
  }
}
static int launch(const void* fn, size_t grid, int threads, void** args, int pdl, void* stream) {
  if (!fn) return -1;
  if (grid == 0) return 0;
  cudaLaunchConfig_t cfg = {};
  cfg.gridDim = (unsigned)grid;
  cfg.blockDim = threads;
  cfg.stream = (cudaStream_t)stream;
  cudaLaunchAttribute at[1];
  at[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  at[0].val.programmaticStreamSerializationAllowed = 1;
  cfg.attrs = at;
  cfg.numAttrs = pdl ? 1 : 0;
  return (int)cudaLaunchKernelExC(&cfg, fn, args);
}

extern "C" int ptq_product(int fmt, int gs, int asym, int path, const void* codes, const void* meta, const void* zeros, const void* x,
                           const void* xs, const void* xsum, const void* xraw, const void* signs, const void* bias, void* y,
                           int N, int K, int B, int scale_bf16, int xdtype, int ydtype, int pdl, void* stream) {
  const Instance k = product_for(fmt, gs, asym, path);
  Args a = {(const uint4*)codes, (const uint32_t*)meta, zeros, x, (const float*)xs, (const int*)xsum, xraw, (const uint32_t*)signs, bias, y,
            N, (K + 255) / 256, B, K, scale_bf16, xdtype, ydtype};
  if (path == ONE_EXACT && a.KB != k.warps) return -2;
  void* args[] = {&a};
  return launch((const void*)k.fn, k.fn ? (N + 16 * k.tiles - 1) / (16 * k.tiles) : 0, k.warps * 32, args, pdl, stream);
}
extern "C" int ptq_dequantize(int fmt, int gs, int asym, const void* codes, const void* meta, const void* zeros, void* y, int N, int K,
                              int scale_bf16, int ydtype, void* stream) {
  Args a = {(const uint4*)codes, (const uint32_t*)meta, zeros, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, y,
            N, (K + 255) / 256, 0, K, scale_bf16, 0, ydtype};
  void* args[] = {&a};
  return launch((const void*)dequantize_for(fmt, gs, asym), ((size_t)((N + 15) / 16) * a.KB + 3) / 4, 128, args, 0, stream);
}
// path FEW: 16 bits; EIGHT, SIXTEEN: 8 bits
extern "C" int ptq_quantize(int fmt, int path, int rotate, int dtype, const void* x, const void* signs, void* frag, void* xs, void* xsum,
                            int K, int B, int gs, int pdl, void* stream) {
  int KB = (K + 255) / 256, NC = 8, BP = path == FEW ? 4 : path == EIGHT ? 8 : 16;
  const void* fn;
  if (fmt == ITQ3)
    fn = path == FEW ? (rotate ? (const void*)quantize_kernel<true, false, A16> : (const void*)quantize_kernel<false, false, A16>)
                     : (rotate ? (const void*)quantize_kernel<true, false, A8> : (const void*)quantize_kernel<false, false, A8>);
  else
    fn = path == FEW ? (const void*)quantize_kernel<false, true, A16> : (const void*)quantize_kernel<false, true, A8>;
  void* args[] = {&x, &signs, &frag, &xs, &xsum, &K, &KB, &B, &NC, &BP, &gs, &dtype};
  return launch(fn, ((size_t)KB * B + 3) / 4, 128, args, pdl, stream);
}
extern "C" const char* ptq_error(int code) { return code < 0 ? "no such kernel" : cudaGetErrorString((cudaError_t)code); }

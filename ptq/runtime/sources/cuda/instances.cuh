// The kernels of one format, by the columns that share a scale, zero points and activations.
#pragma once
#include "dequantize.cuh"

typedef void (*Product)(const Args);
struct Instance { Product fn; int warps, tiles; };
enum Path { ONE = 0, ONE_EXACT = 1, ONE_MANY_ROWS = 2, FEW = 3, EIGHT = 4, SIXTEEN = 5 };

template <int FMT, int GS, bool ASYM> Instance product_of(int path) {
  switch (path) {
    case ONE: return {product_kernel<FMT, GS, ASYM, FUSED, 1, 2, 16, 1, 3, 1024>, 16, 1};
    case ONE_EXACT: return {product_kernel<FMT, GS, ASYM, FUSED, 1, 2, 16, 1, 0, FMT == ITQ3 || FMT == U8 ? 1024 : 1536>, 16, 1};
    case ONE_MANY_ROWS: return {product_kernel<FMT, GS, ASYM, FUSED, 1, 2, 4, 1, 1, FMT == U8 ? 512 : 768>, 4, 1};
    case FEW: return {product_kernel<FMT, GS, ASYM, A16, 1, 8, 16, 1, 3, 1024>, 16, 1};
    case EIGHT: return {product_kernel<FMT, GS, ASYM, A8, 1, 8, 16, 1, 3, 1024>, 16, 1};
    case SIXTEEN: return {product_kernel<FMT, GS, ASYM, A8, 2, 8, 16, 1, 3, 512>, 16, 1};
    default: return {nullptr, 0, 0};
  }
}
template <int FMT> Instance product_of(int gs, bool asym, int path) {
  if (gs == 32) return asym ? product_of<FMT, 32, true>(path) : product_of<FMT, 32, false>(path);
  if (gs == 64) return asym ? product_of<FMT, 64, true>(path) : product_of<FMT, 64, false>(path);
  return asym ? product_of<FMT, 128, true>(path) : product_of<FMT, 128, false>(path);
}
template <int FMT> Product dequantize_of(int gs, bool asym) {
  if (gs == 32) return asym ? dequantize_kernel<FMT, 32, true> : dequantize_kernel<FMT, 32, false>;
  if (gs == 64) return asym ? dequantize_kernel<FMT, 64, true> : dequantize_kernel<FMT, 64, false>;
  return asym ? dequantize_kernel<FMT, 128, true> : dequantize_kernel<FMT, 128, false>;
}

// The operators torch.ops.ptq_cpu.*: checks, threads and dtypes around the kernels of packed_rows.inc.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "packed_rows.h"

namespace {

bool narrow = false;  // for tests of the AVX2 code on a CPU that has both

const Functions* functions() {
#if defined(__x86_64__)
  static const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return avx512 && !narrow ? &avx512_functions : avx2 ? &avx2_functions : nullptr;
#else
  return nullptr;
#endif
}

std::string vectors() {
#if defined(__x86_64__)
  const Functions* f = functions();
  return f == &avx512_functions ? "AVX-512" : f == &avx2_functions ? "AVX2" : "";
#else
  return "";
#endif
}

constexpr int64_t THREAD_WEIGHTS = 1 << 19;  // fewer are not worth waking a thread for

// Walsh-Hadamard transforms of consecutive blocks, normalised, of values with signs.
void rotate(float* x, const int8_t* signs, at::IntArrayRef sizes) {
  for (const int64_t n : sizes) {
    for (int64_t i = 0; i < n; ++i) x[i] = signs[i] < 0 ? -x[i] : x[i];
    for (int64_t h = 1; h < n; h *= 2)
      for (int64_t i = 0; i < n; i += 2 * h)
        for (int64_t j = i; j < i + h; ++j) {
          const float low = x[j], high = x[j + h];
          x[j] = low + high;
          x[j + h] = low - high;
        }
    const float scale = 1.0f / std::sqrt(float(n));
    for (int64_t i = 0; i < n; ++i) x[i] *= scale;
    x += n;
    signs += n;
  }
}

void check_rotation(const std::optional<at::Tensor>& signs, at::IntArrayRef sizes, int64_t columns) {
  if (!signs) return;
  int64_t total = 0;
  for (const int64_t n : sizes) {
    TORCH_CHECK(n > 0 && (n & (n - 1)) == 0, "a block of ", n);
    total += n;
  }
  TORCH_CHECK(total == columns && signs->numel() == columns && signs->scalar_type() == at::kChar && signs->is_contiguous());
}

struct Inputs {  // float32 rows, zero beyond the last column, rotated where there are signs
  int64_t batch, padded, stride;
  std::vector<float> values;
  Inputs(const at::Tensor& x, int64_t columns, const std::optional<at::Tensor>& signs, at::IntArrayRef sizes) {
    check_rotation(signs, sizes, columns);
    const at::Tensor rows = x.reshape({-1, columns}).contiguous();
    batch = rows.size(0);
    padded = batch <= 2 ? batch : batch <= 4 ? 4 : (batch + 7) / 8 * 8;
    stride = (columns + 15) / 16 * 16;
    values.assign(padded * stride, 0.f);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, rows.scalar_type(), "inputs", [&] {
      const scalar_t* from = rows.const_data_ptr<scalar_t>();
      for (int64_t b = 0; b < batch; ++b)
        for (int64_t c = 0; c < columns; ++c) values[b * stride + c] = static_cast<float>(from[b * columns + c]);
    });
    if (signs)
      for (int64_t b = 0; b < batch; ++b) rotate(values.data() + b * stride, signs->const_data_ptr<int8_t>(), sizes);
  }
};

template <class W>
at::Tensor product(const W& w, void (*kernel)(const W&, const float*, int64_t, int, float*, int64_t, int64_t),
                   const at::Tensor& x, const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& signs,
                   at::IntArrayRef sizes) {
  const Inputs in(x, w.columns, signs, sizes);
  std::vector<float> y(in.padded * w.rows);
  const int64_t step = in.padded < 8 ? in.padded : 8;
  const int64_t grain = std::max<int64_t>(8, THREAD_WEIGHTS / std::max<int64_t>(1, w.columns * step));
  at::parallel_for(0, w.rows, grain, [&](int64_t first, int64_t last) {
    for (int64_t b = 0; b < in.padded; b += step)
      kernel(w, in.values.data() + b * in.stride, in.stride, int(step), y.data() + b * w.rows, first, last);
  });
  if (bias) {
    const at::Tensor added = bias->to(x.scalar_type()).to(at::kFloat).contiguous();
    const float* from = added.const_data_ptr<float>();
    for (int64_t b = 0; b < in.batch; ++b)
      for (int64_t r = 0; r < w.rows; ++r) y[b * w.rows + r] += from[r];
  }
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = w.rows;
  at::Tensor out = at::empty(shape, x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, out.scalar_type(), "outputs", [&] {
    scalar_t* to = out.data_ptr<scalar_t>();
    for (int64_t i = 0; i < in.batch * w.rows; ++i) to[i] = static_cast<scalar_t>(y[i]);
  });
  return out;
}

at::Tensor rotated(const at::Tensor& x, const at::Tensor& signs, at::IntArrayRef sizes) {
  const int64_t columns = x.size(-1);
  check_rotation(signs, sizes, columns);
  at::Tensor out = x.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true).contiguous();
  float* values = out.data_ptr<float>();
  at::parallel_for(0, out.numel() / columns, std::max<int64_t>(1, THREAD_WEIGHTS / 8 / columns), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) rotate(values + r * columns, signs.const_data_ptr<int8_t>(), sizes);
  });
  return out;
}

template <class W>
at::Tensor values(const W& w, void (*kernel)(const W&, float*, int64_t, int64_t), int64_t first, int64_t last) {
  TORCH_CHECK(0 <= first && first <= last && last <= w.rows, "rows ", first, " to ", last, " of ", w.rows);
  at::Tensor out = at::empty({last - first, w.columns}, at::kFloat);
  float* to = out.data_ptr<float>();
  at::parallel_for(first, last, std::max<int64_t>(8, THREAD_WEIGHTS / w.columns), [&](int64_t from, int64_t until) {
    kernel(w, to + (from - first) * w.columns, from, until);
  });
  return out;
}

struct PackedTensors {  // a view of the tensors, which outlive the call
  Packed w;
  float table[256], levels[16];
  PackedTensors(const at::Tensor& codes, const at::Tensor& scale, const std::optional<at::Tensor>& zeros,
                const std::optional<at::Tensor>& scale_table, const at::Tensor& level, int64_t bits, double zero, double least,
                int64_t group, int64_t rows, int64_t columns) {
    TORCH_CHECK(functions() != nullptr, "this CPU has no AVX2");
    TORCH_CHECK(codes.is_contiguous() && scale.is_contiguous() && codes.size(0) == rows && scale.size(0) == rows);
    TORCH_CHECK(2 <= bits && bits <= 8 && group > 0 && level.numel() == 16 && level.scalar_type() == at::kFloat);
    w.codes = static_cast<const uint8_t*>(codes.const_data_ptr());
    w.bytes = codes.nbytes();
    w.row_bytes = rows ? w.bytes / rows : 0;
    w.bits = int(bits);
    TORCH_CHECK(w.row_bytes * 8 >= columns * bits, "rows of ", w.row_bytes, " bytes hold no ", columns, " codes");
    std::copy_n(level.const_data_ptr<float>(), 16, levels);
    w.levels = levels;
    w.scale = scale.const_data_ptr();
    w.scale_kind = scale.scalar_type() == at::kHalf ? HALF : scale.scalar_type() == at::kBFloat16 ? BFLOAT : scale.element_size() == 1 ? BYTE : SINGLE;
    if (w.scale_kind == BYTE) {
      TORCH_CHECK(scale_table && scale_table->numel() == 256 && scale_table->scalar_type() == at::kFloat);
      std::copy_n(scale_table->const_data_ptr<float>(), 256, table);
    }
    w.scale_table = table;
    w.least = float(least);
    w.zero = float(zero);
    w.group = group;
    w.groups = (columns + group - 1) / group;
    TORCH_CHECK(scale.numel() == rows * w.groups, "scales of ", rows, " x ", w.groups, " groups");
    w.zeros = nullptr;
    if (zeros) {
      TORCH_CHECK(zeros->is_contiguous() && zeros->scalar_type() == at::kInt && zeros->numel() == (rows * bits + 31) / 32 * w.groups);
      w.zeros = zeros->const_data_ptr<int32_t>();
    }
    w.rows = rows;
    w.columns = columns;
    TORCH_CHECK(group % 16 == 0 || w.groups == 1, "groups of ", group);
  }
};

at::Tensor packed_product(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scale, const std::optional<at::Tensor>& zeros,
                          const std::optional<at::Tensor>& scale_table, const at::Tensor& levels, int64_t bits, double zero,
                          double least, int64_t group, int64_t rows, int64_t columns, const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& signs,
                          at::IntArrayRef sizes) {
  const PackedTensors p(codes, scale, zeros, scale_table, levels, bits, zero, least, group, rows, columns);
  return product(p.w, functions()->packed_product, x, bias, signs, sizes);
}

at::Tensor packed_values(const at::Tensor& codes, const at::Tensor& scale, const std::optional<at::Tensor>& zeros,
                         const std::optional<at::Tensor>& scale_table, const at::Tensor& levels, int64_t bits, double zero, double least,
                         int64_t group, int64_t rows, int64_t columns, int64_t first, int64_t last) {
  const PackedTensors p(codes, scale, zeros, scale_table, levels, bits, zero, least, group, rows, columns);
  return values(p.w, functions()->packed_values, first, last);
}

Blocks blocks(const at::Tensor& words, const at::Tensor& multipliers, const at::Tensor& magnitudes, int64_t sub, double least, int64_t rows, int64_t columns) {
  TORCH_CHECK(functions() != nullptr, "this CPU has no AVX2");
  TORCH_CHECK(words.is_contiguous() && words.scalar_type() == at::kInt && words.size(0) == rows);
  TORCH_CHECK((sub == 32 && multipliers.numel() == 4) || (sub == 16 && multipliers.numel() == 8), "sub-blocks of ", sub);
  TORCH_CHECK(multipliers.scalar_type() == at::kFloat && magnitudes.scalar_type() == at::kFloat && magnitudes.numel() == 4);
  const int64_t head = sub == 32 ? 1 : 2, rest = columns % 256;
  const int64_t need = columns / 256 * (head + 24) + (rest ? head + (rest + 15) / 16 + (rest + 31) / 32 : 0);
  TORCH_CHECK(words.size(1) == need, "rows of ", words.size(1), " words, ", columns, " columns take ", need);
  Blocks w{reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>()), need, int(sub), multipliers.const_data_ptr<float>(), {}, float(least), rows, columns};
  std::copy_n(magnitudes.const_data_ptr<float>(), 4, w.magnitudes);
  return w;
}

at::Tensor blocks_product(const at::Tensor& x, const at::Tensor& words, const at::Tensor& multipliers, const at::Tensor& magnitudes,
                          int64_t sub, double least, int64_t rows, int64_t columns, const std::optional<at::Tensor>& bias,
                          const std::optional<at::Tensor>& signs, at::IntArrayRef sizes) {
  return product(blocks(words, multipliers, magnitudes, sub, least, rows, columns), functions()->blocks_product, x, bias, signs, sizes);
}

at::Tensor blocks_values(const at::Tensor& words, const at::Tensor& multipliers, const at::Tensor& magnitudes, int64_t sub,
                         double least, int64_t rows, int64_t columns, int64_t first, int64_t last) {
  return values(blocks(words, multipliers, magnitudes, sub, least, rows, columns), functions()->blocks_values, first, last);
}

}  // namespace

// Shapes without values (torch.compile) are in cpu_products.py.
TORCH_LIBRARY(ptq_cpu, m) {
  m.def("vectors() -> str", vectors);
  m.def("use_avx2(bool only) -> ()", [](bool only) { narrow = only; });
  m.def("rotated(Tensor x, Tensor signs, int[] sizes) -> Tensor");
  m.def("packed_product(Tensor x, Tensor codes, Tensor scale, Tensor? zeros, Tensor? scale_table, Tensor levels, int bits, "
        "float zero, float least, int group, int rows, int columns, Tensor? bias, Tensor? signs, int[] sizes) -> Tensor");
  m.def("packed_values(Tensor codes, Tensor scale, Tensor? zeros, Tensor? scale_table, Tensor levels, int bits, float zero, "
        "float least, int group, int rows, int columns, int first, int last) -> Tensor");
  m.def("blocks_product(Tensor x, Tensor words, Tensor multipliers, Tensor magnitudes, int sub, float least, int rows, "
        "int columns, Tensor? bias, Tensor? signs, int[] sizes) -> Tensor");
  m.def("blocks_values(Tensor words, Tensor multipliers, Tensor magnitudes, int sub, float least, int rows, int columns, "
        "int first, int last) -> Tensor");
}

TORCH_LIBRARY_IMPL(ptq_cpu, CPU, m) {
  m.impl("rotated", rotated);
  m.impl("packed_product", packed_product);
  m.impl("packed_values", packed_values);
  m.impl("blocks_product", blocks_product);
  m.impl("blocks_values", blocks_values);
}

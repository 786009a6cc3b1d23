// Rows of a packed weight as the CPU kernels read them: straight from the checkpoint's tensors, nothing is repacked.
#pragma once
#include <cstdint>

enum ScaleKind { HALF = 0, BFLOAT = 1, BYTE = 2, SINGLE = 3 };

// Codes as one little-endian stream of bits per row, a scale per group.
struct Packed {
  const uint8_t* codes;
  int64_t row_bytes, bytes;  // of a row; of the whole tensor, beyond which nothing is read
  int bits;
  const float* levels;  // 16, for codes of up to 4 bits; wider codes are their own level
  const void* scale;    // [rows, groups]
  int scale_kind;
  const float* scale_table;  // 256 values, for scales of one byte
  float least;               // scales below it are raised to it
  const int32_t* zeros;      // packed along the rows, [ceil(rows * bits / 32), groups]; null: `zero` for all
  float zero;
  int64_t group, groups, rows, columns;
};

// Blocks of 256 columns with their own scales in front (ptq/number_formats/rotated/block_codes.py).
struct Blocks {
  const uint32_t* words;
  int64_t row_words;
  int sub;                     // columns per multiplier, 32 or 16
  const float* multipliers;    // 4 or 8
  float magnitudes[4];
  float least;
  int64_t rows, columns;
};

// Functions of one instruction set. x: [batch, stride] float32, zero from `columns` to a multiple of 16.
struct Functions {
  void (*packed_product)(const Packed&, const float* x, int64_t stride, int batch, float* y, int64_t first, int64_t last);
  void (*packed_values)(const Packed&, float* out, int64_t first, int64_t last);
  void (*blocks_product)(const Blocks&, const float* x, int64_t stride, int batch, float* y, int64_t first, int64_t last);
  void (*blocks_values)(const Blocks&, float* out, int64_t first, int64_t last);
};
// y: [batch, rows]; columns first..last of it are written. batch is 1, 2, 4 or 8.
extern const Functions avx2_functions, avx512_functions;

// The kernels for AVX2, FMA and F16C.
#include "isa.h"

#include <immintrin.h>
#include <omp.h>

#include <cmath>
#include <cstring>
#include <type_traits>

namespace avx2 {
// Of a row of activations in blocks of 32, the first halves of so many lie side by side, then their second halves.
constexpr int SIDE_BY_SIDE = 2;
constexpr int TILED_ROWS = 0;
#include "formats.inl"
#include "vector_avx2.inl"
#include "levels_avx2.inl"
#include "scales.inl"
#include "eight_avx2.inl"
#include "rows.inl"
#include "rows_avx2.inl"
#include "wanted.inl"
#include "micro_avx2.inl"
#include "panel.inl"
#include "matmul.inl"
#include "exponential.inl"
#include "small.inl"
#include "attention.inl"
#include "blocks.inl"
#include "packing.inl"
}  // namespace avx2

extern const Kernels AVX2_KERNELS = {
    avx2::matmul, avx2::scratch_bytes, avx2::rms_norm, avx2::gated, avx2::rotate, avx2::pack, avx2::attention,
    avx2::attention_floats, avx2::blocks_bytes, avx2::blocks,
};

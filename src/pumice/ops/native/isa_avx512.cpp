// The kernels for AVX-512 (F, BW, DQ, VL, VNNI).
#include "isa.h"

#include <immintrin.h>
#include <omp.h>

#include <cmath>
#include <cstring>
#include <type_traits>

namespace avx512 {
// Of a row of activations in blocks of 32, the first halves of so many lie side by side, then their second halves.
constexpr int SIDE_BY_SIDE = 4;
#include "formats.inl"
#include "vector_avx2.inl"
#include "levels_avx2.inl"
#include "scales.inl"
#include "eight_avx2.inl"
#include "rows.inl"
#include "rows_avx512.inl"
#include "micro_avx512.inl"
#include "panel.inl"
#include "matmul.inl"
#include "small.inl"
#include "attention.inl"
#include "blocks.inl"
#include "packing.inl"
}  // namespace avx512

extern const Kernels AVX512_KERNELS = {
    avx512::matmul, avx512::scratch_bytes, avx512::rms_norm, avx512::gated, avx512::rotate, avx512::pack, avx512::attention,
    avx512::attention_floats, avx512::blocks_bytes, avx512::blocks,
};

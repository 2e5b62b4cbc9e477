// The kernels for AVX-512 (F, BW, DQ, VL, VNNI).
#include "isa.h"

#include <immintrin.h>
#include <omp.h>

#include <cmath>
#include <cstring>
#include <type_traits>

namespace avx512 {
constexpr int TILED_ROWS = 0;
#include "sets_avx512.inl"
}  // namespace avx512

extern const Kernels AVX512_KERNELS = {
    avx512::matmul, avx512::scratch_bytes, avx512::rms_norm, avx512::gated, avx512::rotate, avx512::pack, avx512::attention,
    avx512::attention_floats, avx512::blocks_bytes, avx512::blocks,
};

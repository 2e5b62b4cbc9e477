// The kernels for AVX-512 (F, BW, DQ, VL, VNNI, BF16) with AMX (TILE, BF16, INT8).
#include "isa.h"

#include <immintrin.h>
#include <omp.h>

#include <cmath>
#include <cstring>
#include <type_traits>

namespace amx {
// From so many rows of activations on tiles of bfloat16 are faster than those of bytes.
constexpr int TILED_ROWS = 48;
#include "sets_avx512.inl"
#include "tiles_amx.inl"
#include "bytes_amx.inl"
}  // namespace amx

extern const Kernels AMX_KERNELS = {
    amx::matmul, amx::scratch_bytes, amx::rms_norm, amx::gated, amx::rotate, amx::pack, amx::attention,
    amx::attention_floats, amx::blocks_bytes, amx::blocks,
};

// The kernels for any CPU.
#include "isa.h"

#include <omp.h>

#include <cmath>
#include <cstring>
#include <type_traits>

namespace portable {
// Of a row of activations in blocks of 32, the first halves of so many lie side by side, then their second halves.
constexpr int SIDE_BY_SIDE = 1;
constexpr int TILED_ROWS = 0;
#include "formats.inl"
#include "halves_portable.inl"
#include "vector_portable.inl"
#include "scales.inl"
#include "rows.inl"
#include "rows_portable.inl"
#include "matmul.inl"
#include "exponential.inl"
#include "small.inl"
#include "attention.inl"
#include "blocks.inl"
#include "packing.inl"
}  // namespace portable

extern const Kernels PORTABLE_KERNELS = {
    portable::matmul, portable::scratch_bytes, portable::rms_norm, portable::gated, portable::rotate, portable::pack, portable::attention,
    portable::attention_floats, portable::blocks_bytes, portable::blocks,
};

// What the sets of kernels for AVX-512 have in common.

// Of a row of activations in blocks of 32, the first halves of so many lie side by side, then their second halves.
constexpr int SIDE_BY_SIDE = 4;
#include "formats.inl"
#include "vector_avx2.inl"
#include "levels_avx2.inl"
#include "scales.inl"
#include "eight_avx2.inl"
#include "rows.inl"
#include "rows_avx512.inl"
#include "wanted.inl"
#include "micro_avx512.inl"
#include "panel.inl"
#include "matmul.inl"
#include "exponential.inl"
#include "small.inl"
namespace narrow {
#include "attention.inl"
}
namespace wide {
#include "vector_avx512.inl"
#include "exponential.inl"
#include "attention.inl"
}  // namespace wide
using wide::FEW_QUERIES;

// Heads of all published models are whole wide vectors.
inline bool is_wide(const Attention& a) { return a.head_width % wide::WIDTH == 0; }

inline int64_t attention_floats(const Attention& a, int threads) {
    return is_wide(a) ? wide::attention_floats(a, threads) : narrow::attention_floats(a, threads);
}

inline void attention(const Attention& a, int threads, float* memory) {
    is_wide(a) ? wide::attention(a, threads, memory) : narrow::attention(a, threads, memory);
}

#include "blocks.inl"
#include "packing.inl"

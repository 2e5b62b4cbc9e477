// Sixteen floats at a time: AVX-512.

using V = __m512;
constexpr int WIDTH = 16;

inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline V load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline V load(const Bfloat* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline V all(float v) { return _mm512_set1_ps(v); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V least(V a, V b) { return _mm512_min_ps(a, b); }
inline V most(V a, V b) { return _mm512_max_ps(a, b); }
inline V rounded(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// 2^a for whole a between -126 and 127.
inline V power_of_two(V a) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(127)), 23));
}
inline float lanes_sum(V v) { return _mm512_reduce_add_ps(v); }

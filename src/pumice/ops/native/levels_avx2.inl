// Levels and scales by AVX2 and F16C; AVX-512 reads them the same way.

inline float half(uint16_t bits) { return _cvtsh_ss(bits); }

// `count` halves, `stride` bytes apart; zeros up to eight.
inline __attribute__((always_inline)) void halves_at(const uint8_t* b, int stride, int count, float* out) {
    __m128i h = _mm_setzero_si128();
    if (count == 8) {
        h = _mm_setr_epi16(int16_t(u16_at(b)), int16_t(u16_at(b + stride)), int16_t(u16_at(b + 2 * stride)),
                           int16_t(u16_at(b + 3 * stride)), int16_t(u16_at(b + 4 * stride)), int16_t(u16_at(b + 5 * stride)),
                           int16_t(u16_at(b + 6 * stride)), int16_t(u16_at(b + 7 * stride)));
    } else {
        alignas(16) uint16_t some[8] = {};
        for (int j = 0; j < count; j++) some[j] = u16_at(b + j * stride);
        h = _mm_load_si128((const __m128i*)some);
    }
    _mm256_store_ps(out, _mm256_cvtph_ps(h));
}

inline void widen8(const uint8_t* in, int16_t* out) {
    _mm_store_si128((__m128i*)out, _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)in)));
}

inline __m256i bytes32(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline __m256i masked(__m256i v, int mask) { return _mm256_and_si256(v, _mm256_set1_epi8(char(mask))); }

// 16 in the bytes whose bits are set in two bytes of the word in each half, from byte `from` on.
inline __m256i sixteens(__m256i words, int from) {
    const __m256i order = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m256i spread = _mm256_shuffle_epi8(words, _mm256_add_epi8(order, _mm256_set1_epi8(char(from))));
    const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201));
    return masked(_mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit), 16);
}

inline __m256i iq4_nl(__m256i q) {
    const __m128i table = _mm_setr_epi8(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113);
    return _mm256_shuffle_epi8(_mm256_set_m128i(table, table), q);
}

// The field of each byte from bit `from` on that `mask` keeps.
inline __m256i field(__m256i v, int from, int mask) { return masked(_mm256_srli_epi16(v, from), mask); }

// Levels 32 i to 32 i + 31 of a K-quant's chunk, one a byte; `bytes(at)` has those from `at` on, in any order.
template <Format F, class Bytes> inline __attribute__((always_inline)) __m256i levels_by(const Bytes& bytes, int i) {
    if constexpr (F == Q4_K) return field(bytes(16 + 32 * (i / 2)), 4 * (i % 2), 15);
    if constexpr (F == Q5_K) {
        const __m256i low = field(bytes(48 + 32 * (i / 2)), 4 * (i % 2), 15);
        return _mm256_or_si256(low, _mm256_slli_epi16(field(bytes(16), i, 1), 4));
    }
    const int part = i % 4, side = i / 4;
    if constexpr (F == Q6_K) {
        const __m256i low = field(bytes(64 * side + 32 * (part % 2)), 4 * (part / 2), 15);
        return _mm256_or_si256(low, _mm256_slli_epi16(field(bytes(128 + 32 * side), 2 * part, 3), 4));
    }
    if constexpr (F == Q3_K) {
        const __m256i low = field(bytes(32 + 32 * side), 2 * part, 3);
        return _mm256_or_si256(low, _mm256_slli_epi16(field(bytes(0), i, 1), 2));
    }
    if constexpr (F == Q2_K) return field(bytes(16 + 32 * side), 2 * part, 3);
}

// Levels 32 i to 32 i + 31 of a row's chunk at b.
template <Format F> inline __attribute__((always_inline)) __m256i levels_of(const uint8_t* b, int i) {
    return levels_by<F>([&](int at) { return bytes32(b + at); }, i);
}

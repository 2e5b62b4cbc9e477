// Products of single rows of weights, as they lie in the file, with a few rows of activations: AVX2.

inline __m256i activations_at(const int8_t* x) { return _mm256_loadu_si256((const __m256i*)x); }

// The scales of a K-quant's chunk in registers. Sixteen scales: those of even sub-blocks in the low half, odd in the high
// one, so that one shuffle gives the two of 32 weights; eight scales: twice.
template <Format F> struct RowScales {
    __m256i scales, mins;
    float d, dmin;

    explicit RowScales(const uint8_t* b) {
        if constexpr (F == Q4_K || F == Q5_K) {
            d = half(u16_at(b));
            dmin = half(u16_at(b + 2));
            // Six bits each: four scales and four mins whole, the upper two bits of the other eight above them, the
            // lower four bits in the last four bytes.
            const __m128i packed = _mm_loadu_si128((const __m128i*)(b + 4));
            const __m128i first = _mm_and_si128(packed, _mm_set1_epi8(0x3f));
            const __m128i upper = _mm_and_si128(_mm_srli_epi32(packed, 2), _mm_set1_epi8(0x30));
            const __m128i lower = _mm_srlv_epi32(_mm_shuffle_epi32(packed, 0xaa), _mm_setr_epi32(0, 4, 0, 0));
            const __m128i second = _mm_or_si128(_mm_and_si128(lower, _mm_set1_epi8(0x0f)), upper);
            const __m256i wide = _mm256_cvtepu8_epi16(_mm_unpacklo_epi32(first, second));
            scales = _mm256_permute2x128_si256(wide, wide, 0x00);
            mins = _mm256_zextsi128_si256(_mm256_extracti128_si256(wide, 1));
        } else if constexpr (F == Q6_K) {
            d = dmin = half(u16_at(b + 208));
            const __m128i bytes = _mm_loadu_si128((const __m128i*)(b + 192));
            const __m128i sorted = _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
            scales = _mm256_cvtepi8_epi16(sorted);
            mins = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 5);
        } else {
            WholeScales s;
            read_scales<F>(b, CHUNK, s);
            d = s.d;
            dmin = s.dmin;
            for (int j = 0; j < 8; j++) ((int16_t*)&scales)[j] = s.scale[2 * j];
            for (int j = 0; j < 8; j++) ((int16_t*)&scales)[8 + j] = s.scale[2 * j + 1];
            mins = _mm256_load_si256((const __m256i*)s.min);
        }
    }

    // Of the weights 32 i to 32 i + 31, as factors of the sums of pairs.
    __m256i at(int i) const { return _mm256_shuffle_epi8(scales, _mm256_set1_epi16(int16_t((2 * i + 1) << 8 | 2 * i))); }
};

template <Format F, int MR>
inline void whole_chunk(const uint8_t* b, const ChunkOfRow& x, __m256 (&acc)[MR][2]) {
    const RowScales<F> s(b);
    __m256i total[MR];
    for (int m = 0; m < MR; m++) total[m] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        const __m256i w = levels_of<F>(b, i), scale = s.at(i);
#pragma GCC unroll 4
        for (int m = 0; m < MR; m++) {
            const __m256i p = _mm256_maddubs_epi16(w, activations_at(x.level + m * CHUNK + 32 * i));
            total[m] = _mm256_add_epi32(total[m], _mm256_madd_epi16(p, scale));
        }
    }
    for (int m = 0; m < MR; m++) {
        const int16_t* sums = x.sums<Traits<F>::sub>() + 16 * m;
        const __m256i low = _mm256_madd_epi16(s.mins, _mm256_loadu_si256((const __m256i*)sums));
        const __m256 d = _mm256_set1_ps(s.d * x.scales[m]), dmin = _mm256_set1_ps(s.dmin * x.scales[m]);
        acc[m][0] = _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(total[m]), acc[m][0]);
        acc[m][1] = _mm256_fnmadd_ps(dmin, _mm256_cvtepi32_ps(low), acc[m][1]);
    }
}

// Two blocks of 32 at once: `low` has the first halves of both, `high` the second halves, as the activations lie.
template <Format F> inline __attribute__((always_inline)) void pair_levels(const uint8_t* b, const uint8_t* next, __m256i& low, __m256i& high) {
    constexpr int at = Traits<F>::bytes - (F == Q8_0 ? 32 : 16);
    const auto both = [&](int from) {
        return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)(b + from))),
                                       _mm_loadu_si128((const __m128i*)(next + from)), 1);
    };
    const __m256i first = both(at);
    if constexpr (F == Q8_0) {
        low = first;
        high = both(at + 16);
    } else {
        low = field(first, 0, 15);
        high = field(first, 4, 15);
    }
    if constexpr (F == Q5_0 || F == Q5_1) {
        const __m256i words = _mm256_set_m128i(_mm_set1_epi32(int(u32_at(next + at - 4))), _mm_set1_epi32(int(u32_at(b + at - 4))));
        low = _mm256_or_si256(low, sixteens(words, 0));
        high = _mm256_or_si256(high, sixteens(words, 2));
    }
    if constexpr (F == IQ4_NL) {
        low = iq4_nl(low);
        high = iq4_nl(high);
    }
}

template <Format F, int MR>
inline void float_chunk(const uint8_t* b, int count, const ChunkOfRow& x, __m256 (&acc)[MR][2]) {
    FloatScales s;
    read_scales<F>(b, count, s);
    const __m256i ones = _mm256_set1_epi16(1);
    const __m256 of_weights = _mm256_load_ps(s.scale), offset = _mm256_load_ps(s.offset);
    __m256 scale[MR];
    for (int m = 0; m < MR; m++) {
        scale[m] = _mm256_mul_ps(of_weights, _mm256_loadu_ps(x.scales + 8 * m));
        if constexpr (has_offsets<F>) acc[m][0] = _mm256_fmadd_ps(offset, _mm256_loadu_ps(x.offsets + 8 * m), acc[m][0]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        if (32 * i >= count) break;
        const uint8_t* here = b + i * Traits<F>::bytes;
        __m256i low, high;
        // Without a second block the first stands for it, with no scale.
        pair_levels<F>(here, here + (32 * i + 32 < count ? Traits<F>::bytes : 0), low, high);
        const __m256i lanes = _mm256_setr_epi32(i, i, i, i, i + 1, i + 1, i + 1, i + 1);
#pragma GCC unroll 4
        for (int m = 0; m < MR; m++) {
            const int8_t* xm = x.level + m * CHUNK + 32 * i;
            __m256i sum;
            if constexpr (Traits<F>::bits == 8) {
                sum = _mm256_maddubs_epi16(_mm256_abs_epi8(low), _mm256_sign_epi8(activations_at(xm), low));
                const __m256i second = _mm256_maddubs_epi16(_mm256_abs_epi8(high), _mm256_sign_epi8(activations_at(xm + 32), high));
                sum = _mm256_add_epi32(_mm256_madd_epi16(sum, ones), _mm256_madd_epi16(second, ones));
            } else {
                sum = _mm256_add_epi16(_mm256_maddubs_epi16(low, activations_at(xm)), _mm256_maddubs_epi16(high, activations_at(xm + 32)));
                sum = _mm256_madd_epi16(sum, ones);
            }
            const __m256 of_pair = _mm256_permutevar8x32_ps(scale[m], lanes);
            acc[m][i / 2 % 2] = _mm256_fmadd_ps(of_pair, _mm256_cvtepi32_ps(sum), acc[m][i / 2 % 2]);
        }
    }
}

// Rows of weights that are read side by side.
constexpr int STREAMS = 1;

// sums[0][m] = a row of weights, from `b` on, times row m of MR rows of activations.
template <Format F, int MR, int S>
inline void row_products(const uint8_t* b, int64_t, const Activations& x, int64_t first, float (&sums)[S][4]) {
    static_assert(S == STREAMS);
    float* sum = sums[0];
    __m256 acc[MR][2];
    for (int m = 0; m < MR; m++) acc[m][0] = acc[m][1] = _mm256_setzero_ps();
    const int64_t full = x.k / CHUNK;
    for (int64_t chunk = 0; chunk < full; chunk++, b += chunk_bytes<F>(CHUNK)) {
        // A page ahead: the CPU's own prefetch stops at the end of one.
        for (int i = 0; i < int(chunk_bytes<F>(CHUNK)); i += 64) _mm_prefetch((const char*)b + 4096 + i, _MM_HINT_T0);
        if constexpr (Traits<F>::whole)
            whole_chunk<F, MR>(b, x.row(chunk, first), acc);
        else
            float_chunk<F, MR>(b, CHUNK, x.row(chunk, first), acc);
    }
    if constexpr (!Traits<F>::whole)
        if (full < x.chunks) float_chunk<F, MR>(b, x.count(full), x.row(full, first), acc);
    for (int m = 0; m < MR; m++) sum[m] = lanes_sum(_mm256_add_ps(acc[m][0], acc[m][1]));
}

// Products of single rows of weights, as they lie in the file, with a few rows of activations: AVX-512 VNNI.
//
// Fewer instructions than memory takes time: 64 levels at a time, and sums of four in one step. What a lane
// adds up of a K-quant's chunk is a whole number below 2^24, so it is exact as a float too.

inline __m512i activations_at(const int8_t* x) { return _mm512_loadu_si512(x); }

// Four numbers of a vector, from number `first` on, each in four lanes.
inline __m512 spread(__m512 numbers, int first) {
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(_mm512_add_epi32(lanes, _mm512_set1_epi32(first)), numbers);
}

// The scales of a K-quant's chunk, eight or sixteen, and its mins; `d` has what these and those are multiplied by.
template <Format F> struct RowScales {
    __m256i scale, mins;
    __m128 d;

    explicit RowScales(const uint8_t* b) {
        if constexpr (F == Q4_K || F == Q5_K) {
            d = _mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)b));
            // Six bits each: four scales and four mins whole, the upper two bits of the other eight above them, the
            // lower four bits in the last four bytes.
            const __m128i packed = _mm_loadu_si128((const __m128i*)(b + 4));
            const __m128i first = _mm_and_si128(packed, _mm_set1_epi8(0x3f));
            const __m128i upper = _mm_and_si128(_mm_srli_epi32(packed, 2), _mm_set1_epi8(0x30));
            const __m128i lower = _mm_srlv_epi32(_mm_shuffle_epi32(packed, 0xaa), _mm_setr_epi32(0, 4, 0, 0));
            const __m128i second = _mm_or_si128(_mm_and_si128(lower, _mm_set1_epi8(0x0f)), upper);
            scale = _mm256_cvtepu8_epi16(_mm_unpacklo_epi32(first, second));  // the mins behind them are not looked at
            mins = _mm256_zextsi128_si256(_mm256_extracti128_si256(scale, 1));
        } else if constexpr (F == Q6_K) {
            d = _mm_set1_ps(half(u16_at(b + 208)));
            scale = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(b + 192)));
            mins = _mm256_slli_epi16(scale, 5);
        } else if constexpr (F == Q3_K) {
            d = _mm_set1_ps(half(u16_at(b + 108)));
            // The lower four bits of eight scales, those of the other eight above them, and the upper two bits of each
            // fourth side by side.
            const __m128i eight = _mm_loadl_epi64((const __m128i*)(b + 96)), nibble = _mm_set1_epi8(15);
            const __m128i lower = _mm_unpacklo_epi64(_mm_and_si128(eight, nibble), _mm_and_si128(_mm_srli_epi16(eight, 4), nibble));
            const __m128i fourths = _mm_srlv_epi32(_mm_set1_epi32(int32_t(u32_at(b + 104))), _mm_setr_epi32(0, 2, 4, 6));
            const __m128i upper = _mm_slli_epi16(_mm_and_si128(fourths, _mm_set1_epi8(3)), 4);
            scale = _mm256_cvtepi8_epi16(_mm_sub_epi8(_mm_or_si128(lower, upper), _mm_set1_epi8(32)));
            mins = _mm256_slli_epi16(scale, 2);
        } else {
            static_assert(F == Q2_K);
            d = _mm_cvtph_ps(_mm_cvtsi32_si128(int32_t(u32_at(b + 80))));
            const __m256i both = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)b));
            scale = _mm256_and_si256(both, _mm256_set1_epi16(15));
            mins = _mm256_srli_epi16(both, 4);
        }
    }

    // For the sums of levels 64 i to 64 i + 127 as `_mm512_packs_epi32` puts them side by side.
    __m512i of_pair(int i) const {
        constexpr int lanes = Traits<F>::sub / 16;  // of 128 bits, that share a scale
        const __m512i lane = _mm512_shuffle_epi8(_mm512_setr_epi64(0, 0, 1, 0, 2, 0, 3, 0), _mm512_set1_epi16(int16_t(0x0100)));
        const __m512i later = _mm512_maskz_set1_epi16(0xf0f0f0f0, 4 / lanes);  // in the upper half of each lane
        const __m512i place = _mm512_add_epi16(_mm512_srli_epi16(lane, lanes - 1), later);
        return _mm512_permutexvar_epi16(_mm512_add_epi16(place, _mm512_set1_epi16(int16_t(i * 4 / lanes))), _mm512_castsi256_si512(scale));
    }
};

// Levels 64 i to 64 i + 63 of a K-quant's chunk at b.
template <Format F> inline __attribute__((always_inline)) __m512i levels64(const uint8_t* b, int i) {
    const auto twice = [&](int at) { return _mm512_broadcast_i64x4(bytes32(b + at)); };
    const auto shifted = [](__m512i v, int low, int high) {
        return _mm512_srlv_epi16(v, _mm512_inserti64x4(_mm512_set1_epi16(int16_t(low)), _mm256_set1_epi16(int16_t(high)), 1));
    };
    const auto bits = [](int low, int high) {  // one of each byte of the lower, one of the upper half
        return _mm512_inserti64x4(_mm512_set1_epi8(char(1 << low)), _mm256_set1_epi8(char(1 << high)), 1);
    };
    const auto kept = [](__m512i v, int mask) { return _mm512_and_si512(v, _mm512_set1_epi8(char(mask))); };
    const auto plus = [](__m512i v, __m512i of, __m512i bit, int more) {
        return _mm512_mask_add_epi8(v, _mm512_test_epi8_mask(of, bit), v, _mm512_set1_epi8(char(more)));
    };
    if constexpr (F == Q4_K) return kept(shifted(twice(16 + 32 * i), 0, 4), 15);
    if constexpr (F == Q5_K) return plus(kept(shifted(twice(48 + 32 * i), 0, 4), 15), twice(16), bits(2 * i, 2 * i + 1), 16);
    const int part = 2 * i % 4, side = i / 2;
    if constexpr (F == Q6_K) {
        const __m512i low = kept(_mm512_srli_epi16(_mm512_loadu_si512(b + 64 * side), 2 * part), 15);
        return _mm512_or_si512(low, _mm512_slli_epi16(kept(shifted(twice(128 + 32 * side), 2 * part, 2 * part + 2), 3), 4));
    }
    if constexpr (F == Q3_K)
        return plus(kept(shifted(twice(32 + 32 * side), 2 * part, 2 * part + 2), 3), twice(0), bits(2 * i, 2 * i + 1), 4);
    if constexpr (F == Q2_K) return kept(shifted(twice(16 + 32 * side), 2 * part, 2 * part + 2), 3);
}

// Sums of four products fit into 16 bits, so scales are multiplied in and all are added up as whole numbers.
template <Format F, int MR>
inline __attribute__((always_inline)) void whole_chunk(const uint8_t* b, const ChunkOfRow& x, __m512 (&acc)[MR][2]) {
    static_assert(4 * ((1 << Traits<F>::bits) - 1) * 127 < 1 << 15);
    constexpr int sub = Traits<F>::sub;
    const RowScales<F> s(b);
    __m512i total[MR];
    for (int m = 0; m < MR; m++) total[m] = _mm512_setzero_si512();
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += 2) {
        const __m512i w[2] = {levels64<F>(b, i), levels64<F>(b, i + 1)}, scale = s.of_pair(i);
#pragma GCC unroll 4
        for (int m = 0; m < MR; m++) {
            const auto sums = [&](int of) {
                return _mm512_dpbusd_epi32(_mm512_setzero_si512(), w[of], activations_at(x.level + m * CHUNK + 64 * (i + of)));
            };
            total[m] = _mm512_dpwssd_epi32(total[m], _mm512_packs_epi32(sums(0), sums(1)), scale);
        }
    }
    for (int m = 0; m < MR; m++) {
        const int16_t* sums = x.sums<sub>() + 16 * m;
        const __m256i low = _mm256_madd_epi16(s.mins, _mm256_loadu_si256((const __m256i*)sums));
        const __m512 lows = _mm512_zextps256_ps512(_mm256_cvtepi32_ps(low));
        const __m128 d = _mm_mul_ps(s.d, _mm_set1_ps(x.scales[m]));
        acc[m][0] = _mm512_fmadd_ps(_mm512_broadcastss_ps(d), _mm512_cvtepi32_ps(total[m]), acc[m][0]);
        acc[m][1] = _mm512_fnmadd_ps(_mm512_broadcastss_ps(_mm_movehdup_ps(d)), lows, acc[m][1]);
    }
}

// Four blocks of 32 at once: `low` has the first halves of all, `high` the second halves, as the activations lie. Levels
// with a sign are taken from 128 up.
template <Format F>
inline __attribute__((always_inline)) void four_blocks(const uint8_t* const (&block)[4], __m512i& low, __m512i& high) {
    constexpr int at = Traits<F>::bytes - (F == Q8_0 ? 32 : 16);
    const auto all_four = [&](int from) {
        const auto of = [&](int i) { return _mm_loadu_si128((const __m128i*)(block[i] + from)); };
        __m512i v = _mm512_castsi128_si512(of(0));
        v = _mm512_inserti32x4(v, of(1), 1);
        v = _mm512_inserti32x4(v, of(2), 2);
        return _mm512_inserti32x4(v, of(3), 3);
    };
    const __m512i first = all_four(at);
    if constexpr (F == Q8_0) {
        low = first;
        high = all_four(at + 16);
    } else {
        low = _mm512_and_si512(first, _mm512_set1_epi8(15));
        high = _mm512_and_si512(_mm512_srli_epi16(first, 4), _mm512_set1_epi8(15));
    }
    if constexpr (F == Q5_0 || F == Q5_1) {
        const __m512i words = all_four(at - 4), bit = _mm512_set1_epi64(int64_t(0x8040201008040201));
        const auto fifth = [&](__m512i v, int from) {
            const __m128i order = _mm_set_epi64x(0x0101010101010101 * (from + 1), 0x0101010101010101 * from);
            const __m512i byte = _mm512_shuffle_epi8(words, _mm512_broadcast_i32x4(order));
            return _mm512_mask_add_epi8(v, _mm512_test_epi8_mask(byte, bit), v, _mm512_set1_epi8(16));
        };
        low = fifth(low, 0);
        high = fifth(high, 2);
    }
    if constexpr (F == IQ4_NL) {
        const __m512i table = _mm512_broadcast_i32x4(
            _mm_setr_epi8(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113));
        low = _mm512_shuffle_epi8(table, low);
        high = _mm512_shuffle_epi8(table, high);
    }
    if constexpr (Traits<F>::bits == 8) {
        low = _mm512_xor_si512(low, _mm512_set1_epi8(char(128)));
        high = _mm512_xor_si512(high, _mm512_set1_epi8(char(128)));
    }
}

// The halves at byte `at` of eight blocks, one block after the other. Those in the first 128 bytes by one permutation.
template <Format F> inline __m256 halves_of_eight(const uint8_t* b, int at) {
    constexpr int words = Traits<F>::bytes / 2, near = (64 + words - 1) / words < 8 ? (64 + words - 1) / words : 8;
    const uint8_t* from = b + at;
    const __m512i step = _mm512_mullo_epi16(_mm512_set1_epi16(words), _mm512_set_epi16(
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 6, 5, 4, 3, 2, 1, 0));
    const __m512i place = _mm512_add_epi16(step, _mm512_set1_epi16(int16_t(at / 2)));
    const __m512i found = _mm512_permutex2var_epi16(_mm512_loadu_si512(b), place, _mm512_loadu_si512(b + 64));
    __m128i h = _mm512_castsi512_si128(found);
    if constexpr (near < 5) h = _mm_insert_epi16(h, u16_at(from + 8 * words), 4);
    if constexpr (near < 6) h = _mm_insert_epi16(h, u16_at(from + 10 * words), 5);
    if constexpr (near < 7) h = _mm_insert_epi16(h, u16_at(from + 12 * words), 6);
    if constexpr (near < 8) h = _mm_insert_epi16(h, u16_at(from + 14 * words), 7);
    return _mm256_cvtph_ps(h);
}

template <Format F, int MR>
inline __attribute__((always_inline)) void float_chunk(const uint8_t* b, int count, const ChunkOfRow& x, __m512 (&acc)[MR][2]) {
    __m256 of_weights, offset;
    if (count == CHUNK) {
        of_weights = halves_of_eight<F>(b, 0);
        if constexpr (middle<F> == 0)
            offset = halves_of_eight<F>(b, 2);
        else
            offset = _mm256_mul_ps(of_weights, _mm256_set1_ps(-middle<F>));
    } else {
        FloatScales s;
        read_scales<F>(b, count, s);
        of_weights = _mm256_load_ps(s.scale);
        offset = middle<F> == 0 ? _mm256_load_ps(s.offset) : _mm256_mul_ps(of_weights, _mm256_set1_ps(-middle<F>));
    }
    __m512 scale[MR];
    for (int m = 0; m < MR; m++) {
        scale[m] = _mm512_castps256_ps512(_mm256_mul_ps(of_weights, _mm256_loadu_ps(x.scales + 8 * m)));
        const __m512 offsets = _mm512_zextps256_ps512(_mm256_mul_ps(offset, _mm256_loadu_ps(x.offsets + 8 * m)));
        acc[m][1] = _mm512_add_ps(acc[m][1], offsets);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        if (32 * i >= count) break;
        // Where blocks are missing the first stands for them, with no scale.
        const uint8_t* block[4];
        for (int j = 0; j < 4; j++) block[j] = b + (32 * (i + j) < count ? i + j : i) * Traits<F>::bytes;
        __m512i low, high;
        four_blocks<F>(block, low, high);
#pragma GCC unroll 4
        for (int m = 0; m < MR; m++) {
            const int8_t* xm = x.level + m * CHUNK + 32 * i;
            __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low, activations_at(xm));
            sum = _mm512_dpbusd_epi32(sum, high, activations_at(xm + 64));
            acc[m][0] = _mm512_fmadd_ps(spread(scale[m], i), _mm512_cvtepi32_ps(sum), acc[m][0]);
        }
    }
}

// Rows of weights that are read side by side. One alone comes at half of what memory gives: the CPU's own prefetch follows
// each stream to the end of its page only, and a core waits for few lines of one that it has asked for itself.
constexpr int STREAMS = 4;
// Bytes ahead of what is multiplied that are called for.
constexpr int AHEAD = 2048;

// sum[s][m] = a row of weights, from `b + s * apart` on, times row m of MR rows of activations.
template <Format F, int MR, int S>
inline void row_products(const uint8_t* b, int64_t apart, const Activations& x, int64_t first, float (&sum)[S][4]) {
    __m512 acc[S][MR][2];
    for (int s = 0; s < S; s++)
        for (int m = 0; m < MR; m++) acc[s][m][0] = acc[s][m][1] = _mm512_setzero_ps();
    const int64_t full = x.k / CHUNK;
    for (int64_t chunk = 0; chunk < full; chunk++, b += chunk_bytes<F>(CHUNK)) {
#pragma GCC unroll 4
        for (int s = 0; s < S; s++) {
            const uint8_t* at = b + s * apart;
            for (int i = 0; i < int(chunk_bytes<F>(CHUNK)); i += 64) _mm_prefetch((const char*)at + AHEAD + i, _MM_HINT_T0);
            if constexpr (Traits<F>::whole)
                whole_chunk<F, MR>(at, x.row(chunk, first), acc[s]);
            else
                float_chunk<F, MR>(at, CHUNK, x.row(chunk, first), acc[s]);
        }
    }
    for (int s = 0; s < S; s++) {
        if constexpr (!Traits<F>::whole)
            if (full < x.chunks) float_chunk<F, MR>(b + s * apart, x.count(full), x.row(full, first), acc[s]);
        for (int m = 0; m < MR; m++) sum[s][m] = _mm512_reduce_add_ps(_mm512_add_ps(acc[s][m][0], acc[s][m][1]));
    }
}

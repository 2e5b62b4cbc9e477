// A chunk of eight rows of weights side by side, for a panel: lane r of a vector, 32 bits, has four levels of row r, or what
// they are multiplied by. Bytes are transposed as they lie in the file, before levels are taken out of them. AVX2; AVX-512
// reads them the same way.

struct EightFloats {
    __m256 scale[8], offset[8];
};

// Scales twice in each lane, mins of two sub-blocks side by side.
template <Format F> struct EightWholes {
    static constexpr int subs = CHUNK / Traits<F>::sub;
    __m256i scale[subs], min[subs / 2];
    __m256 d, dmin;
};

// Eight rows, `step` bytes from each other: four and four, so that a few registers hold where they are.
struct EightRows {
    const uint8_t *lower, *upper;
    int64_t step;

    EightRows(const uint8_t* first, int64_t step_) : lower(first), upper(first + 4 * step_), step(step_) {}

    const uint8_t* row(int r) const { return (r < 4 ? lower : upper) + r % 4 * step; }
    __m128i sixteen(int r, int at) const { return _mm_loadu_si128((const __m128i*)(row(r) + at)); }

    // Four dwords from byte `at` on.
    void dwords(int at, __m256i* v) const {
        __m256i r[4];
        for (int t = 0; t < 4; t++)
            r[t] = _mm256_blend_epi32(_mm256_castsi128_si256(sixteen(t, at)), _mm256_broadcastsi128_si256(sixteen(t + 4, at)), 0xf0);
        const __m256i a = _mm256_unpacklo_epi32(r[0], r[1]), b = _mm256_unpackhi_epi32(r[0], r[1]);
        const __m256i c = _mm256_unpacklo_epi32(r[2], r[3]), d = _mm256_unpackhi_epi32(r[2], r[3]);
        v[0] = _mm256_unpacklo_epi64(a, c);
        v[1] = _mm256_unpackhi_epi64(a, c);
        v[2] = _mm256_unpacklo_epi64(b, d);
        v[3] = _mm256_unpackhi_epi64(b, d);
    }

    __m256i dword(int at) const {
        const auto of = [&](int r) { return int(u32_at(row(r) + at)); };
        return _mm256_setr_epi32(of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7));
    }

    // The first bytes of two blocks, each in half of a vector.
    __m256i two(int r, int at, int other) const {
        return _mm256_inserti128_si256(_mm256_castsi128_si256(sixteen(r, at)), sixteen(r, other), 1);
    }
    __m256i thirty_two(int r, int at) const { return _mm256_loadu_si256((const __m256i*)(row(r) + at)); }

    __m256 halves(int at) const {
        const auto of = [&](int r) { return int16_t(u16_at(row(r) + at)); };
        return _mm256_cvtph_ps(_mm_setr_epi16(of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7)));
    }
};

// In each lane, byte `first` and byte `second` as two numbers with a sign.
inline __m256i two_of(__m256i v, int first, int second) {
    const __m256i order = _mm256_setr_epi32(0, 0x04000400, 0x08000800, 0x0c000c00, 0, 0x04000400, 0x08000800, 0x0c000c00);
    const __m256i from = _mm256_or_si256(order, _mm256_set1_epi32(second << 24 | 0x80 << 16 | first << 8 | 0x80));
    return _mm256_srai_epi16(_mm256_shuffle_epi8(v, from), 8);
}

// Byte i of each lane is 16 where bit 4 group + i of the lane is set.
inline __m256i fifths(__m256i words, int group) {
    const __m256i byte = _mm256_set1_epi32(group / 2 * 0x01010101), bit = _mm256_set1_epi32(group % 2 ? int(0x80402010) : 0x08040201);
    const __m256i order = _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404, 0x08080808, 0x0c0c0c0c);
    const __m256i spread = _mm256_shuffle_epi8(words, _mm256_or_si256(order, byte));
    return masked(_mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit), 16);
}

// The levels of block `i`: group of four by group.
template <Format F> inline __attribute__((always_inline)) void levels_of_eight(const EightRows& rows, int i, __m256i (&level)[8]) {
    constexpr int bytes = Traits<F>::bytes;
    if constexpr (F == Q8_0) {
        rows.dwords(i * bytes + 2, level);
        rows.dwords(i * bytes + 18, level + 4);
    } else {
        __m256i packed[4];
        rows.dwords((i + 1) * bytes - 16, packed);
        for (int g = 0; g < 8; g++) level[g] = field(packed[g % 4], g / 4 * 4, 15);
    }
    if constexpr (F == Q5_0 || F == Q5_1) {
        const __m256i words = rows.dword((i + 1) * bytes - 20);
        for (int g = 0; g < 8; g++) level[g] = _mm256_or_si256(level[g], fifths(words, g));
    }
    if constexpr (F == IQ4_NL)
        for (int g = 0; g < 8; g++) level[g] = iq4_nl(level[g]);
}

// Of eight rows' pairs of blocks, the first halves as floats: words `word` of their lower lanes, and `other` of their upper.
template <int word, int other> inline void floats_of_two(const __m256i (&rows)[8], __m256* out) {
    const __m256i low = _mm256_set_epi64x(-1, 0x0d0c090805040100 + other * 0x0202020202020202, -1, 0x0d0c090805040100 + word * 0x0202020202020202);
    const __m256i high = _mm256_shuffle_epi32(low, 0x4e);
    const auto four = [&](int r) {
        return _mm256_unpacklo_epi64(_mm256_unpacklo_epi32(rows[r], rows[r + 1]), _mm256_unpacklo_epi32(rows[r + 2], rows[r + 3]));
    };
    const __m256i words = _mm256_or_si256(_mm256_shuffle_epi8(four(0), low), _mm256_shuffle_epi8(four(4), high));
    out[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(words));
    out[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1));
}

template <Format F> inline __attribute__((always_inline)) void scales_of_eight(const EightRows& rows, int count, EightFloats& s) {
    constexpr int bytes = Traits<F>::bytes;
    const int last = count / 32 - 1;
    for (int j = 0; j < 8; j += 2) {
        __m256i two[8];
        // A whole vector from the first block on reaches the second's half, and no farther than the chunk's end.
        if (bytes == 18 && count == CHUNK) {
            static_assert(bytes != 18 || 6 * bytes + 32 <= 8 * bytes);
            for (int r = 0; r < 8; r++) two[r] = rows.thirty_two(r, j * bytes);
            floats_of_two<0, 1>(two, s.scale + j);
            continue;
        }
        for (int r = 0; r < 8; r++) two[r] = rows.two(r, (j < last ? j : last) * bytes, (j + 1 < last ? j + 1 : last) * bytes);
        floats_of_two<0, 0>(two, s.scale + j);
        if constexpr (F == Q4_1 || F == Q5_1) floats_of_two<1, 1>(two, s.offset + j);
    }
    for (int j = last + 1; j < 8; j++) s.scale[j] = s.offset[j] = _mm256_setzero_ps();
}

// From the dwords of the whole chunk, but for its last bytes.
template <Format F> inline void scales_of_eight(const EightRows& rows, const __m256i* dwords, EightWholes<F>& s) {
    const auto low_bits = [](__m256i v, int from, int mask) { return masked(_mm256_srli_epi32(v, from), mask); };
    if constexpr (F == Q4_K || F == Q5_K) {
        const __m256i low = dwords[1], middle = dwords[2], high = dwords[3];
        const auto six = [&](__m256i lower, __m256i upper) { return _mm256_or_si256(lower, low_bits(upper, 2, 0x30)); };
        const __m256i scale[2] = {masked(low, 0x3f), six(masked(high, 15), low)};
        const __m256i min[2] = {masked(middle, 0x3f), six(low_bits(high, 4, 15), middle)};
        for (int j = 0; j < 8; j++) s.scale[j] = two_of(scale[j / 4], j % 4, j % 4);
        for (int j = 0; j < 4; j++) s.min[j] = two_of(min[j / 2], j % 2 * 2, j % 2 * 2 + 1);
        s.d = rows.halves(0);
        s.dmin = rows.halves(2);
    } else {
        __m256i scale[4];
        if constexpr (F == Q6_K) rows.dwords(192, scale);
        if constexpr (F == Q2_K)
            for (int t = 0; t < 4; t++) scale[t] = masked(dwords[t], 15);
        if constexpr (F == Q3_K) {
            __m256i last[4];
            rows.dwords(92, last);
            for (int t = 0; t < 4; t++) {
                const __m256i upper = _mm256_slli_epi32(low_bits(last[3], 2 * t, 3), 4);
                scale[t] = _mm256_sub_epi8(_mm256_or_si256(low_bits(last[1 + t % 2], t / 2 * 4, 15), upper), _mm256_set1_epi8(32));
            }
        }
        for (int j = 0; j < 16; j++) s.scale[j] = two_of(scale[j / 4], j % 4, j % 4);
        for (int j = 0; j < 8; j++) {
            if constexpr (F == Q2_K)
                s.min[j] = two_of(low_bits(dwords[j / 2], 4, 15), j % 2 * 2, j % 2 * 2 + 1);
            else
                s.min[j] = _mm256_slli_epi16(two_of(scale[j / 2], j % 2 * 2, j % 2 * 2 + 1), F == Q6_K ? 5 : 2);
        }
        s.d = rows.halves(Traits<F>::bytes - (F == Q2_K ? 4 : 2));
        s.dmin = F == Q2_K ? rows.halves(Traits<F>::bytes - 2) : s.d;
    }
}

// Whether a panel wants dwords of two levels in a byte as they lie.
template <class Panel> constexpr bool takes_packed = false;

// A chunk of eight rows to places `first` to `first + 7` of a panel.
template <Format F, class Panel>
inline void put_eight(const EightRows& rows, int count, int first, Panel& panel) {
    if constexpr (Traits<F>::whole) {
        constexpr int whole = Traits<F>::bytes / 16 * 4;
        __m256i dwords[whole];
        for (int at = 0; at < whole; at += 4) rows.dwords(4 * at, dwords + at);
        EightWholes<F> s;
        scales_of_eight<F>(rows, dwords, s);
        panel.put_scales(first, s);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            __m256i level[8];
            for (int g = 0; g < 8; g++) level[g] = levels_by<F>([&](int at) { return dwords[at / 4 + g]; }, i);
            panel.put_levels(first, i, level);
        }
    } else {
        EightFloats s;
        if (count == CHUNK)
            scales_of_eight<F>(rows, CHUNK, s);
        else
            scales_of_eight<F>(rows, count, s);
        panel.put_scales(first, s);
        for (int i = 0; i < 8; i++) {
            if constexpr (takes_packed<Panel>)
                if (32 * i < count) {
                    __m256i packed[4];
                    rows.dwords((i + 1) * Traits<F>::bytes - 16, packed);
                    panel.put_packed(first, i, packed);
                    continue;
                }
            __m256i level[8];
            if (32 * i < count)
                levels_of_eight<F>(rows, i, level);
            else
                for (__m256i& each : level) each = _mm256_setzero_si256();
            panel.put_levels(first, i, level);
        }
    }
}

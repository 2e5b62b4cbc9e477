// AVX2: products of a panel of 16 rows of weights with a tile of whole activations.
//
// vpmaddubsw takes unsigned times signed bytes into int16 sums of pairs. These may be added up while they cannot
// overflow: eight times for levels of 4 bits, four for 5, twice for 6; then they meet the scale of their sub-block, a
// whole number too, and only a chunk's total becomes floating. So every format has whole scales here:
//   MINS     unsigned levels with signed activations; what the mins take away comes from sums of activations.
//   CENTRED  signed levels with activations that are 128 too great; what that adds is the same for all of them (`base`).
//   WIDE     levels of 8 bits, multiplied with their block's share of the greatest scale of the chunk, are 14 bits wide
//            and meet activations of 11 bits in vpmaddwd.
// Floating scales of blocks become shares of the greatest in their chunk, in steps of less than a two-thousandth of it.

constexpr int PANEL = 16;
enum Way { MINS, CENTRED, AS_WIDE };
template <Format F>
constexpr Way way = Traits<F>::bits == 8                                        ? AS_WIDE
                    : F == Q4_0 || F == Q5_0 || F == Q3_K || F == Q6_K ? CENTRED
                                                                       : MINS;
// The level that stands for nothing.
template <Format F> constexpr int centre = F == Q3_K ? 4 : F == Q4_0 ? 8 : F == Q5_0 ? 16 : F == Q6_K ? 32 : 0;
// The whole number for the greatest scale of a chunk, where scales are floating: all sums of a chunk fit into 32 bits.
template <Format F> constexpr int top_scale = Traits<F>::bits == 8 ? 1 << 14 : F == Q5_1 ? 2047 : 4095;
constexpr int TOP_MIN = 32767;

constexpr int tile_rows_of(Layout) { return 4; }

inline Layout layout_of_many(int32_t format) {
    switch (format) {
        case Q8_0: case IQ4_NL: return WIDE;
        case Q4_0: case Q5_0: case Q3_K: case Q6_K: return SHIFTED;
        default: return BY_256;
    }
}

template <int bits> constexpr int sums_that_fit = bits == 5 ? 4 : bits == 6 ? 2 : 8;

template <Format F> struct PanelChunk {
    static constexpr int subs = CHUNK / Traits<F>::sub;
    // In groups of four weights, or of two that are 16 bits wide.
    alignas(64) uint8_t level[CHUNK / (way<F> == AS_WIDE ? 2 : 4)][PANEL][4];
    alignas(64) int16_t scale[subs][PANEL][2];    // twice each: both halves of a pair of sums
    alignas(64) int16_t min[subs / 2][PANEL][2];  // two sub-blocks side by side
    alignas(64) int32_t base[PANEL];
    alignas(64) float d[PANEL], dmin[PANEL];

    // The scales of a row and, of its levels, `q`, what they need.
    void put(int row, uint8_t* q, const WholeScales& s) {
        for (int j = 0; j < subs; j++) scale[j][row][0] = scale[j][row][1] = s.scale[j];
        for (int j = 0; j < subs; j++) min[j / 2][row][j % 2] = s.min[j];
        d[row] = s.d;
        dmin[row] = s.dmin;
        if constexpr (way<F> == CENTRED) base[row] = centred(q, s.scale);
    }

    void put(int row, uint8_t* q, const FloatScales& s) {
        WholeScales whole;
        whole.d = shares(s.scale, top_scale<F>, whole.scale);
        if constexpr (way<F> == AS_WIDE) whole.d *= top_scale<F> / 64;  // a level there is 64 shares of its own scale
        if constexpr (way<F> == MINS) whole.dmin = -shares(s.offset, TOP_MIN, whole.min);
        put(row, q, whole);
    }

   private:
    // Eight numbers as whole shares of the greatest, which has `top`; what one share is worth. If one is no number or
    // has no end, neither has that.
    static float shares(const float* numbers, int top, int16_t* out) {
        const __m256 v = _mm256_load_ps(numbers);
        float greatest = 0;
        for (int j = 0; j < 8; j++) greatest = fabsf(numbers[j]) > greatest ? fabsf(numbers[j]) : greatest;
        const __m256 inverse = _mm256_set1_ps(greatest > 0 ? float(top) / greatest : 0);
        const __m256i share = _mm256_cvtps_epi32(_mm256_mul_ps(v, inverse));
        _mm_store_si128((__m128i*)out, _mm_packs_epi32(_mm256_castsi256_si128(share), _mm256_extracti128_si256(share, 1)));
        return greatest / float(top) + 0 * lanes_sum(v);
    }

    // Makes the levels of a row signed; what activations that are 128 too great add to its sum, taken away.
    static int32_t centred(uint8_t* q, const int16_t* scales) {
        __m256i sum = _mm256_setzero_si256();
        const __m256i ones = _mm256_set1_epi8(1);
        for (int i = 0; i < 8; i++) {
            const __m256i level = _mm256_sub_epi8(_mm256_load_si256((const __m256i*)(q + 32 * i)), _mm256_set1_epi8(centre<F>));
            _mm256_store_si256((__m256i*)(q + 32 * i), level);
            const int16_t low = scales[subs == 16 ? 2 * i : i], high = scales[subs == 16 ? 2 * i + 1 : i];
            const __m256i factor = _mm256_set_m128i(_mm_set1_epi16(high), _mm_set1_epi16(low));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(ones, level), factor));
        }
        alignas(32) int32_t lanes[8], total = 0;
        _mm256_store_si256((__m256i*)lanes, sum);
        for (const int32_t lane : lanes) total += lane;
        return -128 * total;
    }
};

// The levels of PANEL rows, row after row of CHUNK bytes, into a panel's order.
template <Format F> inline void put_levels(uint8_t* rows, int, PanelChunk<F>& w) {
    constexpr int stride = PANEL * 4;
    if constexpr (way<F> == AS_WIDE) {
        alignas(64) int16_t wide[8][CHUNK];
        for (int first = 0; first < PANEL; first += 8) {
            for (int row = 0; row < 8; row++)
                for (int i = 0; i < CHUNK; i += 16) {
                    const __m256i level = _mm256_cvtepi8_epi16(_mm_load_si128((const __m128i*)(rows + (first + row) * CHUNK + i)));
                    const __m256i share = _mm256_set1_epi16(w.scale[i / 32][first + row][0]);
                    // 64 times the level, in proportion to the greatest scale.
                    _mm256_store_si256((__m256i*)(wide[row] + i), _mm256_mulhrs_epi16(_mm256_slli_epi16(level, 7), share));
                }
            for (int k = 0; k < CHUNK; k += 16)
                transpose8((const uint8_t*)&wide[0][k], 2 * CHUNK, w.level[k / 2][first], stride);
        }
    } else {
        for (int first = 0; first < PANEL; first += 8)
            for (int k = 0; k < CHUNK; k += 32)
                transpose8(rows + first * CHUNK + k, CHUNK, w.level[k / 4][first], stride);
    }
}

inline __m256i four_bytes(const int8_t* x) { return _mm256_set1_epi32(*(const int32_t*)x); }
inline __m256i levels_at(const uint8_t* p) { return _mm256_load_si256((const __m256i*)p); }

// Sums of pairs over `steps` groups of four weights: MR rows of activations by 16 rows of weights.
template <Way way, int MR, int steps>
inline __attribute__((always_inline)) void pair_sums(const uint8_t* w, const int8_t* x, __m256i (&sum)[MR][2]) {
#pragma GCC unroll 8
    for (int step = 0; step < steps; step++) {
        const __m256i w0 = levels_at(w + step * 64), w1 = levels_at(w + step * 64 + 32);
#pragma GCC unroll 8
        for (int r = 0; r < MR; r++) {
            const __m256i xr = four_bytes(x + (step * MR + r) * 4);
            const __m256i p0 = way == CENTRED ? _mm256_maddubs_epi16(xr, w0) : _mm256_maddubs_epi16(w0, xr);
            const __m256i p1 = way == CENTRED ? _mm256_maddubs_epi16(xr, w1) : _mm256_maddubs_epi16(w1, xr);
            sum[r][0] = step == 0 ? p0 : _mm256_add_epi16(sum[r][0], p0);
            sum[r][1] = step == 0 ? p1 : _mm256_add_epi16(sum[r][1], p1);
            // Keeps the additions where they stand: GCC would make a tree of them, out of registers that it lacks.
            asm("" : "+x"(sum[r][0]), "+x"(sum[r][1]));
        }
    }
}

// Adds the products of 32 levels of 16 bits: MR rows of activations by 16 rows of weights.
template <int MR>
inline __attribute__((always_inline)) void wide_products(const uint8_t* w, const int8_t* x, __m256i (&sum)[MR][2]) {
#pragma GCC unroll 16
    for (int step = 0; step < 16; step++) {
        const __m256i w0 = levels_at(w + step * 64), w1 = levels_at(w + step * 64 + 32);
#pragma GCC unroll 8
        for (int r = 0; r < MR; r++) {
            const __m256i xr = four_bytes(x + (step * MR + r) * 4);
            sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(w0, xr));
            sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(w1, xr));
            asm("" : "+x"(sum[r][0]), "+x"(sum[r][1]));
        }
    }
}

// Of a chunk, for each row of activations and each row of weights: the sum of levels times activations, with whole scales.
// A function of its own: among other code GCC keeps its sums in memory, which costs much of the speed.
template <Format F, int MR> __attribute__((noinline)) void totals(const PanelChunk<F>& w, const int8_t* x, int32_t* out) {
    constexpr int sub = Traits<F>::sub, fit = sums_that_fit<Traits<F>::bits>, run = fit < sub / 4 ? fit : sub / 4;
    __m256i total[MR][2];
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++)
        for (int v = 0; v < 2; v++)
            total[r][v] = way<F> == CENTRED ? levels_at((const uint8_t*)(w.base + 8 * v)) : _mm256_setzero_si256();
    if constexpr (way<F> == AS_WIDE) {
        for (int at = 0; at < CHUNK / 2; at += 16) wide_products<MR>(w.level[at][0], x + at * MR * 4, total);
    } else {
        for (int j = 0; j < CHUNK / sub; j++) {
#pragma GCC unroll 8
            for (int part = 0; part < sub / 4; part += run) {
                __m256i sum[MR][2];
                pair_sums<way<F>, MR, run>(w.level[sub / 4 * j + part][0], x + (sub / 4 * j + part) * MR * 4, sum);
#pragma GCC unroll 8
                for (int r = 0; r < MR; r++)
#pragma GCC unroll 2
                    for (int v = 0; v < 2; v++)
                        total[r][v] = _mm256_add_epi32(total[r][v], _mm256_madd_epi16(sum[r][v], levels_at((const uint8_t*)w.scale[j][8 * v])));
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) _mm256_store_si256((__m256i*)(out + r * PANEL + 8 * v), total[r][v]);
}

// c += the products of a tile of MR rows of activations with a panel's chunk.
template <Format F, int MR> inline void tile(const PanelChunk<F>& w, int, const TileRows& x, float* c) {
    alignas(64) int32_t total[MR][PANEL];
    totals<F, MR>(w, x.level, total[0]);
    for (int v = 0; v < 2; v++) {
        const __m256 d = _mm256_load_ps(w.d + 8 * v), dmin = _mm256_load_ps(w.dmin + 8 * v);
        for (int r = 0; r < MR; r++) {
            __m256 y = _mm256_mul_ps(d, _mm256_cvtepi32_ps(_mm256_load_si256((const __m256i*)(total[r] + 8 * v))));
            if constexpr (way<F> == MINS) {
                __m256i low = _mm256_setzero_si256();
                const int16_t* sums = x.sums<Traits<F>::sub>(r);
                for (int j = 0; j < PanelChunk<F>::subs / 2; j++)
                    low = _mm256_add_epi32(low, _mm256_madd_epi16(levels_at((const uint8_t*)w.min[j][8 * v]), four_bytes((const int8_t*)(sums + 2 * j))));
                y = _mm256_fnmadd_ps(dmin, _mm256_cvtepi32_ps(low), y);
            }
            float* out = c + r * PANEL + 8 * v;
            _mm256_store_ps(out, _mm256_fmadd_ps(_mm256_set1_ps(x.scale(r)), y, _mm256_load_ps(out)));
        }
    }
}

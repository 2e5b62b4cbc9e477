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

inline __m256i levels_at(const uint8_t* p) { return _mm256_load_si256((const __m256i*)p); }

template <Format F> struct PanelChunk {
    static constexpr int subs = CHUNK / Traits<F>::sub, tile_rows = tile_rows_of(BY_256), turns_of_tile = 1;
    // In groups of four weights, or of two that are 16 bits wide.
    alignas(64) uint8_t level[CHUNK / (way<F> == AS_WIDE ? 2 : 4)][PANEL][4];
    alignas(64) int16_t scale[subs][PANEL][2];    // twice each: both halves of a pair of sums
    alignas(64) int16_t min[subs / 2][PANEL][2];  // two sub-blocks side by side
    alignas(64) int32_t base[PANEL];
    alignas(64) float d[PANEL], dmin[PANEL];

    void put_scales(int first, const EightWholes<F>& s) {
        for (int j = 0; j < subs; j++) store_at(scale[j][first], s.scale[j]);
        if constexpr (way<F> == MINS)
            for (int j = 0; j < subs / 2; j++) store_at(min[j][first], s.min[j]);
        _mm256_store_ps(d + first, s.d);
        _mm256_store_ps(dmin + first, s.dmin);
        store_at(base + first, _mm256_setzero_si256());
    }

    void put_scales(int first, const EightFloats& s) {
        EightWholes<F> whole;
        __m256i share[8];
        whole.d = shares(s.scale, top_scale<F>, share);
        // A level there is 64 shares of its own scale.
        if constexpr (way<F> == AS_WIDE) whole.d = _mm256_mul_ps(whole.d, _mm256_set1_ps(top_scale<F> / 64));
        for (int j = 0; j < 8; j++) whole.scale[j] = side_by_side(share[j], share[j]);
        whole.dmin = _mm256_setzero_ps();
        if constexpr (way<F> == MINS) {
            whole.dmin = _mm256_mul_ps(shares(s.offset, TOP_MIN, share), _mm256_set1_ps(-1));
            for (int j = 0; j < 4; j++) whole.min[j] = side_by_side(share[2 * j], share[2 * j + 1]);
        }
        put_scales(first, whole);
    }

    // Levels 32 i to 32 i + 31 of eight rows whose scales are there.
    void put_levels(int first, int i, const __m256i (&q)[8]) {
        if constexpr (way<F> == AS_WIDE) {
            const __m256i share = levels_at((const uint8_t*)scale[i][first]);
            for (int g = 0; g < 8; g++)
                for (int half = 0; half < 2; half++) {
                    // 64 times the level, in proportion to the greatest scale.
                    const __m256i wide = _mm256_slli_epi16(two_of(q[g], 2 * half, 2 * half + 1), 7);
                    store_at(level[16 * i + 2 * g + half][first], _mm256_mulhrs_epi16(wide, share));
                }
        } else {
            for (int g = 0; g < 8; g++)
                store_at(level[8 * i + g][first], way<F> == CENTRED ? _mm256_sub_epi8(q[g], _mm256_set1_epi8(centre<F>)) : q[g]);
            if constexpr (way<F> == CENTRED) put_base(first, i, q);
        }
    }

   private:
    static void store_at(void* to, __m256i v) { _mm256_store_si256((__m256i*)to, v); }

    // The lower halves of two numbers.
    static __m256i side_by_side(__m256i first, __m256i second) {
        return _mm256_blend_epi16(first, _mm256_slli_epi32(second, 16), 0xaa);
    }

    // Eight numbers of eight rows as whole shares of each row's greatest, which has `top`; what one share is worth. If one
    // is no number or has no end, neither has that.
    static __m256 shares(const __m256 (&numbers)[8], int top, __m256i (&out)[8]) {
        // As whole numbers: then what is no number is greater than what has no end.
        __m256i greatest = _mm256_setzero_si256();
        for (const __m256 v : numbers)
            greatest = _mm256_max_epi32(_mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff)), greatest);
        const __m256 size = _mm256_castsi256_ps(greatest), most = _mm256_set1_ps(float(top));
        const __m256 some = _mm256_cmp_ps(size, _mm256_setzero_ps(), _CMP_GT_OQ);
        const __m256 inverse = _mm256_and_ps(_mm256_div_ps(most, size), some);
        for (int j = 0; j < 8; j++) out[j] = _mm256_cvtps_epi32(_mm256_mul_ps(numbers[j], inverse));
        return _mm256_div_ps(size, most);
    }

    // What activations that are 128 too great add to the sums of centred levels is taken away.
    void put_base(int first, int i, const __m256i (&q)[8]) {
        constexpr int sub = Traits<F>::sub, groups = sub / 4;
        __m256i all = levels_at((const uint8_t*)(base + first));
        for (int from = 0; from < 8; from += groups) {
            __m256i bytes = q[from];  // up to 252: they are so few
            for (int g = from + 1; g < from + groups; g++) bytes = _mm256_add_epi8(bytes, q[g]);
            const __m256i pairs = _mm256_sub_epi16(_mm256_maddubs_epi16(bytes, _mm256_set1_epi8(1)), _mm256_set1_epi16(centre<F> * sub / 2));
            const __m256i factor = levels_at((const uint8_t*)scale[(8 * i + from) / groups][first]);
            all = _mm256_sub_epi32(all, _mm256_slli_epi32(_mm256_madd_epi16(pairs, factor), 7));
        }
        store_at(base + first, all);
    }
};

inline __m256i four_bytes(const int8_t* x) { return _mm256_set1_epi32(*(const int32_t*)x); }

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
template <int MR, Format F> inline void tile(const PanelChunk<F>& w, int, const TileRows& x, Wanted& wanted, float* c) {
    wanted.some<F>();
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

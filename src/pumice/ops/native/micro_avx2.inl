// AVX2: products of a panel of 16 rows of weights with a tile of int8 activations.
//
// vpmaddubsw takes unsigned levels times signed activations into int16 sums of pairs. They may be added up while they
// cannot overflow: eight times for levels of 4 bits, four for 5, twice for 6. Levels of 8 bits do not fit even once, so
// a panel holds them as two planes of 4 bits.

constexpr int PANEL = 16, TILE_ROWS_32 = 4, TILE_ROWS_256 = 4;

template <int bits> constexpr int planes = bits == 8 ? 2 : 1;
template <int bits> constexpr int sums_that_fit = bits == 5 ? 4 : bits == 6 ? 2 : 8;


template <Format F, bool = Traits<F>::whole> struct PanelChunk;

template <Format F> struct PanelChunk<F, false> {
    alignas(64) uint8_t level[planes<Traits<F>::bits>][CHUNK / 4][PANEL][4];
    alignas(64) float scale[8][PANEL], offset[8][PANEL];

    void put_scales(int row, const FloatScales& s) {
        for (int j = 0; j < 8; j++) {
            scale[j][row] = s.scale[j];
            offset[j][row] = s.offset[j];
        }
    }
};

template <Format F> struct PanelChunk<F, true> {
    static constexpr int subs = CHUNK / Traits<F>::sub;
    alignas(64) uint8_t level[1][CHUNK / 4][PANEL][4];
    alignas(64) int16_t scale[subs][PANEL][2];    // twice each: both halves of a pair of sums
    alignas(64) int16_t min[subs / 2][PANEL][2];  // two sub-blocks side by side
    alignas(64) float d[PANEL], dmin[PANEL];

    void put_scales(int row, const WholeScales& s) {
        for (int j = 0; j < subs; j++) scale[j][row][0] = scale[j][row][1] = s.scale[j];
        for (int j = 0; j < subs; j++) min[j / 2][row][j % 2] = s.min[j];
        d[row] = s.d;
        dmin[row] = s.dmin;
    }
};

// The levels of PANEL rows, row after row of CHUNK bytes, into a panel's order.
template <Format F> inline void put_levels(uint8_t* rows, int count, PanelChunk<F>& w) {
    constexpr int stride = PANEL * 4;
    if constexpr (Traits<F>::bits == 8) {
        alignas(64) uint8_t high[8 * CHUNK];
        for (int first = 0; first < PANEL; first += 8) {
            uint8_t* low = rows + first * CHUNK;
            for (int i = 0; i < 8 * CHUNK; i++) {
                const uint8_t level = low[i] ^ 128;
                high[i] = level >> 4;
                low[i] = level & 15;
            }
            for (int k = 0; k < count; k += 32) {
                transpose8(low + k, CHUNK, w.level[0][k / 4][first], stride);
                transpose8(high + k, CHUNK, w.level[1][k / 4][first], stride);
            }
        }
    } else {
        for (int first = 0; first < PANEL; first += 8)
            for (int k = 0; k < count; k += 32)
                transpose8(rows + first * CHUNK + k, CHUNK, w.level[0][k / 4][first], stride);
    }
}

inline __m256i four_bytes(const int8_t* x) { return _mm256_set1_epi32(*(const int32_t*)x); }
inline __m256i levels_at(const uint8_t* p) { return _mm256_load_si256((const __m256i*)p); }

// Sums of pairs over `steps` groups of four weights: MR rows of activations by 16 rows of weights.
template <int MR, int steps>
inline __attribute__((always_inline)) void pair_sums(const uint8_t* w, const int8_t* x, __m256i (&sum)[MR][2]) {
#pragma GCC unroll 8
    for (int step = 0; step < steps; step++) {
        const __m256i w0 = levels_at(w + step * 64), w1 = levels_at(w + step * 64 + 32);
#pragma GCC unroll 8
        for (int r = 0; r < MR; r++) {
            const __m256i xr = four_bytes(x + (step * MR + r) * 4);
            const __m256i p0 = _mm256_maddubs_epi16(w0, xr), p1 = _mm256_maddubs_epi16(w1, xr);
            sum[r][0] = step == 0 ? p0 : _mm256_add_epi16(sum[r][0], p0);
            sum[r][1] = step == 0 ? p1 : _mm256_add_epi16(sum[r][1], p1);
            // Keeps the additions where they stand: GCC would make a tree of them, out of registers that it lacks.
            asm("" : "+x"(sum[r][0]), "+x"(sum[r][1]));
        }
    }
}

// c += the products of a tile of MR rows of activations with a panel's chunk.
template <Format F, int MR> inline void tile(const PanelChunk<F>& w, int subs, const TileRows& x, float* c) {
    constexpr int sub = Traits<F>::sub, bits = Traits<F>::bits, fit = sums_that_fit<bits>;
    constexpr int run = fit < sub / 4 ? fit : sub / 4;
    if constexpr (Traits<F>::whole) {
        __m256i total[MR][2];
        for (int r = 0; r < MR; r++) total[r][0] = total[r][1] = _mm256_setzero_si256();
        for (int j = 0; j < CHUNK / sub; j++) {
            const __m256i s0 = _mm256_load_si256((const __m256i*)w.scale[j][0]);
            const __m256i s1 = _mm256_load_si256((const __m256i*)w.scale[j][8]);
            for (int at = j * sub / 4; at < (j + 1) * sub / 4; at += run) {
                __m256i sum[MR][2];
                pair_sums<MR, run>(w.level[0][at][0], x.level + at * MR * 4, sum);
                for (int r = 0; r < MR; r++) {
                    total[r][0] = _mm256_add_epi32(total[r][0], _mm256_madd_epi16(sum[r][0], s0));
                    total[r][1] = _mm256_add_epi32(total[r][1], _mm256_madd_epi16(sum[r][1], s1));
                }
            }
        }
        for (int v = 0; v < 2; v++) {
            const __m256 d = _mm256_load_ps(w.d + 8 * v), dmin = _mm256_load_ps(w.dmin + 8 * v);
            for (int r = 0; r < MR; r++) {
                __m256i low = _mm256_setzero_si256();
                const int16_t* sums = x.sums<sub>(r);
                for (int j = 0; j < CHUNK / sub / 2; j++) {
                    const __m256i min = _mm256_load_si256((const __m256i*)w.min[j][8 * v]);
                    low = _mm256_add_epi32(low, _mm256_madd_epi16(min, _mm256_set1_epi32(*(const int32_t*)(sums + 2 * j))));
                }
                __m256 y = _mm256_mul_ps(d, _mm256_cvtepi32_ps(total[r][v]));
                y = _mm256_fnmadd_ps(dmin, _mm256_cvtepi32_ps(low), y);
                float* out = c + r * PANEL + 8 * v;
                _mm256_store_ps(out, _mm256_fmadd_ps(_mm256_set1_ps(x.scale(r)), y, _mm256_load_ps(out)));
            }
        }
    } else {
        const __m256i ones = _mm256_set1_epi16(1), sixteens = _mm256_set1_epi16(16);
        for (int j = 0; j < subs; j++) {
            __m256i total[MR][2];
            for (int r = 0; r < MR; r++) total[r][0] = total[r][1] = _mm256_set1_epi32(-middle<F> * x.sums<32>(r)[j]);
            for (int at = 8 * j; at < 8 * j + 8; at += run) {
                __m256i sum[MR][2];
                pair_sums<MR, run>(w.level[0][at][0], x.level + at * MR * 4, sum);
                for (int r = 0; r < MR; r++)
                    for (int v = 0; v < 2; v++) {
                        const __m256i wide = _mm256_madd_epi16(sum[r][v], ones);
                        total[r][v] = _mm256_add_epi32(total[r][v], wide);
                    }
            }
            if constexpr (bits == 8) {
                __m256i sum[MR][2];
                pair_sums<MR, 8>(w.level[1][8 * j][0], x.level + 8 * j * MR * 4, sum);
                for (int r = 0; r < MR; r++)
                    for (int v = 0; v < 2; v++)
                        total[r][v] = _mm256_add_epi32(total[r][v], _mm256_madd_epi16(sum[r][v], sixteens));
            }
            for (int v = 0; v < 2; v++) {
                const __m256 scale = _mm256_load_ps(w.scale[j] + 8 * v), offset = _mm256_load_ps(w.offset[j] + 8 * v);
                for (int r = 0; r < MR; r++) {
                    float* out = c + r * PANEL + 8 * v;
                    const __m256 s = _mm256_mul_ps(scale, _mm256_set1_ps(x.scale(r, j)));
                    __m256 y = _mm256_fmadd_ps(s, _mm256_cvtepi32_ps(total[r][v]), _mm256_load_ps(out));
                    if constexpr (middle<F> == 0) y = _mm256_fmadd_ps(offset, _mm256_set1_ps(x.scaled_sum(r, j)), y);
                    _mm256_store_ps(out, y);
                }
            }
        }
    }
}

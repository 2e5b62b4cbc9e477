// AVX-512 with VNNI: products of a panel of 32 rows of weights with a tile of int8 activations.
//
// vpdpbusd adds four products of unsigned levels and signed activations to an int32 sum. Multiplications of any kind
// share its ports, so the scales of K-quants are applied in floating point, once for each sub-block.

constexpr int PANEL = 32;

constexpr int tile_rows_of(Layout layout) { return is_in_pairs(layout) ? PAIRED_ROWS : layout == BY_32 ? 6 : 4; }

inline Layout layout_of_many(int32_t format) {
    if (TILED_ROWS == 0) return format >= Q2_K && format <= Q6_K ? BY_256 : BY_32;
    switch (format) {
        case Q2_K: case Q3_K: case Q6_K: return BY_256;
        case Q4_K: case Q5_K: return PAIRS_BY_256;
        default: return PAIRS_BY_32;
    }
}

template <Format F> struct PanelLevels {
    alignas(64) uint8_t level[CHUNK / 4][PANEL][4];

    // Levels 32 i to 32 i + 31 of eight rows; levels with a sign are taken from 128 up.
    void put_levels(int first, int i, const __m256i (&q)[8]) {
        const __m256i flip = _mm256_set1_epi8(Traits<F>::bits == 8 ? char(128) : 0);
        for (int g = 0; g < 8; g++) _mm256_store_si256((__m256i*)level[8 * i + g][first], _mm256_xor_si256(q[g], flip));
    }
};

template <Format F, bool = Traits<F>::whole> struct PanelChunk;

template <Format F> struct PanelChunk<F, false> : PanelLevels<F> {
    static constexpr int tile_rows = tile_rows_of(BY_32), turns_of_tile = CHUNK / 32;
    alignas(64) float scale[8][PANEL], offset[8][PANEL];

    void put_scales(int first, const EightFloats& s) {
        for (int j = 0; j < 8; j++) {
            _mm256_store_ps(scale[j] + first, s.scale[j]);
            if constexpr (middle<F> == 0) _mm256_store_ps(offset[j] + first, s.offset[j]);
        }
    }
};

template <Format F> struct PanelChunk<F, true> : PanelLevels<F> {
    static constexpr int subs = CHUNK / Traits<F>::sub, tile_rows = tile_rows_of(BY_256), turns_of_tile = subs;
    alignas(64) float scale[subs][PANEL];
    alignas(64) int16_t min[subs / 2][PANEL][2];  // two sub-blocks side by side
    alignas(64) float d[PANEL], dmin[PANEL];

    void put_scales(int first, const EightWholes<F>& s) {
        for (int j = 0; j < subs; j++) _mm256_store_ps(scale[j] + first, _mm256_cvtepi32_ps(_mm256_srai_epi32(s.scale[j], 16)));
        for (int j = 0; j < subs / 2; j++) _mm256_store_si256((__m256i*)min[j][first], s.min[j]);
        _mm256_store_ps(d + first, s.d);
        _mm256_store_ps(dmin + first, s.dmin);
    }
};

inline __m512i four_bytes(const int8_t* x) {
    int32_t v;
    memcpy(&v, x, 4);
    return _mm512_set1_epi32(v);
}

// Adds the products of `steps` groups of four weights: MR rows of activations by 32 rows of weights.
template <int MR, int steps>
inline __attribute__((always_inline)) void products(const uint8_t* w, const int8_t* x, __m512i (&sum)[MR][2]) {
#pragma GCC unroll 8
    for (int step = 0; step < steps; step++) {
        const __m512i w0 = _mm512_load_si512(w + step * 128), w1 = _mm512_load_si512(w + step * 128 + 64);
#pragma GCC unroll 8
        for (int r = 0; r < MR; r++) {
            const __m512i xr = four_bytes(x + (step * MR + r) * 4);
            sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], w0, xr);
            sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], w1, xr);
        }
    }
}

// c += the products y of a K-quant's chunk, less its mins, with the scales of 256 weights.
template <Format F, int MR>
inline __attribute__((always_inline)) void add_whole(const PanelChunk<F>& w, const TileRows& x, const __m512 (&y)[MR][2], float* c) {
    for (int v = 0; v < 2; v++) {
        const __m512 d = _mm512_load_ps(w.d + 16 * v), dmin = _mm512_load_ps(w.dmin + 16 * v);
        for (int r = 0; r < MR; r++) {
            __m512i low = _mm512_setzero_si512();
            const int16_t* sums = x.sums<Traits<F>::sub>(r);
            for (int j = 0; j < CHUNK / Traits<F>::sub / 2; j++)
                low = _mm512_dpwssd_epi32(low, _mm512_load_si512(w.min[j][16 * v]), four_bytes((const int8_t*)(sums + 2 * j)));
            const __m512 product = _mm512_fnmadd_ps(dmin, _mm512_cvtepi32_ps(low), _mm512_mul_ps(d, y[r][v]));
            float* out = c + r * PANEL + 16 * v;
            _mm512_store_ps(out, _mm512_fmadd_ps(_mm512_set1_ps(x.scale(r)), product, _mm512_load_ps(out)));
        }
    }
}

// c += the products of a tile of MR rows of activations with a panel's chunk.
template <int MR, Format F> inline void tile(const PanelChunk<F>& w, int subs, const TileRows& x, Wanted& wanted, float* c) {
    __m512 y[MR][2];
    if constexpr (Traits<F>::whole) {
        constexpr int steps = Traits<F>::sub / 4;
        for (int r = 0; r < MR; r++) y[r][0] = y[r][1] = _mm512_setzero_ps();
        for (int j = 0; j < CHUNK / Traits<F>::sub; j++) {
            __m512i sum[MR][2];
            for (int r = 0; r < MR; r++) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
            wanted.some<F>();
            products<MR, steps>(w.level[j * steps][0], x.level + j * steps * MR * 4, sum);
            for (int v = 0; v < 2; v++) {
                const __m512 scale = _mm512_load_ps(w.scale[j] + 16 * v);
                for (int r = 0; r < MR; r++) y[r][v] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(sum[r][v]), y[r][v]);
            }
        }
        add_whole<F>(w, x, y, c);
    } else {
        static_assert(middle<F> % 8 == 0, "starts are made for levels that are 8 too great");
        for (int r = 0; r < MR; r++)
            for (int v = 0; v < 2; v++) y[r][v] = _mm512_load_ps(c + r * PANEL + 16 * v);
        for (int j = 0; j < subs; j++) {
            __m512i sum[MR][2];
            for (int r = 0; r < MR; r++) sum[r][0] = sum[r][1] = _mm512_set1_epi32(middle<F> / 8 * x.start(r, j));
            wanted.some<F>();
            products<MR, 8>(w.level[8 * j][0], x.level + 8 * j * MR * 4, sum);
            for (int v = 0; v < 2; v++) {
                const __m512 scale = _mm512_load_ps(w.scale[j] + 16 * v), offset = _mm512_load_ps(w.offset[j] + 16 * v);
                for (int r = 0; r < MR; r++) {
                    const __m512 s = _mm512_mul_ps(scale, _mm512_set1_ps(x.scale(r, j)));
                    y[r][v] = _mm512_fmadd_ps(s, _mm512_cvtepi32_ps(sum[r][v]), y[r][v]);
                    if constexpr (middle<F> == 0)
                        y[r][v] = _mm512_fmadd_ps(offset, _mm512_set1_ps(x.scaled_sum(r, j)), y[r][v]);
                }
            }
        }
        for (int r = 0; r < MR; r++)
            for (int v = 0; v < 2; v++) _mm512_store_ps(c + r * PANEL + 16 * v, y[r][v]);
    }
}

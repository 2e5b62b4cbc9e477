// Fewer than TILED_ROWS rows of activations on AMX: panels of bytes, multiplied in tiles, for formats with a scale for each 32
// weights.
//
// TDPBSSD adds to 16 x 16 sums the products of 16 rows of 64 bytes, and of 64 bytes of 16 columns that lie in groups of four
// (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBSSD). That is two blocks of 32, whose sums must
// not meet: each row of activations is there twice, and of each block one of the two has nothing but 0. What is added up is
// what the kernels of `avx512` add up, bit by bit (micro_avx512.inl), but where Q4_0's scales leave what float32 holds.

// Levels have signs here. Those of Q4_0 stay in the upper half of their byte, so they are 16 times what they stand for.
template <Format F> struct BytePanel : PanelChunk<F> {
    static constexpr int tile_rows = PAIRED_ROWS, turns_of_tile = CHUNK / 64;

    void put_scales(int first, EightFloats s) {
        if constexpr (F == Q4_0)
            for (__m256& scale : s.scale) scale = _mm256_mul_ps(scale, _mm256_set1_ps(1 / 16.f));
        PanelChunk<F>::put_scales(first, s);
    }

    void put_scales(int first, const EightWholes<F>& s) { PanelChunk<F>::put_scales(first, s); }

    void put_levels(int first, int i, const __m256i (&q)[8]) {
        const __m256i zero = _mm256_set1_epi8(F == Q5_0 ? 16 : 0);
        for (int g = 0; g < 8; g++) put(first, 8 * i + g, _mm256_sub_epi8(q[g], zero));
    }

    // Dwords as they lie in a block of Q4_0: a level in the lower half of each byte, and the one 16 behind it in the upper.
    void put_packed(int first, int i, const __m256i (&packed)[4]) {
        const __m256i upper = _mm256_set1_epi8(char(0xf0)), flip = _mm256_set1_epi8(char(0x80));
        constexpr int both_then_flip = 0x6a;  // (a & b) ^ c
        for (int g = 0; g < 4; g++) {
            const __m256i low = _mm256_slli_epi16(packed[g], 4);
            put(first, 8 * i + g, _mm256_ternarylogic_epi32(low, upper, flip, both_then_flip));
            put(first, 8 * i + 4 + g, _mm256_ternarylogic_epi32(packed[g], upper, flip, both_then_flip));
        }
    }

   private:
    void put(int first, int group, __m256i levels) { _mm256_store_si256((__m256i*)this->level[group][first], levels); }
};

template <> constexpr bool takes_packed<BytePanel<Q4_0>> = true;

// c += the products of a tile of MR rows of activations with a panel's chunk.
template <int MR, Format F>
inline __attribute__((always_inline)) void tile(const BytePanel<F>& w, int, const TileRows& x, Wanted& wanted, float* c) {
    constexpr int pairs = CHUNK / 64, stride = PANEL * 4;
    alignas(64) int32_t sums[2][2][TILE][16];  // of this pair and of the one before: [half of the panel][block and row]
    __m512 y[MR][2];
    for (int r = 0; r < MR; r++)
        for (int v = 0; v < 2; v++) y[r][v] = Traits<F>::whole ? _mm512_setzero_ps() : _mm512_load_ps(c + r * PANEL + 16 * v);
    const auto multiply = [&](int pair) __attribute__((always_inline)) {
        const uint8_t* level = w.level[pair * 16][0];
        auto& sum = sums[pair % 2];
        settle_memory();
        _tile_loadd(0, x.level + pair * PAIR_BYTES, 64);
        _tile_loadd(1, level, stride);
        _tile_zero(2);
        _tile_dpbssd(2, 0, 1);
        _tile_loadd(3, level + 64, stride);
        _tile_zero(4);
        _tile_dpbssd(4, 0, 3);
        _tile_stored(2, sum[0], 64);
        _tile_stored(4, sum[1], 64);
    };
    const auto add = [&](int pair) __attribute__((always_inline)) {
        wanted.some<F>();
        for (int block = 0; block < 2; block++)
            for (int v = 0; v < 2; v++) {
                const int j = 2 * pair + block;
                const __m512 scale = _mm512_load_ps(w.scale[j] + 16 * v);
                for (int r = 0; r < MR; r++) {
                    const __m512 product = _mm512_cvtepi32_ps(_mm512_load_si512(sums[pair % 2][v][PAIRED_ROWS * block + r]));
                    if constexpr (Traits<F>::whole)
                        y[r][v] = _mm512_fmadd_ps(scale, product, y[r][v]);
                    else
                        y[r][v] = _mm512_fmadd_ps(_mm512_mul_ps(scale, _mm512_set1_ps(x.scale(r, j))), product, y[r][v]);
                    if constexpr (F == Q4_1 || F == Q5_1)
                        y[r][v] = _mm512_fmadd_ps(_mm512_load_ps(w.offset[j] + 16 * v), _mm512_set1_ps(x.scaled_sum(r, j)), y[r][v]);
                }
            }
    };
    // Tiles take long to come: the next pair is on its way while this one's products meet their scales.
    multiply(0);
#pragma GCC unroll 4
    for (int pair = 0; pair < pairs; pair++) {
        if (pair + 1 < pairs) multiply(pair + 1);
        add(pair);
    }
    if constexpr (Traits<F>::whole)
        add_whole<F>(w, x, y, c);
    else
        for (int r = 0; r < MR; r++)
            for (int v = 0; v < 2; v++) _mm512_store_ps(c + r * PANEL + 16 * v, y[r][v]);
}

// Rows `first` to `last` of weights; `c` has room for x.m * PANEL sums.
template <Format F> __attribute__((noinline)) void pairs(const Matrix& w, const Activations& x, int64_t first, int64_t last, float* c) {
    const TileRegisters registers;
    streamed_panels<F, BytePanel<F>>(w, x, first, last, c);
}

// Many rows of activations on AMX: weights and activations are rounded to bfloat16 and multiplied in tiles, sums are float32.
//
// A tile has 16 rows of 64 bytes. TDPBF16PS adds to 16 x 16 sums the products of 16 rows of 32 channels, and of 32 channels
// of 16 columns that lie in pairs (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS).
// Scales are multiplied into the weights before they are rounded: 8 bits of them are left, as of the activations.

constexpr int TILE = 16, TILE_CHANNELS = 32;

// A chunk of PANEL rows of weights: [pair of channels][row][channel of the pair].
template <Format F> struct TilePanel {
    static constexpr int sub = Traits<F>::sub, subs = CHUNK / sub;
    alignas(64) uint16_t pair[CHUNK / 2][PANEL][2];
    __m512 scale[subs], offset[subs];  // of the eight rows that are put, twice

    void put_scales(int, const EightFloats& s) {
        for (int j = 0; j < subs; j++) {
            scale[j] = twice(s.scale[j]);
            offset[j] = middle<F> ? _mm512_mul_ps(scale[j], _mm512_set1_ps(-middle<F>)) : twice(s.offset[j]);
        }
    }

    void put_scales(int, const EightWholes<F>& s) {
        const __m256 d = s.d, dmin = _mm256_mul_ps(s.dmin, _mm256_set1_ps(-1));
        for (int j = 0; j < subs; j++) {
            const __m256i min = j % 2 ? s.min[j / 2] : _mm256_slli_epi32(s.min[j / 2], 16);
            scale[j] = twice(_mm256_mul_ps(d, _mm256_cvtepi32_ps(_mm256_srai_epi32(s.scale[j], 16))));
            offset[j] = twice(_mm256_mul_ps(dmin, _mm256_cvtepi32_ps(_mm256_srai_epi32(min, 16))));
        }
    }

    // Levels 32 i to 32 i + 31 of eight rows; levels with a sign are taken from 128 up.
    void put_levels(int first, int i, const __m256i (&q)[8]) {
        const __m512i flip = _mm512_set1_epi32(Traits<F>::bits == 8 ? 128 : 0);
        // In each lane of 16 bytes: byte 0 of each dword, and byte 2 in the upper half of the vector; then bytes 1 and 3.
        const __m512i evens = byte_of_dwords(0, 2), odds = byte_of_dwords(1, 3);
        const __m512i between = interleaved();
        for (int g = 0; g < 8; g++) {
            const __m512i level = _mm512_broadcast_i64x4(q[g]);
            const int j = (32 * i + 4 * g) / sub;
            const auto weights = [&](__m512i bytes) {
                const __m512i whole = _mm512_xor_si512(_mm512_shuffle_epi8(level, bytes), flip);
                return _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), scale[j], offset[j]);
            };
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(weights(odds), weights(evens));
            const __m512i pairs = _mm512_permutexvar_epi16(between, both);
            _mm256_store_si256((__m256i*)pair[16 * i + 2 * g][first], _mm512_castsi512_si256(pairs));
            _mm256_store_si256((__m256i*)pair[16 * i + 2 * g + 1][first], _mm512_extracti64x4_epi64(pairs, 1));
        }
    }

   private:
    static __m512 twice(__m256 v) { return _mm512_castsi512_ps(_mm512_broadcast_i64x4(_mm256_castps_si256(v))); }

    static __m512i byte_of_dwords(int lower, int upper) {
        const __m128i each = _mm_setr_epi32(int(0x80808000), int(0x80808004), int(0x80808008), int(0x8080800c));
        const __m256i low = _mm256_broadcastsi128_si256(_mm_add_epi32(each, _mm_set1_epi32(lower)));
        const __m256i high = _mm256_broadcastsi128_si256(_mm_add_epi32(each, _mm_set1_epi32(upper)));
        return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }

    // Words 0 and 16, 1 and 17 and so on.
    static __m512i interleaved() {
        const __m512i lower = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_or_si512(lower, _mm512_slli_epi32(_mm512_add_epi32(lower, _mm512_set1_epi32(16)), 16));
    }
};

// The tile registers of this thread as the kernel wants them: all of 16 rows of 64 bytes. The settings of others come back,
// not what their tiles held.
class TileRegisters {
    struct alignas(64) Settings {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE};
    };
    Settings before;

    // GCC's intrinsics claim to touch the first eight bytes only: the others must be in memory before, and stay as they are.
    static void settle(const Settings& settings) { asm volatile("" : : "r"(&settings) : "memory"); }

   public:
    TileRegisters() {
        const Settings wanted;
        settle(wanted);
        settle(before);
        _tile_storeconfig(&before);
        _tile_loadconfig(&wanted);
    }
    ~TileRegisters() {
        settle(before);
        _tile_loadconfig(&before);
    }
    TileRegisters(const TileRegisters&) = delete;
};

// GCC's intrinsics do not say that they read memory, only that they write it: what is stored before is there after this.
inline void settle_memory() { asm volatile("" : : : "memory"); }

// One row of a chunk of activations, to where the tiles are loaded from: [chunk][tile][32 channels][row of the tile].
inline void put_in_tiles(const Activations& x, int64_t chunk, int64_t r, const float* from) {
    uint16_t* out = x.in_tiles(chunk, r / TILE * TILE) + r % TILE * TILE_CHANNELS;
    for (int i = 0; i < x.count(chunk); i += TILE_CHANNELS, out += TILE * TILE_CHANNELS)
        _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + i + 16), _mm512_loadu_ps(from + i)));
}

// c += the products of 32 rows of activations, or the first 16 of them, with a panel's chunk of `steps` times 32 channels.
template <bool both> inline void multiply(const uint16_t* x, const uint16_t* w, int steps, int64_t chunk_tile, float* c) {
    constexpr int stride = PANEL * 4;
    settle_memory();
    _tile_loadd(0, c, stride);
    _tile_loadd(1, c + TILE, stride);
    if constexpr (both) {
        _tile_loadd(2, c + TILE * PANEL, stride);
        _tile_loadd(3, c + TILE * PANEL + TILE, stride);
    }
    for (int step = 0; step < steps; step++, x += TILE * TILE_CHANNELS, w += TILE * PANEL * 2) {
        _tile_loadd(4, x, 64);
        _tile_loadd(6, w, stride);
        _tile_loadd(7, w + TILE * 2, stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (both) {
            _tile_loadd(5, x + chunk_tile, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, stride);
    _tile_stored(1, c + TILE, stride);
    if constexpr (both) {
        _tile_stored(2, c + TILE * PANEL, stride);
        _tile_stored(3, c + TILE * PANEL + TILE, stride);
    }
}

// `panels`, in tiles. `c` has room for TILED_TOGETHER * rows_in_tiles(x.m) * PANEL sums.
template <Format F> __attribute__((noinline)) void tiles(const Matrix& w, const Activations& x, int64_t first, int64_t last, float* c) {
    TilePanel<F> panel[TILED_TOGETHER];
    const TileRegisters registers;
    const int64_t m = rows_in_tiles(x.m);
    const int count_of_panels = int((last - first + PANEL - 1) / PANEL);
    const auto rows_of = [&](int p) { return PanelRows(w, first + p * PANEL, 1, last); };
    memset(c, 0, size_t(count_of_panels * m) * PANEL * sizeof(float));
    for (int64_t chunk = 0; chunk < x.chunks; chunk++) {
        const int count = x.count(chunk);
        for (int p = 0; p < count_of_panels; p++) fill<F>(panel[p], rows_of(p), chunk, count);
        Wanted wanted(next_chunk<F>(w, first, last, chunk, x.chunks), w.row_bytes, last - first, m / (2 * TILE));
        for (int64_t r = 0; r < x.m; r += 2 * TILE) {
            wanted.some<F>();
            for (int p = 0; p < count_of_panels; p++) {
                float* sums = c + (p * m + r) * PANEL;
                const auto product = x.m - r > TILE ? multiply<true> : multiply<false>;
                product(x.in_tiles(chunk, r), panel[p].pair[0][0], count / TILE_CHANNELS, CHUNK * TILE, sums);
            }
        }
    }
    for (int p = 0; p < count_of_panels; p++) give(w, rows_of(p), x.m, c + p * m * PANEL);
}

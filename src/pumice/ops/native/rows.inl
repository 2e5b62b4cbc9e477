// Activations as int8, with one scale for each 32 channels (floating scales) or each 256 (K-quants), as ggml takes them.

// A chunk of one row of activations.
struct ChunkOfRow {
    const int8_t* level;
    const float *scales, *offsets;
    const int16_t *sums_of_16, *sums_of_32;

    float scale(int sub = 0) const { return scales[sub]; }
    const float* scaled_sums() const { return offsets; }
    template <int sub> const int16_t* sums() const { return sub == 16 ? sums_of_16 : sums_of_32; }
};

// A chunk of a tile: [group of four channels][row][4], so that a kernel reads one stream.
struct TileRows {
    const int8_t* level;
    const float *scales, *offsets;
    const int16_t *sums_of_16, *sums_of_32;
    const int32_t* starts;
    int scale_stride;

    float scale(int r, int sub = 0) const { return scales[r * scale_stride + sub]; }
    float scaled_sum(int r, int sub) const { return offsets[r * 8 + sub]; }
    int32_t start(int r, int sub) const { return starts[r * 8 + sub]; }
    template <int sub> const int16_t* sums(int r) const { return (sub == 16 ? sums_of_16 : sums_of_32) + r * 16; }
};

// How activations are laid out. BY_32: one scale for 32 channels; all others: one a chunk. In tiles only: SHIFTED, levels
// with 128 added, and WIDE, levels of 11 bits in 16. PAIRS_BY_32 and PAIRS_BY_256: as those, but for the places of levels
// (bytes_amx.inl). BFLOATS: not rounded to levels (tiles_amx.inl).
enum Layout : int { BY_32, BY_256, SHIFTED, WIDE, PAIRS_BY_32, PAIRS_BY_256, BFLOATS, LAYOUTS };

constexpr bool is_by_32(Layout layout) { return layout == BY_32 || layout == PAIRS_BY_32; }
constexpr bool is_in_pairs(Layout layout) { return layout == PAIRS_BY_32 || layout == PAIRS_BY_256; }

// Rows of activations in a tile of pairs, and its bytes: 16 rows of two blocks of 32 levels.
constexpr int PAIRED_ROWS = 8, PAIR_BYTES = 2 * PAIRED_ROWS * 64;

// The levels of m rows in one chunk.
inline int64_t chunk_of_levels(int64_t m, Layout layout) {
    if (is_in_pairs(layout)) return (m + PAIRED_ROWS - 1) / PAIRED_ROWS * (CHUNK / 64) * PAIR_BYTES;
    return m * CHUNK * (layout == WIDE ? 2 : 1);
}

// Rows of activations that registers of 16 rows, two at a time, make room for.
inline int64_t rows_in_tiles(int64_t m) { return (m + 31) & ~int64_t(31); }

// Everything about the activations of one call, in memory that the caller owns (see `bytes`).
//   m rows, k channels, chunks of 256 (the last may be shorter). Arrays run over [chunk][row].
struct Activations {
    int64_t m, k, chunks;
    Layout layout;
    int tile_rows;   // 0: rows stay as they are
    int level_bytes;
    int8_t* level;  // [chunk][row][CHUNK], [chunk][tile][groups of four bytes][row of the tile][4], or pairs
    float *scales, *offsets;
    int16_t *sums_of_16, *sums_of_32;
    int32_t* starts;  // BY_32 in tiles: of 32 levels -8 times their sum, which makes up for weights' levels that are 8 too great

    static size_t bytes(int64_t m, int64_t k, Layout layout) {
        const int64_t chunks = (k + CHUNK - 1) / CHUNK;
        if (layout == BFLOATS) return size_t(rows_in_tiles(m) * chunks) * CHUNK * 2;
        return size_t(chunks * (chunk_of_levels(m, layout) + m * (8 * 4 + 8 * 4 + 32 + 32 + 8 * 4))) + 64;
    }

    Activations(int64_t m_, int64_t k_, Layout layout_, int tile_rows_, uint8_t* memory)
        : m(m_), k(k_), chunks((k_ + CHUNK - 1) / CHUNK), layout(layout_), tile_rows(tile_rows_) {
        const int64_t cells = m * chunks;
        level_bytes = layout == WIDE ? 2 : 1;
        level = (int8_t*)memory;
        scales = (float*)(level + chunks * chunk_of_levels(m, layout));
        offsets = scales + cells * 8;
        sums_of_16 = (int16_t*)(offsets + cells * 8);
        sums_of_32 = sums_of_16 + cells * 16;
        starts = (int32_t*)(sums_of_32 + cells * 16);
    }

    int count(int64_t chunk) const { return int(k - chunk * CHUNK < CHUNK ? k - chunk * CHUNK : CHUNK); }
    int scale_stride() const { return is_by_32(layout) ? 8 : 1; }

    ChunkOfRow row(int64_t chunk, int64_t r) const {
        const int64_t cell = chunk * m + r;
        return {level + cell * CHUNK * level_bytes, scales + cell * scale_stride(), offsets + cell * 8, sums_of_16 + cell * 16,
                sums_of_32 + cell * 16};
    }

    TileRows tile(int64_t chunk, int64_t first) const {
        const ChunkOfRow c = row(chunk, first);
        const int8_t* levels = is_in_pairs(layout) ? pairs(chunk, first) : c.level;
        return {levels, c.scales, c.offsets, c.sums_of_16, c.sums_of_32, starts + (chunk * m + first) * 8, scale_stride()};
    }

    // The tiles of bytes of the eight rows that begin with `first`: [pair of blocks][block of the pair][row][block][32]. In the
    // rows of one block the levels of the other are 0.
    int8_t* pairs(int64_t chunk, int64_t first) const {
        return level + chunk * chunk_of_levels(m, layout) + first / PAIRED_ROWS * (CHUNK / 64) * PAIR_BYTES;
    }

    // Where tiles of BFLOATS are loaded from: CHUNK channels of the 16 rows that begin with `first`.
    uint16_t* in_tiles(int64_t chunk, int64_t first) const {
        return (uint16_t*)level + (chunk * rows_in_tiles(m) + first) * CHUNK;
    }

    // Quantise one row of one chunk: level = round to even (x * most level / max |x|).
    void fill(int64_t chunk, int64_t r, const float* x) const {
        if (layout == WIDE)
            fill_with<int16_t>(chunk, r, x, 1023);
        else
            fill_with<int8_t>(chunk, r, x, 127);
    }

   private:
    template <class Level> void fill_with(int64_t chunk, int64_t r, const float* x, float most_level) const {
        alignas(32) Level q[CHUNK];
        const int n = count(chunk), group = is_by_32(layout) ? 32 : CHUNK;
        const int64_t cell = chunk * m + r;
        float* scale = scales + cell * scale_stride();
        if (n < CHUNK) memset(q, 0, sizeof q);
        if (is_by_32(layout)) memset(scale, 0, 8 * sizeof(float));  // blocks that a short chunk lacks count nothing
        for (int g = 0; g * group < n; g++) {
            const int size = n - g * group < group ? n - g * group : group;
            const float* in = x + g * group;
            const float greatest = greatest_of(in, size);
            const float inverse = greatest > 0 ? most_level / greatest : 0;
            scale[g] = greatest / most_level;
            for (int i = 0; i < size; i++) q[g * group + i] = Level(int32_t(rintf(in[i] * inverse)));
        }
        if (layout != WIDE) keep_sums(cell, (const int8_t*)q, scale);
        put(chunk, r, q);
    }

    // The greatest size of `count` numbers, a multiple of 32.
    static float greatest_of(const float* x, int count) {
        V top = all(0);
        for (int i = 0; i < count; i += WIDTH) {
            const V v = load(x + i);
            top = most(most(v, mul(v, all(-1))), top);
        }
        float lanes[WIDTH], greatest = 0;
        store(lanes, top);
        for (const float lane : lanes) greatest = lane > greatest ? lane : greatest;
        return greatest;
    }

    void keep_sums(int64_t cell, const int8_t* q, const float* scale) const {
        int16_t *s16 = sums_of_16 + cell * 16, *s32 = sums_of_32 + cell * 16;
        for (int j = 0; j < 16; j++) {
            int sum = 0;
            for (int i = 0; i < 16; i++) sum += q[16 * j + i];
            s16[j] = int16_t(sum);
        }
        for (int j = 0; j < 16; j++) s32[j] = int16_t(j < 8 ? s16[2 * j] + s16[2 * j + 1] : 0);
        if (!is_by_32(layout)) return;
        for (int j = 0; j < 8; j++) offsets[cell * 8 + j] = scale[j] * s32[j];
        for (int j = 0; tile_rows > 0 && j < 8; j++) starts[cell * 8 + j] = -8 * s32[j];
    }

    template <class Level> void put(int64_t chunk, int64_t r, const Level* q) const {
        if (is_in_pairs(layout)) {
            int8_t* out = pairs(chunk, r) + r % PAIRED_ROWS * 64;
            for (int block = 0; block < CHUNK / 32; block++, out += PAIR_BYTES / 2) {
                memset(out, 0, 64);
                memcpy(out + block % 2 * 32, q + 32 * block, 32);
            }
            return;
        }
        if (tile_rows == 0) {
            int8_t* out = level + (chunk * m + r) * CHUNK;
            if (SIDE_BY_SIDE == 1 || layout != BY_32) {
                memcpy(out, q, CHUNK);
                return;
            }
            for (int i = 0; i < CHUNK; i += 32 * SIDE_BY_SIDE)
                for (int half = 0; half < 2 * SIDE_BY_SIDE; half++)
                    memcpy(out + i + 16 * half, q + i + 16 * (half % SIDE_BY_SIDE * 2 + half / SIDE_BY_SIDE), 16);
            return;
        }
        const int64_t first = r / tile_rows * tile_rows, rows = m - first < tile_rows ? m - first : tile_rows;
        int8_t* out = level + (chunk * m + first) * CHUNK * level_bytes + (r - first) * 4;
        const uint32_t shift = layout == SHIFTED ? 0x80808080 : 0;
        for (int g = 0; g < CHUNK / 4 * level_bytes; g++) {
            const uint32_t four = u32_at((const uint8_t*)q + 4 * g) ^ shift;
            memcpy(out + g * rows * 4, &four, 4);
        }
    }
};

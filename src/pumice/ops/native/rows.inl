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
    int scale_stride;

    float scale(int r, int sub = 0) const { return scales[r * scale_stride + sub]; }
    float scaled_sum(int r, int sub) const { return offsets[r * 8 + sub]; }
    template <int sub> const int16_t* sums(int r) const { return (sub == 16 ? sums_of_16 : sums_of_32) + r * 16; }
};

// Everything about the activations of one call, in memory that the caller owns (see `bytes`).
//   m rows, k channels, chunks of 256 (the last may be shorter). Arrays run over [chunk][row].
struct Activations {
    int64_t m, k, chunks;
    bool whole;     // one scale a chunk
    int tile_rows;  // 0: rows stay as they are
    int8_t* level;  // [chunk][row][CHUNK], or [chunk][tile][CHUNK / 4][row of the tile][4]
    float *scales, *offsets;
    int16_t *sums_of_16, *sums_of_32;

    static size_t bytes(int64_t m, int64_t k) {
        const int64_t chunks = (k + CHUNK - 1) / CHUNK;
        return size_t(m * chunks) * (CHUNK + 8 * 4 + 8 * 4 + 32 + 32) + 64;
    }

    Activations(int64_t m_, int64_t k_, bool whole_, int tile_rows_, uint8_t* memory)
        : m(m_), k(k_), chunks((k_ + CHUNK - 1) / CHUNK), whole(whole_), tile_rows(tile_rows_) {
        const int64_t cells = m * chunks;
        level = (int8_t*)memory;
        scales = (float*)(level + cells * CHUNK);
        offsets = scales + cells * 8;
        sums_of_16 = (int16_t*)(offsets + cells * 8);
        sums_of_32 = sums_of_16 + cells * 16;
    }

    int count(int64_t chunk) const { return int(k - chunk * CHUNK < CHUNK ? k - chunk * CHUNK : CHUNK); }
    int scale_stride() const { return whole ? 1 : 8; }

    ChunkOfRow row(int64_t chunk, int64_t r) const {
        const int64_t cell = chunk * m + r;
        return {level + cell * CHUNK, scales + cell * scale_stride(), offsets + cell * 8, sums_of_16 + cell * 16,
                sums_of_32 + cell * 16};
    }

    TileRows tile(int64_t chunk, int64_t first) const {
        const ChunkOfRow c = row(chunk, first);
        return {c.level, c.scales, c.offsets, c.sums_of_16, c.sums_of_32, scale_stride()};
    }

    // Quantise one row of one chunk: level = round to even (x * 127 / max |x|).
    void fill(int64_t chunk, int64_t r, const float* x) const {
        alignas(32) int8_t q[CHUNK];
        const int n = count(chunk), group = whole ? CHUNK : 32;
        const int64_t cell = chunk * m + r;
        float* scale = scales + cell * scale_stride();
        float* offset = offsets + cell * 8;
        int16_t *s16 = sums_of_16 + cell * 16, *s32 = sums_of_32 + cell * 16;
        memset(q, 0, sizeof q);
        if (!whole) memset(scale, 0, 8 * sizeof(float));  // blocks that a short chunk lacks count nothing
        for (int g = 0; g * group < n; g++) {
            const int size = n - g * group < group ? n - g * group : group;
            const float* in = x + g * group;
            float most = 0;
            for (int i = 0; i < size; i++) {
                const float a = fabsf(in[i]);
                most = a > most ? a : most;
            }
            const float inverse = most > 0 ? 127 / most : 0;
            scale[g] = most / 127;
            for (int i = 0; i < size; i++) q[g * group + i] = int8_t(int32_t(rintf(in[i] * inverse)));
        }
        for (int j = 0; j < 16; j++) {
            int sum = 0;
            for (int i = 0; i < 16; i++) sum += q[16 * j + i];
            s16[j] = int16_t(sum);
        }
        for (int j = 0; j < 16; j++) s32[j] = int16_t(j < 8 ? s16[2 * j] + s16[2 * j + 1] : 0);
        if (!whole)
            for (int j = 0; j < 8; j++) offset[j] = scale[j] * s32[j];
        put(chunk, r, q);
    }

   private:
    void put(int64_t chunk, int64_t r, const int8_t* q) const {
        int8_t* out = level + (chunk * m + r) * CHUNK;
        if (PAIRED_BLOCKS && tile_rows == 0 && !whole) {
            // Two blocks at a time: the first halves of both, then the second halves (see `pair_levels`).
            for (int i = 0; i < CHUNK; i += 64)
                for (int half = 0; half < 4; half++) memcpy(out + i + 16 * half, q + i + 16 * (half % 2 * 2 + half / 2), 16);
            return;
        }
        if (tile_rows == 0) {
            memcpy(out, q, CHUNK);
            return;
        }
        const int64_t first = r / tile_rows * tile_rows, rows = m - first < tile_rows ? m - first : tile_rows;
        int8_t* tile_out = level + (chunk * m + first) * CHUNK + (r - first) * 4;
        for (int g = 0; g < CHUNK / 4; g++) memcpy(tile_out + g * rows * 4, q + g * 4, 4);
    }
};

// Any CPU: plain loops that a compiler makes into what vectors it has. Weights are read four rows of activations at a
// time, always in place.

constexpr int PANEL = 1;

constexpr int tile_rows_of(Layout) { return 0; }

inline Layout layout_of_many(int32_t format) { return format >= Q2_K && format <= Q6_K ? BY_256 : BY_32; }

// Levels 32 i to 32 i + 31 of the chunk at b. What `levels_avx2.inl` does, a byte at a time.
template <Format F> inline void levels_of(const uint8_t* b, int i, int16_t* q) {
    if constexpr (!Traits<F>::whole) {
        static const int8_t table[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
        b += i * Traits<F>::bytes;
        constexpr int at = F == Q4_0 || F == IQ4_NL ? 2 : F == Q4_1 ? 4 : F == Q5_0 ? 6 : F == Q5_1 ? 8 : 2;
        const uint32_t fifth = F == Q5_0 ? u32_at(b + 2) : F == Q5_1 ? u32_at(b + 4) : 0;
        for (int e = 0; e < 32; e++) {
            const int level = F == Q8_0 ? int8_t(b[at + e]) : b[at + e % 16] >> (e / 16 * 4) & 15;
            q[e] = int16_t(F == IQ4_NL ? table[level & 15] : level | int(fifth >> e & 1) << 4);
        }
    } else {
        const int part = i % 4, side = i / 4;
        for (int e = 0; e < 32; e++) {
            int level;
            if constexpr (F == Q4_K) level = b[16 + 32 * (i / 2) + e] >> (4 * (i % 2)) & 15;
            if constexpr (F == Q5_K) level = (b[48 + 32 * (i / 2) + e] >> (4 * (i % 2)) & 15) | (b[16 + e] >> i & 1) << 4;
            if constexpr (F == Q6_K)
                level = (b[64 * side + 32 * (part % 2) + e] >> (4 * (part / 2)) & 15) | (b[128 + 32 * side + e] >> (2 * part) & 3) << 4;
            if constexpr (F == Q3_K) level = (b[32 + 32 * side + e] >> (2 * part) & 3) | (b[e] >> i & 1) << 2;
            if constexpr (F == Q2_K) level = b[16 + 32 * side + e] >> (2 * part) & 3;
            q[e] = int16_t(level);
        }
    }
}

inline int32_t dot(const int16_t* q, const int8_t* x, int count) {
    int32_t sum = 0;
    for (int e = 0; e < count; e++) sum += int32_t(q[e]) * x[e];
    return sum;
}

// Rows of weights that are read side by side.
constexpr int STREAMS = 1;

// sums[0][m] = a row of weights, from `b` on, times row m of MR rows of activations.
template <Format F, int MR, int S>
inline void row_products(const uint8_t* b, int64_t, const Activations& x, int64_t first, float (&sums)[S][4]) {
    static_assert(S == STREAMS);
    float* sum = sums[0];
    constexpr int sub = Traits<F>::sub;
    for (int m = 0; m < MR; m++) sum[m] = 0;
    Scales<F> s;
    int16_t q[CHUNK];
    for (int64_t chunk = 0; chunk < x.chunks; chunk++) {
        const int count = x.count(chunk);
        const ChunkOfRow rows = x.row(chunk, first);
        read_scales<F>(b, count, s);
        for (int i = 0; i < count / 32; i++) levels_of<F>(b, i, q + 32 * i);
        for (int m = 0; m < MR; m++) {
            const int8_t* level = rows.level + m * CHUNK;
            if constexpr (Traits<F>::whole) {
                const int16_t* sums = rows.template sums<sub>() + 16 * m;
                int32_t total = 0, low = 0;
                for (int j = 0; j < CHUNK / sub; j++) {
                    total += s.scale[j] * dot(q + sub * j, level + sub * j, sub);
                    low += s.min[j] * sums[j];
                }
                sum[m] += rows.scales[m] * (s.d * float(total) - s.dmin * float(low));
            } else {
                for (int j = 0; j < count / 32; j++)
                    sum[m] += s.scale[j] * rows.scales[8 * m + j] * float(dot(q + 32 * j, level + 32 * j, 32)) +
                              (has_offsets<F> ? s.offset[j] * rows.offsets[8 * m + j] : 0);
            }
        }
        b += chunk_bytes<F>(count);
    }
}

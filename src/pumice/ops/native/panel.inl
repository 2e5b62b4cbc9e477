// Many rows of activations: PANEL rows of weights become a panel, chunk by chunk, and meet every tile of activations while
// they are in the first cache.

template <Format F, int MR>
inline void tile_of(int rows, const PanelChunk<F>& w, int subs, const TileRows& x, float* c) {
    if constexpr (MR == 1)
        tile<F, 1>(w, subs, x, c);
    else if (rows == MR)
        tile<F, MR>(w, subs, x, c);
    else
        tile_of<F, MR - 1>(rows, w, subs, x, c);
}

// A chunk of the rows of a panel that begins at row `first`; past the end of the matrix the last row stands again.
template <Format F, class Panel> void fill(Panel& panel, const Matrix& w, int64_t first, int64_t chunk, int count) {
    constexpr int bytes = int(chunk_bytes<F>(CHUNK));
    for (int eight = 0; eight < PANEL; eight += 8) {
        EightRows rows;
        for (int r = 0; r < 8; r++) {
            const int64_t row = first + eight + r < w.rows ? first + eight + r : w.rows - 1;
            rows.row[r] = w.data + row * w.row_bytes + chunk * bytes;
        }
        put_eight<F>(rows, count, eight, panel);
    }
}

// What of the weights is wanted next: another chunk of the same rows, or after the last the first chunk of the rows that
// follow. It comes while tiles meet this chunk, some rows at a time: no CPU foresees so many side by side.
class NextChunk {
    const uint8_t* at;
    int64_t row_bytes, done = 0;

   public:
    NextChunk(const Matrix& w, int64_t first, int64_t last, int64_t from)
        : at(from < 0 ? w.data + last * w.row_bytes : w.data + first * w.row_bytes + from), row_bytes(w.row_bytes) {}

    template <int bytes> void bring(int64_t rows) {
        for (; done < rows; done++, at += row_bytes)
            for (int line = 0; line < bytes; line += 64) __builtin_prefetch(at + line, 0, 3);
    }
};

// The sums of a panel that begins at row `first`, [row of activations][PANEL], to where the products go.
inline void give(const Matrix& w, int64_t first, int64_t m, const float* c) {
    const int64_t rows = w.rows - first < PANEL ? w.rows - first : PANEL;
    int64_t place[PANEL];
    float bias[PANEL];
    for (int64_t row = 0; row < rows; row++) {
        place[row] = place_of(w, first + row);
        bias[row] = w.bias ? w.bias[place[row]] : 0;
    }
    for (int64_t r = 0; r < m; r++) {
        float* out = w.out + r * w.out_stride;
        if (rows == PANEL && w.head_width == 0)
            for (int row = 0; row < PANEL; row++) out[first + row] = c[r * PANEL + row] + bias[row];
        else
            for (int64_t row = 0; row < rows; row++) out[place[row]] = c[r * PANEL + row] + bias[row];
    }
}

// Rows `first` to `last` of weights, at most TOGETHER panels; `c` has room for TOGETHER * x.m * PANEL sums.
template <Format F> void panels(const Matrix& w, const Activations& x, int64_t first, int64_t last, float* c) {
    PanelChunk<F> panel[TOGETHER];
    constexpr int most_rows = Traits<F>::whole ? tile_rows_of(BY_256) : tile_rows_of(BY_32);
    const int count_of_panels = int((last - first + PANEL - 1) / PANEL);
    memset(c, 0, size_t(count_of_panels * x.m) * PANEL * sizeof(float));
    for (int64_t chunk = 0; chunk < x.chunks; chunk++) {
        const int count = x.count(chunk);
        for (int p = 0; p < count_of_panels; p++) fill<F>(panel[p], w, first + p * PANEL, chunk, count);
        NextChunk next(w, first, last, chunk + 1 < x.chunks ? (chunk + 1) * chunk_bytes<F>(CHUNK) : -1);
        const int64_t tiles = count_of_panels * ((x.m + most_rows - 1) / most_rows);
        int64_t met = 0;
        for (int64_t m = 0; m < x.m; m += most_rows) {
            const int rows = int(x.m - m < most_rows ? x.m - m : most_rows);
            for (int p = 0; p < count_of_panels; p++) {
                next.bring<int(chunk_bytes<F>(CHUNK))>(++met * (last - first) / tiles);
                tile_of<F, most_rows>(rows, panel[p], count / 32, x.tile(chunk, m), c + (p * x.m + m) * PANEL);
            }
        }
    }
    for (int p = 0; p < count_of_panels; p++) give(w, first + p * PANEL, x.m, c + p * x.m * PANEL);
}

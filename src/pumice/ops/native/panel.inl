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

// The rows of weights in a panel, `apart` rows from each other; past the last of all the last stands again.
struct PanelRows {
    int64_t first, apart, last;

    int64_t row(int64_t r) const { return first + r * apart < last ? first + r * apart : last - 1; }
    int64_t count() const {
        const int64_t rows = (last - first + apart - 1) / apart;
        return rows < PANEL ? rows : PANEL;
    }
};

// A chunk of a panel's rows; what lies `ahead` bytes behind it is called for.
template <Format F, int ahead = 0, class Panel>
void fill(Panel& panel, const Matrix& w, const PanelRows& of, int64_t chunk, int count) {
    constexpr int bytes = int(chunk_bytes<F>(CHUNK));
    for (int eight = 0; eight < PANEL; eight += 8) {
        EightRows rows;
        for (int r = 0; r < 8; r++) {
            rows.row[r] = w.data + of.row(eight + r) * w.row_bytes + chunk * bytes;
            if constexpr (ahead > 0)
                for (int line = 0; line < bytes; line += 64) __builtin_prefetch(rows.row[r] + ahead + line, 0, 2);
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

// The sums of a panel, [row of activations][PANEL], to where the products go.
inline void give(const Matrix& w, const PanelRows& of, int64_t m, const float* c) {
    const int64_t rows = of.count();
    int64_t place[PANEL];
    float bias[PANEL];
    for (int64_t row = 0; row < rows; row++) {
        place[row] = place_of(w, of.row(row));
        bias[row] = w.bias ? w.bias[place[row]] : 0;
    }
    for (int64_t r = 0; r < m; r++) {
        float* out = w.out + r * w.out_stride;
        if (rows == PANEL && w.head_width == 0 && of.apart == 1)
            for (int row = 0; row < PANEL; row++) out[of.first + row] = c[r * PANEL + row] + bias[row];
        else
            for (int64_t row = 0; row < rows; row++) out[place[row]] = c[r * PANEL + row] + bias[row];
    }
}

// Rows `first` to `last` of weights; `c` has room for TOGETHER * x.m * PANEL sums.
//
// Beside few rows of activations memory is waited for. The CPU foresees what is read of a page while that is one stream, so the rows of
// a panel lie far from each other, and the next panel has those behind them.
template <Format F> void streamed_panels(const Matrix& w, const Activations& x, int64_t first, int64_t last, float* c) {
    PanelChunk<F> panel;
    constexpr int most_rows = Traits<F>::whole ? tile_rows_of(BY_256) : tile_rows_of(BY_32);
    const int64_t apart = (last - first + PANEL - 1) / PANEL;
    for (int64_t p = 0; p < apart; p++) {
        const PanelRows rows{first + p, apart, last};
        memset(c, 0, size_t(x.m) * PANEL * sizeof(float));
        for (int64_t chunk = 0; chunk < x.chunks; chunk++) {
            const int count = x.count(chunk);
            fill<F, AHEAD_OF_PANELS>(panel, w, rows, chunk, count);
            for (int64_t m = 0; m < x.m; m += most_rows) {
                const int met = int(x.m - m < most_rows ? x.m - m : most_rows);
                tile_of<F, most_rows>(met, panel, count / 32, x.tile(chunk, m), c + m * PANEL);
            }
        }
        give(w, rows, x.m, c);
    }
}

// Rows `first` to `last` of weights, at most TOGETHER panels, which meet each tile of activations one after the other.
template <Format F> void panels(const Matrix& w, const Activations& x, int64_t first, int64_t last, float* c) {
    if (x.m <= STREAMED) return streamed_panels<F>(w, x, first, last, c);
    PanelChunk<F> panel[TOGETHER];
    constexpr int most_rows = Traits<F>::whole ? tile_rows_of(BY_256) : tile_rows_of(BY_32);
    const int count_of_panels = int((last - first + PANEL - 1) / PANEL);
    const auto rows_of = [&](int p) { return PanelRows{first + p * PANEL, 1, last}; };
    memset(c, 0, size_t(count_of_panels * x.m) * PANEL * sizeof(float));
    for (int64_t chunk = 0; chunk < x.chunks; chunk++) {
        const int count = x.count(chunk);
        for (int p = 0; p < count_of_panels; p++) fill<F>(panel[p], w, rows_of(p), chunk, count);
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
    for (int p = 0; p < count_of_panels; p++) give(w, rows_of(p), x.m, c + p * x.m * PANEL);
}

// Many rows of activations: PANEL rows of weights become a panel, chunk by chunk, and meet every tile of activations while
// they are in the first cache.

template <Format F, int MR>
inline void tile_of(int rows, const PanelChunk<F>& w, int subs, const TileRows& x, Wanted& wanted, float* c) {
    if constexpr (MR == 1)
        tile<F, 1>(w, subs, x, wanted, c);
    else if (rows == MR)
        tile<F, MR>(w, subs, x, wanted, c);
    else
        tile_of<F, MR - 1>(rows, w, subs, x, wanted, c);
}

// The rows of weights in a panel, `apart` rows from each other; past the last of all the last stands again.
class PanelRows {
    int64_t first, apart, last;
    const uint8_t* data[PANEL];

   public:
    PanelRows(const Matrix& w, int64_t first_, int64_t apart_, int64_t last_) : first(first_), apart(apart_), last(last_) {
        for (int64_t r = 0; r < PANEL; r++) data[r] = w.data + row(r) * w.row_bytes;
    }

    int64_t row(int64_t r) const { return first + r * apart < last ? first + r * apart : last - 1; }
    int64_t count() const {
        const int64_t rows = (last - first + apart - 1) / apart;
        return rows < PANEL ? rows : PANEL;
    }
    bool is_whole_run() const { return apart == 1 && count() == PANEL; }
    const uint8_t* at(int64_t offset) const { return data[0] + offset; }
    EightRows eight(int from, int64_t offset) const { return {data + from, offset}; }
};

// A chunk of a panel's rows.
template <Format F, class Panel> void fill(Panel& panel, const PanelRows& rows, int64_t chunk, int count) {
    for (int eight = 0; eight < PANEL; eight += 8)
        put_eight<F>(rows.eight(eight, chunk * chunk_bytes<F>(CHUNK)), count, eight, panel);
}

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
        if (w.head_width == 0 && of.is_whole_run())
            for (int row = 0; row < PANEL; row++) out[of.row(0) + row] = c[r * PANEL + row] + bias[row];
        else
            for (int64_t row = 0; row < rows; row++) out[place[row]] = c[r * PANEL + row] + bias[row];
    }
}

template <Format F> constexpr int rows_of_tile = tile_rows_of(Traits<F>::whole ? BY_256 : BY_32);

// Tiles that m rows of activations are.
template <Format F> int64_t tiles_of(int64_t m) { return (m + rows_of_tile<F> - 1) / rows_of_tile<F>; }

// Rows `first` to `last` of weights, panel by panel; `c` has room for x.m * PANEL sums.
//
// Beside few rows of activations memory is waited for. The CPU foresees what is read of a page while that is one stream, so
// the rows of a panel lie far from each other, and the next panel has those behind them.
template <Format F> void streamed_panels(const Matrix& w, const Activations& x, int64_t first, int64_t last, float* c) {
    PanelChunk<F> panel;
    const int64_t apart = (last - first + PANEL - 1) / PANEL, turns = tiles_of<F>(x.m) * turns_of_tile<F>;
    for (int64_t p = 0; p < apart; p++) {
        const PanelRows rows(w, first + p, apart, last);
        memset(c, 0, size_t(x.m) * PANEL * sizeof(float));
        for (int64_t chunk = 0; chunk < x.chunks; chunk++) {
            const int count = x.count(chunk);
            fill<F>(panel, rows, chunk, count);
            const uint8_t* ahead = rows.at((chunk + CHUNKS_AHEAD) * chunk_bytes<F>(CHUNK));
            Wanted wanted(ahead, apart * w.row_bytes, PANEL, turns);
            for (int64_t m = 0; m < x.m; m += rows_of_tile<F>) {
                const int met = int(x.m - m < rows_of_tile<F> ? x.m - m : rows_of_tile<F>);
                tile_of<F, rows_of_tile<F>>(met, panel, count / 32, x.tile(chunk, m), wanted, c + m * PANEL);
            }
        }
        give(w, rows, x.m, c);
    }
}

// Rows `first` to `last` of weights, at most TOGETHER panels, which meet each tile of activations one after the other. `c` has
// room for TOGETHER * x.m * PANEL sums.
template <Format F> void panels(const Matrix& w, const Activations& x, int64_t first, int64_t last, float* c) {
    if (x.m <= STREAMED) return streamed_panels<F>(w, x, first, last, c);
    PanelChunk<F> panel[TOGETHER];
    const int count_of_panels = int((last - first + PANEL - 1) / PANEL);
    const int64_t turns = count_of_panels * tiles_of<F>(x.m) * turns_of_tile<F>;
    const auto rows_of = [&](int p) { return PanelRows(w, first + p * PANEL, 1, last); };
    memset(c, 0, size_t(count_of_panels * x.m) * PANEL * sizeof(float));
    for (int64_t chunk = 0; chunk < x.chunks; chunk++) {
        const int count = x.count(chunk);
        for (int p = 0; p < count_of_panels; p++) fill<F>(panel[p], rows_of(p), chunk, count);
        Wanted wanted(next_chunk<F>(w, first, last, chunk, x.chunks), w.row_bytes, last - first, turns);
        for (int64_t m = 0; m < x.m; m += rows_of_tile<F>) {
            const int rows = int(x.m - m < rows_of_tile<F> ? x.m - m : rows_of_tile<F>);
            for (int p = 0; p < count_of_panels; p++)
                tile_of<F, rows_of_tile<F>>(rows, panel[p], count / 32, x.tile(chunk, m), wanted, c + (p * x.m + m) * PANEL);
        }
    }
    for (int p = 0; p < count_of_panels; p++) give(w, rows_of(p), x.m, c + p * x.m * PANEL);
}

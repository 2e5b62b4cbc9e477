// Many rows of activations: PANEL rows of weights become a panel, chunk by chunk, and meet every tile of activations while
// they are in the first cache.

// c += the products of a panel's chunk with `rows` of activations, at most MR. A Panel says how many rows a tile of these has,
// and how many turns `Wanted` has meanwhile.
template <int MR, class Panel>
inline void tile_of(int rows, const Panel& w, int subs, const TileRows& x, Wanted& wanted, float* c) {
    if constexpr (MR == 1)
        tile<1>(w, subs, x, wanted, c);
    else if (rows == MR)
        tile<MR>(w, subs, x, wanted, c);
    else
        tile_of<MR - 1>(rows, w, subs, x, wanted, c);
}

// Tiles that m rows of activations are.
template <class Panel> int64_t tiles_of(int64_t m) { return (m + Panel::tile_rows - 1) / Panel::tile_rows; }

// The rows of activations from `first` on that one tile has.
template <class Panel> int rows_of_tile(int64_t m, int64_t first) {
    return int(m - first < Panel::tile_rows ? m - first : Panel::tile_rows);
}

// The rows of weights in a panel, `apart` rows from each other; past the last of all the last stands again.
class PanelRows {
    const Matrix& of;
    int64_t first, apart, last;

   public:
    PanelRows(const Matrix& w, int64_t first_, int64_t apart_, int64_t last_) : of(w), first(first_), apart(apart_), last(last_) {}

    int64_t row(int64_t r) const { return first + r * apart < last ? first + r * apart : last - 1; }
    int64_t count() const {
        const int64_t rows = (last - first + apart - 1) / apart;
        return rows < PANEL ? rows : PANEL;
    }
    bool is_whole() const { return count() == PANEL; }
    bool is_whole_run() const { return apart == 1 && is_whole(); }
    const uint8_t* at(int64_t r, int64_t offset) const { return of.data + row(r) * of.row_bytes + offset; }
    int64_t step() const { return apart * of.row_bytes; }
};

// A chunk of a panel's rows.
template <Format F, class Panel> void fill(Panel& panel, const PanelRows& rows, int64_t chunk, int count) {
    constexpr int64_t bytes = chunk_bytes<F>(CHUNK);
    alignas(64) uint8_t copies[PANEL * bytes];
    const uint8_t* from = rows.at(0, chunk * bytes);
    int64_t step = rows.step();
    if (!rows.is_whole()) {
        for (int r = 0; r < PANEL; r++) memcpy(copies + r * bytes, rows.at(r, chunk * bytes), size_t(chunk_bytes<F>(count)));
        from = copies;
        step = bytes;
    }
    for (int eight = 0; eight < PANEL; eight += 8) put_eight<F>(EightRows(from + eight * step, step), count, eight, panel);
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

// Panels that streams lead through where so many rows are left. An odd number: the first cache finds a line by its place in a
// page, and where rows are a multiple of a page apart, it cannot keep a line of each.
inline int64_t panels_of_streams(int64_t rows) {
    const int64_t panels = (rows + PANEL - 1) / PANEL;
    return panels % 2 ? panels : panels - 1;
}

// Rows `first` to `last` of weights, panel by panel; `c` has room for x.m * PANEL sums.
//
// Beside few rows of activations memory is waited for. The CPU foresees what is read of a page while that is one stream, so
// the rows of a panel lie far from each other, and the next panel has those behind them.
template <Format F, class Panel> void streamed_panels(const Matrix& w, const Activations& x, int64_t first, int64_t last, float* c) {
    Panel panel;
    const int64_t turns = tiles_of<Panel>(x.m) * Panel::turns_of_tile;
    for (int64_t apart; first < last; first += apart * PANEL) {
        apart = panels_of_streams(last - first);
        for (int64_t p = 0; p < apart; p++) {
            const PanelRows rows(w, first + p, apart, last);
            memset(c, 0, size_t(x.m) * PANEL * sizeof(float));
            for (int64_t chunk = 0; chunk < x.chunks; chunk++) {
                const int count = x.count(chunk);
                fill<F>(panel, rows, chunk, count);
                Wanted wanted(rows.at(0, (chunk + CHUNKS_AHEAD) * chunk_bytes<F>(CHUNK)), rows.step(), PANEL, turns);
                for (int64_t m = 0; m < x.m; m += Panel::tile_rows) {
                    const int met = rows_of_tile<Panel>(x.m, m);
                    tile_of<Panel::tile_rows>(met, panel, count / 32, x.tile(chunk, m), wanted, c + m * PANEL);
                }
            }
            give(w, rows, x.m, c);
        }
    }
}

// Rows `first` to `last` of weights, at most TOGETHER panels, which meet each tile of activations one after the other. `c` has
// room for TOGETHER * x.m * PANEL sums.
template <Format F> void panels(const Matrix& w, const Activations& x, int64_t first, int64_t last, float* c) {
    using Panel = PanelChunk<F>;
    if (x.m <= STREAMED) return streamed_panels<F, Panel>(w, x, first, last, c);
    Panel panel[TOGETHER];
    const int count_of_panels = int((last - first + PANEL - 1) / PANEL);
    const int64_t turns = count_of_panels * tiles_of<Panel>(x.m) * Panel::turns_of_tile;
    const auto rows_of = [&](int p) { return PanelRows(w, first + p * PANEL, 1, last); };
    memset(c, 0, size_t(count_of_panels * x.m) * PANEL * sizeof(float));
    for (int64_t chunk = 0; chunk < x.chunks; chunk++) {
        const int count = x.count(chunk);
        for (int p = 0; p < count_of_panels; p++) fill<F>(panel[p], rows_of(p), chunk, count);
        Wanted wanted(next_chunk<F>(w, first, last, chunk, x.chunks), w.row_bytes, last - first, turns);
        for (int64_t m = 0; m < x.m; m += Panel::tile_rows) {
            const int rows = rows_of_tile<Panel>(x.m, m);
            for (int p = 0; p < count_of_panels; p++)
                tile_of<Panel::tile_rows>(rows, panel[p], count / 32, x.tile(chunk, m), wanted, c + (p * x.m + m) * PANEL);
        }
    }
    for (int p = 0; p < count_of_panels; p++) give(w, rows_of(p), x.m, c + p * x.m * PANEL);
}

// Many rows of activations: PANEL rows of weights become a panel, chunk by chunk, and meet every tile of activations while
// they are in the first cache.

template <Format F> constexpr int tile_rows = Traits<F>::whole ? TILE_ROWS_256 : TILE_ROWS_32;

template <Format F, int MR>
inline void tile_of(int rows, const PanelChunk<F>& w, int subs, const TileRows& x, float* c) {
    if constexpr (MR == 1)
        tile<F, 1>(w, subs, x, c);
    else if (rows == MR)
        tile<F, MR>(w, subs, x, c);
    else
        tile_of<F, MR - 1>(rows, w, subs, x, c);
}

// One panel with all rows; `c` has room for x.m * PANEL sums.
template <Format F> void panel(const Matrix& w, const Activations& x, int64_t first, float* c) {
    PanelChunk<F> chunk_of_panel;
    alignas(64) uint8_t q[PANEL * CHUNK];
    const int rows = int(w.rows - first < PANEL ? w.rows - first : PANEL);
    memset(c, 0, size_t(x.m) * PANEL * sizeof(float));
    if (rows < PANEL) {
        memset((void*)&chunk_of_panel, 0, sizeof chunk_of_panel);
        memset(q, 0, sizeof q);
    }
    Scales<F> s;
    for (int64_t chunk = 0; chunk < x.chunks; chunk++) {
        const int count = x.count(chunk);
        for (int row = 0; row < rows; row++) {
            const uint8_t* b = w.data + (first + row) * w.row_bytes + chunk * chunk_bytes<F>(CHUNK);
            read_levels<F>(b, count, q + row * CHUNK);
            read_scales<F>(b, count, s);
            chunk_of_panel.put_scales(row, s);
        }
        put_levels<F>(q, count, chunk_of_panel);
        for (int64_t m = 0; m < x.m; m += tile_rows<F>) {
            const int rows_of_tile = int(x.m - m < tile_rows<F> ? x.m - m : tile_rows<F>);
            tile_of<F, tile_rows<F>>(rows_of_tile, chunk_of_panel, count / 32, x.tile(chunk, m), c + m * PANEL);
        }
    }
    for (int64_t m = 0; m < x.m; m++)
        for (int row = 0; row < rows; row++)
            w.out[m * w.out_stride + first + row] = c[m * PANEL + row] + (w.bias ? w.bias[first + row] : 0);
}

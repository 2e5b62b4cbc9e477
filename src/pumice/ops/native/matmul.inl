// y = x Wᵀ for matrices in blocks that share their input, from the blocks as the file holds them.
//
// Few rows of activations: each row of weights is read once, in place, and multiplied with all of them. Many: see
// panel.inl.

// Up to so many rows of activations a panel costs more to make than it saves.
constexpr int FEW_ROWS = 4;
// Up to so many a panel is filled and met alone: what is read then weighs more than tiles that two panels share.
constexpr int ALONE = 12;
// Rows of weights that a thread takes at a time when they are few.
constexpr int64_t SPAN = 64;

// Rows `first` to `last` of weights with all rows of activations, four of these at a time.
template <Format F> void few(const Matrix& w, const Activations& x, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const uint8_t* b = w.data + row * w.row_bytes;
        const int64_t place = place_of(w, row);
        const float bias = w.bias ? w.bias[place] : 0;
        float sum[4];
        for (int64_t m = 0, rows; m < x.m; m += rows) {
            const int64_t left = x.m - m;
            rows = left >= 4 ? 4 : left >= 2 ? 2 : 1;
            if (rows == 4)
                row_products<F, 4>(b, x, m, sum);
            else if (rows == 2)
                row_products<F, 2>(b, x, m, sum);
            else
                row_products<F, 1>(b, x, m, sum);
            for (int64_t r = 0; r < rows; r++) w.out[(m + r) * w.out_stride + place] = sum[r] + bias;
        }
    }
}

template <Format F> void panels(const Matrix& w, const Activations& x, int64_t first, int64_t last, float* c);

template <Format F> void part(const Matrix& w, const Activations& x, int64_t first, int64_t last, float* c) {
    if constexpr (PANEL > 1)
        if (x.tile_rows > 0) return panels<F>(w, x, first, last, c);
    few<F>(w, x, first, last);
}

inline void part_of(const Matrix& w, const Activations& x, int64_t first, int64_t last, float* c) {
    switch (w.format) {
        case Q4_0: return part<Q4_0>(w, x, first, last, c);
        case Q4_1: return part<Q4_1>(w, x, first, last, c);
        case Q5_0: return part<Q5_0>(w, x, first, last, c);
        case Q5_1: return part<Q5_1>(w, x, first, last, c);
        case Q8_0: return part<Q8_0>(w, x, first, last, c);
        case Q2_K: return part<Q2_K>(w, x, first, last, c);
        case Q3_K: return part<Q3_K>(w, x, first, last, c);
        case Q4_K: return part<Q4_K>(w, x, first, last, c);
        case Q5_K: return part<Q5_K>(w, x, first, last, c);
        case Q6_K: return part<Q6_K>(w, x, first, last, c);
        case IQ4_NL: return part<IQ4_NL>(w, x, first, last, c);
    }
}

inline Layout layout_of(int32_t format, bool many) {
    if (many) return layout_of_many(format);
    return format >= Q2_K && format <= Q6_K ? BY_256 : BY_32;
}

inline int64_t in_lines(int64_t bytes) { return (bytes + 63) & ~int64_t(63); }

// The bytes that `matmul` needs beside its arguments; those of layouts that no matrix wants are never touched.
inline int64_t scratch_bytes(int64_t m, int64_t k, int threads) {
    int64_t bytes = 64 + threads * m * TOGETHER * PANEL * 4;
    for (int layout = 0; layout < LAYOUTS; layout++) bytes += in_lines(Activations::bytes(m, k, Layout(layout)));
    return bytes;
}

// Called from outside any parallel region. Each matrix is (rows, k) and multiplies the same x, (m, k), x_stride apart.
inline void matmul(const Matrix* matrices, int count, const float* x, int64_t x_stride, int64_t m, int64_t k, int threads,
                   uint8_t* scratch) {
    const bool many = PANEL > 1 && m > FEW_ROWS;
    uint8_t* at = (uint8_t*)in_lines(int64_t(uintptr_t(scratch)));
    const auto next_part = [&](Layout layout) {
        const Activations part(m, k, layout, many ? tile_rows_of(layout) : 0, at);
        at += in_lines(Activations::bytes(m, k, layout));
        return part;
    };
    const Activations as[LAYOUTS] = {next_part(BY_32), next_part(BY_256), next_part(SHIFTED), next_part(WIDE)};
    float* sums = (float*)at;
    bool wanted[LAYOUTS] = {};
    for (int i = 0; i < count; i++) wanted[layout_of(matrices[i].format, many)] = true;
    const int64_t step = !many ? SPAN : m > ALONE ? TOGETHER * PANEL : PANEL;
    int64_t next = 0, spans = 0;
    for (int i = 0; i < count; i++) spans += (matrices[i].rows + step - 1) / step;
#pragma omp parallel num_threads(threads)
    {
        const int64_t chunks = as[0].chunks, cells = m * chunks;
#pragma omp for schedule(static)
        for (int64_t cell = 0; cell < cells; cell++) {
            const int64_t chunk = cell % chunks, r = cell / chunks;
            for (int layout = 0; layout < LAYOUTS; layout++)
                if (wanted[layout]) as[layout].fill(chunk, r, x + r * x_stride + chunk * CHUNK);
        }
        float* c = sums + int64_t(omp_get_thread_num()) * m * TOGETHER * PANEL;
        for (;;) {
            int64_t mine;
#pragma omp atomic capture
            mine = next++;
            if (mine >= spans) break;
            int i = 0;
            for (; mine >= (matrices[i].rows + step - 1) / step; i++) mine -= (matrices[i].rows + step - 1) / step;
            const Matrix& w = matrices[i];
            const int64_t last = (mine + 1) * step < w.rows ? (mine + 1) * step : w.rows;
            part_of(w, as[layout_of(w.format, many)], mine * step, last, c);
        }
    }
}

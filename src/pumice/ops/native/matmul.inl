// y = x Wᵀ for matrices in blocks that share their input, from the blocks as the file holds them.
//
// Few rows of activations: each row of weights is read once, in place, and multiplied with all of them. More: see
// panel.inl. Where the set has tiles: see bytes_amx.inl, and for TILED_ROWS and more tiles_amx.inl.

// Up to so many rows of activations a panel costs more to make than it saves.
constexpr int FEW_ROWS = 2;
// Rows of weights that a thread takes at a time where rows are read one by one. Memory comes faster in long streams, and
// all shall end together: it is half of the thread's share of what is left, within these bounds.
constexpr int64_t LONGEST = 512, SHORTEST = 32;

// Row `first` of weights, and others `apart` rows from each other, S in all, with all rows of activations, up to four of these
// at a time.
template <Format F, int S> void rows_with_all(const Matrix& w, const Activations& x, int64_t first, int64_t apart) {
    const uint8_t* b = w.data + first * w.row_bytes;
    float sum[S][4];
    constexpr int most = PANEL > 1 ? FEW_ROWS : 4;
    for (int64_t m = 0, rows; m < x.m; m += rows) {
        const int64_t left = x.m - m;
        rows = left >= most ? most : left >= 2 ? 2 : 1;
        if (rows == most)
            row_products<F, most, S>(b, apart * w.row_bytes, x, m, sum);
        else if (rows == 2)
            row_products<F, 2, S>(b, apart * w.row_bytes, x, m, sum);
        else
            row_products<F, 1, S>(b, apart * w.row_bytes, x, m, sum);
        for (int s = 0; s < S; s++) {
            const int64_t place = place_of(w, first + s * apart);
            for (int64_t r = 0; r < rows; r++) w.out[(m + r) * w.out_stride + place] = sum[s][r] + (w.bias ? w.bias[place] : 0);
        }
    }
}

// Rows `first` to `last` of weights with all rows of activations.
template <Format F> void few(const Matrix& w, const Activations& x, int64_t first, int64_t last) {
    const int64_t apart = (last - first) / STREAMS;
    for (int64_t row = first; row < first + apart; row++) rows_with_all<F, STREAMS>(w, x, row, apart);
    for (int64_t row = first + STREAMS * apart; row < last; row++) rows_with_all<F, 1>(w, x, row, 0);
}

template <Format F> void panels(const Matrix& w, const Activations& x, int64_t first, int64_t last, float* c);
template <Format F> void tiles(const Matrix& w, const Activations& x, int64_t first, int64_t last, float* c);
template <Format F> void pairs(const Matrix& w, const Activations& x, int64_t first, int64_t last, float* c);
inline void put_in_tiles(const Activations& x, int64_t chunk, int64_t r, const float* from);

template <Format F> void part(const Matrix& w, const Activations& x, int64_t first, int64_t last, float* c) {
    if constexpr (TILED_ROWS > 0) {
        if (x.layout == BFLOATS) return tiles<F>(w, x, first, last, c);
        if constexpr (Traits<F>::sub == 32)
            if (is_in_pairs(x.layout)) return pairs<F>(w, x, first, last, c);
    }
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

inline bool are_many(int64_t m) { return PANEL > 1 && m > FEW_ROWS; }
inline bool are_tiled(int64_t m) { return TILED_ROWS > 0 && m >= TILED_ROWS; }

// How a matrix of the format wants m rows of activations.
inline Layout layout_of(int32_t format, int64_t m) {
    if (are_tiled(m)) return BFLOATS;
    if (are_many(m)) return layout_of_many(format);
    return format >= Q2_K && format <= Q6_K ? BY_256 : BY_32;
}

inline int64_t in_lines(int64_t bytes) { return (bytes + 63) & ~int64_t(63); }

// So many sums a thread keeps.
inline int64_t sums_of(int64_t m) { return (are_tiled(m) ? rows_in_tiles(m) * TILED_TOGETHER : m * TOGETHER) * PANEL; }

// The bytes that `matmul` needs beside its arguments; those of layouts that no matrix wants are never touched.
inline int64_t scratch_bytes(int64_t m, int64_t k, int threads) {
    int64_t bytes = 64 + threads * sums_of(m) * 4;
    for (int layout = 0; layout < LAYOUTS; layout++) bytes += in_lines(Activations::bytes(m, k, Layout(layout)));
    return bytes;
}

// Some rows of a matrix, which one thread takes.
struct Span {
    const Matrix* of;
    int64_t first, last;
};

// The rows of some matrices as threads take them, span by span.
class Spans {
    const Matrix* matrices;
    int64_t rows = 0, shortest, longest;
    int threads;
    bool by_streams;
    int64_t taken = 0;

    int64_t length(int64_t left) const {
        const int64_t half = left / (2 * threads), wanted = half < shortest ? shortest : half > longest ? longest : half;
        // An odd number for each stream: where streams lie whole pages apart, as they would by 64 rows of 2304 bytes, they
        // wait for each other.
        return by_streams ? STREAMS * (wanted / STREAMS | 1) : wanted;
    }

   public:
    Spans(const Matrix* matrices_, int count, int64_t m, int threads_) : matrices(matrices_), threads(threads_) {
        for (int i = 0; i < count; i++) rows += matrices[i].rows;
        by_streams = !are_many(m);
        shortest = SHORTEST;
        longest = LONGEST;
        if (are_many(m)) {
            // Not so many panels that some threads get none.
            int64_t panels = are_tiled(m) ? TILED_TOGETHER : m > STREAMED ? TOGETHER : STREAMED_PANELS;
            while (panels > 1 && rows < 4 * threads * panels * PANEL) panels /= 2;
            shortest = longest = panels * PANEL;
        }
    }

    // The next rows that nobody has taken; false where none are left.
    bool take(Span& span) {
        for (int64_t from = __atomic_load_n(&taken, __ATOMIC_RELAXED); from < rows;) {
            const Matrix* of = matrices;
            int64_t first = from;
            for (; first >= of->rows; of++) first -= of->rows;
            const int64_t wanted = first + length(rows - from), last = wanted < of->rows ? wanted : of->rows;
            if (__atomic_compare_exchange_n(&taken, &from, from + last - first, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
                span = {of, first, last};
                return true;
            }
        }
        return false;
    }
};

// A chunk of one row of activations, as its layout has it.
inline void put(const Activations& x, int64_t chunk, int64_t r, const float* from) {
    if constexpr (TILED_ROWS > 0)
        if (x.layout == BFLOATS) return put_in_tiles(x, chunk, r, from);
    x.fill(chunk, r, from);
}

// Called from outside any parallel region. Each matrix is (rows, k) and multiplies the same x, (m, k), x_stride apart.
inline void matmul(const Matrix* matrices, int count, const float* x, int64_t x_stride, int64_t m, int64_t k, int threads,
                   uint8_t* scratch) {
    const bool many = are_many(m);
    uint8_t* at = (uint8_t*)in_lines(int64_t(uintptr_t(scratch)));
    const auto next_part = [&](Layout layout) {
        const Activations part(m, k, layout, many ? tile_rows_of(layout) : 0, at);
        at += in_lines(Activations::bytes(m, k, layout));
        return part;
    };
    const Activations as[LAYOUTS] = {next_part(BY_32),       next_part(BY_256),       next_part(SHIFTED), next_part(WIDE),
                                     next_part(PAIRS_BY_32), next_part(PAIRS_BY_256), next_part(BFLOATS)};
    float* sums = (float*)at;
    bool wanted[LAYOUTS] = {};
    for (int i = 0; i < count; i++) wanted[layout_of(matrices[i].format, m)] = true;
    Spans spans(matrices, count, m, threads);
#pragma omp parallel num_threads(threads)
    {
        const int64_t chunks = as[0].chunks, cells = m * chunks;
#pragma omp for schedule(static)
        for (int64_t cell = 0; cell < cells; cell++) {
            const int64_t chunk = cell % chunks, r = cell / chunks;
            for (int layout = 0; layout < LAYOUTS; layout++)
                if (wanted[layout]) put(as[layout], chunk, r, x + r * x_stride + chunk * CHUNK);
        }
        float* c = sums + omp_get_thread_num() * sums_of(m);
        for (Span span; spans.take(span);)
            part_of(*span.of, as[layout_of(span.of->format, m)], span.first, span.last, c);
    }
}

// Attention over pages of keys and values: of few queries one by one, of many in blocks.

template <class T> inline float dot(const float* q, const T* k, int64_t width) {
    V sum[2] = {all(0), all(0)};
    int64_t i = 0;
    for (; i + 2 * WIDTH <= width; i += 2 * WIDTH) {
        sum[0] = fma(load(q + i), load(k + i), sum[0]);
        sum[1] = fma(load(q + i + WIDTH), load(k + i + WIDTH), sum[1]);
    }
    for (; i < width; i += WIDTH) sum[0] = fma(load(q + i), load(k + i), sum[0]);
    return lanes_sum(add(sum[0], sum[1]));
}

// Where one query looks: positions `first` to `last` of a row, of which `seen`, if there is one, allows some.
struct Sight {
    const int64_t* table;
    int64_t head, first, last;
    const uint8_t* seen;

    template <class T> const T* at(const void* base, const Pages& p, int64_t s) const {
        return (const T*)base + table[s / p.page] * p.page_stride + head * p.head_stride + s % p.page * p.token_stride;
    }

    // Whether some position from `from` to `to` may not be seen, or may be one of those that `seen` hides.
    bool hides(int64_t from, int64_t to) const { return from < first || to > last || (seen && (to - from > 1 || !seen[from])); }
};

inline Sight sight_of(const Attention& a, int64_t row, int64_t shared, int64_t token) {
    Sight sight = {a.pages.table + row * a.pages.row_pages, shared, 0, a.positions, nullptr};
    if (a.places) {
        sight.last = a.places[row * a.tokens + token] + 1;
        sight.first = a.window > 0 && sight.last > a.window ? sight.last - a.window : 0;
    } else if (a.mask) {
        sight.seen = a.mask + (row * a.tokens + token) * a.positions;
    }
    return sight;
}

// One query head: softmax(q k / sqrt(width)) v. `score` has room for all positions.
template <class T>
inline void attend(const Pages& pages, const Sight& sight, const float* q, int64_t width, float* score, float* out) {
    const float scale = 1 / sqrtf(float(width));
    float top = -INFINITY;
    const int64_t count = sight.last - sight.first;
    for (int64_t i = 0; i < count; i++) {
        const int64_t s = sight.first + i;
        const bool hidden = sight.seen && !sight.seen[s];
        score[i] = hidden ? -INFINITY : dot(q, sight.at<T>(pages.keys, pages, s), width) * scale;
        top = score[i] > top ? score[i] : top;
    }
    float sum = 0;
    for (int64_t i = 0; i < count; i += WIDTH) {
        float some[WIDTH];
        for (int j = 0; j < WIDTH; j++) some[j] = i + j < count ? score[i + j] - top : 0;
        store(some, exponential(load(some)));
        for (int j = 0; j < WIDTH && i + j < count; j++) {
            score[i + j] = score[i + j] == -INFINITY ? 0 : some[j];
            sum += score[i + j];
        }
    }
    for (int64_t i = 0; i < width; i++) out[i] = 0;
    for (int64_t i = 0; i < count; i++) {
        if (score[i] == 0) continue;
        const T* v = sight.at<T>(pages.values, pages, sight.first + i);
        const V weight = all(score[i] / sum);
        for (int64_t e = 0; e < width; e += WIDTH) store(out + e, fma(weight, load(v + e), load(out + e)));
    }
}

// Each (row, key head) is one piece of work: the queries of its group read the same keys. `scores`: threads x positions.
inline void attention_of_few(const Attention& a, int threads, float* scores) {
    const int64_t group = a.heads / a.kv_heads;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (a.rows * a.heads * a.positions > 2048)
    for (int64_t piece = 0; piece < a.rows * a.kv_heads; piece++) {
        const int64_t row = piece / a.kv_heads, shared = piece % a.kv_heads;
        float* score = scores + int64_t(omp_get_thread_num()) * a.positions;
        for (int64_t t = 0; t < a.tokens; t++) {
            const Sight sight = sight_of(a, row, shared, t);
            for (int64_t head = shared * group; head < (shared + 1) * group; head++) {
                const float* q = a.q + row * a.q_row_stride + head * a.q_head_stride + t * a.q_token_stride;
                float* out = a.out + ((row * a.tokens + t) * a.heads + head) * a.head_width;
                if (a.pages.type == OF_FLOAT)
                    attend<float>(a.pages, sight, q, a.head_width, score, out);
                else if (a.pages.type == OF_HALF)
                    attend<Half>(a.pages, sight, q, a.head_width, score, out);
                else
                    attend<Bfloat>(a.pages, sight, q, a.head_width, score, out);
            }
        }
    }
}

// More queries than this share what they read of keys and values.
constexpr int64_t FEW_QUERIES = 8;

// The memory of a thread for a block of queries of one head: `attend_block`.
struct QueryBlock {
    static constexpr int64_t queries = 48, keys = 32;  // at a time
    float *q, *out, *score, *top, *sum, *k, *v;

    static int64_t floats(int64_t width) { return 2 * queries * width + queries * (keys + 2) + 2 * keys * width; }

    QueryBlock(float* memory, int64_t width)
        : q(memory), out(q + queries * width), score(out + queries * width), top(score + queries * keys), sum(top + queries),
          k(sum + queries), v(k + keys * width) {}
};

// The memory of `attention`, in floats.
inline int64_t attention_floats(const Attention& a, int threads) {
    return threads * (a.tokens > FEW_QUERIES ? QueryBlock::floats(a.head_width) : a.positions);
}

// c = a b, or c += a b: MR rows of a and c, VS vectors of the columns of b and c.
template <int MR, int VS, bool adds>
inline __attribute__((always_inline)) void products_of(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t inner,
                                                       float* c, int64_t c_stride) {
    V sum[MR][VS];
    for (int r = 0; r < MR; r++)
        for (int v = 0; v < VS; v++) sum[r][v] = adds ? load(c + r * c_stride + v * WIDTH) : all(0);
    for (int64_t i = 0; i < inner; i++) {
        V row[VS];
        for (int v = 0; v < VS; v++) row[v] = load(b + i * b_stride + v * WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < MR; r++) {
            const V x = all(a[r * a_stride + i]);
#pragma GCC unroll 8
            for (int v = 0; v < VS; v++) sum[r][v] = fma(x, row[v], sum[r][v]);
        }
    }
    for (int r = 0; r < MR; r++)
        for (int v = 0; v < VS; v++) store(c + r * c_stride + v * WIDTH, sum[r][v]);
}

// c = a b, or c += a b, for `rows` rows and `columns` columns, a multiple of WIDTH.
template <bool adds>
inline void small_product(const float* a, int64_t a_stride, const float* b, int64_t columns, int64_t inner, int64_t rows, float* c) {
    for (int64_t r = 0; r < rows;) {
        const int take = rows - r >= 6 ? 6 : rows - r >= 2 ? 2 : 1;
        for (int64_t j = 0; j < columns;) {
            const bool two = columns - j >= 2 * WIDTH;
            const float* a_r = a + r * a_stride;
            float* c_r = c + r * columns + j;
            if (take == 6 && two)
                products_of<6, 2, adds>(a_r, a_stride, b + j, columns, inner, c_r, columns);
            else if (take == 6)
                products_of<6, 1, adds>(a_r, a_stride, b + j, columns, inner, c_r, columns);
            else if (take == 2 && two)
                products_of<2, 2, adds>(a_r, a_stride, b + j, columns, inner, c_r, columns);
            else if (take == 2)
                products_of<2, 1, adds>(a_r, a_stride, b + j, columns, inner, c_r, columns);
            else if (two)
                products_of<1, 2, adds>(a_r, a_stride, b + j, columns, inner, c_r, columns);
            else
                products_of<1, 1, adds>(a_r, a_stride, b + j, columns, inner, c_r, columns);
            j += two ? 2 * WIDTH : WIDTH;
        }
        r += take;
    }
}

// `count` keys and values from position `first` on: keys as columns, values as rows.
template <class T> void read_block(const Attention& a, const Sight& sight, int64_t first, int64_t count, const QueryBlock& b) {
    const int64_t width = a.head_width;
    alignas(64) float rows[8][WIDTH];
    for (int64_t i = 0; i < count; i += 8) {
        const int64_t here = count - i < 8 ? count - i : 8;
        const T* k[8];
        for (int64_t j = 0; j < 8; j++) k[j] = sight.at<T>(a.pages.keys, a.pages, first + i + (j < here ? j : here - 1));
        for (int64_t e = 0; e < width; e += WIDTH) {
            for (int64_t j = 0; j < 8; j++) store(rows[j], load(k[j] + e));
            for (int64_t c = 0; c < WIDTH; c += 8) {
                uint8_t* columns = (uint8_t*)(b.k + (e + c) * QueryBlock::keys + i);
                transpose8((const uint8_t*)(rows[0] + c), WIDTH * 4, columns, QueryBlock::keys * 4);
            }
        }
        for (int64_t j = 0; j < here; j++) {
            const T* v = sight.at<T>(a.pages.values, a.pages, first + i + j);
            for (int64_t e = 0; e < width; e += WIDTH) store(b.v + (i + j) * width + e, load(v + e));
        }
    }
}

// Turns a row of scores into e^(score - top), the greatest so far; what was summed up under an older one shrinks.
inline void weigh(const QueryBlock& b, int64_t query, int64_t width) {
    float* score = b.score + query * QueryBlock::keys;
    V high = load(score);
    for (int64_t i = WIDTH; i < QueryBlock::keys; i += WIDTH) high = most(load(score + i), high);
    float lanes[WIDTH], top = b.top[query];
    store(lanes, high);
    for (const float lane : lanes) top = lane > top ? lane : top;
    if (top == -INFINITY) {  // nothing seen yet
        memset(score, 0, QueryBlock::keys * sizeof(float));
        return;
    }
    if (top > b.top[query]) {
        const V shrink = b.top[query] == -INFINITY ? all(0) : exponential(all(b.top[query] - top));
        float* out = b.out + query * width;
        for (int64_t e = 0; e < width; e += WIDTH) store(out + e, mul(shrink, load(out + e)));
        store(lanes, shrink);
        b.sum[query] *= lanes[0];
        b.top[query] = top;
    }
    V sum = all(0);
    for (int64_t i = 0; i < QueryBlock::keys; i += WIDTH) {
        const V weight = exponential(add(load(score + i), all(-top)));
        store(score + i, weight);
        sum = add(sum, weight);
    }
    b.sum[query] += lanes_sum(sum);
}

// Attention of up to QueryBlock::queries tokens of one head, over keys block by block (Dao et al. 2022, FlashAttention).
template <class T> void attend_block(const Attention& a, int64_t row, int64_t head, int64_t token, float* memory) {
    const int64_t width = a.head_width, most = QueryBlock::keys;
    const int64_t count = a.tokens - token < QueryBlock::queries ? a.tokens - token : QueryBlock::queries;
    const QueryBlock b(memory, width);
    const float scale = 1 / sqrtf(float(width));
    Sight sights[QueryBlock::queries];
    int64_t first = a.positions, last = 0;
    for (int64_t i = 0; i < count; i++) {
        sights[i] = sight_of(a, row, head / (a.heads / a.kv_heads), token + i);
        first = sights[i].first < first ? sights[i].first : first;
        last = sights[i].last > last ? sights[i].last : last;
        const float* q = a.q + row * a.q_row_stride + head * a.q_head_stride + (token + i) * a.q_token_stride;
        for (int64_t e = 0; e < width; e += WIDTH) store(b.q + i * width + e, mul(all(scale), load(q + e)));
        b.top[i] = -INFINITY;
        b.sum[i] = 0;
    }
    memset(b.out, 0, size_t(count * width) * sizeof(float));
    for (int64_t at = first; at < last; at += most) {
        const int64_t keys = last - at < most ? last - at : most;
        read_block<T>(a, sights[0], at, keys, b);
        small_product<false>(b.q, width, b.k, most, width, count, b.score);
        for (int64_t i = 0; i < count; i++) {
            if (sights[i].hides(at, at + most))
                for (int64_t s = 0; s < most; s++)
                    if (sights[i].hides(at + s, at + s + 1)) b.score[i * most + s] = -INFINITY;
            weigh(b, i, width);
        }
        small_product<true>(b.score, most, b.v, width, keys, count, b.out);
    }
    for (int64_t i = 0; i < count; i++) {
        float* out = a.out + ((row * a.tokens + token + i) * a.heads + head) * width;
        for (int64_t e = 0; e < width; e += WIDTH) store(out + e, mul(all(1 / b.sum[i]), load(b.out + i * width + e)));
    }
}

inline void attention_of_many(const Attention& a, int threads, float* memory) {
    const int64_t blocks = (a.tokens + QueryBlock::queries - 1) / QueryBlock::queries, floats = QueryBlock::floats(a.head_width);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t piece = 0; piece < a.rows * a.heads * blocks; piece++) {
        const int64_t row = piece / (a.heads * blocks), head = piece / blocks % a.heads;
        const int64_t token = piece % blocks * QueryBlock::queries;
        float* mine = memory + int64_t(omp_get_thread_num()) * floats;
        if (a.pages.type == OF_FLOAT)
            attend_block<float>(a, row, head, token, mine);
        else if (a.pages.type == OF_HALF)
            attend_block<Half>(a, row, head, token, mine);
        else
            attend_block<Bfloat>(a, row, head, token, mine);
    }
}

// `memory`: attention_floats.
inline void attention(const Attention& a, int threads, float* memory) {
    if (a.tokens > FEW_QUERIES)
        attention_of_many(a, threads, memory);
    else
        attention_of_few(a, threads, memory);
}

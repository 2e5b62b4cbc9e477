// Attention over pages of keys and values: of few queries position by position, of many in blocks.

// score[h] = q k of each of H queries.
template <int H, class T> inline void dots(const float* const (&q)[H], const T* k, int64_t width, float (&score)[H]) {
    V sum[H][2];
    for (int h = 0; h < H; h++) sum[h][0] = sum[h][1] = all(0);
    int64_t i = 0;
    for (; i + 2 * WIDTH <= width; i += 2 * WIDTH) {
        const V first = load(k + i), second = load(k + i + WIDTH);
        for (int h = 0; h < H; h++) {
            sum[h][0] = fma(load(q[h] + i), first, sum[h][0]);
            sum[h][1] = fma(load(q[h] + i + WIDTH), second, sum[h][1]);
        }
    }
    for (; i < width; i += WIDTH)
        for (int h = 0; h < H; h++) sum[h][0] = fma(load(q[h] + i), load(k + i), sum[h][0]);
    for (int h = 0; h < H; h++) score[h] = lanes_sum(add(sum[h][0], sum[h][1]));
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

// Calls step(i, k) for each position of a sight, the i-th and where it lies. Those of the next stretch are called for
// meanwhile, as no CPU foresees pages; behind the last `next` is.
template <class T, class Step>
inline void each_position(const void* base, const Pages& p, const Sight& sight, int64_t width, const T* next, const Step& step) {
    constexpr int64_t STRETCH = 32;
    for (int64_t s = sight.first; s < sight.last;) {
        const int64_t page_end = s - s % p.page + p.page, wanted = s + STRETCH < page_end ? s + STRETCH : page_end;
        const int64_t to = wanted < sight.last ? wanted : sight.last;
        const T* at = sight.at<T>(base, p, s);
        const T* later = to < sight.last ? sight.at<T>(base, p, to) : next;
        for (; s < to; s++, at += p.token_stride, later += p.token_stride) {
            for (int64_t i = 0; i < width; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(later + i, 0, 2);
            step(s - sight.first, at);
        }
    }
}

// out[h] = the sum of VS vectors of each value, from channel `first` on, in the weights of each of H queries.
template <int H, int VS, class T>
inline void weighted_sums(const Pages& pages, const Sight& sight, const float* const (&weight)[H], int64_t first, int64_t width,
                          float* const (&out)[H]) {
    V sum[H][VS];
    for (int h = 0; h < H; h++)
        for (int j = 0; j < VS; j++) sum[h][j] = all(0);
    const T* next_head = sight.at<T>(pages.keys, pages, sight.first) + pages.head_stride;
    each_position<T>(pages.values, pages, sight, first == 0 ? width : 0, next_head, [&](int64_t i, const T* v) {
        if (sight.seen && !sight.seen[sight.first + i]) return;
        V value[VS];
        for (int j = 0; j < VS; j++) value[j] = load(v + first + j * WIDTH);
        for (int h = 0; h < H; h++)
            for (int j = 0; j < VS; j++) sum[h][j] = fma(all(weight[h][i]), value[j], sum[h][j]);
    });
    for (int h = 0; h < H; h++)
        for (int j = 0; j < VS; j++) store(out[h] + first + j * WIDTH, sum[h][j]);
}

// So many of anything in whole vectors.
inline int64_t in_vectors(int64_t count) { return (count + WIDTH - 1) / WIDTH * WIDTH; }

// Scores become weights: e^score, and their sum is 1. Vectors are whole.
inline void softmax(float* score, int64_t count) {
    for (int64_t i = count; i < in_vectors(count); i++) score[i] = -INFINITY;
    V high = load(score), sum = all(0);
    for (int64_t i = WIDTH; i < count; i += WIDTH) high = most(load(score + i), high);
    float lanes[WIDTH], top = -INFINITY;
    store(lanes, high);
    for (const float lane : lanes) top = lane > top ? lane : top;
    for (int64_t i = 0; i < count; i += WIDTH) {
        const V weight = exponential(add(load(score + i), all(-top)));
        store(score + i, weight);
        sum = add(sum, weight);
    }
    const V share = all(1 / lanes_sum(sum));
    for (int64_t i = 0; i < count; i += WIDTH) store(score + i, mul(load(score + i), share));
}

// Query heads that read the same keys and values at once, and sums that fit into registers beside them.
constexpr int QUERIES = 4, SUMS = WIDTH == 16 ? 16 : 8;

// H query heads of one key head: softmax(q k / sqrt(width)) v. `scores` has room for all positions of each; q and out of the
// next head lie behind those of one, `q_stride` and width apart.
template <int H, class T>
inline void attend(const Pages& pages, const Sight& sight, const float* q, int64_t q_stride, int64_t width, float* scores,
                   float* out) {
    const float scale = 1 / sqrtf(float(width));
    const int64_t count = sight.last - sight.first;
    if (count == 0) {
        memset(out, 0, size_t(H * width) * sizeof(float));
        return;
    }
    const float *qs[H], *weights[H];
    float *score[H], *outs[H];
    for (int h = 0; h < H; h++) {
        qs[h] = q + h * q_stride;
        outs[h] = out + h * width;
        weights[h] = score[h] = scores + h * in_vectors(count);
    }
    const T* values = sight.at<T>(pages.values, pages, sight.first);
    each_position<T>(pages.keys, pages, sight, width, values, [&](int64_t i, const T* k) {
        float product[H] = {};
        const bool hidden = sight.seen && !sight.seen[sight.first + i];
        if (!hidden) dots<H>(qs, k, width, product);
        for (int h = 0; h < H; h++) score[h][i] = hidden ? -INFINITY : product[h] * scale;
    });
    for (int h = 0; h < H; h++) softmax(score[h], count);
    constexpr int VS = SUMS / H < 8 ? SUMS / H : 8;
    int64_t e = 0;
    for (; e + VS * WIDTH <= width; e += VS * WIDTH) weighted_sums<H, VS, T>(pages, sight, weights, e, width, outs);
    for (; e < width; e += WIDTH) weighted_sums<H, 1, T>(pages, sight, weights, e, width, outs);
}

// All query heads of one key head, some at once.
template <class T>
inline void attend_all(const Pages& pages, const Sight& sight, const float* q, int64_t q_stride, int64_t heads, int64_t width,
                       float* scores, float* out) {
    for (int64_t at_once; heads > 0; heads -= at_once, q += at_once * q_stride, out += at_once * width) {
        at_once = heads >= QUERIES ? QUERIES : heads >= 2 ? 2 : 1;
        const auto attend_some = at_once == QUERIES ? attend<QUERIES, T> : at_once == 2 ? attend<2, T> : attend<1, T>;
        attend_some(pages, sight, q, q_stride, width, scores, out);
    }
}

// Each (row, key head) is one piece of work: the queries of its group read the same keys. `scores`: for each thread and
// QUERIES heads the positions, in whole vectors.
inline void attention_of_few(const Attention& a, int threads, float* scores) {
    const int64_t group = a.heads / a.kv_heads;
    const auto attend_heads = a.pages.type == OF_FLOAT  ? attend_all<float>
                              : a.pages.type == OF_HALF ? attend_all<Half>
                                                        : attend_all<Bfloat>;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (a.rows * a.heads * a.positions > 256)
    for (int64_t piece = 0; piece < a.rows * a.kv_heads; piece++) {
        const int64_t row = piece / a.kv_heads, shared = piece % a.kv_heads, head = shared * group;
        float* score = scores + int64_t(omp_get_thread_num()) * QUERIES * in_vectors(a.positions);
        for (int64_t t = 0; t < a.tokens; t++) {
            const float* q = a.q + row * a.q_row_stride + head * a.q_head_stride + t * a.q_token_stride;
            float* out = a.out + ((row * a.tokens + t) * a.heads + head) * a.head_width;
            attend_heads(a.pages, sight_of(a, row, shared, t), q, a.q_head_stride, group, a.head_width, score, out);
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
    return threads * (a.tokens > FEW_QUERIES ? QueryBlock::floats(a.head_width) : QUERIES * in_vectors(a.positions));
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

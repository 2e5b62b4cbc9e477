// Attention of few queries over pages of keys and values.

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
};

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
inline void attention(const Attention& a, int threads, float* scores) {
    const int64_t group = a.heads / a.kv_heads;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (a.rows * a.heads * a.positions > 2048)
    for (int64_t piece = 0; piece < a.rows * a.kv_heads; piece++) {
        const int64_t row = piece / a.kv_heads, shared = piece % a.kv_heads;
        float* score = scores + int64_t(omp_get_thread_num()) * a.positions;
        for (int64_t t = 0; t < a.tokens; t++) {
            Sight sight = {a.pages.table + row * a.pages.row_pages, shared, 0, a.positions, nullptr};
            if (a.places) {
                sight.last = a.places[row * a.tokens + t] + 1;
                sight.first = a.window > 0 && sight.last > a.window ? sight.last - a.window : 0;
            } else if (a.mask) {
                sight.seen = a.mask + (row * a.tokens + t) * a.positions;
            }
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

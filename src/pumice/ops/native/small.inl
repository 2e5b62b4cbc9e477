// The small operations between matrix products, and attention of few queries over pages of keys and values.

// e^x within 2e-7 of the value for x in [-87, 88]; smaller x give the least normal number's size.
// 2^n e^r with |r| <= ln 2 / 2; e^r by its Taylor series to the seventh power.
inline V exponential(V x) {
    x = most(least(x, all(88)), all(-87));
    const V n = rounded(mul(x, all(1.44269504f)));
    V r = fma(n, all(-0.693359375f), x);  // ln 2 in two parts, the first exact in few bits
    r = fma(n, all(2.12194440e-4f), r);
    V y = fma(r, all(1.f / 5040), all(1.f / 720));
    const float rest[] = {1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f};
    for (const float c : rest) y = fma(y, r, all(c));
    return mul(y, power_of_two(n));
}

// out = weight * x / sqrt(mean x^2 + eps), row by row.
inline void rms_norm(const float* x, int64_t x_stride, const float* weight, float eps, int64_t rows, int64_t width, float* out,
                     int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 4)
    for (int64_t row = 0; row < rows; row++) {
        const float* in = x + row * x_stride;
        V squares = all(0);
        int64_t i = 0;
        for (; i + WIDTH <= width; i += WIDTH) squares = fma(load(in + i), load(in + i), squares);
        float sum = lanes_sum(squares);
        for (; i < width; i++) sum += in[i] * in[i];
        const float scale = 1 / sqrtf(sum / float(width) + eps);
        for (i = 0; i + WIDTH <= width; i += WIDTH)
            store(out + row * width + i, mul(load(weight + i), mul(load(in + i), all(scale))));
        for (; i < width; i++) out[row * width + i] = weight[i] * (in[i] * scale);
    }
}

// out = gate / (1 + e^-gate) * up.
inline void gated_mlp(const float* gate, const float* up, int64_t count, float* out, int threads) {
    const int64_t part = 4096, parts = (count + part - 1) / part;
#pragma omp parallel for schedule(static) num_threads(threads) if (parts > 8)
    for (int64_t p = 0; p < parts; p++) {
        const int64_t last = (p + 1) * part < count ? (p + 1) * part : count;
        int64_t i = p * part;
        for (; i + WIDTH <= last; i += WIDTH) {
            const V g = load(gate + i);
            store(out + i, mul(divide(g, add(all(1), exponential(mul(g, all(-1))))), load(up + i)));
        }
        for (; i < last; i++) out[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
    }
}

// out[row][head] = x[row][head] turned by the angles of its row: the pair (i, i + width / 2) together.
inline void rotate(const float* x, const float* cosine, const float* sine, int64_t rows, int64_t heads, int64_t width,
                   float* out, int threads) {
    const int64_t half_width = width / 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 4)
    for (int64_t row = 0; row < rows; row++) {
        const float *c = cosine + row * width, *s = sine + row * width;
        for (int64_t head = 0; head < heads; head++) {
            const float* in = x + (row * heads + head) * width;
            float* to = out + (row * heads + head) * width;
            int64_t i = 0;
            for (; i + WIDTH <= half_width; i += WIDTH) {
                const V a = load(in + i), b = load(in + half_width + i);
                store(to + i, fma(a, load(c + i), mul(mul(b, all(-1)), load(s + i))));
                store(to + half_width + i, fma(b, load(c + half_width + i), mul(a, load(s + half_width + i))));
            }
            for (; i < half_width; i++) {
                const float a = in[i], b = in[half_width + i];
                to[i] = a * c[i] - b * s[i];
                to[half_width + i] = b * c[half_width + i] + a * s[half_width + i];
            }
        }
    }
}

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

// One query head: softmax(q k / sqrt(width)) v over the positions that `seen` allows. `score` has room for all of them.
template <class T>
inline void attend(const Attention& a, const float* q, const void* const* keys, const void* const* values, int64_t at,
                   const uint8_t* seen, float* score, float* out) {
    const float scale = 1 / sqrtf(float(a.width));
    float top = -INFINITY;
    for (int64_t s = 0; s < a.positions; s++) {
        if (seen && !seen[s]) {
            score[s] = -INFINITY;
            continue;
        }
        const T* k = (const T*)keys[s / a.page] + at + s % a.page * a.token_stride;
        score[s] = dot(q, k, a.width) * scale;
        top = score[s] > top ? score[s] : top;
    }
    V sums = all(0);
    int64_t s = 0;
    for (; s + WIDTH <= a.positions; s += WIDTH) {
        // What is not seen is -inf, and has no weight at all.
        V weight = exponential(add(load(score + s), all(-top)));
        if (seen)
            for (int i = 0; i < WIDTH; i++)
                if (!seen[s + i]) ((float*)&weight)[i] = 0;
        store(score + s, weight);
        sums = add(sums, weight);
    }
    float sum = lanes_sum(sums);
    for (; s < a.positions; s++) sum += score[s] = seen && !seen[s] ? 0 : expf(score[s] - top);
    for (int64_t i = 0; i < a.width; i++) out[i] = 0;
    for (s = 0; s < a.positions; s++) {
        if (score[s] == 0) continue;
        const T* v = (const T*)values[s / a.page] + at + s % a.page * a.token_stride;
        const V weight = all(score[s] / sum);
        for (int64_t i = 0; i < a.width; i += WIDTH) store(out + i, fma(weight, load(v + i), load(out + i)));
    }
}

// Each (row, key head) is one piece of work: its queries, T new positions of each head of the group, read the same keys.
inline void attention(const Attention& a, int threads, float* scratch) {
    const int64_t group = a.heads / a.kv_heads, pages = (a.positions + a.page - 1) / a.page;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (a.rows * a.heads * a.positions > 2048)
    for (int64_t piece = 0; piece < a.rows * a.kv_heads; piece++) {
        const int64_t row = piece / a.kv_heads, shared = piece % a.kv_heads;
        float* score = scratch + int64_t(omp_get_thread_num()) * a.positions;
        for (int64_t t = 0; t < a.tokens; t++)
            for (int64_t g = 0; g < group; g++) {
                const int64_t head = shared * group + g;
                const float* q = a.q + row * a.q_row_stride + head * a.q_head_stride + t * a.q_token_stride;
                float* out = a.out + ((row * a.tokens + t) * a.heads + head) * a.width;
                const uint8_t* seen = a.mask ? a.mask + (row * a.tokens + t) * a.positions : nullptr;
                const int64_t at = shared * a.head_stride;
                if (a.type == OF_FLOAT)
                    attend<float>(a, q, a.keys + row * pages, a.values + row * pages, at, seen, score, out);
                else if (a.type == OF_HALF)
                    attend<Half>(a, q, a.keys + row * pages, a.values + row * pages, at, seen, score, out);
                else
                    attend<Bfloat>(a, q, a.keys + row * pages, a.values + row * pages, at, seen, score, out);
            }
    }
}

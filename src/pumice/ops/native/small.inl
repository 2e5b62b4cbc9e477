// The small operations between matrix products.

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

// x / (1 + e^-(slope x)). Below -88 the quotient is nothing; the bounds stand first, so that what is no number stays none.
inline V sigmoid_times(V x, float slope) {
    return divide(most(all(-88), x), add(all(1), exponential(mul(x, all(-slope)))));
}

// out = gate / (1 + e^-(slope gate)) * up, or without `up` the first factor alone.
inline void gated(const float* gate, const float* up, float slope, int64_t count, float* out, int threads) {
    const int64_t part = 1024, parts = (count + part - 1) / part;
#pragma omp parallel for schedule(static) num_threads(threads) if (parts > 8)
    for (int64_t p = 0; p < parts; p++) {
        const int64_t last = (p + 1) * part < count ? (p + 1) * part : count;
        int64_t i = p * part;
        for (; i + WIDTH <= last; i += WIDTH) {
            const V y = sigmoid_times(load(gate + i), slope);
            store(out + i, up ? mul(y, load(up + i)) : y);
        }
        for (; i < last; i++) out[i] = gate[i] / (1 + expf(-slope * gate[i])) * (up ? up[i] : 1);
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

// Numbers into blocks: the twin of packing.py, with the same bytes. What is computed, and why, stands there.
//
// The groups of a super-block are fitted side by side, each in a lane of its own. So every sum runs in the order of the
// elements, and the bytes depend neither on the width of the vectors nor on the instruction set. That needs a compiler
// that neither reorders nor fuses: no -ffast-math, and -ffp-contract=off.

#ifdef __AVX2__
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

constexpr float SMALLEST = 1e-15f;

// What a K-quant with mins is fitted with: levels 0..top of groups of `size`, steps + 1 divisors from top + first on;
// weighted squares are least, or weighted distances. Scales and mins become 0..ends.
template <Format F> struct Fit;
template <> struct Fit<Q2_K> { static constexpr int size = 16, top = 3, steps = 15, ends = 15; static constexpr float first = -.5f; static constexpr bool squared = false; };
template <> struct Fit<Q4_K> { static constexpr int size = 32, top = 15, steps = 20, ends = 63; static constexpr float first = -1; static constexpr bool squared = true; };
template <> struct Fit<Q5_K> { static constexpr int size = 32, top = 31, steps = 15, ends = 63; static constexpr float first = -.5f; static constexpr bool squared = true; };

// A super-block in groups of E weights. Element e of group g is x[e][g]; `scale` and `low` (what is subtracted) are
// floats before they are rounded, and codes after.
template <int E> struct Groups {
    static constexpr int count = CHUNK / E;
    alignas(32) float x[E][count], level[E][count], scale[count], low[count];

    explicit Groups(const float* in) {
        for (int g = 0; g < count; g++)
            for (int e = 0; e < E; e++) x[e][g] = in[g * E + e];
    }

    void levels(uint8_t* q) const {
        for (int g = 0; g < count; g++)
            for (int e = 0; e < E; e++) q[g * E + e] = uint8_t(level[e][g]);
    }
};

inline Floats at(const float* p) {
    Floats v;
    memcpy(&v, p, sizeof v);
    return v;
}
inline void put(float* p, Floats v) { memcpy(p, &v, sizeof v); }
inline Floats magnitude(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }
inline Floats pick(Ints mask, Floats a, Floats b) { return (Floats)((mask & (Ints)a) | (~mask & (Ints)b)); }
inline Floats every(float x) { return x - Floats{}; }
// a / b, and 0 where b is 0.
inline Floats ratio(Floats a, Floats b) { return pick(b != 0.f, a / b, Floats{}); }
inline float ratio(float a, float b) { return b != 0 ? a / b : 0; }

inline Floats root(Floats x) {
    for (int lane = 0; lane < LANES; lane++) x[lane] = sqrtf(x[lane]);
    return x;
}

// Rounded half to even, within bounds. Beyond 2^22 the low bits of the sum decide, as in ggml's nearest_int.
inline Floats nearest(Floats x, int from, int to) {
    Ints n = ((Ints)(x + 12582912.f) & 0x7fffff) - 0x400000;
    const Ints lowest = from - Ints{}, highest = to - Ints{};
    n = n < lowest ? lowest : n;
    return __builtin_convertvector(n > highest ? highest : n, Floats);
}

// Truncated to a byte, at most `to`, as x86 converts: what no int32 holds ends in eight zero bits.
inline uint8_t truncated(float x, uint8_t to) {
    const uint8_t low = uint8_t(fabsf(x) < 2147483648.f ? int32_t(x) : 0);
    return low < to ? low : to;
}

// The number of largest magnitude, the first of equals, with its sign but for zero's; what is no number is larger than all.
inline float extreme(const float* x, int count) {
    float found = 0;
    for (int i = 0; i < count; i++) found = fabsf(x[i]) > fabsf(found) || x[i] != x[i] ? x[i] : found;
    return found;
}
template <int E> inline Floats extreme(const Floats (&x)[E]) {
    Floats found = {};
    for (int e = 0; e < E; e++) found = pick((magnitude(x[e]) > magnitude(found)) | (x[e] != x[e]), x[e], found);
    return found;
}

inline float greatest(const float* x, int count) {
    float most = 0;
    for (int i = 0; i < count; i++) most = x[i] > most ? x[i] : most;
    return most;
}

// Writes a number as a half; gives what was written.
inline float put_half(uint8_t* to, float value) {
    Half halves[WIDTH];
    store(halves, all(value));
    memcpy(to, &halves[0].bits, 2);
    return half(halves[0].bits);
}

// Two four-bit values in a byte: element e of each run of 2 * span lies low, e + span high.
inline void put_paired(const uint8_t* q, int count, int span, uint8_t* to) {
    for (int run = 0; run < count; run += 2 * span)
        for (int e = 0; e < span; e++) *to++ = uint8_t((q[run + e] & 15) | q[run + span + e] << 4);
}

// Fields of `width` bits, from bit `shift` of each level: the first `span` levels lie lowest in `span` bytes, and so on.
inline void put_fields(const uint8_t* q, int width, int shift, int span, uint8_t* to) {
    for (int e = 0; e < span; e++) {
        int byte = 0;
        for (int k = 0; k < 8 / width; k++) byte |= (q[k * span + e] >> shift & ((1 << width) - 1)) << (k * width);
        to[e] = uint8_t(byte);
    }
}

inline void put_quarters(const uint8_t* q, int shift, uint8_t* to) {
    put_fields(q, 2, shift, 32, to);
    put_fields(q + 128, 2, shift, 32, to + 32);
}

// Scales and mins of six bits: four of each whole, the upper bits of the other eight above them, their lower bits behind.
template <int E> inline void put_six_bits(const Groups<E>& s, uint8_t* to) {
    for (int j = 0; j < 4; j++) {
        const int scale = int(s.scale[j]), later_scale = int(s.scale[j + 4]), low = int(s.low[j]), later_low = int(s.low[j + 4]);
        to[j] = uint8_t(scale | later_scale >> 4 << 6);
        to[j + 4] = uint8_t(low | later_low >> 4 << 6);
        to[j + 8] = uint8_t((later_scale & 15) | (later_low & 15) << 4);
    }
}

template <class Of, int E>
inline Floats miss(const Floats (&x)[E], const Floats (&w)[E], const Floats (&levels)[E], Floats scale, Floats low) {
    Floats sum = {};
    for (int e = 0; e < E; e++) {
        const Floats off = scale * levels[e] + low - x[e];
        sum += w[e] * (Of::squared ? off * off : magnitude(off));
    }
    return sum;
}

// Scales, mins and levels of the groups from g on.
template <class Of> inline void fit_with_min(Groups<Of::size>& s, int g) {
    constexpr int E = Of::size;
    Floats x[E], w[E], tried[E], low = {}, high = at(s.x[0] + g), squares = {};
    for (int e = 0; e < E; e++) {
        x[e] = at(s.x[e] + g);
        low = pick(x[e] < low, x[e], low);
        high = pick(x[e] > high, x[e], high);
        squares += x[e] * x[e];
    }
    // A weight counts by its magnitude, and by its group's where squares are least.
    const Floats group = Of::squared ? root(squares / float(E)) : Floats{};
    Floats sum_w = {}, sum_x = {};
    for (int e = 0; e < E; e++) {
        w[e] = group + magnitude(x[e]);
        sum_w += w[e];
        sum_x += w[e] * x[e];
    }
    const Ints flat = high == low;
    // The levels are those of `factor` and `origin`: made again in the end instead of kept.
    Floats factor = float(Of::top) / (high - low), origin = low, scale = 1.f / factor;
    for (int e = 0; e < E; e++) tried[e] = nearest(factor * (x[e] - low), 0, Of::top);
    Floats best = miss<Of>(x, w, tried, scale, low);
    for (int step = 0; step <= Of::steps; step++) {
        const Floats divisor = (Of::first + .1f * float(step) + float(Of::top)) / (high - low);
        Floats sum_l = {}, sum_ll = {}, sum_lx = {};
        for (int e = 0; e < E; e++) {
            tried[e] = nearest(divisor * (x[e] - low), 0, Of::top);
            const Floats weighted = w[e] * tried[e];
            sum_l += weighted;
            sum_ll += weighted * tried[e];
            sum_lx += weighted * x[e];
        }
        const Floats spread = sum_w * sum_ll - sum_l * sum_l;
        Floats new_scale = (sum_w * sum_lx - sum_x * sum_l) / spread, new_low = (sum_ll * sum_x - sum_l * sum_lx) / spread;
        new_scale = pick(new_low > 0.f, sum_lx / sum_ll, new_scale);
        new_low = pick(new_low > 0.f, Floats{}, new_low);
        const Floats error = miss<Of>(x, w, tried, new_scale, new_low);
        const Ints better = (spread > 0.f) & (error < best);
        factor = pick(better, divisor, factor);
        origin = pick(better, low, origin);
        scale = pick(better, new_scale, scale);
        low = pick(better, new_low, low);
        best = pick(better, error, best);
    }
    put(s.scale + g, pick(flat, Floats{}, scale));
    put(s.low + g, -low);
    for (int e = 0; e < E; e++) put(s.level[e] + g, pick(flat, Floats{}, nearest(factor * (x[e] - origin), 0, Of::top)));
}

// Fits a super-block, and writes its two halves.
template <class Of> inline void fit_with_mins(Groups<Of::size>& s, uint8_t* halves) {
    constexpr int count = Groups<Of::size>::count;
    for (int g = 0; g < count; g += LANES) fit_with_min<Of>(s, g);
    const float most_scale = greatest(s.scale, count), most_low = greatest(s.low, count);
    const float d = put_half(halves, most_scale / float(Of::ends)), dmin = put_half(halves + 2, most_low / float(Of::ends));
    for (int g = 0; g < count; g += LANES) {
        const Floats scale = nearest(ratio(float(Of::ends), most_scale) * at(s.scale + g), 0, Of::ends);
        const Floats low = nearest(ratio(float(Of::ends), most_low) * at(s.low + g), 0, Of::ends);
        put(s.scale + g, scale);
        put(s.low + g, low);
        const Floats step = d * scale, least = dmin * low;
        for (int e = 0; e < Of::size; e++)
            put(s.level[e] + g, pick(step == 0.f, at(s.level[e] + g), nearest((at(s.x[e] + g) + least) / step, 0, Of::top)));
    }
}

// Q3_K's: each level in turn moves where it helps. Levels are from 0 on.
inline void fit_swept(Groups<16>& s, int g) {
    Floats x[16], levels[16], sum_lx = {}, sum_ll = {};
    for (int e = 0; e < 16; e++) x[e] = at(s.x[e] + g);
    const Floats end = extreme(x), inverse = ratio(every(-4), end);
    for (int e = 0; e < 16; e++) {
        const Floats w = x[e] * x[e];
        levels[e] = nearest(inverse * x[e], -4, 3);
        sum_lx += w * x[e] * levels[e];
        sum_ll += w * levels[e] * levels[e];
    }
    for (int sweep = 0; sweep < 5; sweep++) {
        for (int e = 0; e < 16; e++) {
            const Floats w = x[e] * x[e], old = levels[e];
            const Floats lx = sum_lx - w * x[e] * old, ll = sum_ll - w * old * old;
            const Floats moved = nearest(x[e] * ll / lx, -4, 3);
            const Floats new_lx = lx + w * x[e] * moved, new_ll = ll + w * moved * moved;
            const Ints helps = (lx > 0.f) & (moved != old) & (new_ll > 0.f) & (new_lx * new_lx * sum_ll > sum_lx * sum_lx * new_ll);
            levels[e] = pick(helps, moved, old);
            sum_lx = pick(helps, new_lx, sum_lx);
            sum_ll = pick(helps, new_ll, sum_ll);
        }
    }
    const Ints zero = magnitude(end) < SMALLEST;
    put(s.scale + g, pick(zero, Floats{}, ratio(sum_lx, sum_ll)));
    for (int e = 0; e < 16; e++) put(s.level[e] + g, pick(zero, Floats{}, levels[e] + 4.f));
}

// Q6_K's: the best of nineteen divisors. Levels are from 0 on.
inline void fit_searched(Groups<16>& s, int g) {
    Floats x[16], factor = {}, scale = {}, best = {};
    for (int e = 0; e < 16; e++) x[e] = at(s.x[e] + g);
    const Floats end = extreme(x);
    for (int turn = 0; turn < 19; turn++) {
        const int step = turn == 0 ? 0 : turn < 10 ? turn - 10 : turn - 9;
        const Floats divisor = -(32 + .1f * float(step)) / end;
        Floats sum_lx = {}, sum_ll = {};
        for (int e = 0; e < 16; e++) {
            const Floats w = x[e] * x[e], tried = nearest(divisor * x[e], -32, 31);
            sum_lx += w * x[e] * tried;
            sum_ll += w * tried * tried;
        }
        // The first is taken whatever it is.
        const Ints better = turn == 0 ? Ints{} == 0 : (sum_ll > 0.f) & (sum_lx * sum_lx > best * sum_ll);
        factor = pick(better, divisor, factor);
        scale = pick(better, ratio(sum_lx, sum_ll), scale);
        best = pick(better, scale * sum_lx, best);
    }
    const Ints zero = magnitude(end) < SMALLEST;
    put(s.scale + g, pick(zero, Floats{}, scale));
    for (int e = 0; e < 16; e++) put(s.level[e] + g, pick(zero, Floats{}, nearest(factor * x[e], -32, 31) + 32.f));
}

// The levels from 0 on that the rounded scales d * code ask for, of formats without mins.
inline void level_again(Groups<16>& s, float d, int middle) {
    for (int g = 0; g < 16; g += LANES) {
        const Floats step = d * at(s.scale + g);
        for (int e = 0; e < 16; e++) {
            const Floats again = nearest(at(s.x[e] + g) / step, -middle, middle - 1) + float(middle);
            put(s.level[e] + g, pick(step == 0.f, at(s.level[e] + g), again));
        }
    }
}

inline void pack_q3_k(const float* x, uint8_t* to) {
    Groups<16> s(x);
    for (int g = 0; g < 16; g += LANES) fit_swept(s, g);
    const float end = extreme(s.scale, 16), inverse = ratio(-32.f, end);
    const float d = put_half(to + 108, end != 0 ? 1 / inverse : 0);
    for (int g = 0; g < 16; g += LANES) put(s.scale + g, end != 0 ? nearest(inverse * at(s.scale + g), -32, 31) : every(-32));
    level_again(s, d, 4);
    uint8_t q[CHUNK], codes[16];
    s.levels(q);
    for (int g = 0; g < 16; g++) codes[g] = uint8_t(s.scale[g] + 32);
    put_fields(q, 1, 2, 32, to);
    put_quarters(q, 0, to + 32);
    put_paired(codes, 16, 8, to + 96);
    put_fields(codes, 2, 4, 4, to + 104);
}

inline void pack_q6_k(const float* x, uint8_t* to) {
    Groups<16> s(x);
    for (int g = 0; g < 16; g += LANES) fit_searched(s, g);
    const float end = extreme(s.scale, 16);
    if (fabsf(end) < SMALLEST) {
        memset(to, 0, Traits<Q6_K>::bytes);
        return;
    }
    const float inverse = -128 / end, d = put_half(to + 208, 1 / inverse);
    for (int g = 0; g < 16; g += LANES) put(s.scale + g, nearest(inverse * at(s.scale + g), -128, 127));
    level_again(s, d, 32);
    uint8_t q[CHUNK];
    s.levels(q);
    put_paired(q, CHUNK, 64, to);
    put_quarters(q, 4, to + 128);
    for (int g = 0; g < 16; g++) to[192 + g] = uint8_t(int8_t(s.scale[g]));
}

inline void pack_q8_0(const float* x, uint8_t* to) {
    Floats most = {};
    for (int i = 0; i < 32; i += LANES) most = pick(magnitude(at(x + i)) > most, magnitude(at(x + i)), most);
    float lanes[LANES];
    put(lanes, most);
    const float d = greatest(lanes, LANES) / 127, inverse = ratio(1.f, d);
    put_half(to, d);
    for (int i = 0; i < 32; i += LANES) {
        Floats scaled = at(x + i) * inverse;
        scaled = pick(magnitude(scaled) < 128.f, scaled, Floats{});  // the inverse of a denormal number is infinite
        const Ints whole = __builtin_convertvector(scaled, Ints);
        const Floats rest = scaled - __builtin_convertvector(whole, Floats);
        const Ints away = whole - (rest >= .5f) + (rest <= -.5f);  // what holds is -1
        for (int lane = 0; lane < LANES; lane++) to[2 + i + lane] = uint8_t(away[lane]);
    }
}

// Levels of four or five bits of 32 weights: x * inverse + offset, truncated.
template <Format F> inline void put_levels(const float* x, float low, float inverse, float offset, uint8_t* to) {
    uint8_t q[32];
    for (int i = 0; i < 32; i++) q[i] = truncated((x[i] - low) * inverse + offset, (1 << Traits<F>::bits) - 1);
    if constexpr (Traits<F>::bits == 5) {
        for (int byte = 0; byte < 4; byte++) put_fields(q + 8 * byte, 1, 4, 1, to++);
    }
    put_paired(q, 32, 16, to);
}

template <Format F> inline void pack_block(const float* x, uint8_t* to) {
    if constexpr (F == Q3_K) {
        pack_q3_k(x, to);
    } else if constexpr (F == Q6_K) {
        pack_q6_k(x, to);
    } else if constexpr (Traits<F>::whole) {
        Groups<Fit<F>::size> s(x);
        uint8_t q[CHUNK];
        fit_with_mins<Fit<F>>(s, F == Q2_K ? to + 80 : to);
        s.levels(q);
        if constexpr (F == Q2_K) {
            for (int g = 0; g < 16; g++) to[g] = uint8_t(int(s.scale[g]) | int(s.low[g]) << 4);
            put_quarters(q, 0, to + 16);
        } else {
            put_six_bits(s, to + 4);
            if constexpr (F == Q5_K) put_fields(q, 1, 4, 32, to + 16);
            put_paired(q, CHUNK, 32, to + (F == Q5_K ? 48 : 16));
        }
    } else if constexpr (F == Q8_0) {
        pack_q8_0(x, to);
    } else if constexpr (F == Q4_0 || F == Q5_0) {
        const float d = extreme(x, 32) / -middle<F>;
        put_half(to, d);
        put_levels<F>(x, 0, ratio(1.f, d), middle<F> + .5f, to + 2);
    } else {
        // The first of equals, for a zero's sign.
        float low = x[0], high = x[0];
        for (int i = 1; i < 32; i++) {
            low = x[i] < low ? x[i] : low;
            high = x[i] > high ? x[i] : high;
        }
        const float d = (high - low) / float((1 << Traits<F>::bits) - 1);
        put_half(to, d);
        put_half(to + 2, low);
        put_levels<F>(x, low, ratio(1.f, d), .5f, to + 4);
    }
}

template <Format F> inline void pack_blocks(const float* x, int64_t count, uint8_t* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < count; block++) pack_block<F>(x + block * Traits<F>::block, out + block * Traits<F>::bytes);
}

// `count` blocks of a format, but IQ4_NL.
inline void pack(int32_t format, const float* x, int64_t count, uint8_t* out, int threads) {
    switch (format) {
        case Q4_0: return pack_blocks<Q4_0>(x, count, out, threads);
        case Q4_1: return pack_blocks<Q4_1>(x, count, out, threads);
        case Q5_0: return pack_blocks<Q5_0>(x, count, out, threads);
        case Q5_1: return pack_blocks<Q5_1>(x, count, out, threads);
        case Q8_0: return pack_blocks<Q8_0>(x, count, out, threads);
        case Q2_K: return pack_blocks<Q2_K>(x, count, out, threads);
        case Q3_K: return pack_blocks<Q3_K>(x, count, out, threads);
        case Q4_K: return pack_blocks<Q4_K>(x, count, out, threads);
        case Q5_K: return pack_blocks<Q5_K>(x, count, out, threads);
        case Q6_K: return pack_blocks<Q6_K>(x, count, out, threads);
    }
}

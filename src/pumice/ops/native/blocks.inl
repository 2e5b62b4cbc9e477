// All blocks of the language model in one call, for a few new positions: a step of decoding costs its memory's time, not
// that of a hundred calls.

template <class T> inline void keep_as(void* base, const Pages& pages, int64_t at, const float* in, int64_t heads, int64_t width) {
    for (int64_t head = 0; head < heads; head++)
        for (int64_t e = 0; e < width; e += WIDTH)
            store((T*)base + at + head * pages.head_stride + e, load(in + head * width + e));
}

// The new keys or values, one row each of heads x width, to their places in the pages.
inline void keep(void* base, const Pass& p, const float* in, int threads) {
    const int64_t wide = p.kv_heads * p.head_width;
#pragma omp parallel for schedule(static) num_threads(threads) if (p.rows * p.tokens > FEW_QUERIES)
    for (int64_t i = 0; i < p.rows * p.tokens; i++) {
        const int64_t place = p.places[i], row = i / p.tokens;
        const int64_t page = p.pages.table[row * p.pages.row_pages + place / p.pages.page];
        const int64_t at = page * p.pages.page_stride + place % p.pages.page * p.pages.token_stride;
        if (p.pages.type == OF_FLOAT)
            keep_as<float>(base, p.pages, at, in + i * wide, p.kv_heads, p.head_width);
        else if (p.pages.type == OF_HALF)
            keep_as<Half>(base, p.pages, at, in + i * wide, p.kv_heads, p.head_width);
        else
            keep_as<Bfloat>(base, p.pages, at, in + i * wide, p.kv_heads, p.head_width);
    }
}

inline void add_to(float* x, const float* y, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > FEW_QUERIES)
    for (int64_t row = 0; row < rows; row++) {
        int64_t i = row * width;
        for (; i + WIDTH <= (row + 1) * width; i += WIDTH) store(x + i, add(load(x + i), load(y + i)));
        for (; i < (row + 1) * width; i++) x[i] += y[i];
    }
}

inline int64_t furthest(const Pass& p) {
    int64_t most = 0;
    for (int64_t i = 0; i < p.rows * p.tokens; i++) most = p.places[i] >= most ? p.places[i] + 1 : most;
    return most;
}

inline Attention attention_of(const Pass& p, const float* q, float* out) {
    Attention a = {};
    a.q = q;
    a.q_row_stride = p.tokens * p.heads * p.head_width;
    a.q_head_stride = p.head_width;
    a.q_token_stride = p.heads * p.head_width;
    a.pages = p.pages;
    a.places = p.places;
    a.out = out;
    a.rows = p.rows;
    a.tokens = p.tokens;
    a.heads = p.heads;
    a.kv_heads = p.kv_heads;
    a.head_width = p.head_width;
    a.positions = furthest(p);
    a.window = p.window;
    return a;
}

// The memory of one pass, in floats but for the last part.
struct Room {
    int64_t m, inner, shared, widest;
    int64_t normed, q, k, v, mixed, gate, up, scores, rest;

    Room(const Pass& p, int threads) {
        m = p.rows * p.tokens;
        inner = p.heads * p.head_width;
        shared = p.kv_heads * p.head_width;
        widest = p.ffn_width > p.width ? p.ffn_width : p.width;
        widest = inner > widest ? inner : widest;
        normed = 0;
        q = normed + m * p.width;
        k = q + m * inner;
        v = k + m * shared;
        mixed = v + m * shared;
        gate = mixed + m * inner;
        up = gate + m * p.ffn_width;
        scores = up + m * p.ffn_width;
        // The last block may have fewer tokens than the others.
        Attention attention = attention_of(p, nullptr, nullptr);
        const int64_t most = attention_floats(attention, threads);
        attention.tokens = p.kept;
        const int64_t last = attention_floats(attention, threads);
        rest = scores + (last > most ? last : most);
    }
};

inline int64_t blocks_bytes(const Pass& p, int threads) {
    const Room room(p, threads);
    return room.rest * 4 + scratch_bytes(room.m, room.widest, threads);
}

inline Matrix into(Matrix w, float* out) {
    w.out = out;
    w.out_stride = w.rows;
    return w;
}

// What a block works with; of a single row's last block it becomes less on the way.
struct Turn {
    float *x, *normed;
    const float *cosine, *sine;
    Attention attention;

    int64_t m() const { return attention.rows * attention.tokens; }

    // All but the last `kept` tokens of the single row leave.
    void keep_last(int64_t kept, const Pass& p) {
        const int64_t gone = attention.tokens - kept;
        x += gone * p.width;
        normed += gone * p.width;
        cosine += gone * p.head_width;
        sine += gone * p.head_width;
        attention.places += gone;
        attention.tokens = kept;
    }
};

// Queries, keys and values of a block; keys and values go to their pages. Only the last `kept` tokens go on.
inline void project(const Block& block, const Pass& p, const Room& room, int64_t kept, int threads, float* f, Turn& turn) {
    uint8_t* rest = (uint8_t*)(f + room.rest);
    float *q = f + room.q, *k = f + room.k, *v = f + room.v;
    const Matrix all[3] = {into(block.k, k), into(block.v, v), into(block.q, q)};
    const bool fewer = kept < p.tokens;
    matmul(all, fewer ? 2 : 3, turn.normed, p.width, turn.m(), p.width, threads, rest);
    rotate(k, turn.cosine, turn.sine, turn.m(), p.kv_heads, p.head_width, k, threads);
    keep(block.keys, p, k, threads);
    keep(block.values, p, v, threads);
    if (fewer) turn.keep_last(kept, p);
    if (fewer && kept > 0) matmul(all + 2, 1, turn.normed, p.width, turn.m(), p.width, threads, rest);
    rotate(q, turn.cosine, turn.sine, turn.m(), p.heads, p.head_width, q, threads);
}

inline void blocks(const Block* first, int count, const Pass& p, int threads, uint8_t* memory) {
    const Room room(p, threads);
    float *f = (float*)memory, *mixed = f + room.mixed, *gate = f + room.gate, *up = f + room.up;
    uint8_t* rest = (uint8_t*)(f + room.rest);
    Turn turn = {p.x, f + room.normed, p.cosine, p.sine, attention_of(p, f + room.q, mixed)};
    for (const Block* block = first; block < first + count; block++) {
        rms_norm(turn.x, p.width, block->input_norm, p.eps, turn.m(), p.width, turn.normed, threads);
        project(*block, p, room, block == first + count - 1 ? p.kept : p.tokens, threads, f, turn);
        const int64_t m = turn.m();
        if (m == 0) return;
        turn.attention.pages.keys = block->keys;
        turn.attention.pages.values = block->values;
        attention(turn.attention, threads, f + room.scores);
        const Matrix o = into(block->o, turn.normed);
        matmul(&o, 1, mixed, room.inner, m, room.inner, threads, rest);
        add_to(turn.x, turn.normed, m, p.width, threads);
        rms_norm(turn.x, p.width, block->mlp_norm, p.eps, m, p.width, turn.normed, threads);
        const Matrix gate_up[2] = {into(block->gate, gate), into(block->up, up)};
        matmul(gate_up, 2, turn.normed, p.width, m, p.width, threads, rest);
        gated(gate, up, 1, m * p.ffn_width, gate, threads);
        const Matrix down = into(block->down, turn.normed);
        matmul(&down, 1, gate, p.ffn_width, m, p.ffn_width, threads, rest);
        add_to(turn.x, turn.normed, m, p.width, threads);
    }
}

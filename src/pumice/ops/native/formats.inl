// The formats: what the kernels must know of each, and the scales of a chunk of one row.
//
// Included inside the namespace of an instruction set. A chunk is 256 weights, or what is left of a row in blocks of 32.
// Its levels are whole numbers; levels_*.inl reads them, scales.inl what they are multiplied by. Layouts: ggml's dequantize_row_* (ggml-quants.c).

constexpr int CHUNK = 256;

// Panels that meet a tile of activations one after the other, while it is in the first cache (panel.inl).
constexpr int TOGETHER = 2;
// Up to so many rows of activations memory is waited for, and panels are read as streams (panel.inl).
constexpr int STREAMED = 47;
static_assert(TILED_ROWS == 0 || TILED_ROWS == STREAMED + 1, "beside fewer rows tiles of bytes are streamed");
// Panels that streams lead through, one after the other: an odd number (panel.inl), also when it is halved.
constexpr int STREAMED_PANELS = 7;
static_assert((STREAMED_PANELS & (STREAMED_PANELS + 1)) == 0, "all bits are set");
// So many chunks before it is filled in one is called for.
constexpr int CHUNKS_AHEAD = 2;
// As TOGETHER, where activations are tiles of bfloat16, which come from further away (tiles_amx.inl).
constexpr int TILED_TOGETHER = 4;

// Formats with a floating scale for each 32 weights: weight = scale * level + offset.
struct FloatScales {
    alignas(32) float scale[8] = {};
    alignas(32) float offset[8] = {};
};

// K-quants: weight = d * scale * level - dmin * min, with whole scales and mins for each 16 or 32 weights.
struct WholeScales {
    alignas(32) int16_t scale[16] = {};
    alignas(32) int16_t min[16] = {};
    float d = 0, dmin = 0;
};

// What the kernels must know of a format when they are compiled.
//   bits: of a level; 8 means signed levels, stored as they are. sub: weights that share a scale.
template <Format F> struct Traits;
template <> struct Traits<Q4_0> { static constexpr int bits = 4, sub = 32, block = 32, bytes = 18; static constexpr bool whole = false; };
template <> struct Traits<Q4_1> { static constexpr int bits = 4, sub = 32, block = 32, bytes = 20; static constexpr bool whole = false; };
template <> struct Traits<Q5_0> { static constexpr int bits = 5, sub = 32, block = 32, bytes = 22; static constexpr bool whole = false; };
template <> struct Traits<Q5_1> { static constexpr int bits = 5, sub = 32, block = 32, bytes = 24; static constexpr bool whole = false; };
template <> struct Traits<Q8_0> { static constexpr int bits = 8, sub = 32, block = 32, bytes = 34; static constexpr bool whole = false; };
template <> struct Traits<IQ4_NL> { static constexpr int bits = 8, sub = 32, block = 32, bytes = 18; static constexpr bool whole = false; };
template <> struct Traits<Q2_K> { static constexpr int bits = 4, sub = 16, block = 256, bytes = 84; static constexpr bool whole = true; };
template <> struct Traits<Q3_K> { static constexpr int bits = 4, sub = 16, block = 256, bytes = 110; static constexpr bool whole = true; };
template <> struct Traits<Q4_K> { static constexpr int bits = 4, sub = 32, block = 256, bytes = 144; static constexpr bool whole = true; };
template <> struct Traits<Q5_K> { static constexpr int bits = 5, sub = 32, block = 256, bytes = 176; static constexpr bool whole = true; };
template <> struct Traits<Q6_K> { static constexpr int bits = 6, sub = 16, block = 256, bytes = 210; static constexpr bool whole = true; };

inline uint16_t u16_at(const uint8_t* p) {
    uint16_t v;
    memcpy(&v, p, 2);
    return v;
}

inline uint32_t u32_at(const uint8_t* p) {
    uint32_t v;
    memcpy(&v, p, 4);
    return v;
}

// An unsigned level of a format without mins stands for itself less this; signed levels are taken from 128 up.
template <Format F> constexpr int middle = F == Q4_0 ? 8 : F == Q5_0 ? 16 : F == Q8_0 || F == IQ4_NL ? 128 : 0;

// Whether products of levels as they are read need an offset.
template <Format F> constexpr bool has_offsets = F != Q8_0 && F != IQ4_NL;

template <Format F> using Scales = std::conditional_t<Traits<F>::whole, WholeScales, FloatScales>;

template <Format F> constexpr int64_t chunk_bytes(int count) { return int64_t(count / Traits<F>::block) * Traits<F>::bytes; }

// Where the products of a row go: see abi.h.
inline int64_t place_of(const Matrix& w, int64_t row) {
    if (w.head_width == 0) return row;
    const int64_t in_head = row % w.head_width;
    return row - in_head + in_head / 2 + in_head % 2 * (w.head_width / 2);
}

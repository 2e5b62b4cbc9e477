// The C interface of pumice's CPU kernels: plain structs and functions, called from ops/cpu.py through ctypes.
//
// Sizes are counted in elements unless a name says bytes. Nothing here allocates for the caller or keeps a pointer.
#pragma once
#include <cstdint>

#define PUMICE_EXPORT extern "C" __attribute__((visibility("default")))

// ggml's numbers of the formats.
enum Format : int32_t {
    Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14, IQ4_NL = 20,
};

// A weight matrix in blocks as a GGUF file holds it, (rows, columns), and where its products go: out[m * out_stride + place],
// where place is the row. Beside a head_width, rows 2i and 2i + 1 of each head go to places i and i + head_width / 2: to
// where Transformers has what llama.cpp's rotary embedding turns together.
struct Matrix {
    const uint8_t* data;
    int64_t row_bytes;
    int64_t rows;
    float* out;
    int64_t out_stride;
    const float* bias;  // one a place, or null
    int32_t format;
    int32_t head_width;
};

struct Half {
    uint16_t bits;
};
struct Bfloat {
    uint16_t bits;
};
enum KeyType : int32_t { OF_FLOAT = 0, OF_HALF = 1, OF_BFLOAT = 2 };

// Keys and values of one layer in pages: page p of row r begins at element table[r * row_pages + p] * page_stride; in
// it head h of position s lies at h * head_stride + s * token_stride.
struct Pages {
    void* keys;
    void* values;
    const int64_t* table;
    int64_t row_pages, page_stride, page, head_stride, token_stride;
    int32_t type;
};

// Attention of `tokens` new positions of each row over what is in pages. A query sees the positions up to its own,
// `window` of them at most (0: all); without `places` it sees the first `positions`, but where `mask`, rows x tokens x
// positions, is 0. head_width is a multiple of 8. out: rows x tokens x heads x head_width.
struct Attention {
    const float* q;
    int64_t q_row_stride, q_head_stride, q_token_stride;
    Pages pages;
    const int64_t* places;
    const uint8_t* mask;
    float* out;
    int64_t rows, tokens, heads, kv_heads, head_width, positions, window;
};

// A block of the language model: its matrices (where their products go is not read), norms, and its keys and values.
struct Block {
    Matrix q, k, v, o, gate, up, down;
    const float *input_norm, *mlp_norm;
    void *keys, *values;
};

// What all blocks of one pass share. x: rows x tokens x width, replaced by the result; cosine and sine: rows x tokens x
// head_width; places: where each new position stands in its row. The last block gives a result only for the last `kept`
// tokens: all of them, or, of a single row, fewer, since what nobody asks for need only leave keys and values.
struct Pass {
    float* x;
    const float *cosine, *sine;
    const int64_t* places;
    Pages pages;  // of the first block; keys and values are each block's own
    int64_t rows, tokens, kept, heads, kv_heads, head_width, width, ffn_width, window;
    float eps;
};

// How the instruction sets are numbered.
enum Isa : int32_t { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AMX = 3 };

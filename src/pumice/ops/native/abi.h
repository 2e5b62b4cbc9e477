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

// A weight matrix in blocks as a GGUF file holds it, (rows, columns), and where its products go: out[m * out_stride + row].
struct Matrix {
    const uint8_t* data;
    int64_t row_bytes;
    int64_t rows;
    float* out;
    int64_t out_stride;
    const float* bias;  // one a row, or null
    int32_t format;
};

struct Half {
    uint16_t bits;
};
struct Bfloat {
    uint16_t bits;
};
enum KeyType : int32_t { OF_FLOAT = 0, OF_HALF = 1, OF_BFLOAT = 2 };

// Attention of `tokens` new positions of each row over keys and values in pages of `page` positions. Pages are listed
// row after row; in one, head h of position s begins at element h * head_stride + s * token_stride. width is a multiple
// of 8. mask: rows x tokens x positions, not 0 where a query may look, or null. out: rows x tokens x heads x width.
struct Attention {
    const float* q;
    int64_t q_row_stride, q_head_stride, q_token_stride;
    const void* const* keys;
    const void* const* values;
    int64_t page, head_stride, token_stride;
    const uint8_t* mask;
    float* out;
    int64_t rows, tokens, heads, kv_heads, width, positions;
    int32_t type;
};

// How the instruction sets are numbered.
enum Isa : int32_t { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

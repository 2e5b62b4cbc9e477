// What each instruction set provides: see the functions of the same names in the .inl files.
#pragma once
#include "abi.h"

struct Kernels {
    void (*matmul)(const Matrix*, int, const float*, int64_t, int64_t, int64_t, int, uint8_t*);
    int64_t (*scratch_bytes)(int64_t, int64_t, int);
    void (*rms_norm)(const float*, int64_t, const float*, float, int64_t, int64_t, float*, int);
    void (*gated)(const float*, const float*, float, int64_t, float*, int);
    void (*rotate)(const float*, const float*, const float*, int64_t, int64_t, int64_t, float*, int);
    void (*pack)(int32_t, const float*, int64_t, uint8_t*, int);
    void (*attention)(const Attention&, int, float*);
    int64_t (*attention_floats)(const Attention&, int);
    int64_t (*blocks_bytes)(const Pass&, int);
    void (*blocks)(const Block*, int, const Pass&, int, uint8_t*);
};

extern const Kernels PORTABLE_KERNELS;
#ifdef PUMICE_X86
extern const Kernels AVX2_KERNELS, AVX512_KERNELS;
#endif
#ifdef PUMICE_AMX
extern const Kernels AMX_KERNELS;
#endif

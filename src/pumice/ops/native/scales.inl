// Blocks to the scales of a chunk.

// Eight scales and eight mins of six bits, four at a time, from twelve bytes.
inline void six_bit_pairs(const uint8_t* s, int16_t* scale, int16_t* min) {
    const uint32_t low = u32_at(s), middle = u32_at(s + 4), high = u32_at(s + 8);
    const uint32_t four[4] = {
        low & 0x3f3f3f3f,
        (high & 0x0f0f0f0f) | (low >> 2 & 0x30303030),
        middle & 0x3f3f3f3f,
        (high >> 4 & 0x0f0f0f0f) | (middle >> 2 & 0x30303030),
    };
    widen8((const uint8_t*)four, scale);
    widen8((const uint8_t*)(four + 2), min);
}

// Scales of `count` weights from `b` on; count is CHUNK, or less in blocks of 32.
template <Format F> inline void read_scales(const uint8_t* b, int count, FloatScales& s) {
    halves_at(b, Traits<F>::bytes, count / 32, s.scale);
    if constexpr (F == Q4_1 || F == Q5_1) halves_at(b + 2, Traits<F>::bytes, count / 32, s.offset);
    if constexpr (F == Q4_0 || F == Q5_0)
        for (int j = 0; j < 8; j++) s.offset[j] = float(-middle<F>) * s.scale[j];
}

template <Format F> inline void read_scales(const uint8_t* b, int, WholeScales& s) {
    if constexpr (F == Q4_K || F == Q5_K) {
        s.d = half(u16_at(b));
        s.dmin = half(u16_at(b + 2));
        six_bit_pairs(b + 4, s.scale, s.min);
    } else if constexpr (F == Q6_K) {
        s.d = s.dmin = half(u16_at(b + 208));
        for (int j = 0; j < 16; j++) s.scale[j] = int8_t(b[192 + j]);
        for (int j = 0; j < 16; j++) s.min[j] = int16_t(32 * s.scale[j]);
    } else if constexpr (F == Q3_K) {
        s.d = s.dmin = half(u16_at(b + 108));
        for (int j = 0; j < 16; j++) {
            const int low = j < 8 ? b[96 + j] & 15 : b[88 + j] >> 4;
            s.scale[j] = int16_t((low | (b[104 + j % 4] >> (2 * (j / 4)) & 3) << 4) - 32);
        }
        for (int j = 0; j < 16; j++) s.min[j] = int16_t(4 * s.scale[j]);
    } else {
        static_assert(F == Q2_K);
        s.d = half(u16_at(b + 80));
        s.dmin = half(u16_at(b + 82));
        for (int j = 0; j < 16; j++) s.scale[j] = b[j] & 15;
        for (int j = 0; j < 16; j++) s.min[j] = b[j] >> 4;
    }
}

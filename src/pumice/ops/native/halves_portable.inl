// Half precision for any CPU.

inline float half(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7fff;
    uint32_t out;
    if (rest >= 0x7c00)  // infinite, or no number
        out = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    else if (rest >= 0x400)
        out = sign | ((rest << 13) + (112u << 23));
    else {
        const float tiny = float(rest) * 5.9604644775390625e-8f;  // 2^-24
        memcpy(&out, &tiny, 4);
        out |= sign;
    }
    float value;
    memcpy(&value, &out, 4);
    return value;
}

// The nearest half, to even.
inline uint16_t to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (size >= 0x477ff000) return uint16_t(sign | 0x7c00);  // from 65520 on
    if (size < 0x38800000) {                                 // below 2^-14: whole multiples of 2^-24
        const float steps = rintf(fabsf(value) * 16777216.f);
        return uint16_t(sign | uint32_t(steps));
    }
    const uint32_t rounded_up = size + 0xfff + (size >> 13 & 1);
    return uint16_t(sign | ((rounded_up >> 13) - (112u << 10)));
}

inline void halves_at(const uint8_t* b, int stride, int count, float* out) {
    for (int j = 0; j < 8; j++) out[j] = j < count ? half(u16_at(b + j * stride)) : 0;
}

inline void widen8(const uint8_t* in, int16_t* out) {
    for (int j = 0; j < 8; j++) out[j] = in[j];
}

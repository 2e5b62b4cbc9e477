// Eight floats at a time, in plain loops that a compiler makes into vectors.

constexpr int WIDTH = 8;
struct V {
    float lane[WIDTH];
};

template <class Of> inline V each(Of of) {
    V out;
    for (int i = 0; i < WIDTH; i++) out.lane[i] = of(i);
    return out;
}

inline V load(const float* p) { return each([=](int i) { return p[i]; }); }
inline V load(const Half* p) { return each([=](int i) { return half(p[i].bits); }); }
inline V load(const Bfloat* p) {
    return each([=](int i) {
        const uint32_t bits = uint32_t(p[i].bits) << 16;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    });
}
inline void store(float* p, V v) { memcpy(p, v.lane, sizeof v.lane); }
inline void store(Half* p, V v) {
    for (int i = 0; i < WIDTH; i++) p[i].bits = to_half(v.lane[i]);
}
inline void store(Bfloat* p, V v) {
    for (int i = 0; i < WIDTH; i++) {
        uint32_t bits;
        memcpy(&bits, &v.lane[i], 4);
        p[i].bits = v.lane[i] != v.lane[i] ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}
inline V all(float v) { return each([=](int) { return v; }); }
inline V add(V a, V b) { return each([&](int i) { return a.lane[i] + b.lane[i]; }); }
inline V mul(V a, V b) { return each([&](int i) { return a.lane[i] * b.lane[i]; }); }
inline V divide(V a, V b) { return each([&](int i) { return a.lane[i] / b.lane[i]; }); }
inline V fma(V a, V b, V c) { return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; }); }
inline V least(V a, V b) { return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; }); }
inline V most(V a, V b) { return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; }); }
inline V rounded(V a) { return each([&](int i) { return rintf(a.lane[i]); }); }
inline V power_of_two(V a) {
    return each([&](int i) {
        const uint32_t bits = uint32_t(int32_t(a.lane[i]) + 127) << 23;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    });
}
inline float lanes_sum(V v) {
    float sum = 0;
    for (float lane : v.lane) sum += lane;
    return sum;
}

// Eight rows of 32 bytes, as eight times eight groups of four bytes of each row.
inline void transpose8(const uint8_t* in, int stride, uint8_t* out, int out_stride) {
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++) memcpy(out + i * out_stride + 4 * j, in + j * stride + 4 * i, 4);
}

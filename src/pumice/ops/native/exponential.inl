// e^x within 2e-7 of the value for x in [-87, 88]; smaller x give the least normal number's size.
// 2^n e^r with |r| <= ln 2 / 2; e^r by its Taylor series to the seventh power.
inline V exponential(V x) {
    x = most(all(-87), least(all(88), x));
    const V n = rounded(mul(x, all(1.44269504f)));
    V r = fma(n, all(-0.693359375f), x);  // ln 2 in two parts, the first exact in few bits
    r = fma(n, all(2.12194440e-4f), r);
    V y = fma(r, all(1.f / 5040), all(1.f / 720));
    const float rest[] = {1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f};
    for (const float c : rest) y = fma(y, r, all(c));
    return mul(y, power_of_two(n));
}

// What of the weights is wanted next: a chunk of some rows, a step from each other. It is called for while others are
// multiplied, some rows a turn: no CPU foresees so many side by side, and all at once they would wait for each other.
class Wanted {
    const uint8_t* at;
    int64_t step, left, each;

   public:
    Wanted(const uint8_t* first, int64_t step_, int64_t rows, int64_t turns)
        : at(first), step(step_), left(rows), each((rows + turns - 1) / turns) {}

    // Into the second cache: a core waits for few lines that are on their way to its first.
    template <Format F> __attribute__((always_inline)) void some() {
        for (int64_t row = 0; row < each && left > 0; row++, left--, at += step)
            for (int line = 0; line < int(chunk_bytes<F>(CHUNK)); line += 64) __builtin_prefetch(at + line, 0, 2);
    }
};

// Where the next chunk of the same rows lies, or after the last the first chunk of the rows that follow.
template <Format F> const uint8_t* next_chunk(const Matrix& w, int64_t first, int64_t last, int64_t chunk, int64_t chunks) {
    if (chunk + 1 == chunks) return w.data + last * w.row_bytes;
    return w.data + first * w.row_bytes + (chunk + 1) * chunk_bytes<F>(CHUNK);
}

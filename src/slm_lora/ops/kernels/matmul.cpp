// Matrix products in bf16 with fp32 sums, for CPUs with AMX.
//
// Every thread computes rows and columns of its own, and shares nothing: it packs its columns of B
// as the tile registers want them, a part at a time that its second cache holds, and passes over
// its rows of A. Every sum has one order, whatever the number of threads.

#ifdef __AMX_BF16__

#include "scratch.h"
#include "amx.h"
#include "avx512.h"

#include <algorithm>

namespace {

constexpr int64_t SIDE = 32;           // of a block of C, and of a step along the summed dimension
constexpr int64_t WORDS = TILE * TILE;  // of a tile
constexpr int64_t PAIR = 2 * WORDS;    // two tiles: of a step, 32 columns of B or 32 rows of A
constexpr int64_t DEEP = 48;           // steps of a part of B, at most
constexpr int64_t PART = 450 << 10;    // values of a part of B, at most: 0.9 MB

int64_t blocks(int64_t n) { return (n + SIDE - 1) / SIDE; }

// 16 × 16 words, transposed.
void transpose(__m512i x[TILE]) {
    __m512i y[TILE];
    for (int i = 0; i < TILE; i += 4) {
        const __m512i a = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        const __m512i b = _mm512_unpackhi_epi32(x[i], x[i + 1]);
        const __m512i c = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]);
        const __m512i d = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
        y[i] = _mm512_unpacklo_epi64(a, c);
        y[i + 1] = _mm512_unpackhi_epi64(a, c);
        y[i + 2] = _mm512_unpacklo_epi64(b, d);
        y[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    // y[4 r + c] holds, in its quarter q, column 4 q + c of the rows 4 r to 4 r + 3.
    for (int c = 0; c < 4; ++c) {
        const __m512i even_low = _mm512_shuffle_i32x4(y[c], y[c + 4], 0x88);
        const __m512i even_high = _mm512_shuffle_i32x4(y[c + 8], y[c + 12], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(y[c], y[c + 4], 0xdd);
        const __m512i odd_high = _mm512_shuffle_i32x4(y[c + 8], y[c + 12], 0xdd);
        x[c] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        x[c + 4] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        x[c + 8] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        x[c + 12] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
}

__mmask32 first(int64_t many) { return static_cast<__mmask32>((1ull << many) - 1); }

// A matrix in memory, [rows × columns], `row` values from one row to the next.
struct Matrix {
    const bf16* x;
    int64_t row, rows, columns;
    // 32 values from (i, j) on; zeros outside.
    __m512i at(int64_t i, int64_t j) const {
        const bf16* here = x + i * row + j;
        if (i < rows && j + SIDE <= columns) return _mm512_loadu_si512(here);
        const int64_t many = i < rows ? std::clamp<int64_t>(columns - j, 0, SIDE) : 0;
        return _mm512_maskz_loadu_epi16(first(many), here);
    }
};

// From (i, j), 32 rows and columns: pairs of neighbouring rows, [pair][column], as two tiles.
void pair_rows(const Matrix& from, int64_t i, int64_t j, __m512i left[TILE], __m512i right[TILE]) {
    for (int64_t p = 0; p < TILE; ++p) {
        const __m512i even = from.at(i + 2 * p, j), odd = from.at(i + 2 * p + 1, j);
        const auto words = [](__m256i low, __m256i high) {
            return _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                                   _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
        };
        left[p] = words(_mm512_castsi512_si256(even), _mm512_castsi512_si256(odd));
        right[p] = words(_mm512_extracti64x4_epi64(even, 1), _mm512_extracti64x4_epi64(odd, 1));
    }
}

void store(const __m512i x[TILE], uint32_t* out) {
    for (int64_t p = 0; p < TILE; ++p) _mm512_store_si512(out + p * TILE, x[p]);
}

// A step of B, [k × n] or, turned, [n × k]: 32 of the summed dimension from k on, 32 columns from
// j on.
void pack_right(const Matrix& b, bool turned, int64_t k, int64_t j, uint32_t* out) {
    __m512i left[TILE], right[TILE];
    if (turned) {
        for (int64_t c = 0; c < TILE; ++c) left[c] = b.at(j + c, k);
        for (int64_t c = 0; c < TILE; ++c) right[c] = b.at(j + TILE + c, k);
        transpose(left);
        transpose(right);
    } else {
        pair_rows(b, k, j, left, right);
    }
    store(left, out);
    store(right, out + WORDS);
}

// A step of A, [m × k] or, turned, [k × m]: 32 rows from i on, 32 of the summed dimension from k
// on.
void pack_left(const Matrix& a, bool turned, int64_t i, int64_t k, uint32_t* out) {
    if (!turned) {
        for (int64_t r = 0; r < SIDE; ++r) _mm512_store_si512(out + r * TILE, a.at(i + r, k));
        return;
    }
    __m512i upper[TILE], lower[TILE];
    pair_rows(a, k, i, upper, lower);
    transpose(upper);
    transpose(lower);
    store(upper, out);
    store(lower, out + WORDS);
}

// Of this thread.
thread_local Kept kept_right, kept_left, kept_sums;

// Two tiles of A, one below the other, and those of the next step; distances in bytes.
struct Left {
    const char* upper;
    int64_t row, lower, step;
};

// A finished block, on its way to C.
struct Finished {
    const float* sums = nullptr;
    bf16* to = nullptr;
    int64_t row = 0, rows = 0, columns = 0, next = 0;

    void write(int64_t many) {
        // Past the caches where whole lines are written: C is larger, and would be read first.
        const bool whole = columns == SIDE && (reinterpret_cast<uintptr_t>(to) | row * 2) % 64 == 0;
        for (const int64_t end = std::min(rows, next + many); next < end; ++next) {
            const float* from = sums + next * SIDE;
            const auto both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(from + TILE),
                                                           _mm512_load_ps(from));
            if (whole)
                _mm512_stream_si512((__m512i*)(to + next * row), both);
            else
                _mm512_mask_storeu_epi16(to + next * row, first(columns), both);
        }
    }
};

// The block of C in registers += A·B over `steps` steps. Meanwhile another one is written.
void multiply(const Left& a, const uint32_t* b, int64_t steps, Finished& finished) {
    const int64_t rows_a_step = (SIDE + steps - 1) / steps;
    const char* upper = a.upper;
    for (int64_t s = 0; s < steps; ++s, upper += a.step, b += PAIR) {
        // B only passes through the first cache, or it would push A out.
        _tile_stream_loadd(6, b, 64);
        _tile_loadd(4, upper, a.row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_stream_loadd(7, b + WORDS, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, upper + a.lower, a.row);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        finished.write(rows_a_step);
    }
    finished.write(SIDE);
}

void clear_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

constexpr int64_t LINE = SIDE * sizeof(float), BELOW = TILE * SIDE;

void load_sums(const float* c) {
    _tile_loadd(0, c, LINE);
    _tile_loadd(1, c + TILE, LINE);
    _tile_loadd(2, c + BELOW, LINE);
    _tile_loadd(3, c + BELOW + TILE, LINE);
}

void store_sums(float* c) {
    _tile_stored(0, c, LINE);
    _tile_stored(1, c + TILE, LINE);
    _tile_stored(2, c + BELOW, LINE);
    _tile_stored(3, c + BELOW + TILE, LINE);
}

struct Range {
    int64_t first, end;
    int64_t size() const { return end - first; }
};

Range share(int64_t many, int64_t part, int64_t parts) {
    return {many * part / parts, many * (part + 1) / parts};
}

struct Product {
    Matrix a, b;
    bool transpose_a, transpose_b;
    bf16* c;
    int64_t c_row, m, n, k;

    // Blocks of rows and of columns of C.
    void compute(Range rows, Range columns) const {
        if (!rows.size() || !columns.size()) return;
        const int64_t steps = blocks(k), most_steps = std::min(steps, DEEP);
        const int64_t most_columns =
            std::clamp<int64_t>(PART / (most_steps * SIDE * SIDE), 1, columns.size());
        const bool in_parts = most_steps < steps;
        auto* right = kept_right.take<uint32_t>(most_columns * most_steps * PAIR);
        // Sums of all blocks, if they are not finished at once; else of this one and the last.
        auto* sums =
            kept_sums.take<float>((in_parts ? rows.size() * most_columns : 2) * SIDE * SIDE);
        for (int64_t j = columns.first; j < columns.end; j += most_columns) {
            const int64_t many = std::min(most_columns, columns.end - j);
            for (int64_t s = 0; s < steps; s += most_steps) {
                const int64_t deep = std::min(most_steps, steps - s);
                for (int64_t p = 0; p < many * deep; ++p)
                    pack_right(b, transpose_b, (s + p % deep) * SIDE, (j + p / deep) * SIDE,
                               right + p * PAIR);
                for (int64_t i = rows.first; i < rows.end; ++i) {
                    const Left left = rows_of_a(i, s, deep);
                    Finished finished;
                    for (int64_t panel = 0; panel < many; ++panel) {
                        const int64_t place =
                            in_parts ? (i - rows.first) * most_columns + panel : panel % 2;
                        float* own = sums + place * SIDE * SIDE;
                        if (s)
                            load_sums(own);
                        else
                            clear_sums();
                        multiply(left, right + panel * deep * PAIR, deep, finished);
                        store_sums(own);
                        if (s + deep == steps) finished = to_c(own, i, j + panel);
                    }
                    finished.write(SIDE);
                }
            }
        }
        _mm_sfence();
    }

    Finished to_c(const float* sums, int64_t i, int64_t j) const {
        return {sums, c + i * SIDE * c_row + j * SIDE, c_row, std::min(SIDE, m - i * SIDE),
                std::min(SIDE, n - j * SIDE)};
    }

    // From where they are, if they are whole; else packed.
    Left rows_of_a(int64_t i, int64_t s, int64_t deep) const {
        if (!transpose_a && (i + 1) * SIDE <= m && k % SIDE == 0)
            return {reinterpret_cast<const char*>(a.x + i * SIDE * a.row + s * SIDE), a.row * 2,
                    TILE * a.row * 2, SIDE * 2};
        auto* packed = kept_left.take<uint32_t>(deep * PAIR);
        for (int64_t t = 0; t < deep; ++t)
            pack_left(a, transpose_a, i * SIDE, (s + t) * SIDE, packed + t * PAIR);
        return {reinterpret_cast<const char*>(packed), TILE * 4, WORDS * 4, PAIR * 4};
    }
};

}  // namespace

extern "C" {

// C [m × n] = A·B, all bf16, rows in one piece. A is [m × k], or [k × m] with `transpose_a`; B is
// [k × n], or [n × k] with `transpose_b`.
void matrix_product(const bf16* a, int64_t a_row, int transpose_a, const bf16* b, int64_t b_row,
                    int transpose_b, bf16* c, int64_t c_row, int64_t m, int64_t n, int64_t k,
                    int threads) {
    const Product product = {{a, a_row, transpose_a ? k : m, transpose_a ? m : k},
                             {b, b_row, transpose_b ? n : k, transpose_b ? k : n},
                             transpose_a != 0,
                             transpose_b != 0,
                             c,
                             c_row,
                             m,
                             n,
                             k};
    // Threads side by side over the columns, as many as divide the work well.
    int64_t across = 1, least = INT64_MAX;
    for (int64_t each = threads; each >= 1; --each) {
        if (threads % each) continue;
        const int64_t down = threads / each;
        const int64_t most =
            ((blocks(n) + each - 1) / each) * ((blocks(m) + down - 1) / down);
        if (most < least) across = each, least = most;
    }
#pragma omp parallel num_threads(threads)
    {
        const Tiles set_up;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < threads; ++t)
            product.compute(share(blocks(m), t / across, threads / across),
                            share(blocks(n), t % across, across));
    }
}

int has_amx() { return 1; }

}  // extern "C"

#else

#include <cstdint>

extern "C" {

void matrix_product(const void*, int64_t, int, const void*, int64_t, int, void*, int64_t, int64_t,
                    int64_t, int64_t, int) {}

int has_amx() { return 0; }

}  // extern "C"

#endif

// Matrix products in bf16 with fp32 accumulators, for CPUs with AMX.
//
// Each thread computes its own rows and columns of C and shares nothing: it packs its columns of B
// into the layout of the tile registers, in panels that fit its L2 cache, and passes over its rows
// of A. The order of summation does not depend on the number of threads.

#ifdef __AMX_BF16__

#include "scratch.h"
#include "amx.h"
#include "avx512.h"

#include <algorithm>

namespace {

constexpr int64_t BLOCK = 32;  // rows and columns of a block of C; summed values of a step
constexpr int64_t TILE_WORDS = TILE * TILE;
constexpr int64_t STEP_WORDS = 2 * TILE_WORDS;  // of a step: 32 columns of B or 32 rows of A
constexpr int64_t MAX_PANEL_STEPS = 48;
constexpr int64_t MAX_PANEL_VALUES = 450 << 10;  // of a panel of B: 0.9 MB

int64_t blocks(int64_t n) { return (n + BLOCK - 1) / BLOCK; }

// Transposes 16 × 16 words in place.
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
    // Quarter q of y[4 r + c] is column 4 q + c of rows 4 r to 4 r + 3.
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

// Mask of the first `count` of 32 lanes.
__mmask32 first_lanes(int64_t count) { return static_cast<__mmask32>((1ull << count) - 1); }

// A matrix in memory, [rows × columns], with a row stride of `row` values.
struct Matrix {
    const bf16* x;
    int64_t row, rows, columns;
    // 32 values of row i from column j; zeros outside of the matrix.
    __m512i at(int64_t i, int64_t j) const {
        const bf16* address = x + i * row + j;
        if (i < rows && j + BLOCK <= columns) return _mm512_loadu_si512(address);
        const int64_t count = i < rows ? std::clamp<int64_t>(columns - j, 0, BLOCK) : 0;
        return _mm512_maskz_loadu_epi16(first_lanes(count), address);
    }
};

// 32 × 32 values from (i, j) as pairs of neighbouring rows, [pair][column], in two tiles.
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

// Packs a step of B, [k × n] or, with `transposed`, [n × k]: 32 summed values from k, 32 columns
// from j.
void pack_b(const Matrix& b, bool transposed, int64_t k, int64_t j, uint32_t* out) {
    __m512i left[TILE], right[TILE];
    if (transposed) {
        for (int64_t c = 0; c < TILE; ++c) left[c] = b.at(j + c, k);
        for (int64_t c = 0; c < TILE; ++c) right[c] = b.at(j + TILE + c, k);
        transpose(left);
        transpose(right);
    } else {
        pair_rows(b, k, j, left, right);
    }
    store(left, out);
    store(right, out + TILE_WORDS);
}

// Packs a step of A, [m × k] or, with `transposed`, [k × m]: 32 rows from i, 32 summed values
// from k.
void pack_a(const Matrix& a, bool transposed, int64_t i, int64_t k, uint32_t* out) {
    if (!transposed) {
        for (int64_t r = 0; r < BLOCK; ++r) _mm512_store_si512(out + r * TILE, a.at(i + r, k));
        return;
    }
    __m512i upper[TILE], lower[TILE];
    pair_rows(a, k, i, upper, lower);
    transpose(upper);
    transpose(lower);
    store(upper, out);
    store(lower, out + TILE_WORDS);
}

thread_local Scratch b_panel, a_panel, partial_sums;

// Address of two vertically adjacent tiles of A, with byte strides to the next row, to the lower
// tile, and to the next step.
struct ATiles {
    const char* upper;
    int64_t row, lower, step;
};

// A finished block of fp32 sums, converted to bf16 in C while the next one is computed.
struct FinishedBlock {
    const float* sums = nullptr;
    bf16* to = nullptr;
    int64_t row = 0, rows = 0, columns = 0, next = 0;

    void write(int64_t count) {
        // Full cache lines are streamed past the caches, which would read them from memory first.
        const bool full_lines =
            columns == BLOCK && (reinterpret_cast<uintptr_t>(to) | row * 2) % 64 == 0;
        for (const int64_t end = std::min(rows, next + count); next < end; ++next) {
            const float* from = sums + next * BLOCK;
            const auto values = (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(from + TILE),
                                                             _mm512_load_ps(from));
            if (full_lines)
                _mm512_stream_si512((__m512i*)(to + next * row), values);
            else
                _mm512_mask_storeu_epi16(to + next * row, first_lanes(columns), values);
        }
    }
};

// The block of C in the tile registers += A·B over `steps` steps; writes `finished` meanwhile.
void multiply(const ATiles& a, const uint32_t* b, int64_t steps, FinishedBlock& finished) {
    const int64_t rows_per_step = (BLOCK + steps - 1) / steps;
    const char* upper = a.upper;
    for (int64_t s = 0; s < steps; ++s, upper += a.step, b += STEP_WORDS) {
        // Streamed, so that B does not evict A from the L1 cache.
        _tile_stream_loadd(6, b, 64);
        _tile_loadd(4, upper, a.row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_stream_loadd(7, b + TILE_WORDS, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, upper + a.lower, a.row);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        finished.write(rows_per_step);
    }
    finished.write(BLOCK);
}

void clear_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Row stride of a block's sums in bytes, and offset of its lower tiles in floats.
constexpr int64_t SUMS_ROW = BLOCK * sizeof(float), LOWER = TILE * BLOCK;

void load_sums(const float* c) {
    _tile_loadd(0, c, SUMS_ROW);
    _tile_loadd(1, c + TILE, SUMS_ROW);
    _tile_loadd(2, c + LOWER, SUMS_ROW);
    _tile_loadd(3, c + LOWER + TILE, SUMS_ROW);
}

void store_sums(float* c) {
    _tile_stored(0, c, SUMS_ROW);
    _tile_stored(1, c + TILE, SUMS_ROW);
    _tile_stored(2, c + LOWER, SUMS_ROW);
    _tile_stored(3, c + LOWER + TILE, SUMS_ROW);
}

struct Range {
    int64_t first, end;
    int64_t size() const { return end - first; }
};

Range share(int64_t count, int64_t part, int64_t parts) {
    return {count * part / parts, count * (part + 1) / parts};
}

struct Product {
    Matrix a, b;
    bool transpose_a, transpose_b;
    bf16* c;
    int64_t c_row, m, n, k;

    // Computes ranges of row blocks and column blocks of C.
    void compute(Range rows, Range columns) const {
        if (!rows.size() || !columns.size()) return;
        const int64_t steps = blocks(k), max_steps = std::min(steps, MAX_PANEL_STEPS);
        const int64_t max_columns =
            std::clamp<int64_t>(MAX_PANEL_VALUES / (max_steps * BLOCK * BLOCK), 1, columns.size());
        const bool k_is_divided = max_steps < steps;
        auto* packed_b = b_panel.reserve<uint32_t>(max_columns * max_steps * STEP_WORDS);
        // Sums of all blocks if k is divided, else of the current and the previous block.
        auto* sums = partial_sums.reserve<float>((k_is_divided ? rows.size() * max_columns : 2) *
                                                 BLOCK * BLOCK);
        for (int64_t j = columns.first; j < columns.end; j += max_columns) {
            const int64_t panel_columns = std::min(max_columns, columns.end - j);
            for (int64_t s = 0; s < steps; s += max_steps) {
                const int64_t panel_steps = std::min(max_steps, steps - s);
                for (int64_t p = 0; p < panel_columns * panel_steps; ++p)
                    pack_b(b, transpose_b, (s + p % panel_steps) * BLOCK,
                           (j + p / panel_steps) * BLOCK, packed_b + p * STEP_WORDS);
                for (int64_t i = rows.first; i < rows.end; ++i) {
                    const ATiles left = a_tiles(i, s, panel_steps);
                    FinishedBlock finished;
                    for (int64_t column = 0; column < panel_columns; ++column) {
                        const int64_t slot =
                            k_is_divided ? (i - rows.first) * max_columns + column : column % 2;
                        float* block = sums + slot * BLOCK * BLOCK;
                        if (s)
                            load_sums(block);
                        else
                            clear_sums();
                        multiply(left, packed_b + column * panel_steps * STEP_WORDS, panel_steps,
                                 finished);
                        store_sums(block);
                        if (s + panel_steps == steps)
                            finished = finished_block(block, i, j + column);
                    }
                    finished.write(BLOCK);
                }
            }
        }
        _mm_sfence();
    }

    FinishedBlock finished_block(const float* sums, int64_t i, int64_t j) const {
        return {sums, c + i * BLOCK * c_row + j * BLOCK, c_row, std::min(BLOCK, m - i * BLOCK),
                std::min(BLOCK, n - j * BLOCK)};
    }

    // Rows of A in place if they form full tiles, else packed.
    ATiles a_tiles(int64_t i, int64_t s, int64_t panel_steps) const {
        if (!transpose_a && (i + 1) * BLOCK <= m && k % BLOCK == 0)
            return {reinterpret_cast<const char*>(a.x + i * BLOCK * a.row + s * BLOCK), a.row * 2,
                    TILE * a.row * 2, BLOCK * 2};
        auto* packed = a_panel.reserve<uint32_t>(panel_steps * STEP_WORDS);
        for (int64_t t = 0; t < panel_steps; ++t)
            pack_a(a, transpose_a, i * BLOCK, (s + t) * BLOCK, packed + t * STEP_WORDS);
        return {reinterpret_cast<const char*>(packed), TILE * 4, TILE_WORDS * 4, STEP_WORDS * 4};
    }
};

}  // namespace

extern "C" {

// C [m × n] = A·B, all bf16, with contiguous rows and row strides in values. A is [m × k], or
// [k × m] with `transpose_a`; B is [k × n], or [n × k] with `transpose_b`.
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
    // The number of threads along the columns that minimises the largest share of blocks.
    int64_t column_threads = 1, smallest = INT64_MAX;
    for (int64_t across = threads; across >= 1; --across) {
        if (threads % across) continue;
        const int64_t down = threads / across;
        const int64_t largest =
            ((blocks(n) + across - 1) / across) * ((blocks(m) + down - 1) / down);
        if (largest < smallest) column_threads = across, smallest = largest;
    }
#pragma omp parallel num_threads(threads)
    {
        const AmxState amx_state;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < threads; ++t)
            product.compute(share(blocks(m), t / column_threads, threads / column_threads),
                            share(blocks(n), t % column_threads, column_threads));
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

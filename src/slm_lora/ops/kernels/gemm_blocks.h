// Products of blocks that a core's cache holds, and the layouts that they want, for CPUs with
// AVX512-BF16 or AMX.
//
// A product is C[m][n] = sum over k of A[m][k] · B[k][n] in "words": two neighbouring bf16 values
// of the summed dimension, which the instructions multiply at once. A is row by row; a row of B
// holds one pair of the summed dimension for all n. A row is `a_row` words long, and so on;
// `steps` counts words.

#pragma once

#ifdef __AMX_BF16__
#include "amx.h"
#endif
#include "avx512.h"

#include <algorithm>

namespace {

int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

#ifdef __AMX_BF16__

constexpr int64_t BLOCK = 32;       // queries at once
constexpr int64_t UNIT = 32;        // m, n and twice the steps are rounded up to it
constexpr int64_t PAIRS = UNIT / 2;

// C = A·B, or += with ADD. What is read and written is rounded up to `UNIT` in every dimension.
template <bool ADD>
void product(const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_row, int64_t m,
             int64_t n, int64_t steps, float* c, int64_t c_row) {
    for (int64_t j = 0; j < n; j += UNIT)
        for (int64_t i = 0; i < m; i += UNIT) {
            float *upper = c + i * c_row + j, *lower = upper + TILE * c_row;
            if (ADD) {
                _tile_loadd(0, upper, c_row * 4);
                _tile_loadd(1, upper + TILE, c_row * 4);
                _tile_loadd(2, lower, c_row * 4);
                _tile_loadd(3, lower + TILE, c_row * 4);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int64_t k = 0; k < steps; k += PAIRS) {
                const uint32_t *left = a + i * a_row + k, *right = b + k * b_row + j;
                _tile_loadd(4, left, a_row * 4);
                _tile_loadd(6, right, b_row * 4);
                _tile_loadd(7, right + TILE, b_row * 4);
                _tile_loadd(5, left + TILE * a_row, a_row * 4);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, upper, c_row * 4);
            _tile_stored(1, upper + TILE, c_row * 4);
            _tile_stored(2, lower, c_row * 4);
            _tile_stored(3, lower + TILE, c_row * 4);
        }
}

#else

constexpr int64_t BLOCK = 48;            // queries at once: a multiple of the tile's rows, and even
constexpr int64_t UNIT = LANES;          // n is a multiple of it; m and the steps may be any
constexpr int64_t ROWS = 6, VECTORS = 4;  // of the largest tile: 24 sums in registers

struct Tiles {
    Tiles() {}  // (Nothing to be set up.)
};

template <int R, int V, bool ADD>
void tile(const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_row, int64_t steps,
          float* c, int64_t c_row) {
    __m512 sum[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v)
            sum[r][v] = ADD ? _mm512_loadu_ps(c + r * c_row + v * LANES) : _mm512_setzero_ps();
    for (int64_t k = 0; k < steps; ++k) {
        __m512bh right[V];
        for (int v = 0; v < V; ++v)
            right[v] = (__m512bh)_mm512_loadu_si512(b + k * b_row + v * LANES);
        for (int r = 0; r < R; ++r) {
            const auto left = (__m512bh)_mm512_set1_epi32(a[r * a_row + k]);
            for (int v = 0; v < V; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], left, right[v]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) _mm512_storeu_ps(c + r * c_row + v * LANES, sum[r][v]);
}

using Tile = void (*)(const uint32_t*, int64_t, const uint32_t*, int64_t, int64_t, float*, int64_t);

template <int R, bool ADD>
constexpr Tile of_rows[VECTORS] = {tile<R, 1, ADD>, tile<R, 2, ADD>, tile<R, 3, ADD>,
                                   tile<R, 4, ADD>};
template <bool ADD>
constexpr const Tile* tiles[ROWS] = {of_rows<1, ADD>, of_rows<2, ADD>, of_rows<3, ADD>,
                                     of_rows<4, ADD>, of_rows<5, ADD>, of_rows<6, ADD>};

// C = A·B, or += with ADD; n is a multiple of LANES.
template <bool ADD>
void product(const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_row, int64_t m,
             int64_t n, int64_t steps, float* c, int64_t c_row) {
    for (int64_t j = 0; j < n; j += VECTORS * LANES) {
        const int64_t vectors = std::min(VECTORS, (n - j) / LANES);
        for (int64_t i = 0; i < m; i += ROWS) {
            const int64_t rows = std::min(ROWS, m - i);
            tiles<ADD>[rows - 1][vectors - 1](a + i * a_row, a_row, b + j, b_row, steps,
                                              c + i * c_row + j, c_row);
        }
    }
}

#endif

const uint32_t* words(const bf16* x) { return reinterpret_cast<const uint32_t*>(x); }

// A block of bf16 rows, [rows × columns], `row` values from one to the next.
struct Rows {
    const bf16* x;
    int64_t row, rows, columns;
};

__m512i sixteen_steps(int64_t step) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(step)));
}

// Up to 16 of `many`, as a mask.
__mmask16 first(int64_t many) {
    return static_cast<__mmask16>((1u << std::clamp<int64_t>(many, 0, LANES)) - 1);
}

// Pairs along the columns, transposed: out[pair][row], `step` long; zero from the last row to
// the end, and in rows from the last pair to `pairs`.
void transpose_pairs(Rows from, int64_t pairs, uint32_t* out, int64_t step) {
    const __m512i at = sixteen_steps(from.row / 2);
    for (int64_t p = 0; p < pairs; ++p)
        for (int64_t i = 0; i < step; i += LANES) {
            const __mmask16 real = p < from.columns / 2 ? first(from.rows - i) : 0;
            _mm512_storeu_si512(
                out + p * step + i,
                _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), real, at,
                                            words(from.x + i * from.row) + p, 4));
        }
}

// Pairs of neighbouring rows: out[row / 2][column], `step` long; zero where there are no rows or
// columns, up to `pairs` and `step`.
void pair_rows(Rows from, int64_t pairs, uint32_t* out, int64_t step) {
    for (int64_t p = 0; p < pairs; ++p)
        for (int64_t j = 0; j < step; j += LANES) {
            const bf16* low = from.x + 2 * p * from.row + j;
            const auto half = [&](const bf16* x, int64_t row) {
                const bool real = row < from.rows && j < from.columns;
                return real ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x))
                            : _mm512_setzero_si512();
            };
            const __m512i high = _mm512_slli_epi32(half(low + from.row, 2 * p + 1), 16);
            _mm512_storeu_si512(out + p * step + j, _mm512_or_si512(half(low, 2 * p), high));
        }
}

// Pairs along the rows, transposed: out[column][row / 2], BLOCK / 2 long, of a block of at most
// BLOCK rows; zero where there are none.
void transpose_block(Rows from, uint32_t* out) {
    const __m512i at = sixteen_steps(from.row);  // in words: every second row
    const __m512i low = _mm512_set1_epi32(0xffff);
    for (int64_t p = 0; p < from.columns / 2; ++p)
        for (int64_t t = 0; t < BLOCK / 2; t += LANES) {
            const uint32_t* even = words(from.x + 2 * t * from.row) + p;
            const int64_t left = from.rows - 2 * t;
            const __m512i zero = _mm512_setzero_si512();
            const __m512i x =
                _mm512_mask_i32gather_epi32(zero, first((left + 1) / 2), at, even, 4);
            const __m512i y = _mm512_mask_i32gather_epi32(zero, first(left / 2), at,
                                                          even + from.row / 2, 4);
            const __mmask16 inside = first(BLOCK / 2 - t);
            uint32_t* to = out + 2 * p * (BLOCK / 2) + t;
            _mm512_mask_storeu_epi32(
                to, inside,
                _mm512_or_si512(_mm512_and_si512(x, low), _mm512_slli_epi32(y, 16)));
            _mm512_mask_storeu_epi32(
                to + BLOCK / 2, inside,
                _mm512_or_si512(_mm512_srli_epi32(x, 16), _mm512_andnot_si512(low, y)));
        }
}

}  // namespace

// Products of blocks that fit a core's cache, and conversions to their layouts, for CPUs with
// AVX512-BF16 or AMX.
//
// A product is C[m][n] = sum over k of A[m][k] · B[k][n], where a "word" is a pair of neighbouring
// bf16 values of the summed dimension, as the instructions take them. A is row-major; a row of B
// holds one pair of the summed dimension for all n. `a_row`, `b_row` and `c_row` are row strides
// in words (C: in floats); `steps` is the summed dimension in words.

#pragma once

#ifdef __AMX_BF16__
#include "amx.h"
#endif
#include "avx512.h"

#include <algorithm>

namespace {

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

#ifdef __AMX_BF16__

constexpr int64_t QUERY_BLOCK = 32;  // queries per block
constexpr int64_t UNIT = 32;         // m, n and 2 · steps are rounded up to it
constexpr int64_t PAIRS = UNIT / 2;

// C = A·B, or += with ADD. Reads and writes are rounded up to `UNIT` in every dimension.
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

constexpr int64_t QUERY_BLOCK = 48;       // queries per block: even, and a multiple of ROWS
constexpr int64_t UNIT = LANES;           // n is a multiple of it; m and steps are arbitrary
constexpr int64_t ROWS = 6, VECTORS = 4;  // largest tile: 24 accumulators

struct AmxState {
    AmxState() {}  // AVX512 needs no configuration.
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
constexpr Tile row_tiles[VECTORS] = {tile<R, 1, ADD>, tile<R, 2, ADD>, tile<R, 3, ADD>,
                                     tile<R, 4, ADD>};
template <bool ADD>
constexpr const Tile* block_tiles[ROWS] = {row_tiles<1, ADD>, row_tiles<2, ADD>, row_tiles<3, ADD>,
                                           row_tiles<4, ADD>, row_tiles<5, ADD>, row_tiles<6, ADD>};

// C = A·B, or += with ADD; n is a multiple of LANES.
template <bool ADD>
void product(const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_row, int64_t m,
             int64_t n, int64_t steps, float* c, int64_t c_row) {
    for (int64_t j = 0; j < n; j += VECTORS * LANES) {
        const int64_t vectors = std::min(VECTORS, (n - j) / LANES);
        for (int64_t i = 0; i < m; i += ROWS) {
            const int64_t rows = std::min(ROWS, m - i);
            block_tiles<ADD>[rows - 1][vectors - 1](a + i * a_row, a_row, b + j, b_row, steps,
                                                    c + i * c_row + j, c_row);
        }
    }
}

#endif

const uint32_t* as_words(const bf16* x) { return reinterpret_cast<const uint32_t*>(x); }

// A block of bf16 values, [rows × columns], with a row stride of `row` values.
struct Rows {
    const bf16* x;
    int64_t row, rows, columns;
};

__m512i lane_offsets(int64_t step) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(step)));
}

// Mask of the first `count` lanes, clamped to 0 … LANES.
__mmask16 first_lanes(int64_t count) {
    return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, LANES)) - 1);
}

// Pairs along the columns, transposed: out[pair][row], with a row stride of `step` words; padded
// with zeros to `pairs` × `step`.
void transpose_pairs(Rows from, int64_t pairs, uint32_t* out, int64_t step) {
    const __m512i offsets = lane_offsets(from.row / 2);
    for (int64_t p = 0; p < pairs; ++p)
        for (int64_t i = 0; i < step; i += LANES) {
            const __mmask16 valid = p < from.columns / 2 ? first_lanes(from.rows - i) : 0;
            _mm512_storeu_si512(
                out + p * step + i,
                _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), valid, offsets,
                                            as_words(from.x + i * from.row) + p, 4));
        }
}

// Pairs of neighbouring rows: out[row / 2][column], with a row stride of `step` words; padded
// with zeros to `pairs` × `step`.
void pair_rows(Rows from, int64_t pairs, uint32_t* out, int64_t step) {
    for (int64_t p = 0; p < pairs; ++p)
        for (int64_t j = 0; j < step; j += LANES) {
            const bf16* low = from.x + 2 * p * from.row + j;
            const auto load_row = [&](const bf16* x, int64_t row) {
                const bool valid = row < from.rows && j < from.columns;
                return valid ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x))
                            : _mm512_setzero_si512();
            };
            const __m512i high = _mm512_slli_epi32(load_row(low + from.row, 2 * p + 1), 16);
            _mm512_storeu_si512(out + p * step + j, _mm512_or_si512(load_row(low, 2 * p), high));
        }
}

// Pairs of rows, transposed, of a block of at most QUERY_BLOCK rows: out[column][row / 2], with a
// row stride of QUERY_BLOCK / 2 words; padded with zeros.
void transpose_block(Rows from, uint32_t* out) {
    const __m512i offsets = lane_offsets(from.row);  // in words: a stride of two rows
    const __m512i low = _mm512_set1_epi32(0xffff);
    for (int64_t p = 0; p < from.columns / 2; ++p)
        for (int64_t t = 0; t < QUERY_BLOCK / 2; t += LANES) {
            const uint32_t* even = as_words(from.x + 2 * t * from.row) + p;
            const int64_t remaining = from.rows - 2 * t;
            const __m512i zero = _mm512_setzero_si512();
            const __m512i x = _mm512_mask_i32gather_epi32(zero, first_lanes((remaining + 1) / 2),
                                                          offsets, even, 4);
            const __m512i y = _mm512_mask_i32gather_epi32(zero, first_lanes(remaining / 2), offsets,
                                                          even + from.row / 2, 4);
            const __mmask16 valid = first_lanes(QUERY_BLOCK / 2 - t);
            uint32_t* target = out + 2 * p * (QUERY_BLOCK / 2) + t;
            _mm512_mask_storeu_epi32(
                target, valid,
                _mm512_or_si512(_mm512_and_si512(x, low), _mm512_slli_epi32(y, 16)));
            _mm512_mask_storeu_epi32(
                target + QUERY_BLOCK / 2, valid,
                _mm512_or_si512(_mm512_srli_epi32(x, 16), _mm512_andnot_si512(low, y)));
        }
}

}  // namespace

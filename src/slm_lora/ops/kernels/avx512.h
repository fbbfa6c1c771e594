// AVX512 vectors of bf16 and fp32.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>

namespace {

using bf16 = uint16_t;

constexpr int64_t LANES = 16;  // fp32 values per vector

inline void store_bf16(__m512 x, bf16* out) {
    _mm256_storeu_si256((__m256i*)out, (__m256i)_mm512_cvtneps_pbh(x));
}

inline __m512 to_fp32(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

inline __m512 load_fp32(const bf16* x) { return to_fp32(_mm256_loadu_si256((const __m256i*)x)); }

// exp to about two units in the last place: 2^n times a Taylor polynomial of degree 6 on
// [-ln 2 / 2, ln 2 / 2], where the next term is below 2e-7. NaN is propagated: max returns its
// second operand if either is NaN.
inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-100.0f), x);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);  // ln 2 as a sum of two floats
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 y = _mm512_set1_ps(1.0f / 720);
    for (float coefficient : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(coefficient));
    return _mm512_scalef_ps(y, n);
}

}  // namespace

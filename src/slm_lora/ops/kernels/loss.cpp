// Negative log-likelihood of labels and its gradient, from bf16 logits, for CPUs with AVX512-BF16.
//
// A row of logits lies in a core's cache while it is passed over: for its largest value, for the
// sum of exponentials, and, where the gradient is wanted, once more to put that in its place.

#include "avx512.h"

namespace {

// The last vector of a row may be shorter: what lies beyond reads as `beyond`.
__mmask16 inside(int64_t left) {
    return static_cast<__mmask16>(left >= LANES ? 0xffff : (1u << left) - 1);
}

__m512 loaded(const bf16* x, __mmask16 real, float beyond) {
    return _mm512_mask_mov_ps(_mm512_set1_ps(beyond), real,
                              widened(_mm256_maskz_loadu_epi16(real, x)));
}

float log_of_sum(const bf16* row, int64_t vocabulary) {
    __m512 largest = _mm512_set1_ps(-INFINITY);
    for (int64_t j = 0; j < vocabulary; j += LANES)
        largest = _mm512_max_ps(largest, loaded(row + j, inside(vocabulary - j), -INFINITY));
    const float most = _mm512_reduce_max_ps(largest);
    __m512 total = _mm512_setzero_ps();
    for (int64_t j = 0; j < vocabulary; j += LANES) {
        const __mmask16 real = inside(vocabulary - j);
        const __m512 x = _mm512_sub_ps(loaded(row + j, real, 0), _mm512_set1_ps(most));
        total = _mm512_add_ps(total, _mm512_maskz_mov_ps(real, exponential(x)));
    }
    return most + std::log(_mm512_reduce_add_ps(total));
}

float as_float(bf16 x) { return _mm512_cvtss_f32(widened(_mm256_set1_epi16(x))); }

}  // namespace

extern "C" {

// logits: bf16 [positions, vocabulary]; labels: [positions]; nll: fp32 [positions]. With `replace`
// the logits become the gradient of the sum of the nll: softmax minus one-hot.
void negative_log_likelihood(bf16* logits, const int64_t* labels, float* nll, int64_t positions,
                             int64_t vocabulary, int replace, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < positions; ++i) {
        bf16* row = logits + i * vocabulary;
        const float total = log_of_sum(row, vocabulary);
        nll[i] = total - as_float(row[labels[i]]);
        if (!replace) continue;
        const float own = std::exp(-nll[i]) - 1;
        for (int64_t j = 0; j < vocabulary; j += LANES) {
            const __mmask16 real = inside(vocabulary - j);
            const __m512 x = _mm512_sub_ps(loaded(row + j, real, 0), _mm512_set1_ps(total));
            _mm256_mask_storeu_epi16(row + j, real, (__m256i)_mm512_cvtneps_pbh(exponential(x)));
        }
        row[labels[i]] =
            _mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set1_ps(own)), 0);
    }
}

}  // extern "C"

// Negative log-likelihood of labels and its gradient, from bf16 logits, for CPUs with AVX512-BF16.
//
// A row of logits stays in a core's cache for its passes: maximum, sum of exponentials, and
// optionally the gradient, which replaces the logits.

#include "avx512.h"

namespace {

// Mask of the values in a row's last vector, which may be partial.
__mmask16 valid_lanes(int64_t remaining) {
    return static_cast<__mmask16>(remaining >= LANES ? 0xffff : (1u << remaining) - 1);
}

__m512 load_logits(const bf16* x, __mmask16 valid, float fill) {
    return _mm512_mask_mov_ps(_mm512_set1_ps(fill), valid,
                              to_fp32(_mm256_maskz_loadu_epi16(valid, x)));
}

float log_sum_exp(const bf16* row, int64_t vocab_size) {
    __m512 maxima = _mm512_set1_ps(-INFINITY);
    for (int64_t j = 0; j < vocab_size; j += LANES) {
        const __mmask16 valid = valid_lanes(vocab_size - j);
        maxima = _mm512_max_ps(maxima, load_logits(row + j, valid, -INFINITY));
    }
    const float maximum = _mm512_reduce_max_ps(maxima);
    __m512 total = _mm512_setzero_ps();
    for (int64_t j = 0; j < vocab_size; j += LANES) {
        const __mmask16 valid = valid_lanes(vocab_size - j);
        const __m512 x = _mm512_sub_ps(load_logits(row + j, valid, 0), _mm512_set1_ps(maximum));
        total = _mm512_add_ps(total, _mm512_maskz_mov_ps(valid, exponential(x)));
    }
    return maximum + std::log(_mm512_reduce_add_ps(total));
}

float to_float(bf16 x) { return _mm512_cvtss_f32(to_fp32(_mm256_set1_epi16(x))); }

}  // namespace

extern "C" {

// logits: bf16 [positions, vocab_size]; labels: [positions]; nll: fp32 [positions], in nats. With
// `write_gradient` the gradient of the sum of nll, softmax minus one-hot, replaces the logits.
void negative_log_likelihood(bf16* logits, const int64_t* labels, float* nll, int64_t positions,
                             int64_t vocab_size, int write_gradient, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < positions; ++i) {
        bf16* row = logits + i * vocab_size;
        const float logsumexp = log_sum_exp(row, vocab_size);
        nll[i] = logsumexp - to_float(row[labels[i]]);
        if (!write_gradient) continue;
        const float label_gradient = std::exp(-nll[i]) - 1;
        for (int64_t j = 0; j < vocab_size; j += LANES) {
            const __mmask16 valid = valid_lanes(vocab_size - j);
            const __m512 x =
                _mm512_sub_ps(load_logits(row + j, valid, 0), _mm512_set1_ps(logsumexp));
            _mm256_mask_storeu_epi16(row + j, valid, (__m256i)_mm512_cvtneps_pbh(exponential(x)));
        }
        row[labels[i]] =
            _mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set1_ps(label_gradient)), 0);
    }
}

}  // extern "C"

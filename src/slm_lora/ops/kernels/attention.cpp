// Causal attention over packed documents, for CPUs with AVX512-BF16 or AMX.
//
// Computes the same as attention_bmm.py, with padding only to full tiles, and with scores that stay
// in the cache for one block of queries. A task is one document and one key-value head, so tasks
// write to disjoint memory, and results do not depend on the number of threads. Products are bf16
// with fp32 accumulators, softmax is fp32.

#include "gemm_blocks.h"
#include "scratch.h"

#include <algorithm>
#include <vector>

namespace {

// Mask of the 16 keys from `key`: those up to `last`, which the causal mask admits.
__mmask16 visible_keys(int64_t key, int64_t last) { return first_lanes(last + 1 - key); }

struct Shape {
    int64_t heads, kv_heads, head_dim;  // head_dim: a multiple of LANES
    float scale;
    int64_t group() const { return heads / kv_heads; }
    int64_t query_row() const { return heads * head_dim; }
    int64_t key_row() const { return kv_heads * head_dim; }
    int64_t padded_head_dim() const { return round_up(head_dim, UNIT); }
};

struct Tensors {  // of one document and one key-value head
    const bf16 *q, *k, *v;
    int64_t length;
};

// Scratch memory of a thread, reused between tasks.
struct Buffers {
    Scratch k_transposed, v_transposed, k_pairs, v_pairs, p_pairs, ds_pairs, q_transposed,
        upstream_transposed;
    Scratch scores, dp, sums, dk, dv;
    Scratch q, upstream, weights;
};
thread_local Buffers buffers;

// Copies a block of queries, padded with zeros to QUERY_BLOCK rows and `padded_head_dim` columns.
const uint32_t* copy_block(Rows from, int64_t padded_head_dim, Scratch& scratch) {
    bf16* out = scratch.reserve<bf16>(QUERY_BLOCK * padded_head_dim);
    for (int64_t i = 0; i < QUERY_BLOCK; ++i)
        for (int64_t j = 0; j < padded_head_dim; j += LANES) {
            const bool valid = i < from.rows && j < from.columns;
            const auto x = (const __m256i*)(from.x + i * from.row + j);
            _mm256_storeu_si256((__m256i*)(out + i * padded_head_dim + j),
                                valid ? _mm256_loadu_si256(x) : _mm256_setzero_si256());
        }
    return as_words(out);
}

void forward_task(const Shape& s, Tensors x, bf16* out, float* logsumexp) {
    const int64_t keys = round_up(x.length, UNIT), padded = s.padded_head_dim();
    const Rows k = {x.k, s.key_row(), x.length, s.head_dim};
    const Rows v = {x.v, s.key_row(), x.length, s.head_dim};
    uint32_t* k_transposed = buffers.k_transposed.reserve<uint32_t>(padded / 2 * keys);
    uint32_t* v_pairs = buffers.v_pairs.reserve<uint32_t>(keys / 2 * padded);
    float* scores = buffers.scores.reserve<float>(QUERY_BLOCK * keys);
    float* sums = buffers.sums.reserve<float>(QUERY_BLOCK * padded);
    bf16* weights = buffers.weights.reserve<bf16>(QUERY_BLOCK * keys);
    float factor[QUERY_BLOCK];
    transpose_pairs(k, padded / 2, k_transposed, keys);
    pair_rows(v, keys / 2, v_pairs, padded);
    for (int64_t h = 0; h < s.group(); ++h)
        for (int64_t start = 0; start < x.length; start += QUERY_BLOCK) {
            const int64_t stop = std::min(start + QUERY_BLOCK, x.length), rows = stop - start;
            const int64_t columns = round_up(stop, UNIT);
            const bf16* head_q = x.q + h * s.head_dim + start * s.query_row();
            const uint32_t* q =
                copy_block({head_q, s.query_row(), rows, s.head_dim}, padded, buffers.q);
            product<false>(q, padded / 2, k_transposed, keys, rows, columns, padded / 2, scores,
                           keys);
            for (int64_t i = 0; i < rows; ++i) {
                float* row = scores + i * keys;
                __m512 maxima = _mm512_set1_ps(-INFINITY);
                for (int64_t j = 0; j <= start + i; j += LANES)
                    maxima = _mm512_mask_max_ps(maxima, visible_keys(j, start + i), maxima,
                                                _mm512_loadu_ps(row + j));
                const float maximum = _mm512_reduce_max_ps(maxima) * s.scale;
                __m512 total = _mm512_setzero_ps();
                for (int64_t j = 0; j < columns; j += LANES) {
                    const __m512 shifted = _mm512_fmsub_ps(
                        _mm512_loadu_ps(row + j), _mm512_set1_ps(s.scale), _mm512_set1_ps(maximum));
                    const __m512 p =
                        _mm512_maskz_mov_ps(visible_keys(j, start + i), exponential(shifted));
                    total = _mm512_add_ps(total, p);
                    store_bf16(p, weights + i * keys + j);
                }
                const float sum = _mm512_reduce_add_ps(total);
                factor[i] = 1 / sum;
                logsumexp[(start + i) * s.heads + h] = maximum + std::log(sum);
            }
            product<false>(as_words(weights), keys / 2, v_pairs, padded, rows, padded, columns / 2,
                           sums, padded);
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t j = 0; j < s.head_dim; j += LANES)
                    store_bf16(_mm512_mul_ps(_mm512_loadu_ps(sums + i * padded + j),
                                             _mm512_set1_ps(factor[i])),
                               out + h * s.head_dim + (start + i) * s.query_row() + j);
        }
}

struct Gradients {  // of one document and one key-value head
    const bf16 *out, *upstream;
    const float* logsumexp;
    bf16 *q, *k, *v;
};

// bf16 rows [length × head_dim] from fp32 columns [head_dim][length] with a row stride of `step`.
void store_transposed(const float* x, int64_t step, int64_t length, int64_t head_dim, bf16* out,
                      int64_t out_row) {
    const __m512i offsets = lane_offsets(step);
    for (int64_t j = 0; j < head_dim; j += LANES)
        for (int64_t i = 0; i < length; ++i)
            store_bf16(_mm512_i32gather_ps(offsets, x + j * step + i, 4), out + i * out_row + j);
}

void backward_task(const Shape& s, Tensors x, Gradients g) {
    const int64_t keys = round_up(x.length, UNIT), head_dim = s.head_dim;
    const int64_t padded = s.padded_head_dim();
    const Rows k = {x.k, s.key_row(), x.length, head_dim};
    const Rows v = {x.v, s.key_row(), x.length, head_dim};
    uint32_t* k_transposed = buffers.k_transposed.reserve<uint32_t>(padded / 2 * keys);
    uint32_t* v_transposed = buffers.v_transposed.reserve<uint32_t>(padded / 2 * keys);
    uint32_t* k_pairs = buffers.k_pairs.reserve<uint32_t>(keys / 2 * padded);
    uint32_t* p_pairs = buffers.p_pairs.reserve<uint32_t>(QUERY_BLOCK / 2 * keys);
    uint32_t* ds_pairs = buffers.ds_pairs.reserve<uint32_t>(QUERY_BLOCK / 2 * keys);
    uint32_t* q_transposed = buffers.q_transposed.reserve<uint32_t>(padded * QUERY_BLOCK / 2);
    uint32_t* upstream_transposed =
        buffers.upstream_transposed.reserve<uint32_t>(padded * QUERY_BLOCK / 2);
    float* scores = buffers.scores.reserve<float>(QUERY_BLOCK * keys);
    float* dp = buffers.dp.reserve<float>(QUERY_BLOCK * keys);
    float* dk = buffers.dk.reserve<float>(padded * keys);
    float* dv = buffers.dv.reserve<float>(padded * keys);
    float* dq = buffers.sums.reserve<float>(QUERY_BLOCK * padded);
    bf16* ds = buffers.weights.reserve<bf16>(QUERY_BLOCK * keys);
    std::fill(dk, dk + padded * keys, 0.0f);
    std::fill(dv, dv + padded * keys, 0.0f);
    transpose_pairs(k, padded / 2, k_transposed, keys);
    transpose_pairs(v, padded / 2, v_transposed, keys);
    pair_rows(k, keys / 2, k_pairs, padded);
    for (int64_t h = 0; h < s.group(); ++h)
        for (int64_t start = 0; start < x.length; start += QUERY_BLOCK) {
            const int64_t stop = std::min(start + QUERY_BLOCK, x.length), rows = stop - start;
            const int64_t columns = round_up(stop, UNIT);
            const int64_t offset = h * head_dim + start * s.query_row();
            const Rows head_q = {x.q + offset, s.query_row(), rows, head_dim};
            const Rows head_upstream = {g.upstream + offset, s.query_row(), rows, head_dim};
            const uint32_t* q = copy_block(head_q, padded, buffers.q);
            const uint32_t* upstream = copy_block(head_upstream, padded, buffers.upstream);
            product<false>(q, padded / 2, k_transposed, keys, rows, columns, padded / 2, scores,
                           keys);
            product<false>(upstream, padded / 2, v_transposed, keys, rows, columns, padded / 2, dp,
                           keys);
            for (int64_t i = 0; i < QUERY_BLOCK; i += 2) {
                float row_logsumexp[2] = {}, delta[2] = {};
                const int64_t n_valid = std::clamp<int64_t>(rows - i, 0, 2);
                for (int64_t r = 0; r < n_valid; ++r) {
                    row_logsumexp[r] = g.logsumexp[(start + i + r) * s.heads + h];
                    const int64_t row = offset + (i + r) * s.query_row();
                    __m512 sum = _mm512_setzero_ps();
                    for (int64_t j = 0; j < head_dim; j += LANES)
                        sum = _mm512_fmadd_ps(load_fp32(g.out + row + j),
                                              load_fp32(g.upstream + row + j), sum);
                    delta[r] = _mm512_reduce_add_ps(sum);
                }
                for (int64_t j = 0; j < columns; j += LANES) {
                    __m512i p_words = _mm512_setzero_si512(), ds_words = _mm512_setzero_si512();
                    for (int64_t r = 0; r < n_valid; ++r) {
                        const int64_t index = (i + r) * keys + j;
                        const __m512 p = _mm512_maskz_mov_ps(
                            visible_keys(j, start + i + r),
                            exponential(_mm512_fmsub_ps(_mm512_loadu_ps(scores + index),
                                                        _mm512_set1_ps(s.scale),
                                                        _mm512_set1_ps(row_logsumexp[r]))));
                        const __m512 gradient =
                            _mm512_mul_ps(_mm512_mul_ps(p, _mm512_set1_ps(s.scale)),
                                          _mm512_sub_ps(_mm512_loadu_ps(dp + index),
                                                        _mm512_set1_ps(delta[r])));
                        const auto p_low = (__m256i)_mm512_cvtneps_pbh(p);
                        const auto ds_low = (__m256i)_mm512_cvtneps_pbh(gradient);
                        _mm256_storeu_si256((__m256i*)(ds + index), ds_low);
                        const unsigned shift_bits = r * 16;
                        p_words = _mm512_or_si512(
                            p_words, _mm512_slli_epi32(_mm512_cvtepu16_epi32(p_low), shift_bits));
                        ds_words = _mm512_or_si512(
                            ds_words, _mm512_slli_epi32(_mm512_cvtepu16_epi32(ds_low), shift_bits));
                    }
                    _mm512_storeu_si512(p_pairs + i / 2 * keys + j, p_words);
                    _mm512_storeu_si512(ds_pairs + i / 2 * keys + j, ds_words);
                }
            }
            product<false>(as_words(ds), keys / 2, k_pairs, padded, rows, padded, columns / 2, dq,
                           padded);
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t j = 0; j < head_dim; j += LANES)
                    store_bf16(_mm512_loadu_ps(dq + i * padded + j),
                               g.q + offset + i * s.query_row() + j);
            transpose_block(head_q, q_transposed);
            transpose_block(head_upstream, upstream_transposed);
            product<true>(q_transposed, QUERY_BLOCK / 2, ds_pairs, keys, head_dim, columns,
                          (rows + 1) / 2, dk, keys);
            product<true>(upstream_transposed, QUERY_BLOCK / 2, p_pairs, keys, head_dim, columns,
                          (rows + 1) / 2, dv, keys);
        }
    store_transposed(dk, keys, x.length, head_dim, g.k, s.key_row());
    store_transposed(dv, keys, x.length, head_dim, g.v, s.key_row());
}

// Runs `work` for all documents and key-value heads in parallel, longest documents first.
template <class Work>
void run_tasks(const int64_t* lengths, int64_t documents, int64_t kv_heads, int threads,
               Work work) {
    struct Task {
        int64_t start, length, head;
    };
    std::vector<Task> tasks;
    for (int64_t d = 0, start = 0; d < documents; start += lengths[d++])
        for (int64_t head = 0; head < kv_heads && lengths[d]; ++head)
            tasks.push_back({start, lengths[d], head});
    std::stable_sort(tasks.begin(), tasks.end(),
                     [](const Task& a, const Task& b) { return a.length > b.length; });
#pragma omp parallel num_threads(threads)
    {
        const AmxState amx_state;
#pragma omp for schedule(dynamic)
        for (std::size_t t = 0; t < tasks.size(); ++t)
            work(tasks[t].start, tasks[t].length, tasks[t].head);
    }
}

}  // namespace

extern "C" {

// q, out: bf16 [tokens, heads, head_dim]; k, v: bf16 [tokens, kv_heads, head_dim]; logsumexp: fp32
// [tokens, heads]; all contiguous. The sum of the documents' `lengths`, which may be 0, is tokens.
void attention_forward(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* logsumexp,
                       const int64_t* lengths, int64_t documents, int64_t heads, int64_t kv_heads,
                       int64_t head_dim, float scale, int threads) {
    const Shape s{heads, kv_heads, head_dim, scale};
    run_tasks(lengths, documents, kv_heads, threads,
              [&](int64_t start, int64_t length, int64_t head) {
                  const int64_t offset = start * s.query_row() + head * s.group() * head_dim;
                  const int64_t key_offset = start * s.key_row() + head * head_dim;
                  forward_task(s, {q + offset, k + key_offset, v + key_offset, length},
                               out + offset, logsumexp + start * heads + head * s.group());
              });
}

// Gradients dq, dk, dv of `attention_forward`, from `upstream`, the gradient of its output.
void attention_backward(const bf16* upstream, const bf16* q, const bf16* k, const bf16* v,
                        const bf16* out, const float* logsumexp, bf16* dq, bf16* dk, bf16* dv,
                        const int64_t* lengths, int64_t documents, int64_t heads,
                        int64_t kv_heads, int64_t head_dim, float scale, int threads) {
    const Shape s{heads, kv_heads, head_dim, scale};
    run_tasks(lengths, documents, kv_heads, threads,
              [&](int64_t start, int64_t length, int64_t head) {
                  const int64_t offset = start * s.query_row() + head * s.group() * head_dim;
                  const int64_t key_offset = start * s.key_row() + head * head_dim;
                  backward_task(s, {q + offset, k + key_offset, v + key_offset, length},
                                {out + offset, upstream + offset,
                                 logsumexp + start * heads + head * s.group(), dq + offset,
                                 dk + key_offset, dv + key_offset});
              });
}

}  // extern "C"

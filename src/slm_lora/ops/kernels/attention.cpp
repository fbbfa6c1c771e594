// Causal attention over packed documents, for CPUs with AVX512-BF16 or AMX.
//
// The same as the batched products in products.py, with no padding outside of a tile and nothing
// written to memory but results: scores of a block of queries stay in the cache. One task is a
// document and a key-value head, so no two write to the same place, and results do not depend on
// the number of threads. Products are bf16 with fp32 sums, softmax is fp32.

#include "gemm_blocks.h"
#include "scratch.h"

#include <algorithm>
#include <vector>

namespace {

// Of 16 keys from `key` on, those at or before `last`.
__mmask16 seen(int64_t key, int64_t last) { return first(last + 1 - key); }

struct Shape {
    int64_t heads, kv_heads, width;  // width: of a head, a multiple of LANES
    float scale;
    int64_t group() const { return heads / kv_heads; }
    int64_t query_row() const { return heads * width; }
    int64_t key_row() const { return kv_heads * width; }
    int64_t padded_width() const { return rounded_up(width, UNIT); }
};

struct Tensors {  // of one document and one key-value head
    const bf16 *q, *k, *v;
    int64_t length;
};

// Of a thread, from task to task.
struct Room {
    Kept k_transposed, v_transposed, k_pairs, v_pairs, p_pairs, ds_pairs, q_transposed,
        upstream_transposed;
    Kept scores, dp, sums, dk, dv;
    Kept q, upstream, weights;
};
thread_local Room room;

// A block of queries of BLOCK rows and the padded width: zeros where there are none.
const uint32_t* copied(Rows from, int64_t padded_width, Kept& kept) {
    bf16* out = kept.take<bf16>(BLOCK * padded_width);
    for (int64_t i = 0; i < BLOCK; ++i)
        for (int64_t j = 0; j < padded_width; j += LANES) {
            const bool real = i < from.rows && j < from.columns;
            const auto x = (const __m256i*)(from.x + i * from.row + j);
            _mm256_storeu_si256((__m256i*)(out + i * padded_width + j),
                                real ? _mm256_loadu_si256(x) : _mm256_setzero_si256());
        }
    return words(out);
}

void forward_task(const Shape& s, Tensors x, bf16* out, float* log_total) {
    const int64_t keys = rounded_up(x.length, UNIT), padded = s.padded_width();
    const Rows k = {x.k, s.key_row(), x.length, s.width}, v = {x.v, s.key_row(), x.length, s.width};
    uint32_t* k_transposed = room.k_transposed.take<uint32_t>(padded / 2 * keys);
    uint32_t* v_pairs = room.v_pairs.take<uint32_t>(keys / 2 * padded);
    float* scores = room.scores.take<float>(BLOCK * keys);
    float* sums = room.sums.take<float>(BLOCK * padded);
    bf16* weights = room.weights.take<bf16>(BLOCK * keys);
    float factor[BLOCK];
    transpose_pairs(k, padded / 2, k_transposed, keys);
    pair_rows(v, keys / 2, v_pairs, padded);
    for (int64_t h = 0; h < s.group(); ++h)
        for (int64_t start = 0; start < x.length; start += BLOCK) {
            const int64_t stop = std::min(start + BLOCK, x.length), rows = stop - start;
            const int64_t columns = rounded_up(stop, UNIT);
            const bf16* own = x.q + h * s.width + start * s.query_row();
            const uint32_t* q = copied({own, s.query_row(), rows, s.width}, padded, room.q);
            product<false>(q, padded / 2, k_transposed, keys, rows, columns, padded / 2, scores,
                           keys);
            for (int64_t i = 0; i < rows; ++i) {
                float* row = scores + i * keys;
                __m512 largest = _mm512_set1_ps(-INFINITY);
                for (int64_t j = 0; j <= start + i; j += LANES)
                    largest = _mm512_mask_max_ps(largest, seen(j, start + i), largest,
                                                 _mm512_loadu_ps(row + j));
                const float most = _mm512_reduce_max_ps(largest) * s.scale;
                __m512 total = _mm512_setzero_ps();
                for (int64_t j = 0; j < columns; j += LANES) {
                    const __m512 shifted = _mm512_fmsub_ps(
                        _mm512_loadu_ps(row + j), _mm512_set1_ps(s.scale), _mm512_set1_ps(most));
                    const __m512 p = _mm512_maskz_mov_ps(seen(j, start + i), exponential(shifted));
                    total = _mm512_add_ps(total, p);
                    store_bf16(p, weights + i * keys + j);
                }
                const float all = _mm512_reduce_add_ps(total);
                factor[i] = 1 / all;
                log_total[(start + i) * s.heads + h] = most + std::log(all);
            }
            product<false>(words(weights), keys / 2, v_pairs, padded, rows, padded, columns / 2,
                           sums, padded);
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t j = 0; j < s.width; j += LANES)
                    store_bf16(_mm512_mul_ps(_mm512_loadu_ps(sums + i * padded + j),
                                             _mm512_set1_ps(factor[i])),
                               out + h * s.width + (start + i) * s.query_row() + j);
        }
}

struct Gradients {  // of one document and one key-value head
    const bf16 *out, *upstream;
    const float* log_total;
    bf16 *q, *k, *v;
};

// Rows [length × width] of bf16 from columns in fp32, [width][length], `step` long.
void store_transposed(const float* x, int64_t step, int64_t length, int64_t width, bf16* out,
                      int64_t out_row) {
    const __m512i at = sixteen_steps(step);
    for (int64_t j = 0; j < width; j += LANES)
        for (int64_t i = 0; i < length; ++i)
            store_bf16(_mm512_i32gather_ps(at, x + j * step + i, 4), out + i * out_row + j);
}

void backward_task(const Shape& s, Tensors x, Gradients g) {
    const int64_t keys = rounded_up(x.length, UNIT), width = s.width, padded = s.padded_width();
    const Rows k = {x.k, s.key_row(), x.length, width}, v = {x.v, s.key_row(), x.length, width};
    uint32_t* k_transposed = room.k_transposed.take<uint32_t>(padded / 2 * keys);
    uint32_t* v_transposed = room.v_transposed.take<uint32_t>(padded / 2 * keys);
    uint32_t* k_pairs = room.k_pairs.take<uint32_t>(keys / 2 * padded);
    uint32_t* p_pairs = room.p_pairs.take<uint32_t>(BLOCK / 2 * keys);
    uint32_t* ds_pairs = room.ds_pairs.take<uint32_t>(BLOCK / 2 * keys);
    uint32_t* q_transposed = room.q_transposed.take<uint32_t>(padded * BLOCK / 2);
    uint32_t* upstream_transposed = room.upstream_transposed.take<uint32_t>(padded * BLOCK / 2);
    float *scores = room.scores.take<float>(BLOCK * keys), *dp = room.dp.take<float>(BLOCK * keys);
    float *dk = room.dk.take<float>(padded * keys), *dv = room.dv.take<float>(padded * keys);
    float* dq = room.sums.take<float>(BLOCK * padded);
    bf16* ds = room.weights.take<bf16>(BLOCK * keys);
    std::fill(dk, dk + padded * keys, 0.0f);
    std::fill(dv, dv + padded * keys, 0.0f);
    transpose_pairs(k, padded / 2, k_transposed, keys);
    transpose_pairs(v, padded / 2, v_transposed, keys);
    pair_rows(k, keys / 2, k_pairs, padded);
    for (int64_t h = 0; h < s.group(); ++h)
        for (int64_t start = 0; start < x.length; start += BLOCK) {
            const int64_t stop = std::min(start + BLOCK, x.length), rows = stop - start;
            const int64_t columns = rounded_up(stop, UNIT);
            const int64_t at = h * width + start * s.query_row();
            const Rows own = {x.q + at, s.query_row(), rows, width};
            const Rows own_upstream = {g.upstream + at, s.query_row(), rows, width};
            const uint32_t* q = copied(own, padded, room.q);
            const uint32_t* upstream = copied(own_upstream, padded, room.upstream);
            product<false>(q, padded / 2, k_transposed, keys, rows, columns, padded / 2, scores,
                           keys);
            product<false>(upstream, padded / 2, v_transposed, keys, rows, columns, padded / 2, dp,
                           keys);
            for (int64_t i = 0; i < BLOCK; i += 2) {
                float shift[2] = {}, dot[2] = {};
                const int64_t real = std::clamp<int64_t>(rows - i, 0, 2);
                for (int64_t r = 0; r < real; ++r) {
                    shift[r] = g.log_total[(start + i + r) * s.heads + h];
                    const int64_t row = at + (i + r) * s.query_row();
                    __m512 sum = _mm512_setzero_ps();
                    for (int64_t j = 0; j < width; j += LANES)
                        sum = _mm512_fmadd_ps(wide(g.out + row + j), wide(g.upstream + row + j),
                                              sum);
                    dot[r] = _mm512_reduce_add_ps(sum);
                }
                for (int64_t j = 0; j < columns; j += LANES) {
                    __m512i p_words = _mm512_setzero_si512(), ds_words = _mm512_setzero_si512();
                    for (int64_t r = 0; r < real; ++r) {
                        const int64_t cell = (i + r) * keys + j;
                        const __m512 p = _mm512_maskz_mov_ps(
                            seen(j, start + i + r),
                            exponential(_mm512_fmsub_ps(_mm512_loadu_ps(scores + cell),
                                                        _mm512_set1_ps(s.scale),
                                                        _mm512_set1_ps(shift[r]))));
                        const __m512 change =
                            _mm512_mul_ps(_mm512_mul_ps(p, _mm512_set1_ps(s.scale)),
                                          _mm512_sub_ps(_mm512_loadu_ps(dp + cell),
                                                        _mm512_set1_ps(dot[r])));
                        const auto p_low = (__m256i)_mm512_cvtneps_pbh(p);
                        const auto ds_low = (__m256i)_mm512_cvtneps_pbh(change);
                        _mm256_storeu_si256((__m256i*)(ds + cell), ds_low);
                        const unsigned half = r * 16;
                        p_words = _mm512_or_si512(
                            p_words, _mm512_slli_epi32(_mm512_cvtepu16_epi32(p_low), half));
                        ds_words = _mm512_or_si512(
                            ds_words, _mm512_slli_epi32(_mm512_cvtepu16_epi32(ds_low), half));
                    }
                    _mm512_storeu_si512(p_pairs + i / 2 * keys + j, p_words);
                    _mm512_storeu_si512(ds_pairs + i / 2 * keys + j, ds_words);
                }
            }
            product<false>(words(ds), keys / 2, k_pairs, padded, rows, padded, columns / 2, dq,
                           padded);
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t j = 0; j < width; j += LANES)
                    store_bf16(_mm512_loadu_ps(dq + i * padded + j),
                               g.q + at + i * s.query_row() + j);
            transpose_block(own, q_transposed);
            transpose_block(own_upstream, upstream_transposed);
            product<true>(q_transposed, BLOCK / 2, ds_pairs, keys, width, columns, (rows + 1) / 2,
                          dk, keys);
            product<true>(upstream_transposed, BLOCK / 2, p_pairs, keys, width, columns,
                          (rows + 1) / 2, dv, keys);
        }
    store_transposed(dk, keys, x.length, width, g.k, s.key_row());
    store_transposed(dv, keys, x.length, width, g.v, s.key_row());
}

// Tasks of all documents and key-value heads, the longest documents first.
template <class Work>
void each_task(const int64_t* lengths, int64_t documents, int64_t kv_heads, int threads,
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
        const Tiles set_up;
#pragma omp for schedule(dynamic)
        for (std::size_t t = 0; t < tasks.size(); ++t)
            work(tasks[t].start, tasks[t].length, tasks[t].head);
    }
}

}  // namespace

extern "C" {

// q, out: bf16 [tokens, heads, width]; k, v: bf16 [tokens, kv_heads, width]; log_total: fp32
// [tokens, heads]; all contiguous. `lengths` of the documents (some may be 0) sum to the
// tokens.
void attention_forward(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* log_total,
                       const int64_t* lengths, int64_t documents, int64_t heads, int64_t kv_heads,
                       int64_t width, float scale, int threads) {
    const Shape s{heads, kv_heads, width, scale};
    each_task(lengths, documents, kv_heads, threads,
              [&](int64_t start, int64_t length, int64_t head) {
                  const int64_t at = start * s.query_row() + head * s.group() * width;
                  const int64_t key_at = start * s.key_row() + head * width;
                  forward_task(s, {q + at, k + key_at, v + key_at, length}, out + at,
                               log_total + start * heads + head * s.group());
              });
}

// Gradients dq, dk, dv of what `attention_forward` made, from that of its output.
void attention_backward(const bf16* upstream, const bf16* q, const bf16* k, const bf16* v,
                        const bf16* out, const float* log_total, bf16* dq, bf16* dk, bf16* dv,
                        const int64_t* lengths, int64_t documents, int64_t heads,
                        int64_t kv_heads, int64_t width, float scale, int threads) {
    const Shape s{heads, kv_heads, width, scale};
    each_task(lengths, documents, kv_heads, threads,
              [&](int64_t start, int64_t length, int64_t head) {
                  const int64_t at = start * s.query_row() + head * s.group() * width;
                  const int64_t key_at = start * s.key_row() + head * width;
                  backward_task(s, {q + at, k + key_at, v + key_at, length},
                                {out + at, upstream + at,
                                 log_total + start * heads + head * s.group(), dq + at,
                                 dk + key_at, dv + key_at});
              });
}

}  // extern "C"

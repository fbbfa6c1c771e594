// Causal attention over packed documents, for CPUs with AVX512-BF16.
//
// The same as the batched products in attention.py, with no padding outside of a vector and
// nothing written to memory but results: scores of a block of queries stay in the cache. One
// task is a document and a key-value head, so no two write to the same place, and results do
// not depend on the number of threads. Products are bf16 with fp32 sums, softmax is fp32.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

using bf16 = uint16_t;

constexpr int64_t BLOCK = 48;  // queries at once: a multiple of the tile's rows, and even
constexpr int64_t LANES = 16;  // fp32 values of a vector
constexpr int64_t ROWS = 6, VECTORS = 4;  // of the largest tile: 24 sums in registers

int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Every product here is C[m][n] = sum over k of A(m, k) · B(k, n), where a "word" of A or B holds
// two neighbouring bf16 values of the summed dimension: what the instruction multiplies at once.
struct Left {
    const uint32_t* words;
    int64_t row, step;  // distance in words from one m, and from one k, to the next
};

struct Right {
    const uint32_t* words;
    int64_t step;  // from one k to the next; neighbouring n are neighbours
};

template <int R, int V, bool ADD>
void tile(Left a, Right b, int64_t steps, float* c, int64_t c_row) {
    __m512 sum[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v)
            sum[r][v] = ADD ? _mm512_loadu_ps(c + r * c_row + v * LANES) : _mm512_setzero_ps();
    for (int64_t k = 0; k < steps; ++k) {
        __m512bh right[V];
        for (int v = 0; v < V; ++v)
            right[v] = (__m512bh)_mm512_loadu_si512(b.words + k * b.step + v * LANES);
        for (int r = 0; r < R; ++r) {
            const auto left = (__m512bh)_mm512_set1_epi32(a.words[r * a.row + k * a.step]);
            for (int v = 0; v < V; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], left, right[v]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) _mm512_storeu_ps(c + r * c_row + v * LANES, sum[r][v]);
}

using Tile = void (*)(Left, Right, int64_t, float*, int64_t);

template <int R, bool ADD>
constexpr Tile of_rows[VECTORS] = {tile<R, 1, ADD>, tile<R, 2, ADD>, tile<R, 3, ADD>,
                                   tile<R, 4, ADD>};
template <bool ADD>
constexpr const Tile* tiles[ROWS] = {of_rows<1, ADD>, of_rows<2, ADD>, of_rows<3, ADD>,
                                     of_rows<4, ADD>, of_rows<5, ADD>, of_rows<6, ADD>};

// C [m × n] = A·B, or += with ADD; n is a multiple of LANES.
template <bool ADD>
void product(Left a, Right b, int64_t m, int64_t n, int64_t steps, float* c, int64_t c_row) {
    for (int64_t j = 0; j < n; j += VECTORS * LANES) {
        const int64_t vectors = std::min(VECTORS, (n - j) / LANES);
        for (int64_t i = 0; i < m; i += ROWS) {
            const int64_t rows = std::min(ROWS, m - i);
            tiles<ADD>[rows - 1][vectors - 1]({a.words + i * a.row, a.row, a.step},
                                              {b.words + j, b.step}, steps, c + i * c_row + j,
                                              c_row);
        }
    }
}

const uint32_t* words(const bf16* x) { return reinterpret_cast<const uint32_t*>(x); }

// Rows of pairs along the columns, transposed: out[pair][row]; rows beyond the last are zero.
void transpose_pairs(const bf16* x, int64_t x_row, int64_t rows, int64_t columns, uint32_t* out,
                     int64_t out_step) {
    for (int64_t i = 0; i < out_step; ++i)
        for (int64_t p = 0; p < columns / 2; ++p)
            out[p * out_step + i] = i < rows ? words(x + i * x_row)[p] : 0;
}

// Pairs of neighbouring rows: out[row / 2][column]; a last odd row is paired with zeros.
void pair_rows(const bf16* x, int64_t x_row, int64_t rows, int64_t columns, uint32_t* out) {
    for (int64_t i = 0; i < rows; i += 2) {
        const bf16* low = x + i * x_row;
        const bf16* high = low + x_row;
        uint32_t* pair = out + i / 2 * columns;
        if (i + 1 < rows)
            for (int64_t j = 0; j < columns; ++j) pair[j] = low[j] | uint32_t(high[j]) << 16;
        else
            for (int64_t j = 0; j < columns; ++j) pair[j] = low[j];
    }
}

void store_bf16(const float* x, int64_t columns, float factor, bf16* out) {
    for (int64_t j = 0; j < columns; j += LANES) {
        const __m512 y = _mm512_mul_ps(_mm512_loadu_ps(x + j), _mm512_set1_ps(factor));
        _mm256_storeu_si256((__m256i*)(out + j), (__m256i)_mm512_cvtneps_pbh(y));
    }
}

__m512 wide(const bf16* x) {
    const __m512i whole = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(whole, 16));
}

// exp to about two units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]
// (Taylor's, to the sixth power: the next term is below 2e-7 there).
__m512 exponential(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-100.0f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);  // ln 2 in two parts
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 y = _mm512_set1_ps(1.0f / 720);
    for (float next : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(next));
    return _mm512_scalef_ps(y, n);
}

// Of 16 keys from `key` on, those at or before `last`.
__mmask16 seen(int64_t key, int64_t last) {
    const int64_t many = std::clamp<int64_t>(last + 1 - key, 0, LANES);
    return static_cast<__mmask16>((1u << many) - 1);
}

struct Shape {
    int64_t heads, kv_heads, width;  // width: of a head, a multiple of LANES
    float scale;
    int64_t group() const { return heads / kv_heads; }
    int64_t query_row() const { return heads * width; }
    int64_t key_row() const { return kv_heads * width; }
};

struct Tensors {  // of one document and one key-value head
    const bf16 *q, *k, *v;
    int64_t length;
};

void forward_task(const Shape& s, Tensors x, bf16* out, float* log_total) {
    const int64_t keys = rounded_up(x.length, LANES);
    std::vector<uint32_t> k_transposed(s.width / 2 * keys), v_pairs((x.length + 1) / 2 * s.width);
    std::vector<float> scores(BLOCK * keys), sums(BLOCK * s.width), factor(BLOCK);
    std::vector<bf16> weights(BLOCK * keys);
    transpose_pairs(x.k, s.key_row(), x.length, s.width, k_transposed.data(), keys);
    pair_rows(x.v, s.key_row(), x.length, s.width, v_pairs.data());
    for (int64_t h = 0; h < s.group(); ++h)
        for (int64_t start = 0; start < x.length; start += BLOCK) {
            const int64_t stop = std::min(start + BLOCK, x.length), rows = stop - start;
            const int64_t columns = rounded_up(stop, LANES);
            const bf16* q = x.q + h * s.width + start * s.query_row();
            product<false>({words(q), s.query_row() / 2, 1}, {k_transposed.data(), keys}, rows,
                           columns, s.width / 2, scores.data(), keys);
            for (int64_t i = 0; i < rows; ++i) {
                float* row = scores.data() + i * keys;
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
                    _mm256_storeu_si256((__m256i*)(weights.data() + i * keys + j),
                                        (__m256i)_mm512_cvtneps_pbh(p));
                }
                const float all = _mm512_reduce_add_ps(total);
                factor[i] = 1 / all;
                log_total[(start + i) * s.heads + h] = most + std::log(all);
            }
            product<false>({words(weights.data()), keys / 2, 1}, {v_pairs.data(), s.width}, rows,
                           s.width, (stop + 1) / 2, sums.data(), s.width);
            for (int64_t i = 0; i < rows; ++i)
                store_bf16(sums.data() + i * s.width, s.width, factor[i],
                           out + h * s.width + (start + i) * s.query_row());
        }
}

struct Gradients {  // of one document and one key-value head
    const bf16 *out, *upstream;
    const float* log_total;
    bf16 *q, *k, *v;
};

void backward_task(const Shape& s, Tensors x, Gradients g) {
    const int64_t keys = rounded_up(x.length, LANES), width = s.width;
    std::vector<uint32_t> k_transposed(width / 2 * keys), v_transposed(width / 2 * keys),
        k_pairs((x.length + 1) / 2 * width), q_pairs(BLOCK / 2 * width),
        upstream_pairs(BLOCK / 2 * width), p_pairs(BLOCK / 2 * keys), ds_pairs(BLOCK / 2 * keys);
    std::vector<float> scores(BLOCK * keys), dp(BLOCK * keys), dq(BLOCK * width),
        dk(x.length * width, 0.0f), dv(x.length * width, 0.0f);
    std::vector<bf16> ds(BLOCK * keys);
    transpose_pairs(x.k, s.key_row(), x.length, width, k_transposed.data(), keys);
    transpose_pairs(x.v, s.key_row(), x.length, width, v_transposed.data(), keys);
    pair_rows(x.k, s.key_row(), x.length, width, k_pairs.data());
    for (int64_t h = 0; h < s.group(); ++h)
        for (int64_t start = 0; start < x.length; start += BLOCK) {
            const int64_t stop = std::min(start + BLOCK, x.length), rows = stop - start;
            const int64_t columns = rounded_up(stop, LANES);
            const int64_t at = h * width + start * s.query_row();
            const bf16 *q = x.q + at, *upstream = g.upstream + at;
            product<false>({words(q), s.query_row() / 2, 1}, {k_transposed.data(), keys}, rows,
                           columns, width / 2, scores.data(), keys);
            product<false>({words(upstream), s.query_row() / 2, 1}, {v_transposed.data(), keys},
                           rows, columns, width / 2, dp.data(), keys);
            for (int64_t i = 0; i < rows; i += 2) {
                float shift[2] = {}, dot[2] = {};
                for (int64_t r = 0; r < std::min<int64_t>(2, rows - i); ++r) {
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
                    for (int64_t r = 0; r < std::min<int64_t>(2, rows - i); ++r) {
                        const int64_t cell = (i + r) * keys + j;
                        const __m512 p = _mm512_maskz_mov_ps(
                            seen(j, start + i + r),
                            exponential(_mm512_fmsub_ps(_mm512_loadu_ps(scores.data() + cell),
                                                        _mm512_set1_ps(s.scale),
                                                        _mm512_set1_ps(shift[r]))));
                        const __m512 change = _mm512_mul_ps(
                            _mm512_mul_ps(p, _mm512_set1_ps(s.scale)),
                            _mm512_sub_ps(_mm512_loadu_ps(dp.data() + cell),
                                          _mm512_set1_ps(dot[r])));
                        const auto p_low = (__m256i)_mm512_cvtneps_pbh(p);
                        const auto ds_low = (__m256i)_mm512_cvtneps_pbh(change);
                        _mm256_storeu_si256((__m256i*)(ds.data() + cell), ds_low);
                        const unsigned half = r * 16;
                        p_words = _mm512_or_si512(
                            p_words, _mm512_slli_epi32(_mm512_cvtepu16_epi32(p_low), half));
                        ds_words = _mm512_or_si512(
                            ds_words, _mm512_slli_epi32(_mm512_cvtepu16_epi32(ds_low), half));
                    }
                    _mm512_storeu_si512(p_pairs.data() + i / 2 * keys + j, p_words);
                    _mm512_storeu_si512(ds_pairs.data() + i / 2 * keys + j, ds_words);
                }
            }
            product<false>({words(ds.data()), keys / 2, 1}, {k_pairs.data(), width}, rows, width,
                           (stop + 1) / 2, dq.data(), width);
            for (int64_t i = 0; i < rows; ++i)
                store_bf16(dq.data() + i * width, width, 1, g.q + at + i * s.query_row());
            pair_rows(q, s.query_row(), rows, width, q_pairs.data());
            pair_rows(upstream, s.query_row(), rows, width, upstream_pairs.data());
            product<true>({ds_pairs.data(), 1, keys}, {q_pairs.data(), width}, stop, width,
                          (rows + 1) / 2, dk.data(), width);
            product<true>({p_pairs.data(), 1, keys}, {upstream_pairs.data(), width}, stop, width,
                          (rows + 1) / 2, dv.data(), width);
        }
    for (int64_t i = 0; i < x.length; ++i) {
        store_bf16(dk.data() + i * width, width, 1, g.k + i * s.key_row());
        store_bf16(dv.data() + i * width, width, 1, g.v + i * s.key_row());
    }
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
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (std::size_t t = 0; t < tasks.size(); ++t)
        work(tasks[t].start, tasks[t].length, tasks[t].head);
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

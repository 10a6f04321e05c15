// What lies between the matrix products of a layer: one pass over each row, in float, rounded once.

#include <omp.h>

#include "simd.h"

namespace {

// Below so many elements a team of threads takes longer to wake than the work takes.
constexpr int64_t MIN_PARALLEL = 1 << 13;

float sum_of_squares(const float* row, int64_t width) {
    __m512 total = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
        const __m512 v = _mm512_maskz_loadu_ps(first(width - i), row + i);
        total = _mm512_fmadd_ps(v, v, total);
    }
    return _mm512_reduce_add_ps(total);
}

// Adds `x` to `residual`, rounds, and writes the norm of the sum over `x`.
void add_norm_row(bf16* x, bf16* residual, const bf16* weight, int64_t width, float eps, float* row) {
    for (int64_t i = 0; i < width; i += 16) {
        const __mmask16 mask = first(width - i);
        store16(residual + i, _mm512_add_ps(load16(x + i, mask), load16(residual + i, mask)), mask);
        _mm512_mask_storeu_ps(row + i, mask, load16(residual + i, mask));
    }
    const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(sum_of_squares(row, width) / float(width) + eps));
    for (int64_t i = 0; i < width; i += 16) {
        const __mmask16 mask = first(width - i);
        const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, row + i), scale);
        store16(x + i, _mm512_mul_ps(v, load16(weight + i, mask)), mask);
    }
}

struct Rope {
    const bf16* qkv;
    int64_t stride_qkv;
    const float* cos;
    const float* sin;
    int64_t stride_cos;
    const int64_t* positions;
    const bf16* q_weight;
    const bf16* k_weight;
    float eps;
    bf16* query;
    bf16* k_pages;
    bf16* v_pages;
    int64_t stride_block;
    const int64_t* slots;
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t head_dim;
    int64_t block_size;
};

void turn_head(const Rope& r, const bf16* from, bf16* to, const bf16* weight, const float* cos, const float* sin) {
    const int64_t half = r.head_dim / 2;
    __m512 scale = _mm512_set1_ps(1.0f);
    if (weight != nullptr) {
        __m512 total = _mm512_setzero_ps();
        for (int64_t i = 0; i < r.head_dim; i += 16) {
            const __m512 v = load16(from + i);
            total = _mm512_fmadd_ps(v, v, total);
        }
        scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(total) / float(r.head_dim) + r.eps));
    }
    for (int64_t i = 0; i < half; i += 16) {
        __m512 low = load16(from + i), high = load16(from + half + i);
        if (weight != nullptr) {
            low = _mm512_mul_ps(_mm512_mul_ps(low, scale), load16(weight + i));
            high = _mm512_mul_ps(_mm512_mul_ps(high, scale), load16(weight + half + i));
        }
        const __m512 c = _mm512_loadu_ps(cos + i), s = _mm512_loadu_ps(sin + i);
        store16(to + i, _mm512_fmsub_ps(low, c, _mm512_mul_ps(high, s)));
        store16(to + half + i, _mm512_fmadd_ps(high, c, _mm512_mul_ps(low, s)));
    }
}

void rope_row(const Rope& r, int64_t token) {
    const int64_t dim = r.head_dim;
    const bf16* from = r.qkv + token * r.stride_qkv;
    const float* cos = r.cos + r.positions[token] * r.stride_cos;
    const float* sin = r.sin + r.positions[token] * r.stride_cos;
    for (int64_t head = 0; head < r.num_heads; head++)
        turn_head(r, from + head * dim, r.query + (token * r.num_heads + head) * dim, r.q_weight, cos, sin);
    const int64_t slot = r.slots[token];
    if (slot < 0) return;  // padding
    const int64_t place = (slot / r.block_size) * r.stride_block + (slot % r.block_size) * dim;
    for (int64_t head = 0; head < r.num_kv_heads; head++) {
        const int64_t to = place + head * r.block_size * dim;
        turn_head(r, from + (r.num_heads + head) * dim, r.k_pages + to, r.k_weight, cos, sin);
        const bf16* value = from + (r.num_heads + r.num_kv_heads + head) * dim;
        for (int64_t i = 0; i < dim; i += 32)
            _mm512_storeu_si512(r.v_pages + to + i, _mm512_loadu_si512(value + i));
    }
}

}  // namespace

EXPORT void add_rms_norm(bf16* x, int64_t stride_x, bf16* residual, int64_t stride_residual, const bf16* weight,
                         int64_t num_rows, int64_t width, float eps) {
#pragma omp parallel if (num_rows * width >= MIN_PARALLEL)
    {
        float* row = static_cast<float*>(__builtin_alloca(sizeof(float) * size_t(width)));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < num_rows; i++)
            add_norm_row(x + i * stride_x, residual + i * stride_residual, weight, width, eps, row);
    }
}

// `out` may be the first half of `gate_up`.
EXPORT void silu_mul(const bf16* gate_up, int64_t stride_in, bf16* out, int64_t stride_out, int64_t num_rows,
                     int64_t width) {
#pragma omp parallel for schedule(static) if (num_rows * width >= MIN_PARALLEL)
    for (int64_t row = 0; row < num_rows; row++) {
        const bf16* gate = gate_up + row * stride_in;
        for (int64_t i = 0; i < width; i += 16) {
            const __mmask16 mask = first(width - i);
            const __m512 g = load16(gate + i, mask), up = load16(gate + width + i, mask);
            store16(out + row * stride_out + i, _mm512_mul_ps(silu16(g), up), mask);
        }
    }
}

EXPORT void rope_and_write(const bf16* qkv, int64_t stride_qkv, const float* cos, const float* sin, int64_t stride_cos,
                           const int64_t* positions, const bf16* q_weight, const bf16* k_weight, float eps, bf16* query,
                           bf16* k_pages, bf16* v_pages, int64_t stride_block, const int64_t* slots, int64_t num_tokens,
                           int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t block_size) {
    const Rope rope{qkv,     stride_qkv, cos,          sin,   stride_cos, positions,    q_weight, k_weight, eps, query,
                    k_pages, v_pages,    stride_block, slots, num_heads,  num_kv_heads, head_dim, block_size};
#pragma omp parallel for schedule(static) if (num_tokens * (num_heads + 2 * num_kv_heads) * head_dim >= MIN_PARALLEL)
    for (int64_t token = 0; token < num_tokens; token++) rope_row(rope, token);
}

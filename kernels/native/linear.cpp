// Products with weights: `x W^T` for rows of bfloat16 and weights that were laid out as tiles once.
//
// Packed weights are blocks of 32 outputs, each two columns of tiles:
//   [block][half of 16 outputs][step of 32 inputs][pair of inputs][output][2]
// so that a thread reads its part of them from beginning to end: a few rows are bound by that. In a gated product the halves
// of a block are 16 gates and the 16 values that they gate, so that a block knows all that an activation needs.

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "tiles.h"

namespace {

constexpr int BLOCK = 32;  // outputs, and rows, that are worked on together

enum Kind : int64_t { PLAIN = 0, GATED = 1, ACTIVATED = 2 };

struct Product {
    const bf16* x;
    int64_t stride_x;
    const bf16* packed;
    const bf16* bias;  // null: none
    void* out;
    int64_t stride_out;
    int64_t num_rows;
    int64_t num_outputs;  // of the weights
    int64_t num_inputs;
    int64_t kind;
    bool is_float;  // `out` is

    int64_t num_steps() const { return num_inputs / 32; }
    int64_t num_blocks() const { return (num_outputs + BLOCK - 1) / BLOCK; }
    const bf16* block(int64_t index) const { return packed + index * 2 * num_steps() * TILE_BF16; }
};

// Writes half a block: 16 outputs of a row.
void put(const Product& p, int64_t row, int64_t column, __m512 sums) {
    const __mmask16 mask = first(p.num_outputs - column);
    if (p.bias != nullptr) sums = _mm512_add_ps(sums, load16(p.bias + column, mask));
    const int64_t at = row * p.stride_out + column;
    if (p.is_float)
        _mm512_mask_storeu_ps(static_cast<float*>(p.out) + at, mask, sums);
    else
        store16(static_cast<bf16*>(p.out) + at, sums, mask);
}

void put_rows(const Product& p, const float* sums, int64_t begin, int64_t num_rows, int64_t block) {
    const int64_t low = p.kind == PLAIN ? block * BLOCK : block * TILE;
    const int64_t high = p.kind == PLAIN ? low + TILE : p.num_outputs / 2 + low;
    for (int64_t i = 0; i < num_rows; i++) {
        const __m512 a = _mm512_load_ps(sums + i * BLOCK), b = _mm512_load_ps(sums + i * BLOCK + TILE);
        if (p.kind == ACTIVATED) {
            put(p, begin + i, low, _mm512_mul_ps(silu16(a), b));
        } else {
            put(p, begin + i, low, a);
            put(p, begin + i, high, b);
        }
    }
}

// At most 16 rows: tiles are configured for as many.
void few_rows(const Product& p, int64_t block, float* sums) {
    const bf16* low = p.block(block);
    const bf16* high = low + p.num_steps() * TILE_BF16;
    const size_t row_bytes = size_t(p.stride_x) * sizeof(bf16);
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t step = 0; step < p.num_steps(); step++) {
        _tile_loadd(4, p.x + 32 * step, row_bytes);
        _tile_loadd(6, low + step * TILE_BF16, 64);
        _tile_loadd(7, high + step * TILE_BF16, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, sums, BLOCK * sizeof(float));
    _tile_stored(1, sums + TILE, BLOCK * sizeof(float));
    put_rows(p, sums, 0, p.num_rows, block);
}

// Any number of rows; `rest` has those of the last, incomplete block of rows, and zeros behind them.
void many_rows(const Product& p, int64_t block, const bf16* rest, float* sums) {
    for (int64_t begin = 0; begin < p.num_rows; begin += BLOCK) {
        const int64_t here = std::min<int64_t>(BLOCK, p.num_rows - begin);
        const bf16* rows = here == BLOCK ? p.x + begin * p.stride_x : rest;
        multiply<false>(rows, here == BLOCK ? p.stride_x : p.num_inputs, p.block(block), TILE_BF16,
                        p.num_steps() * TILE_BF16, p.num_steps(), sums, BLOCK);
        put_rows(p, sums, begin, here, block);
    }
}

int multiply_all(const Product& p) {
    const bool is_few = p.num_rows <= TILE;
    const int64_t num_rest = is_few ? 0 : p.num_rows % BLOCK;
    bf16* rest = nullptr;
    if (num_rest != 0) {
        rest = static_cast<bf16*>(workspace.reserve(sizeof(bf16) * size_t(BLOCK * p.num_inputs)));
        if (rest == nullptr) return -1;
        for (int64_t i = 0; i < BLOCK; i++) {
            bf16* to = rest + i * p.num_inputs;
            if (i < num_rest)
                std::memcpy(to, p.x + (p.num_rows - num_rest + i) * p.stride_x, sizeof(bf16) * size_t(p.num_inputs));
            else
                std::memset(to, 0, sizeof(bf16) * size_t(p.num_inputs));
        }
    }
    TileConfig config;
    if (is_few)
        for (int tile = 0; tile < 6; tile++) config.num_rows[tile] = uint8_t(p.num_rows);
#pragma omp parallel
    {
        alignas(64) float sums[BLOCK * BLOCK];
        _tile_loadconfig(&config);
#pragma omp for schedule(dynamic) nowait
        for (int64_t block = 0; block < p.num_blocks(); block++) {
            if (is_few)
                few_rows(p, block, sums);
            else
                many_rows(p, block, rest, sums);
        }
        _tile_release();
    }
    return 0;
}

}  // namespace

// Lays out `weight` `[num_outputs, num_inputs]` as blocks; those of a gated one have the gates as the first half of its rows.
EXPORT void pack_linear(const bf16* weight, bf16* packed, int64_t num_outputs, int64_t num_inputs, int64_t is_gated) {
    const int64_t num_steps = num_inputs / 32, num_halves = (num_outputs + BLOCK - 1) / BLOCK * 2;
#pragma omp parallel for schedule(static)
    for (int64_t half = 0; half < num_halves; half++) {
        const int64_t begin = is_gated ? half / 2 * TILE + half % 2 * (num_outputs / 2) : half * TILE;
        for (int64_t step = 0; step < num_steps; step++) {
            __m512i rows[16];
            for (int64_t i = 0; i < TILE; i++)
                rows[i] = begin + i < num_outputs ? _mm512_loadu_si512(weight + (begin + i) * num_inputs + 32 * step)
                                                  : _mm512_setzero_si512();
            transpose16(rows);
            for (int64_t i = 0; i < TILE; i++)
                _mm512_storeu_si512(packed + (half * num_steps + step) * TILE_BF16 + 32 * i, rows[i]);
        }
    }
}

// Returns 0, or -1 without memory for a workspace.
EXPORT int linear(const bf16* x, int64_t stride_x, const bf16* packed, const bf16* bias, void* out, int64_t stride_out,
                  int64_t num_rows, int64_t num_outputs, int64_t num_inputs, int64_t kind, int64_t is_float) {
    if (num_rows == 0) return 0;
    return multiply_all({x, stride_x, packed, bias, out, stride_out, num_rows, num_outputs, num_inputs, kind, is_float != 0});
}

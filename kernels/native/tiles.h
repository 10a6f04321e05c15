// AMX: tiles of 16 rows of 64 bytes, products of 32 rows by 32 columns, and memory to work in.
//
// As the right side of a product a tile has rows of pairs: number 2 r and 2 r + 1 of the summed dimension, for each of 16
// columns. That is a block of 16 columns in memory, as numbers of 32 bits, turned.
#pragma once

#include <cstdlib>

#include "simd.h"

namespace {

constexpr int TILE = 16;        // rows of a tile, and numbers of 32 bits in one of its rows
constexpr int TILE_BF16 = 512;  // numbers of 16 bits in a tile

// Memory of the thread that calls a kernel, kept from call to call: a lane has a thread a slot.
class Workspace {
public:
    ~Workspace() { std::free(data_); }

    void* reserve(size_t num_bytes) {
        if (num_bytes > size_) {
            std::free(data_);
            size_ = (num_bytes + num_bytes / 4 + 4095) / 4096 * 4096;
            data_ = std::aligned_alloc(64, size_);
            if (data_ == nullptr) size_ = 0;
        }
        return data_;
    }

private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

thread_local Workspace workspace;  // one for each source file that includes this

struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t num_rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles 0 to 3 are a square of 32 sums by 32, 4 and 5 its rows, 6 and 7 its columns.
template <bool ADDS>
void multiply(const bf16* rows, int64_t stride_rows, const bf16* columns, int64_t step_columns, int64_t second_column,
              int64_t num_steps, float* sums, int64_t stride_sums) {
    const size_t row_bytes = size_t(stride_rows) * sizeof(bf16), sum_bytes = size_t(stride_sums) * sizeof(float);
    if (ADDS) {
        _tile_loadd(0, sums, sum_bytes);
        _tile_loadd(1, sums + TILE, sum_bytes);
        _tile_loadd(2, sums + TILE * stride_sums, sum_bytes);
        _tile_loadd(3, sums + TILE * stride_sums + TILE, sum_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < num_steps; step++) {
        _tile_loadd(4, rows + 32 * step, row_bytes);
        _tile_loadd(5, rows + TILE * stride_rows + 32 * step, row_bytes);
        _tile_loadd(6, columns + step * step_columns, 64);
        _tile_loadd(7, columns + step * step_columns + second_column, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, sum_bytes);
    _tile_stored(1, sums + TILE, sum_bytes);
    _tile_stored(2, sums + TILE * stride_sums, sum_bytes);
    _tile_stored(3, sums + TILE * stride_sums + TILE, sum_bytes);
}

// 16 rows of 16 numbers of 32 bits, turned: number j of row i becomes number i of row j.
inline void transpose16(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

}  // namespace

// Attention over block tables: one token of many sequences with vectors, chunks of tokens with AMX tiles.
//
// Both work through the keys piece by piece and keep a running maximum and sum a row (Milakov and Gimelshein, 2018; as
// FlashAttention does, Dao et al., 2022). Scores are in units of log2, so that the exponential is a power of two.

#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "tiles.h"

namespace {

constexpr int ROWS = 32;         // rows of queries that are worked on together
constexpr int KEYS = 128;        // keys that are worked on together: scores, weights and sums stay in the first cache
constexpr int MAX_DIM = 256;
constexpr int SPLIT_KEYS = 512;  // a decode step is divided in pieces of so many keys
constexpr int MAX_GROUP = 16;    // query heads that share keys, in a decode step
constexpr float NEVER = -std::numeric_limits<float>::infinity();

struct Layer {
    const bf16* query;  // [n, num_heads, head_dim]
    const bf16* k_pages;
    const bf16* v_pages;
    int64_t stride_block;
    bf16* out;  // [n, num_heads, head_dim]
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t block_size;
    float scale;  // times log2(e)

    int64_t group() const { return num_heads / num_kv_heads; }

    // Where the rows of a block start for a KV head.
    template <int DIM>
    int64_t place(int32_t block, int64_t kv_head) const {
        return int64_t(block) * stride_block + kv_head * block_size * DIM;
    }
};

// ---- one token a sequence ----

// The sums of 16 vectors, in their order.
__m512 sums(const __m512 (&v)[16]) {
    __m512 fours[4];
    for (int i = 0; i < 4; i++) {
        __m512 pairs[2];
        for (int j = 0; j < 2; j++) {
            const __m512 a = v[4 * i + 2 * j], b = v[4 * i + 2 * j + 1];
            pairs[j] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        }
        const __m512d a = _mm512_castps_pd(pairs[0]), b = _mm512_castps_pd(pairs[1]);
        fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    __m512 halves[2];
    for (int i = 0; i < 2; i++) {
        const __m512 a = fours[2 * i], b = fours[2 * i + 1];
        halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    const __m512 a = halves[0], b = halves[1];
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// Products of one query with 16 keys that lie one after the other.
template <int DIM>
__m512 scores16(const bf16* query, const bf16* keys) {
    __m512 products[16];
    for (int j = 0; j < 16; j++) {
        __m512 total = _mm512_setzero_ps();
        for (int c = 0; c < DIM; c += 32)
            total = _mm512_dpbf16_ps(total, (__m512bh)_mm512_loadu_si512(keys + j * DIM + c),
                                     (__m512bh)_mm512_loadu_si512(query + c));
        products[j] = total;
    }
    return sums(products);
}

// A piece of a sequence's keys: for each head of the group the maximum, the sum, and the weighted values.
struct Partial {
    float* out;  // [group, head_dim]
    float* max;  // [group]
    float* sum;  // [group]
};

// Adds values of `count` keys of a block, weighted, to the sums of `HEADS` heads.
template <int DIM, int HEADS>
void add_values(const bf16* values, int64_t count, const float* weights, int64_t stride_weights, float* out) {
    __m512 sum[HEADS][DIM / 16];
    for (int h = 0; h < HEADS; h++)
        for (int c = 0; c < DIM / 16; c++) sum[h][c] = _mm512_loadu_ps(out + h * DIM + 16 * c);
    for (int64_t j = 0; j < count; j++)
        for (int c = 0; c < DIM / 16; c++) {
            const __m512 v = load16(values + j * DIM + 16 * c);
            for (int h = 0; h < HEADS; h++)
                sum[h][c] = _mm512_fmadd_ps(_mm512_set1_ps(weights[h * stride_weights + j]), v, sum[h][c]);
        }
    for (int h = 0; h < HEADS; h++)
        for (int c = 0; c < DIM / 16; c++) _mm512_storeu_ps(out + h * DIM + 16 * c, sum[h][c]);
}

template <int DIM>
void attend_piece(const Layer& layer, const bf16* query, const int32_t* table, int64_t kv_head, int64_t begin,
                  int64_t end, const Partial& result) {
    alignas(64) float scores[MAX_GROUP][SPLIT_KEYS];
    const int64_t group = layer.group(), size = layer.block_size, count = end - begin;
    for (int64_t h = 0; h < group; h++) {
        const bf16* own = query + h * DIM;
        __m512 most = _mm512_set1_ps(NEVER);
        for (int64_t i = 0; i < count; i += 16) {
            const int64_t key = begin + i;
            const bf16* keys = layer.k_pages + layer.place<DIM>(table[key / size], kv_head) + key % size * DIM;
            __m512 s = _mm512_mul_ps(scores16<DIM>(own, keys), _mm512_set1_ps(layer.scale));
            s = _mm512_mask_blend_ps(first(count - i), _mm512_set1_ps(NEVER), s);
            _mm512_store_ps(&scores[h][i], s);
            most = _mm512_max_ps(most, s);
        }
        const float max = _mm512_reduce_max_ps(most);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < count; i += 16) {
            const __m512 p = _mm512_maskz_mov_ps(
                first(count - i), exp2_16(_mm512_sub_ps(_mm512_load_ps(&scores[h][i]), _mm512_set1_ps(max))));
            _mm512_store_ps(&scores[h][i], p);
            sum = _mm512_add_ps(sum, p);
        }
        result.max[h] = max;
        result.sum[h] = _mm512_reduce_add_ps(sum);
    }
    std::memset(result.out, 0, sizeof(float) * size_t(group) * DIM);
    // As many heads at a time as there are registers for.
    constexpr int AT_ONCE = DIM <= 64 ? 4 : DIM <= 128 ? 2 : 1;
    for (int64_t i = 0; i < count;) {
        const int64_t key = begin + i, here = std::min(size - key % size, count - i);
        const bf16* values = layer.v_pages + layer.place<DIM>(table[key / size], kv_head) + key % size * DIM;
        int64_t h = 0;
        for (; h + AT_ONCE <= group; h += AT_ONCE)
            add_values<DIM, AT_ONCE>(values, here, &scores[h][i], SPLIT_KEYS, result.out + h * DIM);
        for (; h < group; h++) add_values<DIM, 1>(values, here, &scores[h][i], SPLIT_KEYS, result.out + h * DIM);
        i += here;
    }
}

// Joins the pieces of one head of one sequence.
template <int DIM>
void join(const float* out, const float* max, const float* sum, int64_t num_pieces, int64_t stride_out,
          int64_t stride_head, bf16* to) {
    float most = NEVER;
    for (int64_t i = 0; i < num_pieces; i++) most = std::max(most, max[i * stride_head]);
    __m512 total[DIM / 16];
    for (int c = 0; c < DIM / 16; c++) total[c] = _mm512_setzero_ps();
    float weight = 0;
    for (int64_t i = 0; i < num_pieces; i++) {
        const float share = std::exp2(max[i * stride_head] - most);
        weight += share * sum[i * stride_head];
        for (int c = 0; c < DIM / 16; c++)
            total[c] = _mm512_fmadd_ps(_mm512_set1_ps(share), _mm512_loadu_ps(out + i * stride_out + 16 * c), total[c]);
    }
    for (int c = 0; c < DIM / 16; c++) store16(to + 16 * c, _mm512_mul_ps(total[c], _mm512_set1_ps(1.0f / weight)));
}

template <int DIM>
int decode(const Layer& layer, const int32_t* kv_lengths, const int32_t* tables, int64_t width, int64_t num_rows) {
    const int64_t group = layer.group(), num_kv_heads = layer.num_kv_heads;
    int64_t longest = 0;
    for (int64_t i = 0; i < num_rows; i++) longest = std::max<int64_t>(longest, kv_lengths[i]);
    const int64_t num_pieces = (longest + SPLIT_KEYS - 1) / SPLIT_KEYS;
    const int64_t num_items = num_rows * num_kv_heads * num_pieces;
    auto* scratch = static_cast<float*>(workspace.reserve(sizeof(float) * size_t(num_items * group * (DIM + 2))));
    if (scratch == nullptr) return -1;
    float* maxima = scratch + num_items * group * DIM;
    float* totals = maxima + num_items * group;
    int64_t num_keys = 0;
    for (int64_t i = 0; i < num_rows; i++) num_keys += kv_lengths[i];
#pragma omp parallel if (num_keys * num_kv_heads >= 256)
    {
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < num_items; item++) {
            const int64_t piece = item % num_pieces, kv_head = item / num_pieces % num_kv_heads;
            const int64_t row = item / num_pieces / num_kv_heads, begin = piece * SPLIT_KEYS;
            const int64_t end = std::min<int64_t>(begin + SPLIT_KEYS, kv_lengths[row]);
            if (begin >= end) continue;
            attend_piece<DIM>(layer, layer.query + (row * layer.num_heads + kv_head * group) * DIM,
                              tables + row * width, kv_head, begin, end,
                              {scratch + item * group * DIM, maxima + item * group, totals + item * group});
        }
#pragma omp for schedule(static)
        for (int64_t item = 0; item < num_rows * layer.num_heads; item++) {
            const int64_t row = item / layer.num_heads, head = item % layer.num_heads;
            if (kv_lengths[row] == 0) continue;  // padding
            const int64_t from = (row * num_kv_heads + head / group) * num_pieces * group + head % group;
            join<DIM>(scratch + from * DIM, maxima + from, totals + from,
                      (kv_lengths[row] + SPLIT_KEYS - 1) / SPLIT_KEYS, group * DIM, group, layer.out + item * DIM);
        }
    }
    return 0;
}

// ---- chunks of tokens ----

// Keys and values of one KV head as tiles:
//   keys    [key tile of 16][step of 32 dimensions][pair of dimensions][key][2]
//   values  [step of 32 keys][tile of 16 dimensions][pair of keys][dimension][2]
// Keys beyond the sequence are zeros: what is there in memory need not be numbers.
template <int DIM>
void pack_keys32(const Layer& layer, const int32_t* table, int64_t kv_head, int64_t begin, int64_t kv_length,
                 bf16* packed_keys, bf16* packed_values) {
    const bf16* k_rows[32];
    const bf16* v_rows[32];
    alignas(64) static const bf16 nothing[MAX_DIM] = {};
    for (int i = 0; i < 32; i++) {
        const int64_t key = begin + i;
        const int64_t at = key < kv_length ? layer.place<DIM>(table[key / layer.block_size], kv_head) +
                                                 key % layer.block_size * DIM
                                           : 0;
        k_rows[i] = key < kv_length ? layer.k_pages + at : nothing;
        v_rows[i] = key < kv_length ? layer.v_pages + at : nothing;
    }
    bf16* keys = packed_keys + begin / TILE * (DIM / 32) * TILE_BF16;
    for (int tile = 0; tile < 2; tile++)
        for (int step = 0; step < DIM / 32; step++) {
            __m512i rows[16];
            for (int i = 0; i < 16; i++) rows[i] = _mm512_loadu_si512(k_rows[16 * tile + i] + 32 * step);
            transpose16(rows);
            for (int i = 0; i < 16; i++) _mm512_store_si512(keys + 32 * i, rows[i]);
            keys += TILE_BF16;
        }
    bf16* values = packed_values + begin / 32 * (DIM / 16) * TILE_BF16;
    for (int tile = 0; tile < DIM / 16; tile++)
        for (int pair = 0; pair < 16; pair++) {
            const auto* even = reinterpret_cast<const __m256i*>(v_rows[2 * pair] + 16 * tile);
            const auto* odd = reinterpret_cast<const __m256i*>(v_rows[2 * pair + 1] + 16 * tile);
            const __m512i both = _mm512_or_si512(
                _mm512_cvtepu16_epi32(_mm256_loadu_si256(even)),
                _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(odd)), 16));
            _mm512_store_si512(values + tile * TILE_BF16 + 32 * pair, both);
        }
}

// What 32 rows have come to: maximum so far, and the sum of the weights below it, 16 partial sums a row.
struct Running {
    alignas(64) float max[ROWS];
    alignas(64) float kept[ROWS];
    alignas(64) float sum[ROWS][16];
};

// Turns scores into weights. `num_visible` is what the first row sees of the keys; the next ones see one more each, but
// none more than `last_visible`. Afterwards `kept` has what the weighted values so far are to be multiplied with.
void weigh(const float* scores, bf16* weights, int64_t num_visible, int64_t last_visible, int64_t num_keys, float scale,
           Running& running) {
    alignas(64) float most[ROWS];
    for (int64_t row = 0; row < ROWS; row++) {
        const float* own = scores + row * KEYS;
        const int64_t end = std::min({num_visible + row, last_visible, num_keys});
        __m512 v = _mm512_set1_ps(NEVER);
        int64_t i = 0;
        for (; i + 16 <= end; i += 16) v = _mm512_max_ps(v, _mm512_load_ps(own + i));
        if (i < end) v = _mm512_mask_max_ps(v, first(end - i), v, _mm512_load_ps(own + i));
        most[row] = _mm512_reduce_max_ps(v);
    }
    for (int row = 0; row < ROWS; row += 16) {
        const __m512 before = _mm512_load_ps(running.max + row);
        const __m512 after = _mm512_max_ps(before, _mm512_mul_ps(_mm512_load_ps(most + row), _mm512_set1_ps(scale)));
        _mm512_store_ps(running.kept + row, exp2_16(_mm512_sub_ps(before, after)));
        _mm512_store_ps(running.max + row, after);
    }
    const __m512 factor = _mm512_set1_ps(scale);
    for (int64_t row = 0; row < ROWS; row++) {
        const float* own = scores + row * KEYS;
        bf16* to = weights + row * KEYS;
        const int64_t end = std::min({num_visible + row, last_visible, num_keys});
        const __m512 max = _mm512_set1_ps(running.max[row]);
        __m512 sum = _mm512_mul_ps(_mm512_load_ps(running.sum[row]), _mm512_set1_ps(running.kept[row]));
        int64_t i = 0;
        for (; i + 16 <= end; i += 16) {
            const __m512 p = exp2_finite16(_mm512_fmsub_ps(_mm512_load_ps(own + i), factor, max));
            sum = _mm512_add_ps(sum, p);
            store16(to + i, p);
        }
        for (; i < num_keys; i += 16) {
            const __m512 power = exp2_finite16(_mm512_fmsub_ps(_mm512_load_ps(own + i), factor, max));
            const __m512 p = _mm512_maskz_mov_ps(first(end - i), power);
            sum = _mm512_add_ps(sum, p);
            store16(to + i, p);
        }
        _mm512_store_ps(running.sum[row], sum);
    }
}

// 32 rows of one head: query positions `begin ..` of a chunk whose first token is at `start` of its sequence.
template <int DIM>
void attend_rows(const Layer& layer, const bf16* query, bf16* out, int64_t begin, int64_t num_rows, int64_t start,
                 const bf16* packed_keys, const bf16* packed_values) {
    alignas(64) bf16 rows[ROWS * DIM];
    alignas(64) float scores[ROWS * KEYS];
    alignas(64) bf16 weights[ROWS * KEYS];
    alignas(64) float sums[ROWS * DIM];
    Running running;
    const int64_t stride = layer.num_heads * DIM;
    for (int64_t i = 0; i < ROWS; i++) {
        running.max[i] = NEVER;
        if (i < num_rows)
            std::memcpy(rows + i * DIM, query + (begin + i) * stride, sizeof(bf16) * DIM);
        else
            std::memset(rows + i * DIM, 0, sizeof(bf16) * DIM);
    }
    std::memset(running.sum, 0, sizeof(running.sum));
    std::memset(sums, 0, sizeof(sums));
    const int64_t num_visible = start + begin + num_rows;  // by the last row
    for (int64_t from = 0; from < num_visible; from += KEYS) {
        const int64_t num_keys = std::min<int64_t>(KEYS, (num_visible - from + 31) / 32 * 32);
        for (int64_t key = 0; key < num_keys; key += 32)
            multiply<false>(rows, DIM, packed_keys + (from + key) / TILE * (DIM / 32) * TILE_BF16, TILE_BF16,
                            DIM / 32 * TILE_BF16, DIM / 32, scores + key, KEYS);
        weigh(scores, weights, start + begin + 1 - from, num_visible - from, num_keys, layer.scale, running);
        for (int64_t i = 0; from != 0 && i < ROWS; i++) {
            if (running.kept[i] == 1.0f) continue;
            for (int c = 0; c < DIM; c += 16) {
                float* at = sums + i * DIM + c;
                _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), _mm512_set1_ps(running.kept[i])));
            }
        }
        for (int64_t c = 0; c < DIM; c += 32)
            multiply<true>(weights, KEYS, packed_values + (from / 32 * (DIM / 16) + c / 16) * TILE_BF16,
                           DIM / 16 * TILE_BF16, TILE_BF16, num_keys / 32, sums + c, DIM);
    }
    for (int64_t i = 0; i < num_rows; i++) {
        const __m512 scale = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(_mm512_load_ps(running.sum[i])));
        for (int c = 0; c < DIM; c += 16)
            store16(out + (begin + i) * stride + c, _mm512_mul_ps(_mm512_load_ps(sums + i * DIM + c), scale));
    }
}

template <int DIM>
int prefill_sequence(const Layer& layer, const int32_t* table, int64_t num_tokens, int64_t kv_length) {
    const int64_t num_keys = (kv_length + 31) / 32 * 32, start = kv_length - num_tokens;
    const size_t per_head = size_t(num_keys) * DIM;
    auto* packed = static_cast<bf16*>(workspace.reserve(2 * sizeof(bf16) * per_head * size_t(layer.num_kv_heads)));
    if (packed == nullptr) return -1;
    const int64_t num_packs = num_keys / 32 * layer.num_kv_heads;
    const int64_t num_rows = (num_tokens + ROWS - 1) / ROWS, num_items = num_rows * layer.num_heads;
    static const TileConfig config;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < num_packs; i++) {
            const int64_t kv_head = i / (num_keys / 32);
            bf16* own = packed + size_t(kv_head) * 2 * per_head;
            pack_keys32<DIM>(layer, table, kv_head, i % (num_keys / 32) * 32, kv_length, own, own + per_head);
        }
        _tile_loadconfig(&config);
        // The last rows first: they see most, and the small ones then fill the gaps.
#pragma omp for schedule(dynamic) nowait
        for (int64_t item = 0; item < num_items; item++) {
            const int64_t head = item % layer.num_heads, begin = (num_rows - 1 - item / layer.num_heads) * ROWS;
            const bf16* own = packed + size_t(head / layer.group()) * 2 * per_head;
            attend_rows<DIM>(layer, layer.query + head * DIM, layer.out + head * DIM, begin,
                             std::min<int64_t>(ROWS, num_tokens - begin), start, own, own + per_head);
        }
        _tile_release();
    }
    return 0;
}

template <int DIM>
int prefill(Layer layer, const int32_t* query_starts, const int32_t* kv_lengths, const int32_t* tables, int64_t width,
            int64_t num_sequences) {
    const bf16* query = layer.query;
    bf16* out = layer.out;
    for (int64_t i = 0; i < num_sequences; i++) {
        const int64_t row = query_starts[i] * layer.num_heads * DIM;
        layer.query = query + row;
        layer.out = out + row;
        const int64_t num_tokens = query_starts[i + 1] - query_starts[i];
        if (prefill_sequence<DIM>(layer, tables + i * width, num_tokens, kv_lengths[i]) != 0) return -1;
    }
    return 0;
}

}  // namespace

// Asks the operating system for the tiles, for the whole process; 0 if they may be used.
EXPORT int allow_tiles() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return int(syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA));
}

// Threads that a kernel would have if the calling thread called it now.
EXPORT int num_threads() { return omp_get_max_threads(); }

// Both return 0, or -1 without memory for a workspace.

EXPORT int paged_decode(const bf16* query, const bf16* k_pages, const bf16* v_pages, int64_t stride_block, bf16* out,
                        const int32_t* kv_lengths, const int32_t* tables, int64_t width, int64_t num_rows,
                        int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t block_size, float scale) {
    const Layer layer{query,     k_pages,      v_pages,    stride_block, out,
                      num_heads, num_kv_heads, block_size, scale * LOG2_E};
    switch (head_dim) {
        case 64: return decode<64>(layer, kv_lengths, tables, width, num_rows);
        case 96: return decode<96>(layer, kv_lengths, tables, width, num_rows);
        case 128: return decode<128>(layer, kv_lengths, tables, width, num_rows);
        default: return decode<256>(layer, kv_lengths, tables, width, num_rows);
    }
}

EXPORT int paged_prefill(const bf16* query, const bf16* k_pages, const bf16* v_pages, int64_t stride_block, bf16* out,
                         const int32_t* query_starts, const int32_t* kv_lengths, const int32_t* tables, int64_t width,
                         int64_t num_sequences, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                         int64_t block_size, float scale) {
    const Layer layer{query,     k_pages,      v_pages,    stride_block, out,
                      num_heads, num_kv_heads, block_size, scale * LOG2_E};
    switch (head_dim) {
        case 64: return prefill<64>(layer, query_starts, kv_lengths, tables, width, num_sequences);
        case 96: return prefill<96>(layer, query_starts, kv_lengths, tables, width, num_sequences);
        case 128: return prefill<128>(layer, query_starts, kv_lengths, tables, width, num_sequences);
        default: return prefill<256>(layer, query_starts, kv_lengths, tables, width, num_sequences);
    }
}

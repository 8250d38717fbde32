// The pruned engine on the CPU: how much of which cell a query scans, the scan by cells, and the result with its error.
//
// Plan: the expected weights say which share of a cell a query takes (stratified sampling); a cell of which it wants
// less than a group's worth it takes with a probability. Scan: cells one after the other, each for all queries that take
// some of it. Recheck: what features cut short left out is put right on a sample of the heaviest windows, compared again
// pixel by pixel. A thread serves a block of queries; a query's numbers do not depend on the company it is in.
#include "lists.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "simd.h"
#include "sliding_task.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define PS_INLINE static inline __attribute__((always_inline))
#define PS_RARELY(condition) __builtin_expect(condition, 0)
#if defined(__clang__)
#define PS_UNROLL16 _Pragma("unroll")
#else
#define PS_UNROLL16 _Pragma("GCC unroll 16")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace patchscore {

namespace {

constexpr int LANES = 16;            // windows side by side, each of another random group of its cell
typedef float Vector __attribute__((vector_size(64)));
constexpr int MOST_CHANNELS = 4;
constexpr int BLOCK = 192;           // windows turned to float at a time
constexpr int MOST_QUERIES = 8192;   // of a thread's block
constexpr int RUN_FLOATS = (3 + MOST_CHANNELS) * LANES;
constexpr int STRIDE = 8;            // one family in so many gives a first idea of all shares
constexpr float LEAST_PARENT = 1e-4f;  // share of a query's foreseen weight below which a parent is not looked into,
constexpr double LEAST_FAMILIES = 0.08;  // share of the parents that is looked into in any case, or four budgets
constexpr float MOST_SKIPPED = 0.02f;  // as long as all that are not have no more than this share
static_assert(SIBLINGS == LANES, "a family is a vector");
constexpr int PARTS = 3 + 3 * MOST_CHANNELS;  // s, s2, ss, then v, vs, vv by channel: of a query's sums, in a row of LANES
constexpr double NEGLIGIBLE_BITS = 42;  // weights so far below the heaviest round away, however many stand for how many
constexpr double LOG2E = 1.4426950408889634;
static_assert(PARTS <= LANES, "a query's sums fit a vector");

// A query's part in one cell: windows taken, of those that compete; what each stands for, which 1 / chance of the cell
// being taken is part of; the variance that its groups' scatter stands for; the weight that was foreseen of the cell,
// where it was taken by chance.
struct Entry {
    int query, take;
    float factor, scatter, chance, foreseen;
};

struct Planned {
    int32_t cell;
    Entry entry;
};

// A priority sample (Duffield, Lund, Thorup 2007): of windows with weights p and luck u, uniform in (0, 1), those of the
// largest p / u; a kept window stands for max(p, threshold). All in bits.
struct Sample {
    float priority, log_size, log_weight, log_count;
    int32_t cell, at;
};

struct Samples {
    float threshold = -INFINITY;
    std::vector<Sample> kept;

    void add(const Sample& sample, int wanted) {
        kept.push_back(sample);
        if (int(kept.size()) >= 2 * wanted + 1) shrink(wanted);
    }

    // Leaves the `wanted` largest; the next becomes the threshold.
    void shrink(int wanted) {
        if (int(kept.size()) <= wanted) return;
        std::nth_element(kept.begin(), kept.begin() + wanted, kept.end(), [](const Sample& a, const Sample& b) {
            if (a.priority != b.priority) return a.priority > b.priority;
            return a.cell != b.cell ? a.cell < b.cell : a.at < b.at;
        });
        threshold = std::max(threshold, kept[size_t(wanted)].priority);
        kept.resize(size_t(wanted));
    }
};

// Parents before a query, in whole vectors.
struct ParentsTask {
    const float *share, *competing;  // [parents]
    const float* moments;            // [channels, parents]
    int64_t parents;
    int channels;
    float least;                     // foreseen weight of a parent that is looked into
    double far[1 + MOST_CHANNELS];   // what is foreseen of all others: weights, weighted values
};

// The cells before a query, families of those parents that matter; and what `plan_cells` adds up on the way.
struct CellsTask {
    const float *share, *score, *competing, *expected2;  // [families, SIBLINGS]: foreseen weights, claims to be scanned, ..
    const int32_t* parents;          // [families]
    const float* moments;            // [all parents, 2 channels, SIBLINGS]
    int64_t families;
    int channels;
    float scale, floor, top2;
    uint32_t luck;
    double sure;                     // foreseen weight of cells that are surely looked into
    double far[1 + MOST_CHANNELS];   // the same of all others, and weighted values
    double unseen[1 + 2 * MOST_CHANNELS];  // expected variance of what is not scanned: of s; with v; of v
};

struct CellTask {
    int channels, rank, stored_rank, q_pitch;
    float scale;                     // log2(e) / sigma^2: log-weights in bits are scale (q.p - p.p / 2)
    const Entry* entries;            // by falling `take`
    int entry_count;
    int32_t cell;
    const float* moments;            // [2 channels] of this cell
    const float* q;                  // [queries, q_pitch], zero beyond `rank`
    const uint16_t* features;        // [windows of the cell, stored_rank] half floats
    const uint8_t* value_bytes;
    const float* value_floats;
    const uint16_t* counts;
    const float* repeats;
    const int32_t* order;            // competing windows of the cell, or null for all
    int64_t competing, start, first_window;
    float negligible, rise;
    float* m;                        // [queries] references of the sums
    float* sums;                     // [queries, LANES]
    const float* calibration;        // [queries] bits from foreseen weights to the scan's
    Samples* samples;                // [queries]
    int recheck;
    const uint32_t* luck;            // [queries]
    // Scratch.
    void* runs;                      // [entry_count]
    float *block, *block_squares, *block_values, *block_counts;
    uint32_t* block_luck;
    Interrupt* interrupt;
    bool calling_thread;
};

// A noisy window beside a training image: rows [row0, row1) of the window lie inside it.
struct WindowTask {
    const float* window;             // its first pixel in the noisy image
    int channels, size, row0, row1;
    int64_t pitch, plane;            // of the noisy image
    int64_t at, height, width;       // the window's first pixel in the training images, which may lie outside of one
    const uint8_t* bytes;
    const float* floats;
    const float *columns, *inside;   // 1 for columns of the window; for those that lie inside the image
};

struct ListLevel {
    const char* name;
    void (*scan_cell)(const CellTask&);
    void (*product)(const float*, int64_t, int, const float*, int64_t, int, const float*, float*);
    float (*greatest)(const float*, const float*, int64_t);
    void (*exponentials)(const float*, int64_t, float, float*);
    void (*windows_taken)(const float*, const float*, int64_t, float, float, double&, double&);
    int64_t (*choose_parents)(ParentsTask&, int32_t*);
    void (*foresee)(const float*, int, const float*, float*, float*, float*);
    int64_t (*plan_cells)(CellsTask&, Planned*);
    float (*distance2)(const WindowTask&);
};

}  // namespace

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx2,fma,f16c")
#endif
namespace avx512 {
constexpr int QT = 4, VT = 3, SPLIT = 2;
PS_INLINE Vector half_to_float(const uint16_t* from) {
    return Vector(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
PS_INLINE Vector bytes_to_float(const uint8_t* from) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return Vector(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)));
}
#define PS_LEVEL 512
#include "lists_kernel.h"
#undef PS_LEVEL
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
constexpr int QT = 2, VT = 2, SPLIT = 1;
PS_INLINE Vector half_to_float(const uint16_t* from) {
    const __m256 x[2] = {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))),
                         _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8)))};
    Vector both;
    __builtin_memcpy(&both, x, sizeof both);
    return both;
}
PS_INLINE Vector bytes_to_float(const uint8_t* from) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m256 x[2] = {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
                         _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
    Vector both;
    __builtin_memcpy(&both, x, sizeof both);
    return both;
}
#define PS_LEVEL 256
#include "lists_kernel.h"
#undef PS_LEVEL
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // x86-64

namespace plain {
constexpr int QT = 2, VT = 1, SPLIT = 1;
// Half floats without hardware: the exponent moves over, subnormals come out of a product.
PS_INLINE Vector half_to_float(const uint16_t* from) {
    float to[LANES];
    for (int d = 0; d < LANES; ++d) {
        const uint32_t bits = uint32_t(from[d] & 0x7fff) << 13 | uint32_t(from[d] & 0x8000) << 16;
        float x;
        std::memcpy(&x, &bits, sizeof x);
        to[d] = x * 0x1p112f;
    }
    Vector all;
    __builtin_memcpy(&all, to, sizeof all);
    return all;
}
PS_INLINE Vector bytes_to_float(const uint8_t* from) {
    Vector all;
    for (int i = 0; i < LANES; ++i) all[i] = float(from[i]);
    return all;
}
#define PS_LEVEL 128
#include "lists_kernel.h"
#undef PS_LEVEL
}  // namespace plain

namespace {

const ListLevel LEVELS[] = {
#if defined(__x86_64__)
    {"avx512", avx512::scan_cell_entry, avx512::product, avx512::greatest, avx512::exponentials, avx512::windows_taken, avx512::choose_parents, avx512::foresee, avx512::plan_cells,
     avx512::distance2},
    {"avx2", avx2::scan_cell_entry, avx2::product, avx2::greatest, avx2::exponentials, avx2::windows_taken, avx2::choose_parents, avx2::foresee, avx2::plan_cells,
     avx2::distance2},
#endif
    {"plain", plain::scan_cell_entry, plain::product, plain::greatest, plain::exponentials, plain::windows_taken, plain::choose_parents, plain::foresee, plain::plan_cells,
     plain::distance2},
};

// A stateless generator (splitmix64): the same numbers for the same seed, wherever they are drawn.
uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

int64_t padded(int64_t count) {
    return (count + LANES - 1) / LANES * LANES;
}

template <typename T>
class Aligned {
    T* memory;

public:
    explicit Aligned(int64_t count)
        : memory(static_cast<T*>(::operator new(size_t(count) * sizeof(T), std::align_val_t(64)))) {}
    ~Aligned() { ::operator delete(memory, std::align_val_t(64)); }
    Aligned(const Aligned&) = delete;
    Aligned& operator=(const Aligned&) = delete;
    T* get() const { return memory; }
};

// A window met by a query that is compared pixel by pixel: what the scan weighed it, with all that it stands for and
// alone, and how many equal ones there are, in bits; its squared distance; where its first pixel lies; its centre's value.
struct Heavy {
    float log_size, log_weight, log_count, distance;
    int32_t image, row, col;
    float value[MOST_CHANNELS];
    bool certain;                    // proposed by a neighbour: then it stands for itself alone
};

// A query between the steps. Sums are relative to 2^m, second moments to 2^(2 m).
struct State {
    double m = 0, s = 0, s2 = 0, ss = 0, v[MOST_CHANNELS] = {}, vs[MOST_CHANNELS] = {}, vv[MOST_CHANNELS] = {};
    int64_t window = 0;              // where its own window starts in z
    float threshold = -INFINITY;     // of the sample: windows of a larger size are in it for certain
    std::vector<Heavy> heavy;
    std::vector<Heavy> best[2];      // the heaviest, for neighbours: before and after a round

    // Makes m at least so many bits.
    void refer_to(double least) {
        if (least <= m) return;
        const double f = std::exp2(m - least);
        m = least, s *= f, s2 *= f * f, ss *= f * f;
        for (int c = 0; c < MOST_CHANNELS; ++c) v[c] *= f, vs[c] *= f * f, vv[c] *= f * f;
    }
};

// What all blocks of one scan share.
struct Region {
    const Scan& scan;
    const Lists& lists;
    const ListLevel& level;
    int64_t parents, parent_row;     // and padded to whole vectors
    std::vector<float> moments;      // [parents, 2 channels, SIBLINGS]
    std::vector<float> parent_competing, parent_moments;  // [parent_row], [channels, parent_row]
    double windows = 0;              // that compete
    int64_t pitch;
    std::vector<float> columns;      // 1 for those of a window, in whole vectors
    std::vector<float> z;            // with room for a vector behind
    std::vector<float> axes, shift;
    // log E[w] of a window as a product with a query's features and their squares: of parents [2 rank, parent_row]; of
    // cells [parents, 4 rank + 2, SIBLINGS], by family and with log E[w^2].
    std::vector<float> parent_weights, parent_constants, weights;
    std::vector<float> q;            // [queries, pitch] features
    std::vector<State> states;

    Region(const Scan& scan, const ListLevel& level)
        : scan(scan), lists(scan.lists), level(level), parents(lists.cells / SIBLINGS), parent_row(padded(parents)),
          moments(size_t(lists.cells * 2 * scan.channels), 0.f), parent_competing(size_t(parent_row), 0.f),
          parent_moments(size_t(parent_row * scan.channels), 0.f), pitch(padded(scan.used_rank)),
          columns(size_t(padded(scan.patch_size)), 0.f) {
        const int64_t images = 1 + *std::max_element(scan.items, scan.items + scan.queries);
        const int64_t size = images * scan.channels * plane();
        q.resize(size_t(scan.queries * pitch)), states.resize(size_t(scan.queries));
        for (int i = 0; i < scan.queries; ++i) states[size_t(i)].window = window_of(i);
        z.reserve(size_t(size + LANES));
        z.assign(scan.z, scan.z + size);
        z.resize(size_t(size + LANES), 0.f);
        for (int j = 0; j < scan.patch_size; ++j) columns[size_t(j)] = 1.f;
        const int parts = 2 * scan.channels;
        std::vector<float> repeats(size_t(parent_row), 0.f);  // of a parent's windows, on average; then its logarithm
        for (int64_t p = 0; p < parents; ++p) {
            float* const of_parent = parent_moments.data() + p;
            for (int64_t c = p * SIBLINGS; c < (p + 1) * SIBLINGS; ++c) {
                const float n = lists.competing[c];
                windows += double(n), parent_competing[size_t(p)] += n;
                repeats[size_t(p)] += n * std::exp(lists.log_repeats[c]);
                for (int i = 0; i < parts; ++i) {
                    const float moment = lists.moments[c * parts + i];
                    moments[size_t((p * parts + i) * SIBLINGS + c % SIBLINGS)] = moment;
                    if (i < scan.channels) of_parent[i * parent_row] += n * moment;
                }
            }
            const float n = std::max(1.f, parent_competing[size_t(p)]);
            repeats[size_t(p)] = std::log(std::max(1.f, repeats[size_t(p)] / n));
            for (int i = 0; i < scan.channels; ++i) of_parent[i * parent_row] /= n;
        }
        const int window_pixels = scan.channels * scan.patch_size * scan.patch_size;
        axes.assign(size_t(window_pixels * pitch), 0.f), shift.assign(size_t(pitch), 0.f);
        for (int64_t d = 0; d < scan.used_rank; ++d) {
            double along = 0;
            for (int i = 0; i < window_pixels; ++i) {
                axes[size_t(i * pitch + d)] = scan.axes[int64_t(i) * lists.rank + d];
                along += double(scan.centre[i]) * double(scan.axes[int64_t(i) * lists.rank + d]);
            }
            shift[size_t(d)] = float(-along);
        }
        // A Gaussian kernel over a Gaussian cell is a Gaussian of their summed variance: with precision = 1 / (sigma^2 +
        // variance), log E[w] = -1/2 sum_d log(1 + variance_d / sigma^2) + precision_d (q_d - mean_d)^2. The same for the
        // square of the kernel, whose variance is sigma^2 / 2.
        const int rank = scan.foreseen_rank;
        const float sigma2 = float(scan.sigma * scan.sigma);
        parent_weights.assign(size_t(2 * rank * parent_row), 0.f), parent_constants = repeats;
        std::vector<float> spread(size_t(parent_row), 1.f);
        for (int d = 0; d < rank; ++d) {
            float* const linear = parent_weights.data() + d * parent_row;
            const float* const mean = lists.parent_mean + d * (lists.pitch / SIBLINGS);
            const float* const variance = lists.parent_variance + d * (lists.pitch / SIBLINGS);
            for (int64_t p = 0; p < parents; ++p) {
                const float precision = 1 / (sigma2 + variance[p]);
                linear[p] = precision * mean[p], linear[rank * parent_row + p] = -0.5f * precision;
                parent_constants[size_t(p)] -= 0.5f * precision * mean[p] * mean[p];
                spread[size_t(p)] *= std::min(1e4f, 1 + variance[p] / sigma2);
            }
            if (d + 1 < rank && d % 8 < 7) continue;  // so many factors fit a float
            for (int64_t p = 0; p < parents; ++p)
                parent_constants[size_t(p)] -= 0.5f * std::log(spread[size_t(p)]), spread[size_t(p)] = 1;
        }
        weights.resize(size_t((4 * rank + 2) * lists.cells));
        for (int64_t p = 0; p < parents; ++p) {
            float* const to = weights.data() + (4 * rank + 2) * p * SIBLINGS;
            Vector constant[2], product[2];
            for (int c = 0; c < SIBLINGS; ++c)
                for (int power : {0, 1})
                    constant[power][c] = float(power + 1) * lists.log_repeats[p * SIBLINGS + c], product[power][c] = 1.f;
            for (int d = 0; d < rank; ++d) {
                Vector mean, variance;
                std::memcpy(&mean, lists.mean + d * lists.pitch + p * SIBLINGS, sizeof mean);
                std::memcpy(&variance, lists.variance + d * lists.pitch + p * SIBLINGS, sizeof variance);
                for (int power : {0, 1}) {
                    const float kernel = power ? sigma2 / 2 : sigma2;
                    const Vector precision = 1 / (kernel + variance), linear = precision * mean;
                    const Vector square = -0.5f * precision;
                    std::memcpy(to + (2 + 4 * d + 2 * power) * SIBLINGS, &linear, sizeof linear);
                    std::memcpy(to + (3 + 4 * d + 2 * power) * SIBLINGS, &square, sizeof square);
                    constant[power] -= 0.5f * linear * mean;
                    product[power] *= 1 + variance / kernel;
                    if (d + 1 < rank && d % 4 < 3) continue;
                    for (int c = 0; c < SIBLINGS; ++c) constant[power][c] -= 0.5f * std::log(std::min(3e38f, product[power][c]));
                    product[power] = product[power] * 0 + 1;
                }
            }
            std::memcpy(to, constant, sizeof constant);
        }
    }

    // Of the noisy images: a row; a channel; where a query's window starts.
    int64_t wide() const { return scan.width + scan.patch_size - 1; }
    int64_t plane() const { return (scan.height + scan.patch_size - 1) * wide(); }
    const float* window(int query) const { return z.data() + states[size_t(query)].window; }
    int64_t window_of(int query) const {
        const int64_t number = scan.numbers[query];
        return scan.items[query] * scan.channels * plane() + (scan.row0 + number / scan.cols) * wide() +
               scan.col0 + number % scan.cols;
    }

    std::pair<int, int> pixel_of(int query) const {
        const int64_t number = scan.numbers[query];
        return {scan.row0 + int(number / scan.cols), scan.col0 + int(number % scan.cols)};
    }

    int64_t image_of(int64_t id) const { return id < 0 ? scan.image_count : id / (int64_t(lists.rows) * lists.cols); }

    const uint8_t* ids(int64_t cell) const {
        return lists.data + lists.offsets[cell] + lists.sizes[cell] * lists.rank * 2;
    }

    float pixel(int64_t at) const {
        return scan.images_are_bytes ? float(static_cast<const uint8_t*>(scan.images)[at]) * (1 / 127.5f) - 1.f
                                     : static_cast<const float*>(scan.images)[at];
    }

    void prefetch(const Heavy& heavy) const {
        const int64_t pixel = scan.images_are_bytes ? 1 : 4, row = std::max(0, heavy.row);
        for (int c = 0; c < scan.channels; ++c) {
            const int64_t at = ((int64_t(heavy.image) * scan.channels + c) * scan.height + row) * scan.width;
            const char* const from = static_cast<const char*>(scan.images) + at * pixel;
            for (int64_t i = 0; i < scan.patch_size * scan.width * pixel; i += 64) __builtin_prefetch(from + i);
        }
    }

    // |window of the query - window of the bank|^2 over all pixels, zeros beyond the border; and the centre's value.
    void look(int query, Heavy& look) const {
        const int k = scan.patch_size, height = scan.height, width = scan.width;
        const int64_t plane = int64_t(height) * width;
        const int64_t image = int64_t(look.image) * scan.channels * plane;
        for (int c = 0; c < scan.channels; ++c)
            look.value[c] = pixel(image + c * plane + int64_t(look.row + k / 2) * width + look.col + k / 2);
        WindowTask t{};
        t.window = window(query), t.pitch = wide(), t.plane = this->plane();
        t.channels = scan.channels, t.size = k, t.height = height, t.width = width;
        t.row0 = std::max(0, -look.row), t.row1 = std::min(k, height - look.row);
        t.at = image + int64_t(look.row) * width + look.col;
        // Vectors read past a window's row; at either end of the images there must be something to read.
        const int64_t begin = t.at + int64_t(t.row0) * width;
        const int64_t end = t.at + ((scan.channels - 1) * int64_t(height) + t.row1 - 1) * width + padded(k);
        if (k <= MOST_WIDE && begin >= 0 && end <= scan.image_count * scan.channels * plane) {
            alignas(64) std::array<float, MOST_WIDE> inside;
            const bool clipped = look.col < 0 || look.col + k > width;
            for (int j = 0; clipped && j < padded(k); ++j)
                inside[size_t(j)] = j < k && look.col + j >= 0 && look.col + j < width ? 1.f : 0.f;
            t.columns = columns.data(), t.inside = clipped ? inside.data() : t.columns;
            t.bytes = scan.images_are_bytes ? static_cast<const uint8_t*>(scan.images) : nullptr;
            t.floats = scan.images_are_bytes ? nullptr : static_cast<const float*>(scan.images);
            look.distance = level.distance2(t);
            return;
        }
        double total = 0;
        for (int c = 0; c < scan.channels; ++c)
            for (int y = 0; y < k; ++y)
                for (int x = 0; x < k; ++x) {
                    const int row = look.row + y, col = look.col + x;
                    const bool inside = row >= 0 && row < height && col >= 0 && col < width;
                    const float p = inside ? pixel(image + c * plane + int64_t(row) * width + col) : 0.f;
                    const double d = double(t.window[c * t.plane + y * t.pitch + x] - p);
                    total += d * d;
                }
        look.distance = float(total);
    }

    static constexpr int MOST_WIDE = 256;
};

// Aligned pointer into a vector that is large enough.
float* room(std::vector<float>& memory, int64_t count) {
    if (int64_t(memory.size()) < count + LANES) memory.resize(size_t(count + LANES));
    const auto at = reinterpret_cast<uintptr_t>(memory.data());
    return memory.data() + (64 - at % 64) % 64 / sizeof(float);
}

constexpr int AT_ONCE = 12;          // queries whose weights are foreseen together

// The families of a query's parents that matter, and what is foreseen of their cells.
struct Families {
    int64_t count;
    double windows;                  // that compete
    float top;                       // log of the greatest weight expected of a parent
    double far[1 + MOST_CHANNELS];   // what is foreseen of other parents, relative to that
    std::vector<int32_t> parents;
    std::vector<float> expected, expected2, competing, score;  // [families, SIBLINGS], from `at` on
    float* at(std::vector<float>& part) { return room(part, 0); }
};

// A thread's scratch, for regions of any size.
struct Workspace {
    std::vector<float> flat, squares, parents, parent_share, ranked, share;
    std::array<Families, AT_ONCE> foreseen;
    std::vector<float> few, few_competing, block, runs;
    std::vector<int32_t> order, active;
    std::vector<uint32_t> luck;
    std::vector<Planned> plan;
};

// Some queries of one region: planned, scanned, and the windows of their samples compared.
class Block {
    Region& region;
    const Scan& scan;
    const Lists& lists;
    const ListLevel& level;
    const int first, count;
    Workspace& space;
    Interrupt& interrupt;
    const bool calling;
    const double bits;               // log2(e) / sigma^2

    // What is foreseen of a query: weights relative to 2^(top), variances to 2^(2 top), calibrated by what is found.
    struct Foreseen {
        double sure, far[1 + MOST_CHANNELS], unseen[1 + 2 * MOST_CHANNELS];
        double pilot_weight = 0;
        bool glanced = false;
        int64_t pilot;               // place in `planned` of the surely taken cell of which most weight is expected
    };
    std::vector<Planned> planned;
    std::vector<Foreseen> foreseen;
    std::vector<float> m, calibration;
    std::vector<uint32_t> luck;
    std::vector<Samples> samples;
    std::vector<char> again;         // which queries are scanned: all, then those whose sample came out too small
    float* const q;                  // [count, pitch]
    Aligned<float> sums;
    std::vector<Entry> entries;
    std::vector<int64_t> first_entry;

public:
    Block(Region& region, int first, int count, Workspace& space, Interrupt& interrupt, bool calling)
        : region(region), scan(region.scan), lists(region.lists), level(region.level), first(first), count(count),
          space(space), interrupt(interrupt), calling(calling), bits(LOG2E / (scan.sigma * scan.sigma)),
          foreseen(size_t(count)), m(size_t(count), -FAR), calibration(size_t(count), -1e9f), luck(size_t(count)),
          samples(size_t(count)), again(size_t(count), 1), q(region.q.data() + first * region.pitch), sums(int64_t(count) * LANES) {
        std::fill_n(sums.get(), int64_t(count) * LANES, 0.f);
        const int k = scan.patch_size;
        const int64_t pixels = int64_t(scan.channels) * k * k;
        space.flat.resize(size_t(count * pixels));
        float* flat = space.flat.data();
        for (int i = 0; i < count; ++i) {
            const float* const window = region.window(first + i);
            for (int c = 0; c < scan.channels; ++c)
                for (int y = 0; y < k; ++y, flat += k) std::copy_n(window + c * region.plane() + y * region.wide(), k, flat);
            // What a query draws depends on the seed and on its own number, not on what else is in the call.
            luck[size_t(i)] = uint32_t(mix(mix(scan.seed) ^ uint64_t(scan.numbers[first + i]) * 0x2545f4914f6cdd1du) >> 32);
        }
        level.product(space.flat.data(), pixels, count, region.axes.data(), region.pitch, int(pixels),
                      region.shift.data(), q);
    }

    // Windows scanned, or -1 if asked to stop.
    int64_t run() {
        const int rank = scan.foreseen_rank;
        space.squares.resize(size_t(AT_ONCE * 2 * rank));
        float* const parents = room(space.parents, AT_ONCE * region.parent_row);
        for (int i = 0; i < count; i += AT_ONCE) {
            if (interrupt.stopped(calling)) return -1;
            const int some = std::min(AT_ONCE, count - i);
            for (int j = 0; j < some; ++j)
                for (int d = 0; d < rank; ++d) {
                    const float x = q[(i + j) * region.pitch + d];
                    space.squares[size_t(j * 2 * rank + d)] = x, space.squares[size_t((j * 2 + 1) * rank + d)] = x * x;
                }
            level.product(space.squares.data(), 2 * rank, some, region.parent_weights.data(), region.parent_row, 2 * rank,
                          region.parent_constants.data(), parents);
            foresee(i, some, parents);
            for (int j = 0; j < some; ++j) plan(i + j, space.foreseen[size_t(j)]);
        }
        // A glance at the most promising cell of every query tells where its weights lie and about how large its sums
        // will be, so that most windows need not be looked at closely. Cells taken by chance go last, when the others
        // have told how foreseen weights compare with real ones.
        group_by_cell(0);
        if (!scan_cells(0)) return -1;
        calibrate();
        for (int i = 0; i < count; ++i) {
            const double all = foreseen[size_t(i)].sure + foreseen[size_t(i)].far[0];
            samples[size_t(i)].threshold =
                float(double(calibration[size_t(i)]) + std::log2(all / std::max(1, scan.recheck)) - DOUBT_BITS);
        }
        std::fill_n(sums.get(), int64_t(count) * LANES, 0.f);
        int64_t pairs = scan_planned();
        if (pairs < 0) return -1;
        // Where that promised far too much, hardly a window was large enough for the sample: again without it.
        again.assign(size_t(count), 0);
        for (int i = 0; i < count; ++i)
            if (scan.recheck && too_few(i)) {
                again[size_t(i)] = 1, m[size_t(i)] = -FAR, samples[size_t(i)] = {};
                std::fill_n(sums.get() + int64_t(i) * LANES, LANES, 0.f);
            }
        if (std::count(again.begin(), again.end(), 1)) {
            const int64_t more = scan_planned();
            if (more < 0) return -1;
            pairs += more;
        }
        for (int i = 0; i < count; ++i) leave(i);
        return look_again() ? pairs : -1;
    }

private:
    // The cells that are surely looked into, then those taken by chance; windows scanned, or -1 if asked to stop.
    int64_t scan_planned() {
        int64_t pairs = group_by_cell(1);
        if (!scan_cells(scan.recheck)) return -1;
        calibrate();
        pairs += group_by_cell(2);
        return scan_cells(scan.recheck) ? pairs : -1;
    }

    // Whether a sample has few windows that do not hold most of the weight either.
    bool too_few(int i) const {
        const std::vector<Sample>& kept = samples[size_t(i)].kept;
        if (int(kept.size()) >= scan.recheck / 4) return false;
        double held = 0;
        for (const Sample& sample : kept) held += std::exp2(double(sample.log_size) - double(m[size_t(i)]) * bits);
        return held < 0.75 * double(sums.get()[int64_t(i) * LANES]);
    }

    // Queries i .. i + some: parents that matter, and what is to be expected of their cells.
    void foresee(int i, int some, const float* of_parents) {
        for (int j = 0; j < some; ++j) choose(of_parents + j * region.parent_row, space.foreseen[size_t(j)]);
        // Family after family, so that its weights are read once for all queries.
        const int rank = scan.foreseen_rank;
        std::array<size_t, AT_ONCE> next{};
        for (int32_t parent = 0; parent < int32_t(region.parents); ++parent)
            for (int j = 0; j < some; ++j) {
                Families& f = space.foreseen[size_t(j)];
                if (next[size_t(j)] == size_t(f.count) || f.parents[next[size_t(j)]] != parent) continue;
                const size_t at = next[size_t(j)]++ * SIBLINGS;
                level.foresee(q + (i + j) * region.pitch, rank,
                              region.weights.data() + (4 * rank + 2) * int64_t(parent) * SIBLINGS, f.at(f.expected) + at,
                              f.at(f.expected2) + at, f.at(f.score) + at);
                std::copy_n(lists.competing + int64_t(parent) * SIBLINGS, SIBLINGS, f.at(f.competing) + at);
            }
    }

    void choose(const float* of_parents, Families& families) {
        const float parent_top = level.greatest(of_parents, region.parent_competing.data(), region.parent_row);
        float* const parent_share = room(space.parent_share, region.parent_row);
        level.exponentials(of_parents, region.parent_row, parent_top, parent_share);
        double all, rising;
        level.windows_taken(parent_share, region.parent_competing.data(), region.parent_row, 1, 0, all, rising);
        ParentsTask parents{};
        parents.share = parent_share, parents.competing = region.parent_competing.data();
        parents.moments = region.parent_moments.data(), parents.parents = region.parent_row;
        parents.channels = scan.channels, parents.least = LEAST_PARENT * float(all);
        families.parents.resize(size_t(region.parent_row));
        families.count = level.choose_parents(parents, families.parents.data());
        if (parents.far[0] > double(MOST_SKIPPED) * all) {
            parents.least = MOST_SKIPPED / float(region.parents) * float(all);
            families.count = level.choose_parents(parents, families.parents.data());
        }
        const double least = std::min(1., std::max(LEAST_FAMILIES, 4 * scan.budget));
        if (double(families.count) < least * double(region.parents)) {
            // At low noise weights are foreseen badly: about so many at least, by the rank among one parent in so many.
            const int64_t step = 1 + region.parents / 1024, some = (region.parents + step - 1) / step;
            const int64_t rank = std::min(some - 1, int64_t(least * double(some)));
            float* const ranked = room(space.ranked, some);
            for (int64_t i = 0; i < some; ++i)
                ranked[i] = parent_share[i * step] * region.parent_competing[size_t(i * step)];
            std::nth_element(ranked, ranked + rank, ranked + some, std::greater<float>());
            parents.least = std::min(parents.least, std::nextafter(ranked[rank], 0.f));
            families.count = level.choose_parents(parents, families.parents.data());
        }
        families.top = parent_top;
        std::copy_n(parents.far, 1 + MOST_CHANNELS, families.far);
        families.windows = 0;
        for (int64_t f = 0; f < families.count; ++f)
            families.windows += double(region.parent_competing[size_t(families.parents[size_t(f)])]);
        for (auto* part : {&families.expected, &families.expected2, &families.competing, &families.score})
            room(*part, families.count * SIBLINGS);
    }

    void plan(int i, Families& f) {
        const int64_t families = f.count, cells = families * SIBLINGS;
        const float *const expected = f.at(f.expected), *const expected2 = f.at(f.expected2);
        const float* const competing = f.at(f.competing);
        float *const share = room(space.share, cells), *const score = f.at(f.score);
        const double windows = f.windows;
        const float top = level.greatest(expected, competing, cells);
        level.exponentials(expected, cells, top, share);
        level.exponentials(score, cells, level.greatest(score, competing, cells), score);
        const double wanted = std::min(windows, scan.budget * region.windows);
        double scale = 1;
        if (families >= 8 * STRIDE) {
            space.few.clear(), space.few_competing.clear();
            double few = 0;
            for (int64_t f = 0; f < families; f += STRIDE)
                for (int64_t c = f * SIBLINGS; c < (f + 1) * SIBLINGS; ++c) {
                    space.few.push_back(score[c]), space.few_competing.push_back(competing[c]);
                    few += double(competing[c]);
                }
            scale = raise(space.few.data(), space.few_competing.data(), int64_t(space.few.size()), wanted * few / windows,
                          scale, 0.05);
        }
        scale = raise(score, competing, cells, wanted, scale, 0.02);

        CellsTask t{};
        t.share = share, t.score = score, t.competing = competing, t.expected2 = expected2, t.parents = f.parents.data();
        t.moments = region.moments.data(), t.families = families;
        t.channels = scan.channels, t.scale = float(scale), t.floor = scan.budget < 1 ? float(std::min(1., scan.floor)) : 1.f;
        t.top2 = 2 * top, t.luck = luck[size_t(i)];
        if (int64_t(space.plan.size()) < cells) space.plan.resize(size_t(cells));
        const int64_t taken = level.plan_cells(t, space.plan.data());
        // What lies under other parents is not looked into at all: foreseen, and in doubt by a third of it.
        constexpr double DOUBT = 1 / (9 * EXPECTED_SHARE);
        const double unit = std::exp(std::min(80., double(f.top) - double(top)));
        const double skipped = unit * f.far[0];
        t.far[0] += skipped, t.unseen[0] += DOUBT * skipped * skipped;
        for (int c = 0; c < scan.channels; ++c) {
            const double value = unit * f.far[1 + c];
            t.far[1 + c] += value;
            t.unseen[1 + c] += DOUBT * skipped * value;
            t.unseen[1 + scan.channels + c] += DOUBT * value * value;
        }
        Foreseen& known = foreseen[size_t(i)];
        known.sure = t.sure;
        std::copy_n(t.far, 1 + MOST_CHANNELS, known.far);
        std::copy_n(t.unseen, 1 + 2 * MOST_CHANNELS, known.unseen);
        known.pilot = -1;
        const double one_group = double(LANES) / (LANES - 1);
        for (int64_t p = 0; p < taken; ++p) {
            Planned planning = space.plan[size_t(p)];
            Entry& entry = planning.entry;
            const double n = double(lists.competing[planning.cell]), stands_for = n / entry.take;
            const bool sure = entry.chance >= 1;
            if (sure && double(entry.foreseen) > known.pilot_weight)
                known.pilot_weight = double(entry.foreseen), known.pilot = int64_t(planned.size());
            entry.query = i;
            entry.factor = float(stands_for / double(entry.chance));
            entry.scatter = entry.take < int(n)
                                ? float((1 - entry.take / n) * stands_for * stands_for * one_group / double(entry.chance))
                                : 0.f;
            if (sure) entry.foreseen = 0;
            planned.push_back(planning);
        }
    }

    // The t at which shares min(1, max(floor, t share)) add up to `wanted` windows, by Newton steps on its logarithm.
    double raise(const float* share, const float* competing, int64_t cells, double wanted, double t,
                 double tolerance) const {
        double low = 0, high = 1e38;
        for (int step = 0; step < 60; ++step) {
            double taken, rising;
            level.windows_taken(share, competing, cells, float(t), float(std::min(1., scan.floor)), taken, rising);
            (taken > wanted ? high : low) = t;
            if (std::abs(taken - wanted) <= tolerance * wanted || high < low * 1.0001) break;
            double next = rising > 0 ? t * std::exp(std::min(20., (wanted - taken) / rising)) : 0;
            if (!(next > low && next < high))
                next = low > 0 && high < 1e38 ? std::sqrt(low * high) : taken > wanted ? t / 64 : t * 64;
            if (next > 1e37 || next < 1e-37) break;
            t = next;
        }
        return t;
    }

    static constexpr double MOST_FORESEEN = 4;  // weight foreseen of other cells, in units of what sure ones hold
    static constexpr double DOUBT_BITS = 1.5;  // by how much a first guess of a query's sum may be too large

    // Foreseen weights, in the scan's units: by what was found in cells of which `expected` had been foreseen.
    void calibrate() {
        for (int i = 0; i < count; ++i) {
            Foreseen& f = foreseen[size_t(i)];
            const double found = double(sums.get()[int64_t(i) * LANES]), expected = f.glanced ? f.sure : f.pilot_weight;
            f.glanced = true;
            // Where most is foreseen in cells that are not surely looked into, foresight is no guide.
            const double leading = std::max(expected, f.far[0] / MOST_FORESEEN);
            if (found > 0 && leading > 0)
                calibration[size_t(i)] = float(std::log2(found / leading) + double(m[size_t(i)]) * bits);
        }
    }

    // Turns the plans into each cell's list of queries: the most promising (0), the sure (1), those by chance (2).
    int64_t group_by_cell(int turn) {
        first_entry.assign(size_t(lists.cells) + 1, 0);
        int64_t pairs = 0;
        const auto each = [&](auto visit) {
            if (turn == 0) {
                for (const Foreseen& f : foreseen)
                    if (f.pilot >= 0) visit(planned[size_t(f.pilot)]);
                return;
            }
            for (const Planned& planning : planned)
                if ((planning.entry.chance < 1) == (turn == 2) && again[size_t(planning.entry.query)]) visit(planning);
        };
        each([&](const Planned& p) { ++first_entry[size_t(p.cell) + 1], pairs += p.entry.take; });
        for (int64_t c = 0; c < lists.cells; ++c) first_entry[size_t(c) + 1] += first_entry[size_t(c)];
        entries.resize(size_t(first_entry.back()));
        std::vector<int64_t> at(first_entry.begin(), first_entry.end() - 1);
        each([&](const Planned& p) { entries[size_t(at[size_t(p.cell)]++)] = p.entry; });
        return pairs;
    }

    bool scan_cells(int recheck) {
        int64_t largest = 0;
        for (int64_t c = 0; c < lists.cells; ++c)
            largest = std::max(largest, first_entry[size_t(c) + 1] - first_entry[size_t(c)]);
        const int64_t channels = scan.channels;
        CellTask t{};
        t.channels = scan.channels, t.rank = scan.used_rank, t.stored_rank = lists.rank, t.q_pitch = int(region.pitch);
        t.scale = float(bits);
        t.q = q, t.m = m.data(), t.sums = sums.get(), t.calibration = calibration.data();
        t.negligible = float(NEGLIGIBLE_BITS / bits), t.rise = float(16 / bits);
        t.samples = samples.data(), t.recheck = recheck, t.luck = luck.data();
        t.runs = room(space.runs, largest * RUN_FLOATS);
        t.block = room(space.block, BLOCK * (scan.used_rank + 2 + channels));
        t.block_squares = t.block + BLOCK * scan.used_rank, t.block_counts = t.block_squares + BLOCK;
        t.block_values = t.block_counts + BLOCK;
        space.luck.resize(BLOCK);
        t.block_luck = space.luck.data();
        t.interrupt = &interrupt, t.calling_thread = calling;
        space.active.clear();
        for (int64_t cell = 0; cell < lists.cells; ++cell)
            if (first_entry[size_t(cell)] < first_entry[size_t(cell) + 1]) space.active.push_back(int32_t(cell));
        const auto start_of = [&](int64_t cell, int64_t windows) {
            return int64_t(mix(scan.seed ^ uint64_t(cell) * 0xd6e8feb86659fd93u) % uint64_t(windows));
        };
        for (size_t n = 0; n < space.active.size(); ++n) {
            const int64_t cell = space.active[n];
            const int64_t begin = first_entry[size_t(cell)], end = first_entry[size_t(cell) + 1];
            if (n % 64 == 0 && interrupt.stopped(calling)) return false;
            if (n + 1 < space.active.size() && !lists.allowed) {
                // The first windows of the next cell, meanwhile.
                const int64_t next = space.active[n + 1], row = lists.rank * 2;
                const int64_t start = start_of(next, lists.sizes[next]), size = lists.values_are_bytes ? 1 : 4;
                const uint8_t* const from = lists.data + lists.offsets[next] + start * row;
                for (int64_t at = 0; at < 2 * LANES * row; at += 64) __builtin_prefetch(from + at);
                const char* const values = static_cast<const char*>(lists.values);
                for (int64_t at = 0; at < LANES * channels * size + 64; at += 64)
                    __builtin_prefetch(values + (lists.starts[next] + start) * channels * size + at);
                if (lists.counts) __builtin_prefetch(lists.counts + lists.starts[next] + start);
            }
            std::sort(entries.begin() + begin, entries.begin() + end, [](const Entry& a, const Entry& b) {
                return a.take != b.take ? a.take > b.take : a.query < b.query;
            });
            const int64_t size = lists.sizes[cell], start = lists.starts[cell];
            t.entries = entries.data() + begin, t.entry_count = int(end - begin), t.cell = int32_t(cell);
            t.moments = lists.moments + cell * 2 * channels;
            t.features = reinterpret_cast<const uint16_t*>(lists.data + lists.offsets[cell]);
            t.value_bytes = lists.values_are_bytes ? static_cast<const uint8_t*>(lists.values) + start * channels : nullptr;
            t.value_floats = lists.values_are_bytes ? nullptr : static_cast<const float*>(lists.values) + start * channels;
            t.counts = lists.counts ? lists.counts + start : nullptr, t.repeats = lists.repeats;
            t.order = nullptr, t.competing = size;
            if (lists.allowed) {
                const uint8_t* const ids = region.ids(cell);
                space.order.clear();
                for (int64_t i = 0; i < size; ++i) {
                    int64_t id;
                    std::memcpy(&id, ids + i * 8, 8);
                    const int64_t image = region.image_of(id);
                    if (image < scan.image_count && lists.allowed[image]) space.order.push_back(int32_t(i));
                }
                t.order = space.order.data(), t.competing = int64_t(space.order.size());
            }
            if (t.competing == 0) continue;
            t.start = start_of(cell, t.competing);
            t.first_window = start;
            level.scan_cell(t);
        }
        return true;
    }

    // A query's sums and the windows of its sample.
    void leave(int i) {
        const int channels = scan.channels;
        const float* const x = sums.get() + int64_t(i) * LANES;
        State& state = region.states[size_t(first + i)];
        state.m = double(m[size_t(i)]) * bits;
        state.s = double(x[0]), state.s2 = double(x[1]), state.ss = double(x[2]);
        for (int c = 0; c < channels; ++c) {
            state.v[c] = double(x[3 + c]);
            state.vs[c] = double(x[3 + channels + c]);
            state.vv[c] = double(x[3 + 2 * channels + c]);
        }
        // Cells taken by chance were entered by how they differ from what was foreseen: here is the rest. And a part of
        // the variance that their moments let expect of the unscanned, since where nothing was seen scatter says nothing.
        const Foreseen& f = foreseen[size_t(i)];
        const double unit = std::exp2(std::min(100., double(calibration[size_t(i)]) - state.m));
        state.s += unit * f.far[0];
        for (int c = 0; c < channels; ++c) state.v[c] += unit * f.far[1 + c];
        double guard = EXPECTED_SHARE * unit * unit;
        if (guard * f.unseen[0] > 4 * state.s * state.s) guard = 4 * state.s * state.s / f.unseen[0];  // values' range is 2
        state.ss += guard * f.unseen[0];
        for (int c = 0; c < channels; ++c) {
            state.vs[c] += guard * f.unseen[1 + c];
            state.vv[c] += guard * f.unseen[1 + channels + c];
        }

        Samples& drawn = samples[size_t(i)];
        drawn.shrink(scan.recheck);
        state.threshold = drawn.threshold;
        for (const Sample& sample : drawn.kept) __builtin_prefetch(region.ids(sample.cell) + int64_t(sample.at) * 8);
        const int64_t per_image = int64_t(lists.rows) * lists.cols;
        const int r = scan.patch_size / 2;
        state.heavy.reserve(drawn.kept.size());
        for (const Sample& sample : drawn.kept) {
            if (sample.priority <= drawn.threshold) continue;
            int64_t id;
            std::memcpy(&id, region.ids(sample.cell) + int64_t(sample.at) * 8, 8);
            if (region.image_of(id) >= scan.image_count) throw std::runtime_error("index: a window lies outside the bank");
            state.heavy.push_back({sample.log_size, sample.log_weight, sample.log_count, 0, int32_t(id / per_image),
                                   int32_t(id % per_image / lists.cols) + lists.row0 - r,
                                   int32_t(id % lists.cols) + lists.col0 - r, {}, false});
        }
        drawn = {};
    }

    static constexpr double EXPECTED_SHARE = 0.1;

    // Compares the sampled windows of all queries pixel by pixel, image after image, so that each is fetched once.
    bool look_again() {
        struct Look {
            Heavy window;
            int query;
            Heavy* to;
        };
        std::vector<size_t> of_image(size_t(scan.image_count) + 1, 0);
        for (int i = 0; i < count; ++i)
            for (const Heavy& heavy : region.states[size_t(first + i)].heavy) ++of_image[size_t(heavy.image) + 1];
        for (size_t n = 0; n + 1 < of_image.size(); ++n) of_image[n + 1] += of_image[n];
        std::vector<Look> looks(of_image.back());
        for (int i = 0; i < count; ++i)
            for (Heavy& heavy : region.states[size_t(first + i)].heavy)
                looks[of_image[size_t(heavy.image)]++] = {heavy, first + i, &heavy};
        constexpr size_t AHEAD = 8;
        for (size_t n = 0; n < looks.size(); ++n) {
            if (n % 256 == 0 && interrupt.stopped(calling)) return false;
            if (n + AHEAD < looks.size()) {
                region.prefetch(looks[n + AHEAD].window);
                __builtin_prefetch(looks[n + AHEAD].to, 1);
            }
            region.look(looks[n].query, looks[n].window);
            *looks[n].to = looks[n].window;
        }
        return true;
    }
};

// Which query of which region every pixel of the noisy images is.
class Pixels {
    struct At {
        Region* region = nullptr;
        int query = -1;
    };
    int height = 1, width = 1;
    std::vector<At> at;              // [items, height, width]

public:
    explicit Pixels(const std::vector<std::unique_ptr<Region>>& regions) {
        int64_t items = 0;
        for (const auto& region : regions) {
            const Scan& scan = region->scan;
            height = std::max(height, scan.height), width = std::max(width, scan.width);
            items = std::max(items, 1 + *std::max_element(scan.items, scan.items + scan.queries));
        }
        at.resize(size_t(items * height * width));
        for (const auto& region : regions)
            for (int i = 0; i < region->scan.queries; ++i) {
                const auto [row, col] = region->pixel_of(i);
                at[size_t((region->scan.items[i] * height + row) * width + col)] = {region.get(), i};
            }
    }

    // Null where that pixel is not estimated.
    const State* state(int64_t item, int row, int col) const {
        if (row < 0 || row >= height || col < 0 || col >= width) return nullptr;
        const At& found = at[size_t((item * height + row) * width + col)];
        return found.region ? &found.region->states[size_t(found.query)] : nullptr;
    }
};

// The last steps: heavy windows that neighbours propose, and the result of a query with its error.
class Recheck {
    Region& region;
    const Pixels& pixels;
    const Scan& scan;
    const Lists& lists;
    const double bits, exact_bits;   // log2(e) / sigma^2, and half of that at the noise that counts in the end

public:
    Recheck(Region& region, const Pixels& pixels)
        : region(region), pixels(pixels), scan(region.scan), lists(region.lists), bits(LOG2E / (scan.sigma * scan.sigma)),
          exact_bits(LOG2E / (2 * scan.exact_sigma * scan.exact_sigma)) {}

    static constexpr int ROUNDS = 3;

    // The windows that weigh most in a query's sample, for its neighbours.
    void choose(int query, int round) {
        State& state = region.states[size_t(query)];
        std::vector<Heavy>& best = state.best[round % 2];
        best.clear();
        for (const Heavy& heavy : state.heavy)
            if (heavy.log_weight >= state.threshold) best.push_back(heavy);
        const auto nearer = [](const Heavy& a, const Heavy& b) {
            if (a.distance != b.distance) return a.distance < b.distance;
            if (a.image != b.image) return a.image < b.image;
            return a.row != b.row ? a.row < b.row : a.col < b.col;
        };
        if (best.size() > MOST_PROPOSED) {
            std::nth_element(best.begin(), best.begin() + MOST_PROPOSED, best.end(), nearer);
            best.resize(MOST_PROPOSED);
        }
    }

    // Images are smooth, so a window that is heavy at a pixel is, moved along, likely heavy at the next (PatchMatch,
    // Barnes et al. 2009). What neighbours propose is taken for certain, whether it was scanned or not: the rest is then
    // estimated without it. One heavier than the sample's threshold has been scanned if and only if it is in the sample.
    void listen(int query, int round) {
        State& state = region.states[size_t(query)];
        const auto [row, col] = region.pixel_of(query);
        const int r = scan.patch_size / 2;
        std::vector<Heavy> proposed;
        constexpr int BESIDE[4][2] = {{0, 1}, {0, -1}, {1, 0}, {-1, 0}};
        for (const auto& step : BESIDE) {
            const State* const neighbour = pixels.state(scan.items[query], row + step[0], col + step[1]);
            if (!neighbour) continue;
            for (Heavy heavy : neighbour->best[round % 2]) {
                heavy.row -= step[0], heavy.col -= step[1];
                const int at_row = heavy.row + r - lists.row0, at_col = heavy.col + r - lists.col0;
                if (at_row < 0 || at_col < 0 || at_row >= lists.rows || at_col >= lists.cols) continue;
                const auto same = [&](const Heavy& other) {
                    return other.image == heavy.image && other.row == heavy.row && other.col == heavy.col;
                };
                if (std::any_of(proposed.begin(), proposed.end(), same)) continue;
                proposed.push_back(heavy);
                const auto known = std::find_if(state.heavy.begin(), state.heavy.end(), same);
                if (known != state.heavy.end()) {
                    known->certain = true;
                    continue;
                }
                region.look(query, heavy);
                if (!may_matter(state, heavy)) continue;
                heavy.log_weight = heavy.log_size = rough_weight(query, heavy), heavy.log_count = 0;
                if (heavy.log_weight < state.threshold) continue;
                // Equal windows are stored once: one of the same distance is the same window.
                const auto equal = [&](const Heavy& other) {
                    return std::abs(other.distance - heavy.distance) <= 2e-6f * heavy.distance;
                };
                if (std::any_of(state.heavy.begin(), state.heavy.end(), equal)) continue;
                heavy.certain = true;
                state.heavy.push_back(heavy);
                // Not scanned, it was not in the sums.
                state.refer_to(double(heavy.log_weight));
                const double weight = std::exp2(double(heavy.log_weight) - state.m);
                state.s += weight, state.s2 += weight * weight;
                for (int c = 0; c < scan.channels; ++c) state.v[c] += weight * double(heavy.value[c]);
            }
        }
    }

    void finish(int query) {
        State& state = region.states[size_t(query)];
        const int channels = scan.channels;
        for (Heavy& heavy : state.heavy) {
            const float alone = heavy.log_weight + heavy.log_count;
            if (!heavy.certain || heavy.log_size <= alone) continue;
            const double excess = std::exp2(double(heavy.log_size) - state.m) - std::exp2(double(alone) - state.m);
            state.s -= excess;
            for (int c = 0; c < channels; ++c) state.v[c] -= excess * double(heavy.value[c]);
            heavy.log_size = alone;
        }
        double norm = 0;
        for (int d = 0; d < scan.used_rank; ++d) norm += std::pow(double(region.q[size_t(query * region.pitch + d)]), 2);
        double log_shift = -norm / (2 * scan.sigma * scan.sigma);
        correct(state, log_shift);
        scan.m[query] = state.m / LOG2E + log_shift;
        scan.s[query] = state.s, scan.s2[query] = state.s2, scan.ss[query] = state.ss;
        for (int c = 0; c < channels; ++c) {
            scan.v[query * channels + c] = state.v[c];
            scan.vs[query * channels + c] = state.vs[c];
            scan.vv[query * channels + c] = state.vv[c];
        }
        state = {};
    }

private:
    // Where features put windows in quite another order than pixels do (at low noise, far from everything), one that is not
    // in the sample may be the heaviest: the variance of the sample's values, as far as the lead over those falls short.
    double in_doubt(const State& state, int channel) const {
        if (!(state.threshold > -INFINITY) || state.heavy.size() < 2) return 0;
        double offset = 0, squares = 0, best = -INFINITY, mean = 0, variance = 0;
        const double size = double(state.heavy.size());
        for (const Heavy& heavy : state.heavy) {
            const double exact = -double(heavy.distance) * bits / 2, apart = exact - double(heavy.log_weight);
            offset += apart / size, squares += apart * apart / size, best = std::max(best, exact);
            mean += double(heavy.value[channel]) / size, variance += std::pow(double(heavy.value[channel]), 2) / size;
        }
        const double deviation = std::sqrt(std::max(0., squares - offset * offset));
        const double lead = best - offset - double(state.threshold);
        if (deviation * exact_bits * 2 / bits < DISORDER) return 0;
        return std::min(1., std::max(0., 1 - lead / (4 * deviation))) * std::max(0., variance - mean * mean);
    }

    static constexpr double DISORDER = 3;  // bits by which weights may be off before their order is doubted
    static constexpr size_t MOST_PROPOSED = 8;
    static constexpr double FEW_DRAWN = 4;  // so many sampled windows of the rest count as much as all sure ones together

    // Whether a window may be heavier than the sample's threshold, by its distance beside those of the sample.
    bool may_matter(const State& state, const Heavy& heavy) const {
        float nearest = INFINITY, weight = 0;
        for (const Heavy& other : state.heavy)
            if (other.distance < nearest) nearest = other.distance, weight = other.log_weight;
        constexpr double DOUBT = 4;
        return double(weight) - double(heavy.distance - nearest) * bits / 2 > double(state.threshold) - DOUBT ||
               state.heavy.empty();
    }

    // What the scan would weigh a window, in bits.
    float rough_weight(int query, const Heavy& heavy) const {
        const int k = scan.patch_size, channels = scan.channels, rank = scan.used_rank;
        std::vector<float> features(size_t(region.pitch)), flat(size_t(channels * k * k), 0.f);
        for (int c = 0; c < channels; ++c)
            for (int y = 0; y < k; ++y)
                for (int x = 0; x < k; ++x) {
                    const int row = heavy.row + y, col = heavy.col + x;
                    if (row < 0 || row >= scan.height || col < 0 || col >= scan.width) continue;
                    flat[size_t((c * k + y) * k + x)] = region.pixel(
                        ((int64_t(heavy.image) * channels + c) * scan.height + row) * scan.width + col);
                }
        region.level.product(flat.data(), int64_t(flat.size()), 1, region.axes.data(), region.pitch, int(flat.size()),
                             region.shift.data(), features.data());
        const float* const q = region.q.data() + query * region.pitch;
        double weight = 0;
        for (int d = 0; d < rank; ++d) weight += double(features[size_t(d)]) * (double(q[d]) - 0.5 * double(features[size_t(d)]));
        return float(weight * bits);
    }

    // Puts right what the features leave out. Windows of the sample that are sure to be in it get their exact weights;
    // the rest keeps the scan's sums, times what the sampled ones of it weigh more, and its mean moves by what their exact
    // weights change, in proportion to how well the sample knows that.
    void correct(State& total, double& log_shift) const {
        const auto& kept = total.heavy;
        if (kept.empty()) return;
        const size_t size = kept.size();
        const int channels = scan.channels;
        std::vector<double> exact(size), chance(size), rough(size);
        double top = -INFINITY;
        for (size_t j = 0; j < size; ++j) {
            chance[j] = kept[j].certain ? 1 : std::min(1., std::exp2(double(kept[j].log_size) - double(total.threshold)));
            rough[j] = std::exp2(double(kept[j].log_size) - total.m);
            // In bits: the size stands for all that a window represents.
            exact[j] = double(kept[j].log_size) - double(kept[j].log_weight) -
                       double(kept[j].distance) * exact_bits;
            top = std::max(top, exact[j] - std::log2(chance[j]));
        }
        struct Part {
            double size = 0, rough = 0, exact = 0, rough_v[MOST_CHANNELS] = {}, exact_v[MOST_CHANNELS] = {};
        } sure, drawn_part;
        double squares = 0;
        for (size_t j = 0; j < size; ++j) {
            const double log_exact = exact[j];
            exact[j] = std::exp2(exact[j] - top);
            squares += exact[j] / chance[j] * std::exp2(log_exact - top - double(kept[j].log_size) + double(kept[j].log_weight));
            Part& part = chance[j] < 1 ? drawn_part : sure;
            part.size += 1, part.rough += rough[j] / chance[j], part.exact += exact[j] / chance[j];
            for (int c = 0; c < channels; ++c) {
                const double value = double(kept[j].value[c]);
                part.rough_v[c] += rough[j] / chance[j] * value, part.exact_v[c] += exact[j] / chance[j] * value;
            }
        }
        const double found = sure.exact + drawn_part.exact;
        if (!(found > 0) || !(total.s > 0)) return;
        // Where the scan weighed by more noise than there is, its sums are no guide: the sample alone decides.
        const bool guided = scan.exact_sigma >= scan.sigma;
        double rest = 0, ratio = 0;  // the rest by the scan; exact weights by the scan's
        if (guided) {
            rest = std::max(0., total.s - sure.rough);
            const double known = sure.rough > 0 ? sure.exact / sure.rough : 0, weight = known > 0 ? FEW_DRAWN : 0;
            const double each = drawn_part.size > 0 ? drawn_part.rough / drawn_part.size : 1;
            const double drawn_count = drawn_part.size;
            ratio = (drawn_part.exact / each + weight * known) / std::max(1e-300, drawn_count + weight);
        }
        const double whole = guided ? sure.exact + ratio * rest : found;
        if (!(whole > 0)) return;
        // Relative variance of the ratio, by how ratios scatter.
        double spread = 0;
        for (size_t j = 0; guided && j < size; ++j) spread += std::pow(exact[j] / (ratio * rough[j]) - 1, 2) / double(size);
        spread = std::min(1., spread) / (drawn_part.size + FEW_DRAWN);
        const double rest_share = guided ? ratio * rest / whole : drawn_part.exact / whole;
        for (int c = 0; c < channels; ++c) {
            double mean, error = in_doubt(total, c);
            if (guided) {
                const double rest_v = total.v[c] - sure.rough_v[c];
                double rest_mean = rest > 1e-6 * total.s ? std::min(1., std::max(-1., rest_v / rest)) : 0;
                double bias_variance = 0, change = 0, noise = 0;
                if (drawn_part.exact > 0 && rest > 0) {
                    const double exact_mean = drawn_part.exact_v[c] / drawn_part.exact;
                    const double rough_mean = drawn_part.rough_v[c] / drawn_part.rough;
                    change = exact_mean - rough_mean;
                    for (size_t j = 0; j < size; ++j) {
                        if (chance[j] >= 1) continue;
                        const double value = double(kept[j].value[c]);
                        const double d = exact[j] / chance[j] / drawn_part.exact * (value - exact_mean) -
                                         rough[j] / chance[j] / drawn_part.rough * (value - rough_mean);
                        bias_variance += (1 - chance[j]) * d * d;
                        const double excess = (exact[j] - ratio * rough[j]) / whole;
                        noise += excess * excess / chance[j] * (value - rest_mean) * (value - rest_mean);
                    }
                }
                // The change is measured with `measured` variance; before that, independent excesses of the rest's
                // windows let expect `noise`, and what stands out from both tells that they were not independent.
                const double measured = rest_share * rest_share * bias_variance;
                const double seen = rest_share * rest_share * change * change;
                const double expected = std::max(noise, seen - 9 * measured);
                const double kept_share = expected > 0 ? expected / (expected + measured) : 0;
                rest_mean += kept_share * change;
                const double sure_mean = sure.exact > 0 ? sure.exact_v[c] / sure.exact : rest_mean;
                mean = (1 - rest_share) * sure_mean + rest_share * rest_mean;
                const double apart = rest_share * (1 - rest_share) * (rest_mean - sure_mean);
                error += 4 * kept_share * measured + 2 * noise + apart * apart * spread;
            } else {
                mean = (sure.exact_v[c] + drawn_part.exact_v[c]) / found;
                for (size_t j = 0; j < size; ++j) {
                    const double d = exact[j] / chance[j] / found *
                                     (double(kept[j].value[c]) - mean);
                    error += (1 - chance[j]) * d * d;
                }
            }
            const double shift = mean - total.v[c] / total.s;
            total.vv[c] += 2 * shift * total.vs[c] + shift * shift * total.ss + error * total.s * total.s;
            total.vs[c] += shift * total.ss;
            total.v[c] += shift * total.s;
        }
        if (!guided) total.s2 = total.s * total.s * squares / (found * found);
        // Weights of whole windows: the scan's times what exact ones are of rough ones.
        const double rough_found = sure.rough + drawn_part.rough;
        log_shift = guided ? (top + std::log2(whole) - total.m - std::log2(total.s)) / LOG2E
                           : (top + std::log2(found) - total.m - std::log2(rough_found)) / LOG2E;
    }
};

// `act` on every part of the work, by several threads.
template <typename Work, typename Act>
void in_parallel(int threads, std::vector<Work>& work, Interrupt& interrupt, Act act) {
    std::atomic<size_t> next{0};
    std::exception_ptr failure;
    std::mutex mutex;
    const auto serve = [&](bool calling) noexcept {
        try {
            Workspace space;
            for (size_t w; (w = next++) < work.size() && !interrupt.stopped(calling);) act(work[w], space, calling);
        } catch (...) {
            const std::lock_guard<std::mutex> lock(mutex);
            if (!failure) failure = std::current_exception();
            interrupt.stop = true;
        }
    };
    std::vector<std::thread> others;
    try {
        for (int i = 1; i < threads && size_t(i) < work.size(); ++i) others.emplace_back([&] { serve(false); });
    } catch (const std::system_error&) {
        // No more threads to be had: those that started serve.
    }
    serve(true);
    for (std::thread& other : others) other.join();
    if (failure) std::rethrow_exception(failure);
}

}  // namespace

bool scan_lists(const std::vector<Scan>& scans, int threads, const std::string& simd, Poll poll) {
    const ListLevel& level = choose_level(LEVELS, simd);
    Interrupt interrupt;
    interrupt.poll = poll;
    struct Work {
        Region* region;
        int first, count;
    };
    std::vector<std::unique_ptr<Region>> regions;
    std::vector<Work> work;
    for (const Scan& scan : scans) {
        if (scan.channels < 1 || scan.channels > MOST_CHANNELS)
            throw std::invalid_argument("channels: takes 1 to " + std::to_string(MOST_CHANNELS));
        *scan.pairs = 0;
        regions.push_back(std::make_unique<Region>(scan, level));
        // Blocks of whole vectors, as many as serve the threads alike.
        const int rounds = (scan.queries + threads * MOST_QUERIES - 1) / (threads * MOST_QUERIES);
        const int blocks = std::max(1, rounds * threads);
        const int each = std::max(LANES, int(padded((scan.queries + blocks - 1) / blocks)));
        for (int at = 0; at < scan.queries; at += each)
            work.push_back({regions.back().get(), at, std::min(each, scan.queries - at)});
    }
    std::mutex mutex;
    in_parallel(threads, work, interrupt, [&](Work& part, Workspace& space, bool calling) {
        const int64_t pairs = Block(*part.region, part.first, part.count, space, interrupt, calling).run();
        const std::lock_guard<std::mutex> lock(mutex);
        *part.region->scan.pairs += pairs;
    });
    // Neighbours may be in another block or region: all wait for all.
    const Pixels pixels(regions);
    const auto each_query = [&](auto act) {
        if (interrupt.stop) return;
        in_parallel(threads, work, interrupt, [&](Work& part, Workspace&, bool) {
            Recheck recheck(*part.region, pixels);
            for (int query = part.first; query < part.first + part.count; ++query) act(recheck, query);
        });
    };
    for (int round = 0; round < Recheck::ROUNDS; ++round) {
        each_query([&](Recheck& recheck, int query) { recheck.choose(query, round); });
        each_query([&](Recheck& recheck, int query) { recheck.listen(query, round); });
    }
    each_query([](Recheck& recheck, int query) { recheck.finish(query); });
    return !interrupt.stop;
}

}  // namespace patchscore

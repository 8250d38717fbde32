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
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <tuple>
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

}  // namespace

}  // namespace patchscore

#include "lists_region.h"
#include "lists_block.h"
#include "lists_recheck.h"

namespace patchscore {

namespace {

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
    std::map<Pixels::Kind, std::vector<Region*>> alike;
    for (const auto& region : regions) alike[Pixels::kind(region->scan)].push_back(region.get());
    std::map<Pixels::Kind, Pixels> pixels;
    for (const auto& [kind, of_kind] : alike) pixels.emplace(kind, of_kind);
    const auto each_query = [&](auto act) {
        if (interrupt.stop) return;
        in_parallel(threads, work, interrupt, [&](Work& part, Workspace&, bool) {
            Recheck recheck(*part.region, pixels.at(Pixels::kind(part.region->scan)));
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

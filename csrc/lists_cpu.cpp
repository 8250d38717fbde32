// The pruned engine on the CPU: how much of which cell a query scans, the scan by cells, and the result with its error.
//
// Three steps. Plan: the expected weights say which share of a cell a query takes (stratified sampling); a cell of which
// it wants less than a group's worth it takes with a probability. Scan: cells one after the other, each for all queries
// that take some of it. Recheck: what features cut short left out is put right on a sample of the heaviest windows,
// compared again pixel by pixel. Shards of cells are fixed, so the numbers do not depend on the threads.
#include "lists.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
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

constexpr int LANES = 16;            // queries side by side
typedef float Vector __attribute__((vector_size(64)));
constexpr int GROUPS = 8;            // random groups of a cell's windows, for the scan's error
constexpr int BLOCK = 192;           // windows turned to float at a time
constexpr int SHARDS = 16;
constexpr int STRIDE = 16;           // one cell in so many gives a first idea of all shares
constexpr int MOST_CHANNELS = 4;
constexpr double NEGLIGIBLE_BITS = 42;  // weights so far below the heaviest round away, however many stand for how many
constexpr double LOG2E = 1.4426950408889634;

// A query's part in one cell: windows taken, what each stands for, and how its groups enter the error:
// variance = c1 * (sum of squared group sums) + c2 * (squared sum).
struct Entry {
    int query, take;
    float factor, c1, c2;
};

// A priority sample (Duffield, Lund, Thorup 2007): of windows with weights p and luck u, uniform in (0, 1), those of the
// largest p / u; a kept window stands for max(p, threshold). All in bits.
struct Sample {
    float priority, log_size, log_weight;
    int64_t at;
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
        std::nth_element(kept.begin(), kept.begin() + wanted, kept.end(),
                         [](const Sample& a, const Sample& b) {
                             return a.priority != b.priority ? a.priority > b.priority : a.at < b.at;
                         });
        threshold = std::max(threshold, kept[size_t(wanted)].priority);
        kept.resize(size_t(wanted));
    }
};

struct CellTask {
    int channels, rank, stored_rank, q_pitch;
    float scale;                     // log2(e) / sigma^2: log-weights in bits are scale (q.p - p.p / 2)
    const Entry* entries;            // by falling `take`
    int entry_count;
    const float* q;                  // [queries, q_pitch], zero beyond `rank`
    const uint16_t* features;        // [windows of the cell, stored_rank] half floats
    const uint8_t* value_bytes;
    const float* value_floats;
    const float* counts;
    const int32_t* order;            // competing windows of the cell, or null for all
    int64_t competing, start, first_window;
    float negligible[LANES], rise[LANES];
    float* m;                        // [queries] references of the shard's sums
    float* sums;                     // [queries, rows, LANES]: s, s2, ss, v, vs, vv
    Samples* samples;                // [queries]
    int recheck;
    const uint32_t* luck;            // [queries]
    // Scratch.
    void* lane_state;
    float *query_features, *block, *block_values;
    int64_t* block_at;
    uint32_t* block_luck;
    Interrupt* interrupt;
    bool calling_thread;
};

// A noisy window beside a training image: rows [row0, row1) of the window lie inside it.
struct WindowTask {
    const float* window;             // [channels, size, pitch]
    int channels, size, pitch, height, width, row0, row1;
    int64_t at;                      // of the window's first pixel, which may lie outside
    const uint8_t* bytes;
    const float* floats;
    const float *mask, *inside;      // [pitch] 1 for columns of the window; for those inside the image
};

struct ListLevel {
    const char* name;
    void (*scan_cell)(const CellTask&);
    void (*exponentials)(const float*, int64_t, float, float*);
    void (*windows_taken)(const float*, const float*, int64_t, float, float, double&, double&);
    int64_t (*active_cells)(const float*, const float*, int64_t, float, float, int32_t*);
    float (*log_squared)(const float*, const float*, const float*, int, float);
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
constexpr int WT = 6, QV = 2;
PS_INLINE Vector half_to_float(const uint16_t* from) {
    return Vector(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
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
constexpr int WT = 4, QV = 1;
PS_INLINE Vector half_to_float(const uint16_t* from) {
    const __m256 x[2] = {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))),
                         _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8)))};
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
constexpr int WT = 2, QV = 1;
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
#define PS_LEVEL 128
#include "lists_kernel.h"
#undef PS_LEVEL
}  // namespace plain

namespace {

const ListLevel LEVELS[] = {
#if defined(__x86_64__)
    {"avx512", avx512::scan_cell_entry, avx512::exponentials, avx512::windows_taken, avx512::active_cells, avx512::log_squared,
     avx512::distance2},
    {"avx2", avx2::scan_cell_entry, avx2::exponentials, avx2::windows_taken, avx2::active_cells, avx2::log_squared,
     avx2::distance2},
#endif
    {"plain", plain::scan_cell_entry, plain::exponentials, plain::windows_taken, plain::active_cells, plain::log_squared,
     plain::distance2},
};

// A stateless generator (splitmix64): the same numbers for the same seed, wherever they are drawn.
uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

double uniform(uint64_t x) {
    return (double(mix(x) >> 11) + 0.5) * 0x1p-53;
}

// What a query draws depends on the seed and on its own number, not on what else is in the call.
uint64_t luck_of(const Scan& scan, int query) {
    return mix(scan.seed) ^ uint64_t(scan.numbers[query]) * 0x2545f4914f6cdd1du;
}

struct Planned {
    int64_t cell;
    Entry entry;
};

// Sampling covariance that the cells' moments let expect of what is not scanned; relative to e^(2 m).
struct Expected {
    double m = -INFINITY;
    double ss = 0, vs[MOST_CHANNELS] = {}, vv[MOST_CHANNELS] = {};
};

int64_t padded(int64_t count) {
    return (count + LANES - 1) / LANES * LANES;
}

// How much of which cell every query takes.
class Plan {
    const Lists& lists;
    const Scan& scan;
    const ListLevel& level;
    const float floor;
    std::vector<float> competing, few_competing, always;
    std::vector<double> reach;       // sums of the cells' chances at the floor

public:
    Plan(const Lists& lists, const Scan& scan, const ListLevel& level)
        : lists(lists), scan(scan), level(level), floor(float(std::min(scan.floor, 1.0))),
          competing(size_t(padded(lists.cells)), 0.f), always(competing), reach(size_t(lists.cells) + 1, 0) {
        for (int64_t c = 0; c < lists.cells; ++c) {
            const float n = lists.competing[c];
            competing[size_t(c)] = n;
            always[size_t(c)] = n > 0 && (n <= GROUPS || floor * n >= GROUPS) ? 1.f : 0.f;
            reach[size_t(c) + 1] = reach[size_t(c)] + double(floor * n) / GROUPS;
        }
        for (int64_t c = 0; c < padded(lists.cells) / STRIDE / LANES * LANES; ++c)
            few_competing.push_back(competing[size_t(c * STRIDE)]);
    }

    struct Scratch {
        std::vector<float> expected, share, few;
        std::vector<int32_t> active;
        explicit Scratch(int64_t cells)
            : expected(size_t(padded(cells)), -INFINITY), share(expected), few(size_t(padded(cells) / STRIDE / LANES * LANES)),
              active(size_t(padded(cells))) {}
    };

    // `first` becomes the place in `planned` of the cell of which most weight is expected.
    void query(int query, Scratch& s, std::vector<Planned>& planned, Expected& unseen, size_t& first) const {
        const float* const expected = scan.expected + int64_t(query) * lists.cells;
        float top = -INFINITY;
        for (int64_t c = 0; c < lists.cells; ++c)
            if (competing[size_t(c)] > 0) top = std::max(top, expected[c]);
        std::copy_n(expected, lists.cells, s.expected.begin());
        level.exponentials(s.expected.data(), padded(lists.cells), top, s.share.data());
        for (size_t c = 0; c < s.few.size(); ++c) s.few[c] = s.share[c * STRIDE];
        const double start = raise(s.few, few_competing, 1, 0.05);
        double mass_of_all, rising;
        level.windows_taken(s.share.data(), competing.data(), padded(lists.cells), 1.f, 0.f, mass_of_all, rising);
        const float t = float(raise(s.share, competing, start, 5e-3));
        const int64_t count = level.active_cells(s.share.data(), always.data(), padded(lists.cells), t, floor,
                                                 s.active.data());
        // Systematic sampling: a running sum passes an integer where a cell, or a group more of it, is drawn.
        planned.reserve(size_t(count) + size_t(reach.back()) + 1);
        const double luck = uniform(luck_of(scan, query));
        double cumulated = luck, heaviest = -1;
        int64_t next_active = 0;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t c = s.active[size_t(i)];
            if (c >= lists.cells || competing[size_t(c)] <= 0) continue;
            const double n = double(competing[size_t(c)]);
            const double share = double(std::min(1.f, std::max(floor, t * s.share[size_t(c)])));
            double chance = 1;
            int64_t take = int64_t(n);
            if (n > GROUPS && n * share < n - GROUPS / 2) {
                const double groups = n * share / GROUPS, before = std::floor(cumulated);
                cumulated += groups - std::floor(groups);
                take = std::min(int64_t(n), (int64_t(groups) + (std::floor(cumulated) > before)) * GROUPS);
                chance = std::min(1., groups);
            } else if (n <= GROUPS && share < 1) {
                const double before = std::floor(cumulated);
                cumulated += share, chance = share;
                if (std::floor(cumulated) == before) take = 0;
            }
            const double mass = double(s.share[size_t(c)]) * n;
            if (take && chance == 1 && mass > heaviest) heaviest = mass, first = planned.size();
            add(query, c, n, take, chance, mass / mass_of_all, planned, unseen);
        }
        // The floor: of all other cells one group, now and then.
        double at = luck;
        int64_t c = 0;
        for (; at < reach.back(); at += 1) {
            c = std::upper_bound(reach.begin() + c, reach.end(), at) - reach.begin() - 1;
            while (next_active < count && s.active[size_t(next_active)] < c) ++next_active;
            const bool taken = next_active < count && s.active[size_t(next_active)] == c;
            if (c >= lists.cells || taken || competing[size_t(c)] <= 0) continue;
            const double n = double(competing[size_t(c)]);
            add(query, c, n, GROUPS, double(floor) * n / GROUPS, -1, planned, unseen);
        }
    }

private:
    // The t at which shares min(1, max(floor, t share)) add up to the budget, by Newton steps on its logarithm.
    double raise(const std::vector<float>& share, const std::vector<float>& windows, double t, double tolerance) const {
        double sum = 0;
        for (const float n : windows) sum += double(n);
        const double wanted = scan.budget * sum;
        double low = 0, high = 1e38;
        for (int step = 0; step < 60; ++step) {
            double taken, rising;
            level.windows_taken(share.data(), windows.data(), int64_t(windows.size()), float(t), floor, taken, rising);
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

    void add(int query, int64_t c, double n, int64_t take, double chance, double share_of_mass,
             std::vector<Planned>& planned, Expected& unseen) const {
        const double seen = double(take ? take : GROUPS);
        // Expected: N^2 (1 - f) / n E[w^2], and where cells are taken by chance as much again as their rarity.
        const double unscanned = n * std::max(0., n / (std::min(seen, n) * chance) - 1);
        if (unscanned > 0 && share_of_mass > 1e-5) {
            const float* const q = scan.q + int64_t(query) * lists.rank;
            const double log_square = double(level.log_squared(q, lists.mean + c * lists.rank,
                                                               lists.variance + c * lists.rank, scan.used_rank,
                                                               float(scan.sigma * scan.sigma / 2))) +
                                      std::log(unscanned) + 2 * double(lists.log_repeats[c]);
            if (log_square > unseen.m - 40) {
                if (log_square > unseen.m + 40) rescale(unseen, log_square);
                const double weight = std::exp(log_square - unseen.m);
                unseen.ss += weight;
                const float* const moments = lists.moments + c * 2 * scan.channels;
                for (int k = 0; k < scan.channels; ++k) {
                    unseen.vs[k] += weight * double(moments[k]);
                    unseen.vv[k] += weight * double(moments[scan.channels + k]);
                }
            }
        }
        if (take == 0) return;
        const double factor = n / double(take), one_group = double(GROUPS) / (GROUPS - 1);
        const double c1 = take < int64_t(n) ? (1 - double(take) / n) * factor * factor * one_group / chance : 0;
        const double c2 = -c1 / GROUPS + (1 - chance) * factor * factor / (chance * chance);
        planned.push_back({c, {query, int(take), float(factor / chance), float(c1), float(c2)}});
    }

private:
    static void rescale(Expected& unseen, double m) {
        const double factor = std::exp(unseen.m - m);
        unseen.ss *= factor;
        for (int k = 0; k < MOST_CHANNELS; ++k) unseen.vs[k] *= factor, unseen.vv[k] *= factor;
        unseen.m = m;
    }
};

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

// Sums of one shard's cells for every query.
struct Shard {
    std::vector<float> m;
    Aligned<float> sums;
    std::vector<Samples> samples;
    Shard(int queries, int64_t parts) : m(size_t(queries), -FAR), sums(queries * parts), samples(size_t(queries)) {
        std::fill_n(sums.get(), queries * parts, 0.f);
    }
};

class Scanner {
    const Lists& lists;
    const Scan& scan;
    const ListLevel& level;
    Interrupt interrupt;
    const int pitch, parts_rows, window_pitch;
    std::vector<float> column_mask, q, windows;
    std::vector<uint32_t> luck;
    std::vector<std::vector<Planned>> planned;
    std::vector<size_t> first;              // per query: which of its plans goes first
    std::vector<Expected> unseen;
    std::vector<Entry> entries;
    std::vector<int64_t> first_entry;       // per cell
    std::vector<int64_t> shard_of_cell;     // first cell of each shard
    std::vector<std::unique_ptr<Shard>> shards;
    std::unique_ptr<Shard> pilot;
    int64_t largest = 0;
    std::exception_ptr failure;
    std::mutex mutex;

public:
    Scanner(const Lists& lists, const Scan& scan, const ListLevel& level, Poll poll)
        : lists(lists), scan(scan), level(level), pitch((scan.used_rank + LANES - 1) / LANES * LANES),
          parts_rows((3 + 3 * scan.channels + LANES - 1) / LANES), window_pitch(int(padded(scan.patch_size))),
          column_mask(size_t(window_pitch), 0.f), luck(size_t(scan.queries)), planned(size_t(scan.queries)),
          first(size_t(scan.queries), SIZE_MAX), unseen(size_t(scan.queries)) {
        *scan.pairs = 0;
        interrupt.poll = poll;
        q.assign(size_t(scan.queries) * size_t(pitch), 0.f);
        for (int i = 0; i < scan.queries; ++i)
            std::copy_n(scan.q + int64_t(i) * lists.rank, scan.used_rank, q.begin() + int64_t(i) * pitch);
        const int64_t lines = int64_t(scan.queries) * scan.channels * scan.patch_size;
        windows.assign(size_t(lines * window_pitch), 0.f);
        for (int64_t i = 0; i < lines; ++i)
            std::copy_n(scan.windows + i * scan.patch_size, scan.patch_size, windows.begin() + i * window_pitch);
        std::fill_n(column_mask.begin(), scan.patch_size, 1.f);
        for (int i = 0; i < scan.queries; ++i) luck[size_t(i)] = uint32_t(mix(luck_of(scan, i)) >> 32);
    }

    bool run() {
        const Plan plan(lists, scan, level);
        std::atomic<int> next{0};
        in_parallel([&](bool calling) {
            Plan::Scratch scratch(lists.cells);
            for (int query; (query = next++) < scan.queries && !interrupt.stopped(calling);)
                plan.query(query, scratch, planned[size_t(query)], unseen[size_t(query)], first[size_t(query)]);
        });
        if (interrupt.stop) return false;
        // The most promising cell of every query goes first: where its weights lie, others need not be looked at.
        pilot = std::make_unique<Shard>(scan.queries, int64_t(parts_rows) * LANES);
        scan_all(true);
        if (interrupt.stop) return false;
        for (Samples& samples : pilot->samples) samples.shrink(scan.recheck);
        scan_all(false);
        if (interrupt.stop) return false;
        shards.push_back(std::move(pilot));
        std::atomic<int> next_query{0};
        in_parallel([&](bool calling) {
            for (int query; (query = next_query++) < scan.queries && !interrupt.stopped(calling);) finish(query);
        });
        return !interrupt.stop;
    }

private:
    template <typename Work>
    void in_parallel(Work work) {
        const auto guarded = [&](bool calling) noexcept {
            try {
                work(calling);
            } catch (...) {
                const std::lock_guard<std::mutex> lock(mutex);
                if (!failure) failure = std::current_exception();
                interrupt.stop = true;
            }
        };
        std::vector<std::thread> others;
        try {
            for (int i = 1; i < scan.threads; ++i) others.emplace_back([&] { guarded(false); });
        } catch (const std::system_error&) {
            // No more threads to be had: those that started serve.
        }
        guarded(true);
        for (std::thread& other : others) other.join();
        if (failure) std::rethrow_exception(failure);
    }

    void scan_all(bool ahead) {
        group_by_cell(ahead);
        std::atomic<int> next{0};
        in_parallel([&](bool calling) {
            Scratch scratch(*this);
            for (int shard; (shard = next++) < SHARDS && !interrupt.stopped(calling);)
                scan_shard(shard, ahead, scratch, calling);
        });
    }

    // Turns the queries' plans into each cell's list of queries, and cuts cells into shards of about equal work.
    void group_by_cell(bool ahead) {
        first_entry.assign(size_t(lists.cells) + 1, 0);
        std::vector<double> work(size_t(lists.cells), 0);
        double total = 0, sum = 0;
        int64_t pairs = 0;
        const auto each = [&](auto visit) {
            for (size_t query = 0; query < planned.size(); ++query) {
                const auto& list = planned[query];
                if (ahead && first[query] < list.size()) visit(list[first[query]]);
                for (size_t i = 0; i < list.size() && !ahead; ++i)
                    if (i != first[query]) visit(list[i]);
            }
        };
        each([&](const Planned& p) {
            ++first_entry[size_t(p.cell) + 1];
            work[size_t(p.cell)] += 16 + p.entry.take, pairs += p.entry.take;
        });
        *scan.pairs += pairs;
        largest = 0;
        for (int64_t c = 0; c < lists.cells; ++c) {
            total += work[size_t(c)];
            largest = std::max(largest, first_entry[size_t(c) + 1]);
            first_entry[size_t(c) + 1] += first_entry[size_t(c)];
        }
        entries.resize(size_t(first_entry.back()));
        std::vector<int64_t> at(first_entry.begin(), first_entry.end() - 1);
        each([&](const Planned& p) { entries[size_t(at[size_t(p.cell)]++)] = p.entry; });
        shard_of_cell.assign(1, 0);
        for (int64_t c = 0; c < lists.cells; ++c) {
            sum += work[size_t(c)];
            while (int(shard_of_cell.size()) < SHARDS && sum >= total * double(shard_of_cell.size()) / SHARDS)
                shard_of_cell.push_back(c + 1);
        }
        shard_of_cell.resize(SHARDS + 1, lists.cells);
        shard_of_cell[SHARDS] = lists.cells;
        shards.resize(SHARDS);
    }

    struct Scratch {
        Aligned<float> lanes, query_features, block, values;
        std::vector<int64_t> at;
        std::vector<uint32_t> luck;
        std::vector<int32_t> order;
        explicit Scratch(const Scanner& s)
            : lanes((s.largest / LANES + 1) * LANES * (7 + GROUPS * (1 + MOST_CHANNELS))),
              query_features((s.largest / LANES + 1) * LANES * s.pitch), block((BLOCK + 16) * s.pitch),
              values((BLOCK + 16) * (3 + MOST_CHANNELS)), at(BLOCK + 16), luck(BLOCK + 16) {
            std::fill_n(block.get(), (BLOCK + 16) * s.pitch, 0.f);
        }
    };

    // Ahead, a query meets one cell only, so that all shards may share the sums; later each has its own.
    void scan_shard(int index, bool ahead, Scratch& scratch, bool calling) {
        if (!ahead) {
            shards[size_t(index)] = std::make_unique<Shard>(scan.queries, int64_t(parts_rows) * LANES);
            shards[size_t(index)]->m = pilot->m;
            for (int i = 0; i < scan.queries; ++i)
                shards[size_t(index)]->samples[size_t(i)].threshold = pilot->samples[size_t(i)].threshold;
        }
        Shard& shard = ahead ? *pilot : *shards[size_t(index)];
        CellTask t{};
        t.channels = scan.channels, t.rank = scan.used_rank, t.stored_rank = lists.rank, t.q_pitch = pitch;
        t.scale = float(LOG2E / (scan.sigma * scan.sigma));
        t.q = q.data();
        for (int i = 0; i < LANES; ++i) {
            t.negligible[i] = float(NEGLIGIBLE_BITS / double(t.scale));
            t.rise[i] = 16 / t.scale;
        }
        t.m = shard.m.data(), t.sums = shard.sums.get(), t.samples = shard.samples.data(), t.recheck = scan.recheck;
        t.luck = luck.data();
        t.lane_state = scratch.lanes.get(), t.query_features = scratch.query_features.get();
        t.block = scratch.block.get(), t.block_values = scratch.values.get(), t.block_at = scratch.at.data(), t.block_luck = scratch.luck.data();
        t.interrupt = &interrupt, t.calling_thread = calling;
        for (int64_t cell = shard_of_cell[size_t(index)]; cell < shard_of_cell[size_t(index) + 1]; ++cell) {
            const int64_t first = first_entry[size_t(cell)], end = first_entry[size_t(cell) + 1];
            if (first == end || interrupt.stop) continue;
            std::sort(entries.begin() + first, entries.begin() + end, [](const Entry& a, const Entry& b) {
                return a.take != b.take ? a.take > b.take : a.query < b.query;
            });
            const int64_t size = lists.sizes[cell];
            t.entries = entries.data() + first, t.entry_count = int(end - first);
            t.features = reinterpret_cast<const uint16_t*>(lists.data + lists.offsets[cell]);
            t.value_bytes = lists.values_are_bytes
                                ? static_cast<const uint8_t*>(lists.values) + lists.starts[cell] * scan.channels
                                : nullptr;
            t.value_floats = lists.values_are_bytes
                                 ? nullptr
                                 : static_cast<const float*>(lists.values) + lists.starts[cell] * scan.channels;
            t.counts = lists.counts ? lists.counts + lists.starts[cell] : nullptr;
            t.order = nullptr, t.competing = size;
            if (lists.allowed) {
                const uint8_t* const ids = lists.data + lists.offsets[cell] + size * lists.rank * 2;
                scratch.order.clear();
                for (int64_t i = 0; i < size; ++i) {
                    int64_t id;
                    std::memcpy(&id, ids + i * 8, 8);
                    const int64_t image = image_of(id);
                    if (image < scan.image_count && lists.allowed[image]) scratch.order.push_back(int32_t(i));
                }
                t.order = scratch.order.data(), t.competing = int64_t(scratch.order.size());
            }
            if (t.competing == 0) continue;
            t.start = int64_t(mix(scan.seed ^ uint64_t(cell) * 0xd6e8feb86659fd93u) % uint64_t(t.competing));
            t.first_window = lists.starts[cell];
            level.scan_cell(t);
        }
    }

    struct Total {
        double m, s = 0, s2 = 0, ss = 0, v[MOST_CHANNELS] = {}, vs[MOST_CHANNELS] = {}, vv[MOST_CHANNELS] = {};
    };

    void finish(int query) {
        const int channels = scan.channels;
        const double scale = LOG2E / (scan.sigma * scan.sigma);
        Total total{};
        total.m = -INFINITY;  // in bits
        for (const auto& shard : shards) {
            const float m = shard->m[size_t(query)];
            if (m > -FAR) total.m = std::max(total.m, double(m) * scale);
        }
        Samples samples;
        for (const auto& shard : shards) {
            const float* const x = shard->sums.get() + int64_t(query) * parts_rows * LANES;
            const double m = double(shard->m[size_t(query)]) * scale;
            if (!(shard->m[size_t(query)] > -FAR)) continue;
            const double f = std::exp2(m - total.m), g = f * f;
            total.s += f * double(x[0]), total.s2 += g * double(x[1]), total.ss += g * double(x[2]);
            for (int c = 0; c < channels; ++c) {
                total.v[c] += f * double(x[3 + c]);
                total.vs[c] += g * double(x[3 + channels + c]);
                total.vv[c] += g * double(x[3 + 2 * channels + c]);
            }
            const Samples& part = shard->samples[size_t(query)];
            samples.threshold = std::max(samples.threshold, part.threshold);
            samples.kept.insert(samples.kept.end(), part.kept.begin(), part.kept.end());
        }
        // What the cells' moments expect of the unscanned, in the same units.
        double norm = 0;
        for (int d = 0; d < pitch; ++d) norm += std::pow(double(q[size_t(query) * size_t(pitch) + size_t(d)]), 2);
        const Expected& expected = unseen[size_t(query)];
        if (expected.m > -INFINITY) {
            const double f = EXPECTED_SHARE *
                             std::exp(std::min(80., expected.m + norm / (scan.sigma * scan.sigma) - 2 * total.m / LOG2E));
            total.ss += f * expected.ss;
            for (int c = 0; c < channels; ++c) total.vs[c] += f * expected.vs[c], total.vv[c] += f * expected.vv[c];
        }
        double log_shift = -norm / (2 * scan.sigma * scan.sigma);
        if (scan.recheck) recheck(query, samples, total, log_shift);
        scan.m[query] = total.m / LOG2E + log_shift;
        scan.s[query] = total.s, scan.s2[query] = total.s2, scan.ss[query] = total.ss;
        for (int c = 0; c < channels; ++c) {
            scan.v[query * channels + c] = total.v[c];
            scan.vs[query * channels + c] = total.vs[c];
            scan.vv[query * channels + c] = total.vv[c];
        }
    }

    static constexpr double EXPECTED_SHARE = 0.1;

    int64_t image_of(int64_t id) const { return id < 0 ? scan.image_count : id / (lists.rows * lists.cols); }

    // Which window this is.
    int64_t id_of(int64_t at) const {
        const int64_t cell = std::upper_bound(lists.starts, lists.starts + lists.cells, at) - lists.starts - 1;
        int64_t id;
        std::memcpy(&id, lists.data + lists.offsets[cell] + lists.sizes[cell] * lists.rank * 2 +
                             (at - lists.starts[cell]) * 8, 8);
        if (image_of(id) >= scan.image_count) throw std::runtime_error("index: a window lies outside the bank");
        return id;
    }

    float pixel(const void* images, int64_t at) const {
        return scan.images_are_bytes ? float(static_cast<const uint8_t*>(images)[at]) * (1 / 127.5f) - 1.f
                                     : static_cast<const float*>(images)[at];
    }

    // |window of the query - window of the bank|^2 over all pixels, zeros beyond the border.
    double distance2(int query, int64_t id, float* value) const {
        const int k = scan.patch_size, r = k / 2, height = scan.height, width = scan.width;
        const int64_t per_image = int64_t(lists.rows) * lists.cols, plane = int64_t(height) * width;
        const int64_t image = id / per_image * scan.channels * plane;
        const int row = int(id % per_image / lists.cols) + lists.row0, col = int(id % lists.cols) + lists.col0;
        for (int c = 0; c < scan.channels; ++c) value[c] = pixel(scan.images, image + c * plane + int64_t(row) * width + col);
        const float* const mask = column_mask.data();
        std::array<float, 256> clipped;
        WindowTask t{};
        t.window = windows.data() + int64_t(query) * scan.channels * k * window_pitch;
        t.channels = scan.channels, t.size = k, t.pitch = window_pitch, t.height = height, t.width = width;
        t.row0 = std::max(0, r - row), t.row1 = std::min(k, height + r - row);
        t.at = image + int64_t(row - r) * width + (col - r);
        t.mask = t.inside = mask;
        if (col < r || col + r >= width) {
            for (int j = 0; j < window_pitch; ++j)
                clipped[size_t(j)] = j < k && col - r + j >= 0 && col - r + j < width ? 1.f : 0.f;
            t.inside = clipped.data();
        }
        // Vectors read past a window's row; at either end of the images there must be something to read.
        const int64_t first = t.at + int64_t(t.row0) * width;
        const int64_t last = t.at + ((scan.channels - 1) * int64_t(height) + t.row1 - 1) * width + window_pitch;
        if (window_pitch <= 256 && first >= 0 && last <= scan.image_count * scan.channels * plane) {
            t.bytes = scan.images_are_bytes ? static_cast<const uint8_t*>(scan.images) : nullptr;
            t.floats = scan.images_are_bytes ? nullptr : static_cast<const float*>(scan.images);
            return double(level.distance2(t));
        }
        double total = 0;
        for (int c = 0; c < scan.channels; ++c)
            for (int i = 0; i < k; ++i)
                for (int j = 0; j < k; ++j) {
                    const int y = row - r + i, x = col - r + j;
                    const bool inside = y >= 0 && y < height && x >= 0 && x < width;
                    const float p = inside ? pixel(scan.images, image + c * plane + int64_t(y) * width + x) : 0.f;
                    const double d = double(t.window[(c * k + i) * window_pitch + j] - p);
                    total += d * d;
                }
        return total;
    }

    // Puts right what the features leave out: mean += (mean of the sample by exact weights - by the scan's weights).
    void recheck(int query, Samples& samples, Total& total, double& log_shift) const {
        samples.shrink(scan.recheck);
        auto& kept = samples.kept;
        kept.erase(std::remove_if(kept.begin(), kept.end(),
                                  [&](const Sample& s) { return s.priority <= samples.threshold; }), kept.end());
        if (kept.empty()) return;
        std::sort(kept.begin(), kept.end(), [](const Sample& a, const Sample& b) { return a.at < b.at; });
        const size_t count = kept.size();
        const int channels = scan.channels;
        std::vector<double> rough(count), exact(count), log_exact(count), chance(count);
        std::vector<float> values(count * size_t(channels));
        double top = -INFINITY;
        for (size_t i = 0; i < count; ++i) {
            const Sample& sample = kept[i];
            const double distance = distance2(query, id_of(sample.at), values.data() + i * size_t(channels));
            chance[i] = std::min(1., std::exp2(double(sample.log_size) - double(samples.threshold)));
            // Sizes stand for all that a window represents; what exact and rough weights share cancels later.
            log_exact[i] = double(sample.log_size) - double(sample.log_weight) -
                           distance / (2 * scan.exact_sigma * scan.exact_sigma) * LOG2E;
            rough[i] = std::exp2(double(sample.log_size) - total.m) / chance[i];
            top = std::max(top, log_exact[i] - std::log2(chance[i]));
        }
        double rough_sum = 0, exact_sum = 0, rough_mean[MOST_CHANNELS] = {}, exact_mean[MOST_CHANNELS] = {};
        for (size_t i = 0; i < count; ++i) {
            exact[i] = std::exp2(log_exact[i] - top) / chance[i];
            rough_sum += rough[i], exact_sum += exact[i];
            for (int c = 0; c < channels; ++c) {
                rough_mean[c] += rough[i] * double(values[i * size_t(channels) + size_t(c)]);
                exact_mean[c] += exact[i] * double(values[i * size_t(channels) + size_t(c)]);
            }
        }
        if (!(rough_sum > 0) || !(exact_sum > 0)) return;
        double error[MOST_CHANNELS] = {}, squares = 0;
        for (int c = 0; c < channels; ++c) rough_mean[c] /= rough_sum, exact_mean[c] /= exact_sum;
        // Where the scan weighed by more noise than there is, its mean is no guide: the sample alone decides.
        const bool guided = scan.exact_sigma >= scan.sigma;
        for (size_t i = 0; i < count; ++i) {
            squares += exact[i] * std::exp2(log_exact[i] - top - double(kept[i].log_size) + double(kept[i].log_weight));
            for (int c = 0; c < channels; ++c) {
                const double value = double(values[i * size_t(channels) + size_t(c)]);
                const double change = exact[i] / exact_sum * (value - exact_mean[c]) -
                                      (guided ? rough[i] / rough_sum * (value - rough_mean[c]) : 0);
                error[c] += (1 - chance[i]) * change * change;
            }
        }
        for (int c = 0; c < channels; ++c) {
            const double mean = total.v[c] / total.s;
            const double shift = guided ? exact_mean[c] - rough_mean[c] : exact_mean[c] - mean;
            total.vv[c] += 2 * shift * total.vs[c] + shift * shift * total.ss + error[c] * total.s * total.s;
            total.vs[c] += shift * total.ss;
            total.v[c] += shift * total.s;
        }
        if (!guided) total.s2 = total.s * total.s * squares / (exact_sum * exact_sum);
        // Weights of whole windows: the scan's times what exact ones are of rough ones.
        log_shift = (top + std::log2(exact_sum) - total.m - std::log2(rough_sum)) / LOG2E;
    }
};

}  // namespace

bool scan_lists(const Lists& lists, const Scan& scan, const std::string& simd, Poll poll) {
    const ListLevel& level = choose_level(LEVELS, simd);
    if (scan.channels < 1 || scan.channels > MOST_CHANNELS)
        throw std::invalid_argument("channels: takes 1 to " + std::to_string(MOST_CHANNELS));
    Scanner scanner(lists, scan, level, poll);
    return scanner.run();
}

}  // namespace patchscore

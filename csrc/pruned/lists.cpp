// The pruned engine on the CPU: how much of which cell a query scans, the scan by cells, and the result with its error.
//
// Plan: the expected weights say which share of a cell a query takes (stratified sampling); a cell of which it wants
// less than a group's worth it takes with a probability. Scan: cells one after the other, each for all queries that
// take some of it. Recheck: what features cut short left out is put right on a sample of the heaviest windows, compared
// again pixel by pixel. Threads share queries in one step and cells in the next; a query's numbers depend neither on
// how many there are nor on the company it is in.
#include "lists.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <tuple>
#include <utility>
#include <vector>

#include "../common/memory.h"
#include "../common/simd.h"
#include "../common/threads.h"

namespace patchscore {

namespace {

constexpr int LANES = 16;            // windows side by side, each of another random group of its cell
typedef float Vector __attribute__((vector_size(64)));
constexpr float FAR = 1e30f;         // squared distance of a window that is not there
constexpr int MOST_CHANNELS = 4;
constexpr int BLOCK = 192;           // windows turned to float at a time
constexpr int MOST_QUERIES = 16384;  // scanned together
constexpr int RUN_FLOATS = (3 + MOST_CHANNELS) * LANES;
constexpr float LEAST_PARENT = 1e-4f;  // share of a query's foreseen weight below which a parent is not looked into,
constexpr double LEAST_FAMILIES = 0.02;  // share of the parents that is looked into in any case, or four budgets
constexpr float MOST_SKIPPED = 0.02f;  // as long as all that are not have no more than this share
static_assert(SIBLINGS == LANES, "a family is a vector");
constexpr int PARTS = 3 + 3 * MOST_CHANNELS;  // s, s2, ss, then v, vs, vv by channel: a query's sums, in a row of LANES
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

// A priority sample (Duffield, Lund, Thorup 2007): of windows with weights p and luck u, uniform in (0, 1), those of
// the largest p / u; a kept window stands for max(p, threshold). All in bits.
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

// A query before a family: its features, and where to put log E[w] and log E[w^2] of the cells.
struct Foreseeing {
    const float* q;
    float* to;                       // [2, SIBLINGS]
};

// The cells before a query, families of those parents that matter; and what `plan_cells` adds up on the way.
struct CellsTask {
    const float *share, *score, *competing;  // [families, SIBLINGS]: foreseen weights, claims to be scanned, windows
    const float* foreseen;           // [families, 2, SIBLINGS] log E[w], log E[w^2]
    const float* all_competing;      // [all parents, SIBLINGS]
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
    void (*foresee)(const Foreseeing*, int64_t, int, const float*);
    float (*shares_and_scores)(const CellsTask&, float*, float*, float*, double&);
    int64_t (*plan_cells)(CellsTask&, Planned*);
    float (*distance2)(const WindowTask&);
};

}  // namespace

#define PS_KERNEL "../pruned/kernel-inl.h"
#include "../common/each-level-inl.h"

namespace {

const ListLevel LEVELS[] = {
#if defined(__x86_64__)
    {"avx512", avx512::scan_cell_entry, avx512::product, avx512::greatest, avx512::exponentials, avx512::windows_taken,
     avx512::choose_parents, avx512::foresee, avx512::shares_and_scores, avx512::plan_cells, avx512::distance2},
    {"avx2", avx2::scan_cell_entry, avx2::product, avx2::greatest, avx2::exponentials, avx2::windows_taken,
     avx2::choose_parents, avx2::foresee, avx2::shares_and_scores, avx2::plan_cells, avx2::distance2},
#endif
    {"plain", plain::scan_cell_entry, plain::product, plain::greatest, plain::exponentials, plain::windows_taken,
     plain::choose_parents, plain::foresee, plain::shares_and_scores, plain::plan_cells, plain::distance2},
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

}  // namespace

}  // namespace patchscore

#include "lists_region.h"
#include "lists_block.h"
#include "lists_recheck.h"

namespace patchscore {

namespace {

// Threads that serve lists of work, one list after the other, each with its own scratch.
class Crew {
    ThreadPool pool;
    std::vector<Workspace> spaces;

public:
    Crew(int threads, Interrupt& interrupt) : pool(threads, interrupt), spaces(size_t(pool.size())) {}

    template <typename Work, typename Act>
    void serve(const std::vector<Work>& work, Act act) {
        pool.each(int64_t(work.size()),
                  [&](int64_t w, int thread) { act(work[size_t(w)], spaces[size_t(thread)], thread == 0); });
    }
};

// Plans and scans blocks of queries together, step by step.
void plan_and_scan(std::vector<std::unique_ptr<Block>>& blocks, Crew& crew) {
    struct Part {
        Block* block;
        int number;
    };
    std::vector<Part> slices, stretches;
    for (const auto& block : blocks) {
        for (int i = 0; i < block->slices(); ++i) slices.push_back({block.get(), i});
        for (int i = 0; i < Block::STRETCHES; ++i) stretches.push_back({block.get(), i});
    }
    const auto step = [&](Block::Turn turn) {
        crew.serve(stretches, [turn](const Part& part, Workspace& space, bool calling) {
            part.block->scan_stretch(turn, part.number, space, calling);
        });
        if (turn == Block::CHANCE) return;
        crew.serve(slices, [turn](const Part& part, Workspace&, bool) { part.block->learn(turn, part.number); });
    };
    crew.serve(slices, [](const Part& part, Workspace& space, bool calling) {
        part.block->plan(part.number, space, calling);
    });
    step(Block::GLANCE), step(Block::SURE), step(Block::CHANCE);
    crew.serve(slices, [](const Part& part, Workspace&, bool) { part.block->judge(part.number); });
    const auto done = [](const Part& part) { return !part.block->scans_again(); };
    stretches.erase(std::remove_if(stretches.begin(), stretches.end(), done), stretches.end());
    if (!stretches.empty()) step(Block::SURE), step(Block::CHANCE);
    crew.serve(slices, [](const Part& part, Workspace&, bool calling) { part.block->finish(part.number, calling); });
}

}  // namespace

bool scan_lists(const std::vector<Scan>& scans, int threads, const std::string& simd, Poll poll) {
    const ListLevel& level = choose_level(LEVELS, simd);
    Interrupt interrupt;
    interrupt.poll = poll;
    Crew crew(threads, interrupt);
    std::vector<std::unique_ptr<Region>> regions(scans.size());
    std::vector<size_t> numbers(scans.size());
    for (size_t i = 0; i < scans.size(); ++i) {
        if (scans[i].channels < 1 || scans[i].channels > MOST_CHANNELS)
            throw std::invalid_argument("channels: takes 1 to " + std::to_string(MOST_CHANNELS));
        numbers[i] = i;
    }
    crew.serve(numbers, [&](size_t i, Workspace&, bool) { regions[i] = std::make_unique<Region>(scans[i], level); });
    if (interrupt.stop) return false;
    struct Queries {
        Region* region;
        int first, count;
    };
    std::vector<Queries> all, slices;
    for (const auto& region : regions) {
        const auto cut = [&](int most, std::vector<Queries>& into) {
            const int queries = region->scan.queries;
            for (int at = 0; at < queries; at += most) into.push_back({region.get(), at, std::min(most, queries - at)});
        };
        cut(MOST_QUERIES, all), cut(Block::SLICE, slices);
        *region->scan.pairs = 0;
    }
    for (size_t from = 0, to; from < all.size(); from = to) {
        std::vector<std::unique_ptr<Block>> blocks;
        int queries = 0;
        for (to = from; to < all.size() && (to == from || queries + all[to].count <= MOST_QUERIES); ++to) {
            blocks.push_back(std::make_unique<Block>(*all[to].region, all[to].first, all[to].count, interrupt));
            queries += all[to].count;
        }
        plan_and_scan(blocks, crew);
        if (interrupt.stop) return false;
        for (size_t i = from; i < to; ++i) *all[i].region->scan.pairs += blocks[i - from]->pairs();
    }
    // Neighbours may be in another block or region: all wait for all.
    std::map<Pixels::Kind, std::vector<Region*>> alike;
    for (const auto& region : regions) alike[Pixels::kind(region->scan)].push_back(region.get());
    std::map<Pixels::Kind, Pixels> pixels;
    for (const auto& [kind, of_kind] : alike) pixels.emplace(kind, of_kind);
    const auto each_query = [&](auto act) {
        crew.serve(slices, [&](const Queries& part, Workspace&, bool) {
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

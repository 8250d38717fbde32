// Engine `pruned` on the CPU: plans every query, sorts the visits by cell, scans cell by cell, and adds up.
//
// Cells are cut into PARTS runs with sums of their own, which are added in their order: the numbers do not depend on
// the number of threads.
#include "pruned.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "../common/simd.h"
#include "../common/threads.h"
#include "moments.h"

namespace patchscore {

namespace {

constexpr int PARTS = 32;
constexpr int TOGETHER = 64;     // queries that are planned together, which read the table of moments once
constexpr int FEW_CHANNELS = 4;  // up to as many take less memory

// How images of a type of pixels are held in tiles, and compared. A score grows with the weight.
template <typename Pixel>
struct Held;

template <>
struct Held<uint8_t> {
    using Stored = int8_t;
    using Query = int16_t;
    using Score = int32_t;
    static constexpr Score NONE = INT32_MIN;
    static constexpr uint8_t NOTHING = 0x80;
    static double value(uint8_t pixel) { return pixel / 127.5 - 1; }
    static constexpr Score about(Score score) { return score; }
};

template <>
struct Held<float> {
    using Stored = float;
    using Query = float;
    using Score = float;
    static constexpr Score NONE = -FLT_MAX;
    static constexpr float NOTHING = 0;
    static double value(float pixel) { return pixel; }
    // Below all scores that another order of summation may give the same window.
    static constexpr Score about(Score score) { return score * 1.00001f; }
};

template <typename Pixel>
using StoredOf = typename Held<Pixel>::Stored;
template <typename Pixel>
using QueryOf = typename Held<Pixel>::Query;
template <typename Pixel>
using ScoreOf = typename Held<Pixel>::Score;

struct ScanVisit {
    int32_t query, cell;
    int32_t first, tiles;  // tiles first, first + 1, .. of the cell, wrapping around
    float units;           // 0: a stratum that is visited with certainty; else its tiles over the expected hits
};

template <typename Pixel, int MOST>
struct Visited {  // sums over the windows of a visit
    float w, w2, wv[MOST], w2v[MOST], w2v2[MOST];
    ScoreOf<Pixel> largest;
};

// The first items, in their order, of all that were offered; of equal ones the earlier.
template <typename Item, int ROOM>
struct Ranking {
    int count = 0;
    Item items[ROOM];

    const Item* begin() const { return items; }
    const Item* end() const { return items + count; }

    // The item's place, `most` if it is not among the first `most`.
    int offer(const Item& item, int most = ROOM) {
        int at = count;
        while (at > 0 && item.before(items[at - 1])) --at;
        if (at >= most) return most;
        count = std::min(count + 1, most);
        std::copy_backward(items + at, items + count - 1, items + count);
        items[at] = item;
        return at;
    }
};

template <typename Pixel>
struct KnownWindow {
    int64_t id;
    ScoreOf<Pixel> score;
    int8_t sweep;  // of neighbours' proposals in which it was found, 0 before them

    bool before(const KnownWindow& other) const {
        return score > other.score || (score == other.score && id < other.id);
    }
};

// The heaviest windows known of a query. They are certainty units, left out of the sample.
template <typename Pixel>
struct KnownOf : Ranking<KnownWindow<Pixel>, MOST_KNOWN> {
    ScoreOf<Pixel> least = std::numeric_limits<ScoreOf<Pixel>>::max();  // of the scores

    bool holds(int64_t id) const {
        return std::any_of(this->begin(), this->end(), [id](const auto& known) { return known.id == id; });
    }

    void offer(ScoreOf<Pixel> score, int64_t id, int sweep, int most) {
        if (this->count == most && score < least) return;
        Ranking<KnownWindow<Pixel>, MOST_KNOWN>::offer({id, score, int8_t(sweep)}, most);
        least = this->items[this->count - 1].score;
    }

    void offer(const KnownOf& others, int most) {
        for (const auto& known : others) offer(known.score, known.id, 0, most);
    }
};

#define PS_KERNEL "../pruned/scan-inl.h"
#include "../common/each-level-inl.h"

template <typename Pixel, int MOST>
struct Level {
    const char* name;
    decltype(&plain::moments) moments;
    decltype(&plain::measures) measures;
    decltype(&plain::windows_at) windows_at;
    decltype(&plain::pack<Pixel>) pack;
    decltype(&plain::facts_of<Pixel, MOST>) facts_of;
    decltype(&plain::compare_tile<Pixel, MOST>) compare_tile;
    decltype(&plain::compare_window<Pixel>) compare_window;
    decltype(&plain::scan_tiles<false, Pixel, MOST>) scan_tiles;
    decltype(&plain::scan_tiles<true, Pixel, MOST>) scan_moments;
};

// TileFacts is laid out alike in every namespace.
using plain::TileFacts;

template <typename F, typename G>
F as(G g) {
    return reinterpret_cast<F>(g);
}

#define PS_LEVEL_OF(name)                                                                         \
    {#name,                                                                                       \
     name::moments,                                                                               \
     name::measures,                                                                              \
     name::windows_at,                                                                            \
     name::pack<Pixel>,                                                                           \
     as<decltype(&plain::facts_of<Pixel, MOST>)>(&name::facts_of<Pixel, MOST>),                   \
     as<decltype(&plain::compare_tile<Pixel, MOST>)>(&name::compare_tile<Pixel, MOST>),           \
     name::compare_window<Pixel>,                                                                 \
     as<decltype(&plain::scan_tiles<false, Pixel, MOST>)>(&name::scan_tiles<false, Pixel, MOST>), \
     as<decltype(&plain::scan_tiles<true, Pixel, MOST>)>(&name::scan_tiles<true, Pixel, MOST>)}

template <typename Pixel, int MOST>
const Level<Pixel, MOST> LEVELS[] = {
#if defined(__x86_64__)
    PS_LEVEL_OF(avx512),
    PS_LEVEL_OF(avx2),
#endif
    PS_LEVEL_OF(plain),
};

// SplitMix64 (Steele, Lea & Flood 2014).
uint64_t mixed(uint64_t x) {
    x += 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

double uniform(uint64_t key, uint64_t number) { return double(mixed(key ^ mixed(number)) >> 11) * 0x1p-53; }

int64_t tiles_of(int64_t windows) { return (windows + TILE - 1) / TILE; }

// The heaviest window of a visit to a part of a stratum: its weight, expanded and as it is; mean values of the visit.
template <int MOST>
struct Heavy {
    double expanded, weight, mean[MOST];
    bool before(const Heavy& other) const { return expanded > other.expanded; }
};

// A cell in which heavy windows may be, by log2 of its expected weight.
struct PilotCell {
    float first;
    int32_t cell;
    bool before(const PilotCell& other) const { return first > other.first; }
};

// What a query has added up over the cells of one part.
template <typename Pixel, int MOST>
struct SumsOf {
    double s = 0, s2 = 0, v[MOST] = {};
    double ss = 0, vs[MOST] = {}, vv[MOST] = {}, fourth = 0;  // certainty strata
    double hits = 0, y = 0, yv[MOST] = {}, yy = 0, yyv[MOST] = {}, yvv[MOST] = {}, y4 = 0;
    int64_t windows = 0;
    ScoreOf<Pixel> largest = Held<Pixel>::NONE;
    KnownOf<Pixel> found;  // windows heavier than the lightest that was known
    Ranking<Heavy<MOST>, TRIMMED> heavy;
};

template <typename Pixel, int MOST>
class Scan {
    using Tile = StoredOf<Pixel>;
    using Score = ScoreOf<Pixel>;
    using Known = KnownOf<Pixel>;
    using Sums = SumsOf<Pixel, MOST>;
    using Facts = TileFacts<Pixel, MOST>;
    using Totals = TotalsOf<MOST>;
    using Products = ProductsOf<MOST>;
    using MomentSums = MomentSumsOf<MOST>;
    static constexpr Score NONE = Held<Pixel>::NONE;

    const Request& request;
    const Level<Pixel, MOST>& level;
    ThreadPool& pool;
    Interrupt& interrupt;
    const int channels;
    uint64_t key;
    std::vector<int64_t> window_start, tile_start;
    std::vector<float> child_size, parent_size, parent_competing;  // parents padded to whole groups of SIBLINGS
    std::vector<std::vector<ScanVisit>> planned;
    std::vector<Known> known;
    std::vector<std::vector<ScanVisit>> pilots;  // cells of each query that hold heavy windows
    std::vector<double> budget;                  // windows of each query
    std::vector<Score> refs;
    std::vector<double> expected;  // log2 of the expected sum
    std::vector<double> sampled;   // and of that of the strata that are not evaluated whole
    std::vector<double> model;     // [queries, 1 + 2 channels] expected variance, about 2^ref
    std::vector<double> model_ref;
    // With moments alone: what values are taken about, and expected variances of their sums (see add_expected).
    std::vector<float> centres;           // [queries, channels]
    std::vector<double> moments_model;    // [queries, 2 + 2 channels]
    std::vector<MomentSums> moment_sums;  // [queries] of a scan

public:
    Scan(const Request& request, const Level<Pixel, MOST>& level, ThreadPool& pool, Interrupt& interrupt)
        : request(request),
          level(level),
          pool(pool),
          interrupt(interrupt),
          channels(request.images.channels),
          key(request.key),
          window_start(size_t(request.cells) + 1),
          tile_start(size_t(request.cells) + 1),
          child_size(size_t(request.cells)),
          planned(size_t(request.queries)),
          known(size_t(request.queries)),
          pilots(size_t(request.queries)),
          budget(size_t(request.queries), request.budget),
          refs(size_t(request.queries)),
          expected(size_t(request.queries)),
          sampled(size_t(request.queries)),
          model(size_t(request.queries) * (1 + 2 * size_t(channels))),
          model_ref(size_t(request.queries)) {
        if (request.v2)
            centres.resize(size_t(request.queries) * size_t(channels)),
                moments_model.resize(size_t(request.queries) * (2 + 2 * size_t(channels)));
        for (int64_t c = 0; c < request.cells; ++c) {
            window_start[size_t(c) + 1] = window_start[size_t(c)] + request.sizes[c];
            tile_start[size_t(c) + 1] = tile_start[size_t(c)] + tiles_of(request.sizes[c]);
            child_size[size_t(c)] = float(request.sizes[c]);
        }
        const size_t padded = size_t((request.parents.count + SIBLINGS - 1) / SIBLINGS * SIBLINGS);
        parent_size.assign(padded, 0), parent_competing.assign(padded, 0);
        for (int64_t p = 0; p < request.parents.count; ++p) {
            parent_size[size_t(p)] = float(window_start[size_t(p + 1) * SIBLINGS] - window_start[size_t(p) * SIBLINGS]);
            parent_competing[size_t(p)] = request.parents.sizes[p];
        }
    }

    bool operator()() {
        std::vector<int> left(size_t(request.queries));
        for (int q = 0; q < request.queries; ++q) left[size_t(q)] = q, request.pairs[q] = 0;
        for (int round = 0; !left.empty(); ++round) {
            key = mixed(request.key + uint64_t(round));
            if (!plan_all(left)) return false;
            if (round == 0 && !request.whole) {
                if (!find_heavy()) return false;
                left.erase(std::remove_if(left.begin(), left.end(), [&](int q) { return is_far(q); }), left.end());
                if (2 * left.size() < size_t(request.queries)) break;  // the image gets exact sums
            }
            for (int q : left) refs[size_t(q)] = reference_of(q);
            std::vector<int> unknown;
            if (!scan_all(left, unknown)) return false;
            if (request.whole) break;
            // A rejected sample is drawn again, larger, while that takes less than an exact sum.
            left.clear();
            for (int q : unknown)
                if ((budget[size_t(q)] *= request.policy.further) <= request.largest_budget) left.push_back(q);
        }
        for (int q = 0; request.remembered && q < request.queries; ++q)
            for (int i = 0; i < MOST_KNOWN; ++i)
                request.remembered[q * MOST_KNOWN + i] = i < known[size_t(q)].count ? known[size_t(q)].items[i].id : -1;
        return true;
    }

private:
    // Nothing was found near the query, or nothing at all.
    bool is_far(int q) const {
        const Known& own = known[size_t(q)];
        if (!own.count) return request.policy.known > 0;
        return request.bits[q] * double(own.items[0].score) - request.base[q] < request.least;
    }

    // Windows to draw; the rest of a budget goes to the windows that are known.
    double drawn(int q) const { return (1 - request.policy.pilot) * budget[size_t(q)]; }

    const Tile* tile_at(int64_t cell, int64_t tile, Tile* scratch) const {
        const int64_t values = request.images.tile_values();
        if (request.tiles) return static_cast<const Tile*>(request.tiles) + (tile_start[size_t(cell)] + tile) * values;
        thread_local std::vector<Pixel> rows;
        rows.resize(size_t(values));
        level.pack(request.images, ids_of(cell, tile), windows_in(cell, tile), rows.data(), scratch);
        return scratch;
    }

    const int64_t* ids_of(int64_t cell, int64_t tile) const {
        return request.ids + window_start[size_t(cell)] + tile * TILE;
    }

    int windows_in(int64_t cell, int64_t tile) const {
        return int(std::min<int64_t>(TILE, request.sizes[cell] - tile * TILE));
    }

    // Samples start at a tile drawn for the cell, or for the parent, not for the query: queries share what is read.
    int64_t start_of(int64_t stratum, int64_t tiles) const {
        return std::min(tiles - 1, int64_t(uniform(key, uint64_t(stratum)) * double(tiles)));
    }

    // What planning a block of queries needs; kept by each thread.
    struct Scratch {
        std::vector<float> parents, scale, first, second, size, competing, expected, g1, g2;
        std::vector<std::vector<float>> cells;  // of each query: moments under its opened parents, in order
        std::vector<std::vector<int32_t>> opened;
        std::vector<uint8_t> is_opened;
    };

    bool plan_all(const std::vector<int>& queries) {
        std::vector<int> sampled;
        for (int q : queries) {
            planned[size_t(q)].clear();
            if (request.whole)
                plan_whole(q);
            else
                sampled.push_back(q);
        }
        std::vector<Scratch> scratch(size_t(pool.size()));
        const int64_t count = int64_t(sampled.size());
        pool.each((count + TOGETHER - 1) / TOGETHER, [&](int64_t block, int thread) {
            const int64_t begin = block * TOGETHER;
            plan_together(&sampled[size_t(begin)], int(std::min<int64_t>(count - begin, TOGETHER)),
                          scratch[size_t(thread)]);
        });
        return !interrupt.stopped(true);
    }

    void plan_whole(int q) {
        for (int64_t c = 0; c < request.cells; ++c)
            if (request.sizes[c])
                planned[size_t(q)].push_back({q, int32_t(c), 0, int32_t(tiles_of(request.sizes[c])), 0});
    }

    void plan_together(const int* queries, int count, Scratch& x) {
        const int rank = request.rank;
        const int64_t table = int64_t(2) * (2 * rank + 2) * SIBLINGS, padded = int64_t(parent_size.size());
        x.parents.resize(size_t(count * 2 * padded)), x.scale.resize(size_t(count));
        x.cells.resize(TOGETHER), x.opened.resize(TOGETHER), x.is_opened.assign(size_t(padded * TOGETHER), 0);
        const auto moments = [&](const float* of, int q, float* out) {
            level.moments(of, rank, request.features + int64_t(q) * rank, request.rest[q], out);
        };
        for (int64_t g = 0; g < padded / SIBLINGS; ++g)
            for (int i = 0; i < count; ++i) {
                float out[2 * SIBLINGS], *to = &x.parents[size_t(2 * padded * i + g * SIBLINGS)];
                moments(request.parents.table + g * table, queries[i], out);
                std::memcpy(to, out, sizeof(float) * SIBLINGS);
                std::memcpy(to + padded, out + SIBLINGS, sizeof(float) * SIBLINGS);
            }
        // Parents that would get some tiles are opened.
        resize(x, padded);
        for (int i = 0; i < count; ++i) {
            const float *first = &x.parents[size_t(2 * padded * i)], *second = first + padded;
            const float ref = largest(first, parent_competing.data(), padded);
            level.measures(first, second, parent_size.data(), parent_competing.data(), padded, ref, x.expected.data(),
                           x.g1.data(), x.g2.data());
            x.scale[size_t(i)] = solve(parent_size.data(), x.g1.data(), x.g2.data(), padded, drawn(queries[i]), 1);
            const float from = float(request.policy.opened_from * TILE) / x.scale[size_t(i)];
            x.cells[size_t(i)].clear(), x.opened[size_t(i)].clear();
            for (int64_t p = 0; p < request.parents.count; ++p)
                x.is_opened[size_t(p * TOGETHER + i)] =
                    parent_competing[size_t(p)] > 0 && (x.g2[size_t(p)] >= from || first[p] >= ref);
        }
        for (int64_t p = 0; p < request.parents.count; ++p)
            for (int i = 0; i < count; ++i)
                if (x.is_opened[size_t(p * TOGETHER + i)]) {
                    float out[2 * SIBLINGS];
                    moments(request.children.table + p * table, queries[i], out);
                    x.cells[size_t(i)].insert(x.cells[size_t(i)].end(), out, out + 2 * SIBLINGS);
                    x.opened[size_t(i)].push_back(int32_t(p));
                }
        for (int i = 0; i < count; ++i) plan(queries[i], i, x);
    }

    static void resize(Scratch& x, int64_t count) {
        for (auto* of : {&x.first, &x.second, &x.size, &x.competing, &x.expected, &x.g1, &x.g2})
            of->resize(size_t(count));
    }

    // Strata: parents, those that were opened empty, then the cells of the opened ones.
    void plan(int q, int i, Scratch& x) {
        const int64_t padded = int64_t(parent_size.size());
        const std::vector<int32_t>& opened = x.opened[size_t(i)];
        const int64_t count = padded + SIBLINGS * int64_t(opened.size());
        resize(x, count);
        std::memcpy(x.first.data(), &x.parents[size_t(2 * padded * i)], sizeof(float) * size_t(padded));
        std::memcpy(x.second.data(), &x.parents[size_t(2 * padded * i + padded)], sizeof(float) * size_t(padded));
        std::memcpy(x.size.data(), parent_size.data(), sizeof(float) * size_t(padded));
        std::memcpy(x.competing.data(), parent_competing.data(), sizeof(float) * size_t(padded));
        for (size_t j = 0; j < opened.size(); ++j) {
            const int64_t p = opened[j], at = padded + int64_t(j) * SIBLINGS;
            const float* moments = &x.cells[size_t(i)][j * 2 * SIBLINGS];
            std::memcpy(&x.first[size_t(at)], moments, sizeof(float) * SIBLINGS);
            std::memcpy(&x.second[size_t(at)], moments + SIBLINGS, sizeof(float) * SIBLINGS);
            std::memcpy(&x.size[size_t(at)], &child_size[size_t(p * SIBLINGS)], sizeof(float) * SIBLINGS);
            std::memcpy(&x.competing[size_t(at)], request.children.sizes + p * SIBLINGS, sizeof(float) * SIBLINGS);
            x.size[size_t(p)] = x.competing[size_t(p)] = 0;
        }
        const float ref = largest(x.first.data(), x.competing.data(), count);
        level.measures(x.first.data(), x.second.data(), x.size.data(), x.competing.data(), count, ref,
                       x.expected.data(), x.g1.data(), x.g2.data());
        const float kappa = solve(x.size.data(), x.g1.data(), x.g2.data(), count, drawn(q), x.scale[size_t(i)]);

        // Visits, and the variance to expect: strata in their order, so that systematic sampling spreads over it.
        std::vector<ScanVisit>& visits = planned[size_t(q)];
        double total = 0, rest = 0, climb = uniform(key, mixed(uint64_t(q)) | 1ull << 63), next = std::ceil(climb);
        double* variance = &model[size_t(q) * (1 + 2 * size_t(channels))];
        std::fill(variance, variance + 1 + 2 * channels, 0.0);
        double* more = request.v2 ? &moments_model[size_t(q) * (2 + 2 * size_t(channels))] : nullptr;
        if (more) std::fill(more, more + 2 + 2 * channels, 0.0);
        Ranking<PilotCell, MOST_PILOT_CELLS> best;
        for (int64_t h = 0; h < count; ++h) {
            const double n = x.size[size_t(h)], expect = x.expected[size_t(h)], g1 = x.g1[size_t(h)];
            if (!(x.g2[size_t(h)] > 0)) continue;
            const bool is_parent = h < padded;
            const int64_t p = is_parent ? h : opened[size_t((h - padded) / SIBLINGS)];
            const int64_t cell = p * SIBLINGS + (h - padded) % SIBLINGS;
            total += n * expect;
            if (!is_parent) best.offer({x.first[size_t(h)], int32_t(cell)}, request.policy.pilot_cells);
            const double wanted =
                std::min(n, std::max(kappa * g1, std::min(double(kappa) * x.g2[size_t(h)], double(TILE))));
            double a = 0;  // expected variance of the stratum's sum
            bool whole = false;
            if (!is_parent && wanted > 0.999 * TILE) {
                const int64_t tiles = tiles_of(request.sizes[cell]);
                const int64_t taken = wanted >= request.policy.certain_from * n || tiles <= 2
                                          ? tiles
                                          : std::min(tiles, std::max<int64_t>(2, tiles_of(int64_t(std::ceil(wanted)))));
                visits.push_back({q, int32_t(cell), int32_t(start_of(cell, tiles)), int32_t(taken), 0});
                whole = taken == tiles;
                const double f = double(taken) / double(tiles);
                a = g1 * g1 * (1 - f) / (double(taken) * TILE);
            } else {
                const double hits = wanted / TILE;
                climb += hits;
                if (climb > next) {
                    const int64_t of = is_parent ? -1 - p : cell,
                                  begin = tile_start[size_t(is_parent ? p * SIBLINGS : cell)];
                    const int64_t tiles = tile_start[size_t(is_parent ? (p + 1) * SIBLINGS : cell + 1)] - begin;
                    const int64_t drawn = int64_t(std::ceil(climb - next)), start = start_of(of, tiles);
                    for (int64_t j = 0; j < drawn; ++j)
                        visits.push_back(hit(q, is_parent ? p : -1, cell, (start + j * tiles / drawn) % tiles,
                                             float(double(tiles) / hits)));
                    next += double(drawn);
                }
                a = (n * expect * n * expect + g1 * g1 / TILE) * std::max(0.0, 1 - hits) / hits;
                a = std::max(a, g1 * g1 / wanted * (1 - std::min(1.0, wanted / n)));
            }
            if (!whole) rest += n * expect;
            if (a > 1e-6 * variance[0]) {  // those left out are less than a hundredth together
                const Strata& of = is_parent ? request.parents : request.children;
                const int64_t at = (is_parent ? p : cell) * channels;
                variance[0] += a;
                for (int c = 0; c < channels; ++c) {
                    variance[1 + c] += a * of.value[at + c];
                    variance[1 + channels + c] += a * of.value_square[at + c];
                }
                if (more)
                    add_expected(a, of.value + at, of.value_square + at, channels, x.first[size_t(h)],
                                 x.second[size_t(h)], n, more);
            }
        }
        model_ref[size_t(q)] = ref;
        expected[size_t(q)] = ref + std::log2(std::max(total, 1e-300));
        sampled[size_t(q)] = ref + std::log2(std::max(rest, 1e-300));
        int64_t left = std::max<int64_t>(1, int64_t(request.policy.pilot * budget[size_t(q)] / TILE));
        pilots[size_t(q)].clear();
        for (const PilotCell& pilot : best) {
            if (left <= 0) break;
            const int64_t tiles = std::min(left, tiles_of(request.sizes[pilot.cell]));
            pilots[size_t(q)].push_back({q, pilot.cell, 0, int32_t(tiles), 0});
            left -= tiles;
        }
    }

    ScanVisit hit(int q, int64_t parent, int64_t cell, int64_t tile, float units) const {
        if (parent < 0) return {q, int32_t(cell), int32_t(tile), 1, units};
        const int64_t at = tile_start[size_t(parent) * SIBLINGS] + tile;
        const auto begin = tile_start.begin() + parent * SIBLINGS, end = begin + SIBLINGS + 1;
        const int64_t c = (std::upper_bound(begin, end, at) - tile_start.begin()) - 1;
        return {q, int32_t(c), int32_t(at - tile_start[size_t(c)]), 1, units};
    }

    static float largest(const float* first, const float* competing, int64_t count) {
        float found = -1e30f;
        for (int64_t i = 0; i < count; ++i) found = competing[i] > 0 && first[i] > found ? first[i] : found;
        return found;
    }

    // The scale at which the expected number of windows is the budget, to one part in a thousand of either: a bracket
    // around a guess, then false position in log scale (Illinois method).
    float solve(const float* size, const float* g1, const float* g2, int64_t count, double wanted, double guess) const {
        const auto excess = [&](double log_scale) {
            return std::log2(std::max(1e-30, level.windows_at(size, g1, g2, count, float(std::exp2(log_scale)))) /
                             wanted);
        };
        double low = std::log2(std::max(guess, 1e-6)), high = low, below = excess(low), above = below;
        for (double step = 1; below > 0 && low > -60; step *= 2)
            high = low, above = below, low -= step, below = excess(low);
        for (double step = 1; above <= 0 && high < 126; step *= 2)
            low = high, below = above, high = std::min(126.0, high + step), above = excess(high);
        if (above <= 0) return float(std::exp2(high));
        for (int i = 0; i < 40 && high - low > 0.0015 && below < -0.0015; ++i) {
            double middle = (low * above - high * below) / (above - below);
            if (!(middle > low && middle < high)) middle = (low + high) / 2;
            const double found = excess(middle);
            if (found > 0)
                high = middle, above = found, below /= 2;
            else
                low = middle, below = found, above /= 2;
        }
        return float(std::exp2(low));
    }

    // The heaviest windows known of every query: in the cells of the largest expected weight, then by neighbours, who
    // propose theirs shifted by a pixel (PatchMatch; Barnes et al. 2009). Nothing here is drawn, so a sample of the
    // other windows stays unbiased.
    bool find_heavy() {
        const int most = request.policy.known;
        if (most == 0) return true;
        std::vector<int> all(size_t(request.queries));
        std::iota(all.begin(), all.end(), 0);
        std::vector<std::vector<Known>> parts(PARTS, std::vector<Known>(size_t(request.queries)));
        const auto look = [&](int64_t part, int64_t c, Cell& cell, ScanVisit* some, int64_t count) {
            for (int64_t at = 0; at < count; at += 4) {
                const int many = int(std::min<int64_t>(4, count - at));
                int32_t tiles = 0;
                for (int i = 0; i < many; ++i) tiles = std::max(tiles, some[at + i].tiles);
                for (int32_t tile = 0; tile < tiles; ++tile) {
                    Score t[4][TILE];
                    prepare(cell, c, tile);
                    level.compare_tile(request, some + at, many, cell.tiles[size_t(tile)], cell.facts[size_t(tile)], t);
                    for (int i = 0; i < many; ++i) {
                        Known& own = parts[size_t(part)][size_t(some[at + i].query)];
                        for (int l = 0; l < TILE && tile < some[at + i].tiles; ++l)
                            if (t[i][l] != NONE) own.offer(t[i][l], cell.facts[size_t(tile)].ids[l], 0, most);
                    }
                }
            }
        };
        if (!each_cell(all, pilots, look)) return false;
        for (int q = 0; q < request.queries; ++q) {
            for (const ScanVisit& visit : pilots[size_t(q)]) request.pairs[q] += int64_t(visit.tiles) * TILE;
            for (const std::vector<Known>& part : parts) known[size_t(q)].offer(part[size_t(q)], most);
        }
        if (request.remembered && !recall()) return false;
        const int width = request.columns, height = width ? request.queries / width : 0;
        for (int sweep = 1; width && sweep <= request.policy.sweeps; ++sweep) {
            const std::vector<Known> before = known;
            pool.each(height, [&](int64_t y, int) {
                std::vector<Pixel> room(size_t(request.images.values()));
                for (int x = 0; x < width; ++x) {
                    if (y > 0)
                        propose(int(y) * width + x, before[size_t((y - 1) * width + x)], 1, 0, sweep, room.data());
                    if (y + 1 < height)
                        propose(int(y) * width + x, before[size_t((y + 1) * width + x)], -1, 0, sweep, room.data());
                    if (x > 0) propose(int(y) * width + x, before[size_t(y * width + x - 1)], 0, 1, sweep, room.data());
                    if (x + 1 < width)
                        propose(int(y) * width + x, before[size_t(y * width + x + 1)], 0, -1, sweep, room.data());
                }
            });
            if (interrupt.stopped(true)) return false;
        }
        return true;
    }

    // Offers each query the windows that it knew before.
    bool recall() {
        const int64_t per_image = int64_t(request.images.rows()) * request.images.cols();
        pool.each((request.queries + TOGETHER - 1) / TOGETHER, [&](int64_t block, int) {
            std::vector<Pixel> room(size_t(request.images.values()));
            for (int q = int(block) * TOGETHER; q < std::min(request.queries, int(block + 1) * TOGETHER); ++q) {
                Known& own = known[size_t(q)];
                for (int i = 0; i < MOST_KNOWN; ++i) {
                    const int64_t id = request.remembered[q * MOST_KNOWN + i];
                    if (id < 0 || own.holds(id) || (request.allowed && !request.allowed[id / per_image])) continue;
                    own.offer(level.compare_window(request, q, id, room.data()), id, 0, request.policy.known);
                    ++request.pairs[q];
                }
            }
        });
        return !interrupt.stopped(true);
    }

    // A neighbour has already proposed what it has known for longer.
    void propose(int q, const Known& neighbour, int down, int right, int sweep, Pixel* room) {
        const Images& images = request.images;
        const int64_t cols = images.cols(), per_image = images.rows() * cols;
        Known& own = known[size_t(q)];
        for (const auto& proposed : neighbour) {
            if (proposed.sweep != sweep - 1) continue;
            const int64_t at = proposed.id % per_image;
            const int64_t row = at / cols + down, col = at % cols + right, id = proposed.id + down * cols + right;
            if (row < 0 || col < 0 || row >= images.rows() || col >= cols || own.holds(id)) continue;
            own.offer(level.compare_window(request, q, id, room), id, sweep, request.policy.known);
            ++request.pairs[q];
        }
    }

    // Where sums are accumulated about: the heaviest window known, or one of a few that are visited.
    Score reference_of(int q) {
        float* centre = request.v2 ? &centres[size_t(q) * size_t(channels)] : nullptr;
        if (known[size_t(q)].count) {
            double sums[1 + MOST] = {}, values[MOST];
            const Score heaviest = known[size_t(q)].items[0].score;
            for (int i = 0; centre && i < known[size_t(q)].count; ++i) {
                const auto& window = known[size_t(q)].items[i];
                const double w = std::exp2((double(window.score) - double(heaviest)) * request.bits[q]);
                value_of(window.id, values);
                sums[0] += w;
                for (int c = 0; c < channels; ++c) sums[1 + c] += w * values[c];
            }
            for (int c = 0; centre && c < channels; ++c) centre[c] = float(sums[1 + c] / sums[0]);
            return heaviest;
        }
        std::vector<Tile> scratch(size_t(request.images.tile_values()));
        for (const ScanVisit& visit : planned[size_t(q)]) {
            const Tile* tile = tile_at(visit.cell, visit.first, scratch.data());
            Facts facts;
            Score t[1][TILE];
            level.facts_of(tile, request, ids_of(visit.cell, visit.first), windows_in(visit.cell, visit.first), facts);
            level.compare_tile(request, &visit, 1, tile, facts, t);
            const int64_t at = std::max_element(t[0], t[0] + TILE) - t[0];
            for (int c = 0; centre && c < channels; ++c) centre[c] = facts.value[c][at];
            if (t[0][at] != NONE) return t[0][at];
        }
        return 0;
    }

    // Scans and finishes queries; those with a rejected sample go to `unknown`.
    bool scan_all(std::vector<int> left, std::vector<int>& unknown) {
        // A query whose reference turns out far from its heaviest window is scanned again with that window's.
        for (int round = 0; round < 4 && !left.empty(); ++round) {
            std::vector<Sums> sums;
            if (!scan(left, sums)) return false;
            std::vector<int> again;
            for (const int q : left) {
                const Sums& sum = sums[size_t(q)];
                const double off = (double(sum.largest) - double(refs[size_t(q)])) * request.bits[q];
                // A known window is the heaviest, unless a heavier one is found.
                const bool far = off > 50 || (off < -50 && sum.largest != NONE && !known[size_t(q)].count);
                if (far && round < 3) {
                    refs[size_t(q)] = sum.largest, again.push_back(q);
                    for (int c = 0; request.v2 && sum.s > 0 && c < channels; ++c)
                        centres[size_t(q * channels + c)] = float(sum.v[c] / sum.s);
                } else {
                    request.pairs[q] += sum.windows;
                    if (!finish(q, sum)) unknown.push_back(q);
                    known[size_t(q)].offer(sum.found, request.policy.known);
                }
            }
            left = again;
        }
        return true;
    }

    bool scan(const std::vector<int>& queries, std::vector<Sums>& total) {
        std::vector<std::vector<Sums>> parts(PARTS, std::vector<Sums>(size_t(request.queries)));
        std::vector<std::vector<MomentSums>> moments(PARTS,
                                                     std::vector<MomentSums>(request.v2 ? size_t(request.queries) : 0));
        const auto scan_cell = [&](int64_t part, int64_t c, Cell& cell, ScanVisit* visits, int64_t count) {
            // Four queries with the same first tile go together, those with the most tiles first.
            std::sort(visits, visits + count, [](const ScanVisit& a, const ScanVisit& b) {
                return a.first != b.first ? a.first < b.first
                                          : (a.tiles != b.tiles ? a.tiles > b.tiles : a.query < b.query);
            });
            const int64_t tiles = tiles_of(request.sizes[c]);
            for (int64_t at = 0; at < count;) {
                int many = 1;
                while (many < 4 && at + many < count && visits[at + many].first == visits[at].first) ++many;
                for (int t = 0; t < visits[at].tiles; ++t) prepare(cell, c, (visits[at].first + t) % tiles);
                Visited<Pixel, MOST> found[4];
                Known* heavier[4];
                for (int i = 0; i < many; ++i) heavier[i] = &parts[size_t(part)][size_t(visits[at + i].query)].found;
                VisitedMoments<MOST> more[4];
                (request.v2 ? level.scan_moments : level.scan_tiles)(
                    request, cell.tiles.data(), cell.facts.data(), int(tiles), visits + at, many, refs.data(),
                    known.data(), centres.data(), heavier, found, more);
                for (int i = 0; i < many; ++i) {
                    const size_t q = size_t(visits[at + i].query);
                    enter(visits[at + i], found[i], tiles, c, parts[size_t(part)][q],
                          request.v2 ? &moments[size_t(part)][q] : nullptr, more[i]);
                }
                at += many;
            }
        };
        if (!each_cell(queries, planned, scan_cell)) return false;
        total = std::move(parts[0]), moment_sums = std::move(moments[0]);
        for (size_t part = 1; part < PARTS; ++part)
            for (int q : queries)
                add(total[size_t(q)], parts[part][size_t(q)], request.v2 ? &moment_sums[size_t(q)] : nullptr,
                    request.v2 ? &moments[part][size_t(q)] : nullptr);
        return true;
    }

    // The current cell's tiles and their facts, filled in as they are asked for.
    struct Cell {
        std::vector<Tile> gathered;
        std::vector<const Tile*> tiles;
        std::vector<Facts> facts;
        std::vector<uint8_t> ready;
    };

    void prepare(Cell& cell, int64_t c, int64_t tile) const {
        if (cell.ready[size_t(tile)]) return;
        cell.ready[size_t(tile)] = 1;
        if (!request.tiles && tile + 1 < tiles_of(request.sizes[c])) fetch(c, tile + 1);
        Tile* room = request.tiles ? nullptr : cell.gathered.data() + tile * request.images.tile_values();
        cell.tiles[size_t(tile)] = tile_at(c, tile, room);
        level.facts_of(cell.tiles[size_t(tile)], request, ids_of(c, tile), windows_in(c, tile),
                       cell.facts[size_t(tile)]);
    }

    // Prefetches the memory of a tile.
    void fetch(int64_t c, int64_t tile) const {
        const Images& images = request.images;
        const auto lines = [](const auto* from, int64_t count) {
            for (int64_t at = 0; at < count * int64_t(sizeof *from); at += 64)
                __builtin_prefetch((const char*)from + at);
        };
        if (request.tiles)
            return lines(
                static_cast<const Tile*>(request.tiles) + (tile_start[size_t(c)] + tile) * images.tile_values(),
                2 * images.tile_values());
        const int64_t plane = int64_t(images.height) * images.width, per_image = int64_t(images.rows()) * images.cols();
        const int64_t* ids = ids_of(c, tile);
        for (int l = 0; l < windows_in(c, tile); ++l) {
            const int64_t image = ids[l] / per_image, row = ids[l] % per_image / images.cols();
            for (int ch = 0; ch < channels; ++ch)
                lines(static_cast<const Pixel*>(images.pixels) + (image * channels + ch) * plane + row * images.width,
                      int64_t(images.patch_size) * images.width);
        }
    }

    // Calls look(part, c, cell, visits, count) for each cell that is visited, in PARTS runs of cells; false if stopped.
    template <typename Look>
    bool each_cell(const std::vector<int>& queries, const std::vector<std::vector<ScanVisit>>& wanted,
                   const Look& look) {
        std::vector<int64_t> begin(size_t(request.cells) + 1);
        for (int q : queries)
            for (const ScanVisit& visit : wanted[size_t(q)]) ++begin[size_t(visit.cell) + 1];
        for (size_t c = 0; c < size_t(request.cells); ++c) begin[c + 1] += begin[c];
        std::vector<ScanVisit> visits(size_t(begin.back()));
        std::vector<int64_t> at(begin.begin(), begin.end() - 1), edges(PARTS + 1, request.cells);
        for (int q : queries)
            for (const ScanVisit& visit : wanted[size_t(q)]) visits[size_t(at[size_t(visit.cell)]++)] = visit;
        edges[0] = 0;
        for (int part = 1; part < PARTS; ++part)
            edges[size_t(part)] =
                std::lower_bound(begin.begin(), begin.end() - 1, begin.back() / PARTS * part) - begin.begin();
        const int64_t tile_values = request.images.tile_values();
        pool.each(PARTS, [&](int64_t part, int) {
            Cell cell;
            const int64_t end = edges[size_t(part) + 1];
            for (int64_t c = edges[size_t(part)], ahead = c; c < end; ++c) {
                // What the next cell needs first is fetched from memory meanwhile.
                for (ahead = std::max(ahead, c + 1); ahead < end; ++ahead)
                    if (begin[size_t(ahead)] < begin[size_t(ahead) + 1]) break;
                if (ahead < end) fetch(ahead, visits[size_t(begin[size_t(ahead)])].first);
                const int64_t count = begin[size_t(c) + 1] - begin[size_t(c)];
                if (count == 0) continue;
                const size_t tiles = size_t(tiles_of(request.sizes[c]));
                cell.ready.assign(tiles, 0);
                if (cell.tiles.size() < tiles) cell.tiles.resize(tiles), cell.facts.resize(tiles);
                if (!request.tiles && cell.gathered.size() < tiles * size_t(tile_values))
                    cell.gathered.resize(tiles * size_t(tile_values));
                look(part, c, cell, &visits[size_t(begin[size_t(c)])], count);
            }
        });
        return !interrupt.stopped(true);
    }

    // Adds a visit's windows to its query: Horvitz-Thompson totals, and their variance.
    void enter(const ScanVisit& visit, const Visited<Pixel, MOST>& lanes, int64_t tiles, int64_t c, Sums& sum,
               MomentSums* more, const VisitedMoments<MOST>& more_lanes) const {
        const double w = lanes.w, w2 = lanes.w2;
        double n = double(visit.tiles) * TILE;
        const int64_t last = tiles * TILE - request.sizes[c];  // empty lanes of the last tile
        if ((visit.first + visit.tiles - 1) % tiles == tiles - 1 || visit.first + visit.tiles > tiles)
            n -= double(last);
        const double factor = visit.units > 0 ? visit.units : double(tiles) / visit.tiles;
        sum.windows += int64_t(n);
        sum.largest = std::max(sum.largest, lanes.largest);
        const double y = factor * w;
        sum.s += y, sum.s2 += factor * w2;
        if (factor > 1 && w > 0) {
            const double heaviest = std::min(
                w, std::exp2((double(lanes.largest) - double(refs[size_t(visit.query)])) * request.bits[visit.query]));
            if (sum.heavy.count < TRIMMED || factor * heaviest > sum.heavy.items[TRIMMED - 1].expanded) {
                Heavy<MOST> heavy{factor * heaviest, heaviest, {}};
                for (int ch = 0; ch < channels; ++ch) heavy.mean[ch] = lanes.wv[ch] / w;
                const int at = sum.heavy.offer(heavy);
                if (more && at < TRIMMED) {
                    Totals mean{};
                    mean.add(1 / w, MomentSums::totals_of(more_lanes, channels), channels);
                    more->take(at, sum.heavy.count, mean);
                }
            }
        }
        const double f = double(visit.tiles) / double(tiles);
        const double a = n > 1 ? factor * factor * (1 - f) * n / (n - 1) : 0;
        if (more) more->enter(w, more_lanes, factor, visit.units > 0, a, n, channels);
        if (visit.units > 0) {
            sum.hits += 1, sum.y += y, sum.yy += y * y, sum.y4 += y * y * y * y;
            for (int ch = 0; ch < channels; ++ch) {
                const double yv = factor * lanes.wv[ch];
                sum.v[ch] += yv, sum.yv[ch] += yv, sum.yyv[ch] += y * yv, sum.yvv[ch] += yv * yv;
            }
            return;
        }
        const double ss = std::max(0.0, a * (w2 - w * w / n));
        sum.ss += ss, sum.fourth += ss * ss;
        for (int ch = 0; ch < channels; ++ch) {
            const double wv = lanes.wv[ch];
            sum.v[ch] += factor * wv;
            sum.vs[ch] += a * (lanes.w2v[ch] - w * wv / n);
            sum.vv[ch] += a * (lanes.w2v2[ch] - wv * wv / n);
        }
    }

    void add(Sums& to, const Sums& from, MomentSums* more, const MomentSums* more_from) const {
        to.s += from.s, to.s2 += from.s2, to.ss += from.ss, to.fourth += from.fourth, to.hits += from.hits;
        to.y += from.y, to.yy += from.yy, to.y4 += from.y4, to.windows += from.windows;
        to.largest = std::max(to.largest, from.largest);
        if (more) more->add(*more_from, channels);
        for (int i = 0; i < from.heavy.count; ++i) {
            const int at = to.heavy.offer(from.heavy.items[i]);
            if (more && at < TRIMMED) more->take(at, to.heavy.count, more_from->heavy[i]);
        }
        to.found.offer(from.found, MOST_KNOWN);
        for (int c = 0; c < channels; ++c) {
            to.v[c] += from.v[c], to.vs[c] += from.vs[c], to.vv[c] += from.vv[c];
            to.yv[c] += from.yv[c], to.yyv[c] += from.yyv[c], to.yvv[c] += from.yvv[c];
        }
    }

    // The values of a window's centre pixel.
    void value_of(int64_t id, double* values) const {
        const Images& images = request.images;
        const int64_t cols = images.cols(), per_image = images.rows() * cols,
                      plane = int64_t(images.height) * images.width;
        const int64_t image = id / per_image, at = id % per_image, r = images.patch_size / 2;
        const Pixel* pixel = static_cast<const Pixel*>(images.pixels) + image * channels * plane +
                             (at / cols + r) * images.width + at % cols + r;
        for (int c = 0; c < channels; ++c) values[c] = Held<Pixel>::value(pixel[c * plane]);
    }

    // The sums of moments, and their errors. Expected variances are `about` times those of the model, whose
    // log2 weights are over `reference`; degrees of the observed ones, negative where nothing is sampled.
    void finish_moments(int q, double s, const double* v, double ss, const Totals& total, const Products& covariance,
                        double about, double reference, double degrees) const {
        if (!(s > 0)) return;  // no window was found
        const int C = channels;
        const double* variance = &model[size_t(q) * (1 + 2 * size_t(C))];
        const double* more = &moments_model[size_t(q) * (2 + 2 * size_t(C))];
        const double share = degrees < 0 ? 1 : degrees / (degrees + request.policy.prior_degrees);
        double found[MOST], foreseen[MOST], all_found = 0, all_foreseen = 0;
        for (int c = 0; c < C; ++c) {
            const VarianceOf of(s, ss, total, covariance, c);
            const double mean = v[c] / s;
            request.v2[q * C + c] = s * (of.variance + mean * mean);
            all_found += found[c] = std::max(0.0, of.observed);
            all_foreseen += foreseen[c] =
                about * of.expected(mean, variance[0], variance[1 + c], variance[1 + C + c], more[c], more[C + c]);
        }
        double own = all_found >= all_foreseen ? 1 : share;
        for (int c = 0; c < C; ++c) request.qq[q * C + c] = own * found[c] + (1 - own) * foreseen[c];
        const double log = LN2 * total.x / s;
        request.sl[q] = s * log;
        // s times the derivatives of ln s - sl / s by the totals are 1 + log and -1.
        const double observed =
            std::max(0.0, (1 + log) * (1 + log) * ss - 2 * (1 + log) * LN2 * covariance.xw + LN2 * LN2 * covariance.xx);
        const double at = 1 + log + LN2 * reference;
        const double expected = about * std::max(0.0, at * at * variance[0] - 2 * at * more[2 * C] + more[2 * C + 1]);
        own = observed >= expected ? 1 : share;
        request.ee[q] = own * observed + (1 - own) * expected;
    }

    // The sums of a query; false where the sample is rejected.
    bool finish(int q, const Sums& sum) const {
        const int C = channels;
        const double m = request.bits[q] * double(refs[size_t(q)]) - request.base[q];  // log2 of the reference weight
        double s = sum.s, s2 = sum.s2, v[MOST];
        std::copy(sum.v, sum.v + C, v);
        Totals more = request.v2 ? moment_sums[size_t(q)].all : Totals{};
        for (const auto& window : known[size_t(q)]) {
            const double x = (double(window.score) - double(refs[size_t(q)])) * request.bits[q];
            const double w = std::exp2(x);
            double value[MOST];
            value_of(window.id, value);
            s += w, s2 += w * w, more.x += w * x;
            for (int c = 0; c < C; ++c) v[c] += w * value[c];
            for (int c = 0; request.v2 && c < C; ++c) {
                const double u = value[c] - centres[size_t(q * C + c)];
                more.u[c] += w * u, more.q[c] += w * u * u;
            }
        }
        // Expanded weights beyond a share of the sum are trimmed.
        const double share = std::pow(double(std::max<int64_t>(sum.windows, 1)), -request.policy.trimming);
        for (int i = 0; share < 1 && i < sum.heavy.count; ++i) {
            const Heavy<MOST>& heavy = sum.heavy.items[i];
            const double most = std::max(heavy.weight, share / (1 - share) * (s - heavy.expanded));
            const double cut = std::max(0.0, heavy.expanded - most);
            s -= cut, s2 -= cut * heavy.weight;
            for (int c = 0; c < C; ++c) v[c] -= cut * heavy.mean[c];
            if (request.v2) more.add(-cut, moment_sums[size_t(q)].heavy[i], C);
        }
        request.m[q] = m * std::log(2.0), request.s[q] = s, request.s2[q] = s2;
        for (int c = 0; c < C; ++c) request.v[q * C + c] = v[c];
        // Hansen & Hurwitz for strata sampled by hits; the square of a single hit is its variance.
        const double h = sum.hits, spread = h > 1 ? h / (h - 1) : 1, mean = h > 1 ? 1 / h : 0;
        const double hh = spread * std::max(0.0, sum.yy - mean * sum.y * sum.y);
        const double ss = sum.ss + hh;
        const double fourth = sum.fourth + (h > 0 ? std::max(sum.y4 - mean * sum.yy * sum.yy, hh * hh / h) : 0);
        const double degrees = fourth > 0 ? ss * ss / fourth : 0;
        double vs[MOST], vv[MOST], found = 0, foreseen = 0;  // and the variances of the ratio
        const double* variance = &model[size_t(q) * (1 + 2 * size_t(C))];
        // Where the sample holds more weight than was expected, so does its variance: the coefficient of variation
        // stays.
        const double held = std::max(0.0, m + std::log2(std::max(sum.s, 1e-300)) - expected[size_t(q)]);
        const double about = std::exp2(std::min(500.0, 2 * (model_ref[size_t(q)] - m + held)));
        for (int c = 0; c < C; ++c) {
            vs[c] = sum.vs[c] + spread * (sum.yyv[c] - mean * sum.y * sum.yv[c]);
            vv[c] = sum.vv[c] + spread * (sum.yvv[c] - mean * sum.yv[c] * sum.yv[c]);
            const double x = v[c] / s;
            found += vv[c] - 2 * x * vs[c] + x * x * ss;
            foreseen += about * (variance[1 + C + c] - 2 * x * variance[1 + c] + x * x * variance[0]);
        }
        // Moderated towards the expected variance, where that is larger.
        const double prior = request.whole || found >= foreseen ? 0 : request.policy.prior_degrees;
        const double own = prior > 0 ? degrees / (degrees + prior) : 1, other = (1 - own) * about;
        double largest = 0;  // squared standard error
        request.ss[q] = own * ss + other * variance[0];
        for (int c = 0; c < C; ++c) {
            request.vs[q * C + c] = own * vs[c] + other * variance[1 + c];
            request.vv[q * C + c] = own * vv[c] + other * variance[1 + C + c];
            const double x = v[c] / s;
            largest = std::max(
                largest, (request.vv[q * C + c] - 2 * x * request.vs[q * C + c] + x * x * request.ss[q]) / (s * s));
        }
        if (request.v2) {
            const Products covariance = moment_sums[size_t(q)].covariance(sum.y, spread, mean, C);
            finish_moments(q, s, v, ss, more, covariance, about, m - held, request.whole ? -1 : degrees);
        }
        if (request.whole) {
            request.fits[q] = 1;
            return true;
        }
        // More is expected of what was sampled than was found altogether, or more was sampled than was expected.
        const auto log_sum = [&](double sum) { return m + std::log2(std::max(sum, 1e-300)); };
        const double misfit = std::max(sampled[size_t(q)] - log_sum(s), log_sum(sum.s) - expected[size_t(q)]);
        const bool fits =
            s > 0 && misfit <= request.policy.misfit && largest <= request.policy.unknown * request.policy.unknown;
        request.fits[q] = fits;
        return fits;
    }
};

template <typename Pixel, int MOST>
bool scan(const Request& request, int threads, const std::string& simd, Interrupt& interrupt) {
    ThreadPool pool(std::max(1, threads), interrupt);
    return Scan<Pixel, MOST>(request, choose_level(LEVELS<Pixel, MOST>, simd), pool, interrupt)();
}

template <typename Pixel>
void pack(const Images& images, const int64_t* ids, const int64_t* sizes, int64_t cells, StoredOf<Pixel>* tiles,
          int threads) {
    std::vector<int64_t> windows(size_t(cells) + 1), starts(size_t(cells) + 1);
    for (int64_t c = 0; c < cells; ++c) {
        windows[size_t(c) + 1] = windows[size_t(c)] + sizes[c];
        starts[size_t(c) + 1] = starts[size_t(c)] + tiles_of(sizes[c]);
    }
    const auto& level = choose_level(LEVELS<Pixel, FEW_CHANNELS>, "");
    Interrupt interrupt;
    ThreadPool pool(std::max(1, threads), interrupt);
    pool.each(cells, [&](int64_t c, int) {
        std::vector<Pixel> rows(size_t(images.tile_values()));
        for (int64_t t = 0; t < tiles_of(sizes[c]); ++t)
            level.pack(images, ids + windows[size_t(c)] + t * TILE, int(std::min<int64_t>(TILE, sizes[c] - t * TILE)),
                       rows.data(), tiles + (starts[size_t(c)] + t) * images.tile_values());
    });
}

}  // namespace

bool pruned_scan(const Request& request, int threads, const std::string& simd, Poll poll) {
    Interrupt interrupt;
    interrupt.poll = poll;
    const bool few = request.images.channels <= FEW_CHANNELS;
    const auto run = request.images.floats ? few ? &scan<float, FEW_CHANNELS> : &scan<float, MOST_CHANNELS>
                     : few                 ? &scan<uint8_t, FEW_CHANNELS>
                                           : &scan<uint8_t, MOST_CHANNELS>;
    return run(request, threads, simd, interrupt);
}

void pruned_pack(const Images& images, const int64_t* ids, const int64_t* sizes, int64_t cells, void* tiles,
                 int threads) {
    if (images.floats)
        pack<float>(images, ids, sizes, cells, static_cast<float*>(tiles), threads);
    else
        pack<uint8_t>(images, ids, sizes, cells, static_cast<int8_t*>(tiles), threads);
}

}  // namespace patchscore

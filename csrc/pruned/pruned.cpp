// Engine `pruned` on the CPU: plans every query, sorts the visits by cell, scans cell by cell, and adds up.
//
// Cells are cut into PARTS runs with sums of their own, which are added in their order: the numbers do not depend on
// the number of threads.
#include "pruned.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "../common/simd.h"
#include "../common/threads.h"

namespace patchscore {

namespace {

constexpr int PARTS = 32;
constexpr int TOGETHER = 16;  // queries that are planned together, so that a table of moments is read once for all

struct ScanVisit {
    int32_t query, cell;
    int32_t first, tiles;      // tiles first, first + 1, .. of the cell, wrapping around
    float units;               // 0: a stratum that is surely visited; else tiles of the stratum over the expected hits
    int32_t ref;
};

#define PS_KERNEL "../pruned/scan-inl.h"
#include "../common/each-level-inl.h"

struct Level {
    const char* name;
    decltype(&plain::moments) moments;
    decltype(&plain::measures) measures;
    decltype(&plain::windows_at) windows_at;
    decltype(&plain::facts_of) facts_of;
    decltype(&plain::scan_tiles) scan_tiles;
};

// TileFacts and Lanes are laid out alike in every namespace.
using TileFacts = plain::TileFacts;
using Lanes = plain::Lanes;

template <typename F, typename G>
F as(G g) { return reinterpret_cast<F>(g); }

#define PS_LEVEL_OF(name) \
    {#name, name::moments, name::measures, name::windows_at, as<decltype(&plain::facts_of)>(&name::facts_of), \
     as<decltype(&plain::scan_tiles)>(&name::scan_tiles)}

const Level LEVELS[] = {
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

void pack_tile(const Images& images, const int64_t* ids, int count, int8_t* out) {
    const int k = images.patch_size;
    const int64_t plane = int64_t(images.height) * images.width, cols = images.cols(), per_image = images.rows() * cols;
    std::memset(out, 0, size_t(images.tile_bytes()));
    for (int l = 0; l < count; ++l) {
        const int64_t image = ids[l] / per_image, at = ids[l] % per_image;
        const uint8_t* from = images.pixels + image * images.channels * plane + at / cols * images.width + at % cols;
        int d = 0;
        for (int c = 0; c < images.channels; ++c, from += plane)
            for (int y = 0; y < k; ++y)
                for (int x = 0; x < k; ++x, ++d)
                    out[(d / 2 * TILE + l) * 2 + d % 2] = int8_t(from[y * images.width + x] ^ 0x80);
    }
}

// What a query has added up over the cells of one part.
struct Sums {
    double s = 0, s2 = 0, v[MOST_CHANNELS] = {};
    double ss = 0, vs[MOST_CHANNELS] = {}, vv[MOST_CHANNELS] = {}, fourth = 0;  // surely visited strata
    double hits = 0, y = 0, yv[MOST_CHANNELS] = {}, yy = 0, yyv[MOST_CHANNELS] = {}, yvv[MOST_CHANNELS] = {}, y4 = 0;
    int64_t windows = 0;
    int32_t largest = INT32_MIN;
};

class Scan {
    const Request& request;
    const Level& level;
    ThreadPool& pool;
    Interrupt& interrupt;
    const int channels;
    std::vector<int64_t> window_start, tile_start, parent_tiles;
    std::vector<std::vector<ScanVisit>> planned;
    std::vector<int32_t> refs;
    std::vector<double> expected;                          // log2 of the expected sum
    std::vector<double> model;                             // [queries, 1 + 2 channels] expected variance, about 2^ref
    std::vector<double> model_ref;

public:
    Scan(const Request& request, const Level& level, ThreadPool& pool, Interrupt& interrupt)
        : request(request), level(level), pool(pool), interrupt(interrupt), channels(request.images.channels),
          window_start(size_t(request.cells) + 1), tile_start(size_t(request.cells) + 1),
          planned(size_t(request.queries)), refs(size_t(request.queries)), expected(size_t(request.queries)),
          model(size_t(request.queries) * (1 + 2 * size_t(channels))), model_ref(size_t(request.queries)) {
        for (int64_t c = 0; c < request.cells; ++c) {
            window_start[size_t(c) + 1] = window_start[size_t(c)] + request.sizes[c];
            tile_start[size_t(c) + 1] = tile_start[size_t(c)] + tiles_of(request.sizes[c]);
        }
    }

    bool operator()() {
        pool.each((request.queries + TOGETHER - 1) / TOGETHER, [&](int64_t block, int) {
            plan_together(int(block * TOGETHER), int(std::min<int64_t>(request.queries, (block + 1) * TOGETHER)));
        });
        if (interrupt.stopped(true)) return false;
        std::vector<int> left(size_t(request.queries));
        for (int q = 0; q < request.queries; ++q) left[size_t(q)] = q;
        // Where the reference turns out far from the heaviest window, once more with that window's.
        for (int round = 0; round < 4 && !left.empty(); ++round) {
            std::vector<Sums> sums;
            if (!scan(left, sums)) return false;
            std::vector<int> again;
            for (size_t i = 0; i < left.size(); ++i) {
                const int q = left[i];
                const Sums& sum = sums[size_t(q)];
                const double off = (double(sum.largest) - refs[size_t(q)]) * request.bits[q];
                if (sum.largest != INT32_MIN && std::abs(off) > 50 && round < 3)
                    refs[size_t(q)] = sum.largest, again.push_back(q);
                else
                    finish(q, sum);
            }
            left = again;
        }
        return true;
    }

private:
    const int8_t* tile_at(int64_t cell, int64_t tile, int8_t* scratch) const {
        if (request.tiles) return request.tiles + (tile_start[size_t(cell)] + tile) * request.images.tile_bytes();
        const int64_t first = tile * TILE;
        pack_tile(request.images, request.ids + window_start[size_t(cell)] + first,
                  int(std::min<int64_t>(TILE, request.sizes[cell] - first)), scratch);
        return scratch;
    }

    int32_t start_of(int64_t cell) const {
        return int32_t(uniform(request.key, uint64_t(cell)) * double(tiles_of(request.sizes[cell])));
    }

    // Largest dot - 2^shift |p|^2 in a few tiles of a cell.
    int32_t glance(int q, int64_t cell) const {
        const int64_t tiles = tiles_of(request.sizes[cell]);
        std::vector<int8_t> scratch(size_t(request.images.tile_bytes()));
        int32_t largest = INT32_MIN;
        for (int64_t t = 0; t < std::min<int64_t>(4, tiles); ++t) {
            const int8_t* tile = tile_at(cell, t, scratch.data());
            TileFacts facts;
            const int64_t first = t * TILE;
            level.facts_of(tile, request, request.ids + window_start[size_t(cell)] + first,
                           int(std::min<int64_t>(TILE, request.sizes[cell] - first)), facts);
            ScanVisit visit{q, int32_t(cell), 0, 1, 0, 0};
            Lanes sums;
            level.scan_tiles(request, &tile, &facts, 1, &visit, 1, &sums);
            for (int l = 0; l < TILE; ++l) largest = std::max(largest, int32_t(sums.largest[l]));
        }
        return largest;
    }

    struct Stratum {
        int64_t cell;          // of the children, or -1 - parent
        int64_t windows, tiles;
    };

    // What planning a query needs of the tables: moments of parents, and of the cells under the opened ones in order.
    struct Planned {
        std::vector<float> first, second, size, competing, cells;
        std::vector<uint8_t> opened;
    };

    void plan_together(int begin, int end) {
        const Strata &parents = request.parents, &children = request.children;
        const int rank = request.rank;
        const int64_t table = int64_t(2) * (2 * rank + 2) * LANES;
        if (request.whole) {
            for (int q = begin; q < end; ++q) plan_whole(q);
            return;
        }
        const int64_t groups = (parents.count + LANES - 1) / LANES, padded = groups * LANES;
        std::vector<Planned> found(size_t(end - begin));
        for (Planned& of : found) {
            of.first.assign(size_t(padded), -1e30f), of.second.assign(size_t(padded), -1e30f);
            of.size.assign(size_t(padded), 0), of.competing.assign(size_t(padded), 0);
            of.opened.assign(size_t(parents.count), 0);
        }
        float out[2 * LANES];
        for (int64_t g = 0; g < groups; ++g)
            for (int q = begin; q < end; ++q) {
                Planned& of = found[size_t(q - begin)];
                level.moments(parents.table + g * table, rank, request.features + int64_t(q) * rank, request.rest[q], out);
                std::memcpy(&of.first[size_t(g) * LANES], out, sizeof(float) * LANES);
                std::memcpy(&of.second[size_t(g) * LANES], out + LANES, sizeof(float) * LANES);
            }
        // Parents that would surely be visited are opened.
        std::vector<float> e(static_cast<size_t>(padded)), g1(e.size()), g2(e.size());
        for (Planned& of : found) {
            for (int64_t p = 0; p < parents.count; ++p) {
                of.size[size_t(p)] = float(window_start[size_t(p + 1) * LANES] - window_start[size_t(p) * LANES]);
                of.competing[size_t(p)] = parents.sizes[p];
            }
            const float ref = reference(of.first, of.competing);
            level.measures(of.first.data(), of.second.data(), of.size.data(), of.competing.data(), padded, ref, e.data(),
                           g1.data(), g2.data());
            const float scale = solve(of.size, g1, g2);
            for (int64_t p = 0; p < parents.count; ++p)
                of.opened[size_t(p)] = of.competing[size_t(p)] > 0 && scale * g2[size_t(p)] >= TILE;
        }
        for (int64_t p = 0; p < parents.count; ++p)
            for (int q = begin; q < end; ++q) {
                Planned& of = found[size_t(q - begin)];
                if (!of.opened[size_t(p)]) continue;
                level.moments(children.table + p * table, rank, request.features + int64_t(q) * rank, request.rest[q], out);
                of.cells.insert(of.cells.end(), out, out + 2 * LANES);
            }
        for (int q = begin; q < end; ++q) plan(q, found[size_t(q - begin)]);
    }

    void plan_whole(int q) {
        std::vector<ScanVisit>& visits = planned[size_t(q)];
        for (int64_t c = 0; c < request.cells; ++c)
            if (request.sizes[c]) visits.push_back({q, int32_t(c), 0, int32_t(tiles_of(request.sizes[c])), 0, 0});
        for (int64_t c = 0; c < request.cells; ++c)
            if (request.sizes[c] && (refs[size_t(q)] = glance(q, c)) != INT32_MIN) break;
    }

    void plan(int q, const Planned& of) {
        const Strata &parents = request.parents, &children = request.children;
        std::vector<ScanVisit>& visits = planned[size_t(q)];
        const float* out = of.cells.data();
        std::vector<Stratum> strata;
        std::vector<float> f1, f2, windows, compete;
        const auto push = [&](int64_t cell, int64_t count, int64_t tiles, float a, float b, float c) {
            strata.push_back({cell, count, tiles});
            f1.push_back(a), f2.push_back(b), windows.push_back(float(count)), compete.push_back(c);
        };
        for (int64_t p = 0; p < parents.count; ++p) {
            if (of.competing[size_t(p)] <= 0) continue;
            if (!of.opened[size_t(p)]) {
                const int64_t tiles = tile_start[size_t(p + 1) * LANES] - tile_start[size_t(p) * LANES];
                push(-1 - p, int64_t(of.size[size_t(p)]), tiles, of.first[size_t(p)], of.second[size_t(p)],
                     of.competing[size_t(p)]);
                continue;
            }
            for (int64_t i = 0; i < LANES; ++i) {
                const int64_t c = p * LANES + i;
                if (children.sizes[c] > 0)
                    push(c, request.sizes[c], tiles_of(request.sizes[c]), out[i], out[LANES + i], children.sizes[c]);
            }
            out += 2 * LANES;
        }
        const size_t count = strata.size(), whole = (count + 7) / 8 * 8;
        f1.resize(whole, -1e30f), f2.resize(whole, -1e30f), windows.resize(whole, 0), compete.resize(whole, 0);
        const float ref = reference(f1, compete);
        std::vector<float> e(whole), g1(whole), g2(whole);
        level.measures(f1.data(), f2.data(), windows.data(), compete.data(), int64_t(whole), ref, e.data(), g1.data(),
                       g2.data());
        const float kappa = solve(windows, g1, g2);

        // Visits, and the variance to expect: strata in their order, so that systematic sampling spreads over it.
        double total = 0, climb = uniform(request.key, mixed(uint64_t(q)) | 1ull << 63);
        double* variance = &model[size_t(q) * (1 + 2 * size_t(channels))];
        double best = -1e300;
        int64_t best_cell = -1;
        for (size_t i = 0; i < count; ++i) {
            const Stratum& stratum = strata[i];
            const double n = double(windows[i]), expect = e[i];
            total += n * expect;
            if (stratum.cell >= 0 && f1[i] > best) best = f1[i], best_cell = stratum.cell;
            const double sure = double(kappa) * g1[i];
            const double wanted = std::min(n, std::max(sure, std::min(double(kappa) * g2[i], double(TILE))));
            double a = 0;      // expected variance of the stratum's sum
            const double g1s = double(g1[i]) * g1[i];
            if (stratum.cell >= 0 && wanted >= request.policy.certain_from * n) {
                visits.push_back({q, int32_t(stratum.cell), 0, int32_t(stratum.tiles), 0, 0});
            } else if (stratum.cell >= 0 && wanted > TILE * 0.999 && stratum.tiles > 2) {
                const int64_t tiles = std::min(stratum.tiles, std::max<int64_t>(2, tiles_of(int64_t(std::ceil(wanted)))));
                visits.push_back({q, int32_t(stratum.cell), start_of(stratum.cell), int32_t(tiles), 0, 0});
                const double f = double(tiles) / double(stratum.tiles);
                a = g1s * (1 - f) / (double(tiles) * TILE);
            } else if (wanted > 0) {
                const double hits = wanted / TILE;
                double before = climb;
                climb += hits;
                for (double at = std::ceil(before); at < climb; at += 1) {
                    const int64_t tile = std::min(stratum.tiles - 1, int64_t((at - before) / hits * double(stratum.tiles)));
                    visits.push_back(hit(q, stratum, tile, float(double(stratum.tiles) / hits)));
                }
                a = (n * expect * n * expect + g1s / TILE) * std::max(0.0, 1 - hits) / hits;
                a = std::max(a, g1s / wanted * (1 - std::min(1.0, wanted / n)));
            }
            if (a > 0) {
                const bool parent = stratum.cell < 0;
                const Strata& of = parent ? parents : children;
                const int64_t at = (parent ? -1 - stratum.cell : stratum.cell) * channels;
                variance[0] += a;
                for (int c = 0; c < channels; ++c) {
                    variance[1 + c] += a * of.value[at + c];
                    variance[1 + channels + c] += a * of.value_square[at + c];
                }
            }
        }
        model_ref[size_t(q)] = ref;
        expected[size_t(q)] = ref + std::log2(std::max(total, 1e-300));
        refs[size_t(q)] = best_cell >= 0 ? glance(q, best_cell) : INT32_MIN;
        for (size_t i = 0; refs[size_t(q)] == INT32_MIN && i < visits.size(); ++i)
            refs[size_t(q)] = glance(q, visits[i].cell);
        if (refs[size_t(q)] == INT32_MIN) refs[size_t(q)] = 0;
    }

    ScanVisit hit(int q, const Stratum& stratum, int64_t tile, float units) const {
        if (stratum.cell >= 0) return {q, int32_t(stratum.cell), int32_t(tile), 1, units, 0};
        const int64_t p = -1 - stratum.cell, at = tile_start[size_t(p) * LANES] + tile;
        const auto begin = tile_start.begin() + p * LANES, end = begin + LANES + 1;
        const int64_t c = (std::upper_bound(begin, end, at) - tile_start.begin()) - 1;
        return {q, int32_t(c), int32_t(at - tile_start[size_t(c)]), 1, units, 0};
    }

    // log2 of the expected sum.
    static float reference(const std::vector<float>& first, const std::vector<float>& competing) {
        float largest = -1e30f;
        for (size_t i = 0; i < first.size(); ++i)
            if (competing[i] > 0) largest = std::max(largest, first[i]);
        double sum = 0;
        for (size_t i = 0; i < first.size(); ++i)
            if (competing[i] > 0 && first[i] > largest - 60) sum += competing[i] * std::exp2(double(first[i] - largest));
        return largest + float(std::log2(std::max(sum, 1e-300)));
    }

    // The scale at which the expected number of windows is the budget; by bisection, to one part in a thousand.
    float solve(const std::vector<float>& size, const std::vector<float>& g1, const std::vector<float>& g2) const {
        double low = -20, high = 126;
        while (high - low > 0.002) {
            const double middle = (low + high) / 2;
            const double n = level.windows_at(size.data(), g1.data(), g2.data(), int64_t(size.size()),
                                              float(std::exp2(middle)));
            (n > request.budget ? high : low) = middle;
        }
        return float(std::exp2(low));
    }

    bool scan(const std::vector<int>& queries, std::vector<Sums>& total) {
        // Visits by cell.
        std::vector<int64_t> begin(size_t(request.cells) + 1);
        for (int q : queries)
            for (const ScanVisit& visit : planned[size_t(q)]) ++begin[size_t(visit.cell) + 1];
        for (size_t c = 0; c < size_t(request.cells); ++c) begin[c + 1] += begin[c];
        std::vector<ScanVisit> visits(size_t(begin.back()));
        {
            std::vector<int64_t> at(begin.begin(), begin.end() - 1);
            for (int q : queries)
                for (ScanVisit visit : planned[size_t(q)]) {
                    visit.ref = refs[size_t(q)];
                    visits[size_t(at[size_t(visit.cell)]++)] = visit;
                }
        }
        std::vector<std::vector<Sums>> parts(PARTS);
        std::vector<int64_t> edges(PARTS + 1, request.cells);
        edges[0] = 0;
        for (int part = 1; part < PARTS; ++part)
            edges[size_t(part)] =
                std::lower_bound(begin.begin(), begin.end() - 1, begin.back() / PARTS * part) - begin.begin();
        pool.each(PARTS, [&](int64_t part, int) {
            parts[size_t(part)].resize(size_t(request.queries));
            Cell cell;
            for (int64_t c = edges[size_t(part)]; c < edges[size_t(part) + 1]; ++c)
                if (begin[size_t(c)] < begin[size_t(c) + 1])
                    scan_cell(c, &visits[size_t(begin[size_t(c)])], begin[size_t(c) + 1] - begin[size_t(c)], cell,
                              parts[size_t(part)]);
        });
        if (interrupt.stopped(true)) return false;
        total = std::move(parts[0]);
        for (int part = 1; part < PARTS; ++part)
            for (int q : queries) add(total[size_t(q)], parts[size_t(part)][size_t(q)]);
        return true;
    }

    struct Cell {
        std::vector<int8_t> bytes;
        std::vector<const int8_t*> tiles;
        std::vector<TileFacts> facts;
        std::vector<uint8_t> ready;
    };

    void scan_cell(int64_t c, ScanVisit* visits, int64_t count, Cell& cell, std::vector<Sums>& sums) const {
        const int64_t tiles = tiles_of(request.sizes[c]), tile_bytes = request.images.tile_bytes();
        cell.tiles.assign(size_t(tiles), nullptr), cell.ready.assign(size_t(tiles), 0);
        if (cell.facts.size() < size_t(tiles)) cell.facts.resize(size_t(tiles));
        if (!request.tiles && cell.bytes.size() < size_t(tiles * tile_bytes)) cell.bytes.resize(size_t(tiles * tile_bytes));
        // Four queries with the same first tile go together, those with the most tiles first.
        std::stable_sort(visits, visits + count, [](const ScanVisit& a, const ScanVisit& b) {
            return a.first != b.first ? a.first < b.first : a.tiles > b.tiles;
        });
        for (int64_t at = 0; at < count;) {
            int many = 1;
            while (many < 4 && at + many < count && visits[at + many].first == visits[at].first) ++many;
            for (int t = 0; t < visits[at].tiles; ++t) {
                const int64_t tile = (visits[at].first + t) % tiles;
                if (cell.ready[size_t(tile)]) continue;
                cell.ready[size_t(tile)] = 1;
                cell.tiles[size_t(tile)] = tile_at(c, tile, cell.bytes.data() + tile * tile_bytes);
                const int64_t first = tile * TILE;
                level.facts_of(cell.tiles[size_t(tile)], request, request.ids + window_start[size_t(c)] + first,
                               int(std::min<int64_t>(TILE, request.sizes[c] - first)), cell.facts[size_t(tile)]);
            }
            Lanes lanes[4];
            level.scan_tiles(request, cell.tiles.data(), cell.facts.data(), int(tiles), visits + at, many, lanes);
            for (int i = 0; i < many; ++i) enter(visits[at + i], lanes[i], tiles, c, sums[size_t(visits[at + i].query)]);
            at += many;
        }
    }

    template <typename V>
    static double sum_of(const V& lanes) {
        double sum = 0;
        for (int l = 0; l < TILE; ++l) sum += lanes[l];
        return sum;
    }

    // Adds a visit's windows to its query: Horvitz-Thompson totals, and their variance.
    void enter(const ScanVisit& visit, const Lanes& lanes, int64_t tiles, int64_t c, Sums& sum) const {
        const double w = sum_of(lanes.w), w2 = sum_of(lanes.w2);
        double n = double(visit.tiles) * TILE;
        const int64_t last = tiles * TILE - request.sizes[c];          // lanes that the last tile lacks
        if ((visit.first + visit.tiles - 1) % tiles == tiles - 1 || visit.first + visit.tiles > tiles) n -= double(last);
        const double factor = visit.units > 0 ? visit.units : double(tiles) / visit.tiles;
        sum.windows += int64_t(n);
        for (int l = 0; l < TILE; ++l) sum.largest = std::max(sum.largest, int32_t(lanes.largest[l]));
        sum.s += factor * w, sum.s2 += factor * w2;
        if (visit.units > 0) {
            const double y = factor * w;
            sum.hits += 1, sum.y += y, sum.yy += y * y, sum.y4 += y * y * y * y;
            for (int ch = 0; ch < channels; ++ch) {
                const double yv = factor * sum_of(lanes.wv[ch]);
                sum.v[ch] += yv, sum.yv[ch] += yv, sum.yyv[ch] += y * yv, sum.yvv[ch] += yv * yv;
            }
            return;
        }
        const double f = double(visit.tiles) / double(tiles);
        const double a = n > 1 ? factor * factor * (1 - f) * n / (n - 1) : 0;
        const double ss = std::max(0.0, a * (w2 - w * w / n));
        sum.ss += ss, sum.fourth += ss * ss;
        for (int ch = 0; ch < channels; ++ch) {
            const double wv = sum_of(lanes.wv[ch]);
            sum.v[ch] += factor * wv;
            sum.vs[ch] += a * (sum_of(lanes.w2v[ch]) - w * wv / n);
            sum.vv[ch] += a * (sum_of(lanes.w2v2[ch]) - wv * wv / n);
        }
    }

    void add(Sums& to, const Sums& from) const {
        to.s += from.s, to.s2 += from.s2, to.ss += from.ss, to.fourth += from.fourth, to.hits += from.hits;
        to.y += from.y, to.yy += from.yy, to.y4 += from.y4, to.windows += from.windows;
        to.largest = std::max(to.largest, from.largest);
        for (int c = 0; c < channels; ++c) {
            to.v[c] += from.v[c], to.vs[c] += from.vs[c], to.vv[c] += from.vv[c];
            to.yv[c] += from.yv[c], to.yyv[c] += from.yyv[c], to.yvv[c] += from.yvv[c];
        }
    }

    void finish(int q, const Sums& sum) const {
        const int C = channels;
        const double m = request.bits[q] * refs[size_t(q)] - request.base[q];   // log2 of the reference weight
        request.m[q] = m * std::log(2.0), request.s[q] = sum.s, request.s2[q] = sum.s2, request.pairs[q] = sum.windows;
        for (int c = 0; c < C; ++c) request.v[q * C + c] = sum.v[c];
        // Hansen & Hurwitz for the strata visited by chance; a single hit is its own variance.
        const double h = sum.hits, spread = h > 1 ? h / (h - 1) : 1, mean = h > 1 ? 1 / h : 0;
        const double hh = spread * std::max(0.0, sum.yy - mean * sum.y * sum.y);
        const double ss = sum.ss + hh;
        const double fourth = sum.fourth + (h > 0 ? std::max(sum.y4 - mean * sum.yy * sum.yy, hh * hh / h) : 0);
        const double degrees = fourth > 0 ? ss * ss / fourth : 0;
        const double prior = request.whole ? 0 : request.policy.prior_degrees;
        const double* variance = &model[size_t(q) * (1 + 2 * size_t(C))];
        const double about = std::exp2(std::min(500.0, 2 * (model_ref[size_t(q)] - m)));
        const double own = degrees + prior > 0 ? degrees / (degrees + prior) : 0;
        const double other = degrees + prior > 0 ? prior / (degrees + prior) * about : 0;
        request.ss[q] = own * ss + other * variance[0];
        for (int c = 0; c < C; ++c) {
            const double vs = sum.vs[c] + spread * (sum.yyv[c] - mean * sum.y * sum.yv[c]);
            const double vv = sum.vv[c] + spread * (sum.yvv[c] - mean * sum.yv[c] * sum.yv[c]);
            request.vs[q * C + c] = own * vs + other * variance[1 + c];
            request.vv[q * C + c] = own * vv + other * variance[1 + C + c];
        }
        const double misfit = std::abs(expected[size_t(q)] - (m + std::log2(std::max(sum.s, 1e-300))));
        request.fits[q] = request.whole || (sum.s > 0 && misfit <= request.policy.misfit);
    }
};

}  // namespace

bool pruned_scan(const Request& request, int threads, const std::string& simd, Poll poll) {
    Interrupt interrupt;
    interrupt.poll = poll;
    ThreadPool pool(std::max(1, threads), interrupt);
    return Scan(request, choose_level(LEVELS, simd), pool, interrupt)();
}

void pruned_pack(const Images& images, const int64_t* ids, const int64_t* sizes, int64_t cells, int8_t* tiles,
                 int threads) {
    std::vector<int64_t> windows(size_t(cells) + 1), starts(size_t(cells) + 1);
    for (int64_t c = 0; c < cells; ++c) {
        windows[size_t(c) + 1] = windows[size_t(c)] + sizes[c];
        starts[size_t(c) + 1] = starts[size_t(c)] + tiles_of(sizes[c]);
    }
    Interrupt interrupt;
    ThreadPool pool(std::max(1, threads), interrupt);
    pool.each(cells, [&](int64_t c, int) {
        for (int64_t t = 0; t < tiles_of(sizes[c]); ++t)
            pack_tile(images, ids + windows[size_t(c)] + t * TILE, int(std::min<int64_t>(TILE, sizes[c] - t * TILE)),
                      tiles + (starts[size_t(c)] + t) * images.tile_bytes());
    });
}

}  // namespace patchscore

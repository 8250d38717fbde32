// Runs the pruned engine on small random indexes, on every instruction set, under AddressSanitizer and UBSan.
//
// What it computes is checked by tests/test_pruned.py; here only that no access leaves its memory and no arithmetic is
// undefined. Buffers are as large as what they hold. Results must come out finite and the same for one thread and for
// three.
#include "../../csrc/pruned/pruned.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <string>
#include <vector>

using patchscore::SIBLINGS;

static uint32_t state = 1;

static float uniform() {
    state = state * 1664525u + 1013904223u;
    return float(state >> 8) / float(1 << 24);
}

static float between(float low, float high) { return low + (high - low) * uniform(); }
static int below(int count) { return std::min(count - 1, int(uniform() * float(count))); }
static bool chance(float p) { return uniform() < p; }

template <typename T>
static T one_of(std::initializer_list<T> choices) {
    return choices.begin()[below(int(choices.size()))];
}

// An index of random images whose windows are dealt to cells, and some queries with moments that say little of them.
struct Case {
    int channels, k, rank, parents, queries;
    bool moments;
    patchscore::Request request{};
    std::vector<uint8_t> pixels, allowed, fits;
    std::vector<float> float_pixels, float_tiles, float_windows;
    std::vector<int64_t> sizes, ids, pairs, remembered;
    std::vector<int8_t> tiles;
    std::vector<float> features, rest, tables[2], competing[2], value[2], value_square[2];
    std::vector<int16_t> digits;
    std::vector<int32_t> shift;
    std::vector<double> bits, base;

    Case(bool floats, int channels, int k, int rank) : channels(channels), k(k), rank(rank), moments(chance(0.4f)) {
        patchscore::Images& images = request.images;
        images.floats = floats, images.channels = channels, images.patch_size = k, images.count = 1 + below(12);
        images.height = k + below(9), images.width = k + below(9);
        const size_t held = size_t(images.count * channels * images.height * images.width);
        if (floats) {
            for (size_t i = 0; i < held; ++i) float_pixels.push_back(between(-1, 1));
            images.pixels = float_pixels.data();
        } else {
            for (size_t i = 0; i < held; ++i) pixels.push_back(uint8_t(below(256)));
            images.pixels = pixels.data();
        }
        parents = 1 + below(5);
        request.cells = int64_t(parents) * SIBLINGS, request.rank = rank;
        deal();
        strata(0, parents), strata(1, int(request.cells));
        request.parents = of(0), request.children = of(1);
        query();
        request.largest_budget = 0.2 * double(ids.size()), request.least = one_of({-1e9, -30.0});
        request.budget = std::max(1.0, double(ids.size()) * between(0, 0.3f)), request.whole = chance(0.2f);
        request.key = state;
        request.policy = {0.75,
                          10,
                          one_of({0.0, 0.5}),
                          one_of({0.5, 7.2, 100.0}),
                          one_of({0.01, 0.1, 10.0}),
                          8,
                          one_of({1.0, 8.0}),
                          0.25,
                          one_of({1, 64, patchscore::MOST_PILOT_CELLS}),
                          one_of({0, 4}),
                          one_of({0, 3, patchscore::MOST_KNOWN})};
    }

    void deal() {
        const patchscore::Images& images = request.images;
        std::vector<std::vector<int64_t>> cells(size_t(request.cells));
        const int64_t windows = images.count * images.rows() * images.cols();
        const int used = 1 + below(int(request.cells));  // the others are empty
        for (int64_t id = 0; id < windows; ++id) cells[size_t(below(used))].push_back(id);
        for (const auto& cell : cells) {
            sizes.push_back(int64_t(cell.size()));
            ids.insert(ids.end(), cell.begin(), cell.end());
        }
        request.sizes = sizes.data(), request.ids = ids.data();
        if (chance(0.5f)) {
            int64_t count = 0;
            for (const int64_t size : sizes) count += (size + patchscore::TILE - 1) / patchscore::TILE;
            const size_t room = size_t(count * images.tile_values());
            void* to = images.floats ? (float_tiles.resize(room), static_cast<void*>(float_tiles.data()))
                                     : (tiles.resize(room), static_cast<void*>(tiles.data()));
            patchscore::pruned_pack(images, ids.data(), sizes.data(), request.cells, to, 2);
            request.tiles = to;
        }
        if (chance(0.3f)) {
            for (int64_t i = 0; i < images.count; ++i) allowed.push_back(i == 0 || chance(0.5f));
            request.allowed = allowed.data();
        }
    }

    void strata(int which, int count) {
        const int columns = 2 * rank + 2, groups = (count + SIBLINGS - 1) / SIBLINGS, each = which ? 1 : SIBLINGS;
        for (int i = 0; i < groups * 2 * columns * SIBLINGS; ++i) {
            const int column = i / SIBLINGS % columns;
            const bool negative = column < rank || column == 2 * rank;
            tables[which].push_back(negative ? -between(0, 9) : between(-5, 5));
        }
        for (int s = 0; s < count; ++s) {
            float held = 0;
            int64_t start = 0;
            for (int64_t c = 0; c < int64_t(s) * each; ++c) start += sizes[size_t(c)];
            for (int64_t c = int64_t(s) * each; c < int64_t(s + 1) * each; ++c)
                for (int64_t i = 0; i < sizes[size_t(c)]; ++i) {
                    const int64_t image = ids[size_t(start++)] / (request.images.rows() * request.images.cols());
                    held += float(allowed.empty() || allowed[size_t(image)]);
                }
            competing[which].push_back(held);
        }
        for (int i = 0; i < count * channels; ++i) {
            value[which].push_back(between(-1, 1)), value_square[which].push_back(between(0, 1));
        }
    }

    patchscore::Strata of(int which) const {
        return {int64_t(competing[which].size()), tables[which].data(), competing[which].data(), value[which].data(),
                value_square[which].data()};
    }

    void query() {
        const patchscore::Images& images = request.images;
        const int columns = 1 + below(6);
        queries = columns * (1 + below(6));
        request.queries = queries, request.columns = chance(0.8f) ? columns : 0;
        const float scale = one_of({1e-7f, 1e-4f, 1e-1f});
        for (int q = 0; q < queries; ++q) {
            for (int j = 0; j < rank; ++j) features.push_back(between(-3, 3));
            rest.push_back(between(0, 20));
            if (images.floats) {
                for (int d = 0; d < 2 * images.pairs(); ++d)
                    float_windows.push_back(d < images.values() ? between(-2, 2) : 0);
                shift.push_back(0), bits.push_back(1e4 * scale), base.push_back(0);
                continue;
            }
            shift.push_back(below(4));
            double square = 0;
            for (int d = 0; d < 2 * images.pairs(); ++d) {
                const bool held = d < images.values();
                digits.push_back(int16_t(held ? between(-200, 200) * float(2 << shift.back()) : 0));
                square += double(digits.back()) * digits.back();
            }
            const double unit = double(2 << shift.back());
            bits.push_back(2 * scale / unit), base.push_back(scale * square / unit / unit);
        }
        request.features = features.data(), request.rest = rest.data(), request.windows = digits.data();
        if (images.floats) request.windows = float_windows.data();
        request.shift = shift.data(), request.bits = bits.data(), request.base = base.data();
        if (chance(0.5f))  // windows once or twice, or none
            for (int i = 0; i < queries * patchscore::MOST_KNOWN; ++i)
                remembered.push_back(chance(0.2f) ? -1 : ids[size_t(below(int(ids.size())))]);
    }

    std::vector<double> run(const std::string& level, int threads) {
        const size_t count = size_t(queries), colours = count * size_t(channels);
        std::vector<double> m(count), s(count), s2(count), ss(count), v(colours), vs(colours), vv(colours);
        fits.assign(count, 0), pairs.assign(count, 0);
        request.m = m.data(), request.s = s.data(), request.s2 = s2.data(), request.v = v.data();
        request.ss = ss.data(), request.vs = vs.data(), request.vv = vv.data();
        std::vector<double> v2(colours), sl(count), qq(colours), ee(count);
        if (moments) request.v2 = v2.data(), request.sl = sl.data(), request.qq = qq.data(), request.ee = ee.data();
        request.fits = fits.data(), request.pairs = pairs.data();
        std::vector<int64_t> known = remembered;
        request.remembered = known.empty() ? nullptr : known.data();
        if (!patchscore::pruned_scan(request, threads, level, nullptr)) std::abort();
        std::vector<double> all;
        for (const auto* part : {&m, &s, &s2, &v, &ss, &vs, &vv, &v2, &sl, &qq, &ee})
            all.insert(all.end(), part->begin(), part->end());
        all.insert(all.end(), fits.begin(), fits.end());
        all.insert(all.end(), pairs.begin(), pairs.end());
        all.insert(all.end(), known.begin(), known.end());
        return all;
    }
};

int main() {
    int runs = 0, complaints = 0;
    for (const int k : {1, 3, 5, 7, 17})
        for (const int channels : {1, 2, 3, 4, 6, 16})
            for (const int rank : {1, 4, 12, 32})
                for (int turn = 0; turn < 4; ++turn) {
                    if (rank > channels * k * k) continue;  // no index has more axes
                    const bool floats = turn % 2;
                    Case one(floats, channels, k, rank);
                    for (const std::string& level : patchscore::simd_levels()) {
                        const std::vector<double> alone = one.run(level, 1), together = one.run(level, 3);
                        runs += 2;
                        bool finite = true;
                        for (const double x : alone) finite = finite && std::isfinite(x);
                        if (finite && alone == together) continue;
                        ++complaints;
                        std::printf("%s: %s, k = %d, %d channels, rank %d, turn %d: %s\n", level.c_str(),
                                    floats ? "floats" : "bytes", k, channels, rank, turn,
                                    finite ? "threads differ" : "not finite");
                    }
                }
    std::printf("%d runs, %d complaints\n", runs, complaints);
    return complaints > 0;
}

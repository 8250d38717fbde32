// Runs the pruned engine on small random indexes, on every instruction set, under AddressSanitizer and UBSan.
//
// What it computes is checked by tests/test_pruned.py; here only that no access leaves its memory and no arithmetic is
// undefined. Buffers are as large as what they hold, but for the zeros at the end of an index's file. Results must come
// out finite and the same for one thread and for three.
#include "../../csrc/pruned/lists.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <string>
#include <vector>

using patchscore::Scan;
using patchscore::SIBLINGS;

static uint32_t state = 1;

static float uniform() {
    state = state * 1664525u + 1013904223u;
    return float(state >> 8) / float(1 << 24);
}

static int below(int count) { return std::min(count - 1, int(uniform() * float(count))); }
static bool chance(float p) { return uniform() < p; }

template <typename T>
static T one_of(std::initializer_list<T> choices) {
    return choices.begin()[below(int(choices.size()))];
}

// The half float at or next to x towards zero, for |x| < 65504; small ones become zero.
static uint16_t half_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000;
    return uint16_t(std::abs(x) < 6.2e-5f ? sign : sign | (((bits & 0x7fffffff) - (112u << 23)) >> 13));
}

// A region of an index and some queries.
struct Case {
    int channels, k, rank, height, width, images, cells, items;
    bool circular, edge;
    std::vector<uint8_t> data, value_bytes, image_bytes, allowed;
    std::vector<int64_t> offsets, sizes, starts, item, number;
    std::vector<float> value_floats, image_floats, repeats, competing, mean, variance, parent_mean, parent_variance;
    std::vector<float> log_repeats, moments, axes, centre, z;
    std::vector<uint16_t> counts;
    int64_t pairs = 0;
    Scan scan{};

    Case(int channels, int k, int rank);
    Case(const Case&) = delete;
    void make_images();
    void make_cells();
    void make_queries();
    std::string text() const;
};

Case::Case(int channels, int k, int rank)
    : channels(channels),
      k(k),
      rank(rank),
      height(k > 7 ? k + 3 : 12),
      width(k > 7 ? k + 2 : 10),
      images(one_of({1, 3, 40, 40})),
      cells(SIBLINGS * (rank <= 8 && k < 5 && chance(0.2f) ? 70 : one_of({1, 3}))),
      items(one_of({1, 3})),
      circular(chance(0.5f)),
      edge(k > 1 && !circular && chance(0.5f)) {
    scan.channels = channels, scan.height = height, scan.width = width, scan.patch_size = k;
    scan.lists.cells = cells, scan.lists.rank = rank;
    scan.sigma = one_of({1e-3, 0.02, 0.3, 2., 100.});
    scan.exact_sigma = scan.sigma * (scan.sigma < 0.1 ? one_of({1., 0.2, 0.01}) : one_of({1., 1., 0.5}));
    scan.used_rank = chance(0.5f) ? rank : 1 + below(rank), scan.foreseen_rank = 1 + below(scan.used_rank);
    scan.budget = one_of({1., 0.2, 0.01}), scan.floor = 0.02 * scan.budget;
    scan.recheck = one_of({0, 8}), scan.seed = uint64_t(below(1 << 20)) << 42 | uint64_t(below(1 << 20));
    make_images();
    make_cells();
    make_queries();
}

void Case::make_images() {
    const size_t size = size_t(images) * size_t(channels * height * width);
    image_bytes = std::vector<uint8_t>(size), image_floats = std::vector<float>(size);
    // Smooth, so that windows resemble each other.
    for (size_t i = 0; i < size; ++i) {
        const float before = i ? float(image_bytes[i - 1]) : 100.f;
        image_bytes[i] = uint8_t(std::min(255.f, std::max(0.f, before + 60 * uniform() - 30)));
        image_floats[i] = float(image_bytes[i]) / 127.5f - 1.f;
    }
    scan.images_are_bytes = scan.lists.values_are_bytes = chance(0.5f);
    scan.images = scan.images_are_bytes ? static_cast<const void*>(image_bytes.data()) : image_floats.data();
    scan.image_count = images;
    if (chance(0.3f)) {
        allowed = std::vector<uint8_t>(size_t(images));
        for (uint8_t& one : allowed) one = chance(0.6f);
        scan.lists.allowed = allowed.data();
    }
    const size_t pixels = size_t(channels * k * k);
    axes = std::vector<float>(pixels * size_t(rank)), centre = std::vector<float>(pixels);
    for (size_t i = 0; i < axes.size(); ++i)  // where pixels are fewer, axes of zeros
        if (i % size_t(rank) < pixels) axes[i] = (2 * uniform() - 1) * std::sqrt(3.f / float(pixels));
    for (float& x : centre) x = 0.4f * uniform() - 0.2f;
    scan.axes = axes.data(), scan.centre = centre.data();
}

void Case::make_cells() {
    patchscore::Lists& lists = scan.lists;
    const int r = k / 2;
    lists.row0 = r, lists.col0 = r, lists.rows = height - 2 * r, lists.cols = width - 2 * r;
    if (edge && chance(0.5f)) {
        lists.row0 = below(2) ? height - 1 - below(r) : below(r), lists.rows = 1;
    } else if (edge) {
        lists.col0 = below(2) ? width - 1 - below(r) : below(r), lists.cols = 1;
    }
    const int per_image = lists.rows * lists.cols;
    std::vector<int64_t> ids(size_t(images) * size_t(per_image));
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = int64_t(i);
    for (size_t i = ids.size(); i > 1; --i) std::swap(ids[i - 1], ids[size_t(below(int(i)))]);

    // How many windows each cell gets of those.
    sizes = std::vector<int64_t>(size_t(cells)), offsets = starts = sizes;
    const int large = chance(0.2f) ? below(cells) : -1, most = cells > 100 ? 3 : 70;
    int64_t stored = 0;
    const int64_t before = 64;  // of another region
    for (int c = 0; c < cells; ++c) {
        const int64_t left = int64_t(ids.size()) - stored;
        const int64_t wanted = c == large ? 400 : chance(0.3f) ? 0 : 1 + below(1 + below(most));
        sizes[size_t(c)] = std::min(left, c == cells - 1 && !stored ? std::max<int64_t>(1, wanted) : wanted);
        starts[size_t(c)] = stored, offsets[size_t(c)] = before + stored * (2 * rank + 8);
        stored += sizes[size_t(c)];
    }
    if (!allowed.empty())  // one at least competes
        allowed[size_t(ids[size_t(below(int(stored)))] / per_image)] = 1;

    const bool repeated = chance(0.5f);
    data = std::vector<uint8_t>(size_t(before + stored * (2 * rank + 8) + 32));
    if (lists.values_are_bytes)
        value_bytes = std::vector<uint8_t>(size_t(stored * channels));
    else
        value_floats = std::vector<float>(size_t(stored * channels));
    if (repeated) {
        counts = std::vector<uint16_t>(size_t(stored)), repeats = std::vector<float>(1 << 16);
        for (int i = 0; i < 9; ++i) repeats[size_t(i)] = float(i < 8 ? 1 + i : 5000);
        for (uint16_t& code : counts) code = uint16_t(below(below(2) ? 1 : 9));
        lists.counts = counts.data(), lists.repeats = repeats.data();
    }
    // A family of another region stands before this one's cells.
    const size_t pitch = size_t(cells) + SIBLINGS, families = pitch / SIBLINGS, parts = size_t(2 * channels);
    mean = variance = std::vector<float>(size_t(rank) * pitch);
    parent_mean = parent_variance = std::vector<float>(size_t(rank) * families);
    competing = log_repeats = std::vector<float>(size_t(cells)), moments = std::vector<float>(size_t(cells) * parts);
    std::vector<double> parent_sum(size_t(rank) * families), parent_square(parent_sum), parent_weight(families);
    for (int c = 0; c < cells; ++c) {
        std::vector<double> sum(size_t(rank), 0.), square(sum), value_sums(parts);
        double total = 0;
        uint8_t* features = data.data() + offsets[size_t(c)];
        uint8_t* places = features + sizes[size_t(c)] * 2 * rank;
        for (int64_t w = starts[size_t(c)]; w < starts[size_t(c)] + sizes[size_t(c)]; ++w, places += 8) {
            const int64_t id = ids[size_t(w)], image = id / per_image;
            std::memcpy(places, &id, 8);
            const int row = int(id % per_image) / lists.cols + lists.row0, col = int(id % lists.cols) + lists.col0;
            const auto pixel = [&](int channel, int y, int x) {
                if (y < 0 || x < 0 || y >= height || x >= width) return 0.f;
                return image_floats[size_t(((image * channels + channel) * height + y) * width + x)];
            };
            const double weight = repeated ? double(repeats[counts[size_t(w)]]) : 1;
            total += weight;
            for (int d = 0; d < rank; ++d, features += 2) {
                float x = 0;
                for (int i = 0; i < channels * k * k; ++i)
                    x += (pixel(i / (k * k), row - r + i / k % k, col - r + i % k) - centre[size_t(i)]) *
                         axes[size_t(i * rank + d)];
                const uint16_t half = half_of(x);
                std::memcpy(features, &half, 2);
                sum[size_t(d)] += weight * double(x), square[size_t(d)] += weight * double(x * x);
            }
            for (int i = 0; i < channels; ++i) {
                const float value = pixel(i, row, col);
                const size_t at = size_t(w * channels + i);
                if (lists.values_are_bytes)
                    value_bytes[at] = uint8_t(std::lround((value + 1) * 127.5f));
                else
                    value_floats[at] = value;
                value_sums[size_t(i)] += weight * double(value);
                value_sums[size_t(channels + i)] += weight * double(value * value);
            }
            competing[size_t(c)] += allowed.empty() || allowed[size_t(image)] ? 1.f : 0.f;
        }
        if (!(total > 0)) continue;
        const size_t family = 1 + size_t(c / SIBLINGS);
        parent_weight[family] += total;
        for (size_t d = 0; d < size_t(rank); ++d) {
            const double average = sum[d] / total;
            mean[d * pitch + SIBLINGS + size_t(c)] = float(average);
            variance[d * pitch + SIBLINGS + size_t(c)] = float(std::max(0., square[d] / total - average * average));
            parent_sum[d * families + family] += sum[d], parent_square[d * families + family] += square[d];
        }
        for (size_t i = 0; i < parts; ++i) moments[size_t(c) * parts + i] = float(value_sums[i] / total);
        log_repeats[size_t(c)] = float(std::log(total / double(sizes[size_t(c)])));
    }
    for (size_t i = 0; i < parent_sum.size(); ++i) {
        const double total = std::max(1., parent_weight[i % families]), average = parent_sum[i] / total;
        parent_mean[i] = float(average);
        parent_variance[i] = float(std::max(0., parent_square[i] / total - average * average));
    }
    lists.data = data.data(), lists.offsets = offsets.data(), lists.sizes = sizes.data(), lists.starts = starts.data();
    lists.values = lists.values_are_bytes ? static_cast<const void*>(value_bytes.data()) : value_floats.data();
    lists.competing = competing.data(), lists.log_repeats = log_repeats.data(), lists.moments = moments.data();
    lists.mean = mean.data() + SIBLINGS, lists.variance = variance.data() + SIBLINGS, lists.pitch = int64_t(pitch);
    lists.parent_mean = parent_mean.data() + 1, lists.parent_variance = parent_variance.data() + 1;
}

void Case::make_queries() {
    const int high = height + k - 1, wide = width + k - 1;
    z = std::vector<float>(size_t(items * channels) * size_t(high * wide));
    // A training image and noise, so that weights differ.
    const float noise = float(std::min(3., scan.exact_sigma));
    for (size_t i = 0; i < z.size(); ++i) z[i] = image_floats[i % image_floats.size()] + noise * (3 * uniform() - 1.5f);
    scan.z = z.data();
    // Places go round the border where windows of the interior compete, and are the windows' own otherwise.
    const patchscore::Lists& lists = scan.lists;
    scan.row0 = circular ? 0 : lists.row0, scan.col0 = circular ? 0 : lists.col0;
    scan.cols = circular ? width : lists.cols;
    const int places = (circular ? height : lists.rows) * scan.cols;
    const int kind = below(4);  // all places of all images, of the last, some of them, one
    std::vector<int64_t> which, where;
    for (int i = kind == 1 ? items - 1 : 0; i < items; ++i)
        for (int n = 0; n < places; ++n)
            if (kind < 2 || (kind == 2 && (n % 7 == 0 || n == places - 1))) which.push_back(i), where.push_back(n);
    if (kind == 3) which.push_back(below(items)), where.push_back(one_of({0, places - 1, below(places)}));
    item = std::vector<int64_t>(which.begin(), which.end()), number = std::vector<int64_t>(where.begin(), where.end());
    scan.items = item.data(), scan.numbers = number.data(), scan.queries = int(item.size());
}

std::string Case::text() const {
    char line[400];
    const patchscore::Lists& lists = scan.lists;
    std::snprintf(line, sizeof line,
                  "C=%d k=%d rank=%d/%d/%d cells=%d images=%d %s%s%s queries=%d of %d at %d,%d windows at %d,%d "
                  "sigma=%g/%g budget=%g recheck=%d",
                  channels, k, rank, scan.used_rank, scan.foreseen_rank, cells, images,
                  scan.images_are_bytes ? "bytes" : "floats", lists.counts ? " counts" : "",
                  lists.allowed ? " allowed" : "", scan.queries, items, scan.row0, scan.col0, lists.row0, lists.col0,
                  scan.sigma, scan.exact_sigma, scan.budget, scan.recheck);
    return line;
}

// Everything that the engine finds of the cases: results in a row, then the pairs.
static std::vector<double> run(const std::vector<Case*>& cases, const std::string& simd, int threads) {
    std::vector<Scan> scans;
    std::vector<std::vector<double>> rooms;
    for (Case* one : cases) {
        Scan scan = one->scan;
        const size_t queries = size_t(scan.queries), values = queries * size_t(scan.channels);
        std::vector<double*> at;
        for (const size_t size : {queries, queries, queries, queries, values, values, values}) {
            rooms.emplace_back(size, NAN);
            at.push_back(rooms.back().data());
        }
        scan.m = at[0], scan.s = at[1], scan.s2 = at[2], scan.ss = at[3];
        scan.v = at[4], scan.vv = at[5], scan.vs = at[6];
        scan.pairs = &one->pairs;
        scans.push_back(scan);
    }
    if (!patchscore::scan_lists(scans, threads, simd, nullptr)) std::abort();
    std::vector<double> all;
    for (const std::vector<double>& part : rooms) all.insert(all.end(), part.begin(), part.end());
    for (const Case* one : cases) all.push_back(double(one->pairs));
    return all;
}

int main() {
    const std::vector<std::string> levels = patchscore::simd_levels();
    int runs = 0, complaints = 0;
    for (const int k : {1, 3, 5, 7, 17})
        for (const int channels : {1, 2, 3, 4})
            for (const int rank : {4, 8, 12, 20})
                for (int turn = 0; turn < (k > 7 ? 1 : 3); ++turn) {
                    if (rank > (channels * k * k + 3) / 4 * 4) continue;  // no index has more axes
                    // Two of other sizes in one call share scratch.
                    Case one(channels, k, rank), other(1 + below(4), 3, 4);
                    std::vector<Case*> cases = {&one};
                    if (turn == 1) cases.push_back(&other);
                    for (const std::string& level : levels) {
                        const std::vector<double> alone = run(cases, level, 1), together = run(cases, level, 3);
                        bool fine = true;
                        for (const Case* part : cases) fine = fine && part->pairs > 0;
                        for (const double x : alone) fine = fine && std::isfinite(x);
                        size_t apart = 0;
                        while (apart < alone.size() && alone[apart] == together[apart]) ++apart;
                        runs += 2;
                        if (fine && apart == alone.size()) continue;
                        ++complaints;
                        std::printf("%s: %s: %s", level.c_str(), fine ? "threads differ" : "not finite, or no pairs",
                                    one.text().c_str());
                        if (fine)
                            std::printf(": %zu of %zu: %.17g, %.17g", apart, alone.size(), alone[apart],
                                        together[apart]);
                        std::printf("\n");
                    }
                }
    std::printf("%d runs, %d complaints\n", runs, complaints);
    return complaints > 0;
}

// What all queries of one region share: its cells' moments made ready for a noise level, the noisy images, and the state
// of a query between the steps. Also the comparison of two windows pixel by pixel. Included by lists_cpu.cpp alone.
#pragma once

namespace patchscore {

namespace {

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
                    constant[power][c] = float(power + 1) * lists.log_repeats[p * SIBLINGS + c],
                    product[power][c] = 1.f;
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
                    for (int c = 0; c < SIBLINGS; ++c)
                        constant[power][c] -= 0.5f * std::log(std::min(3e38f, product[power][c]));
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

}  // namespace

}  // namespace patchscore

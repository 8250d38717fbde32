// The last steps: windows that neighbours propose, and what exact weights put right. Included by lists_cpu.cpp alone.
#pragma once

#include "lists_region.h"

namespace patchscore {

namespace {

// Which query of which region every pixel of the noisy images is, among regions that share images and competitors.
class Pixels {
    struct At {
        Region* region = nullptr;
        int query = -1;
    };
    int height = 1, width = 1;
    std::vector<At> at;              // [items, height, width]

public:
    typedef std::tuple<const void*, const void*, const void*, int> Kind;
    static Kind kind(const Scan& scan) { return {scan.z, scan.images, scan.lists.allowed, scan.patch_size}; }

    explicit Pixels(const std::vector<Region*>& regions) {
        int64_t items = 0;
        for (const Region* region : regions) {
            const Scan& scan = region->scan;
            height = std::max(height, scan.height), width = std::max(width, scan.width);
            items = std::max(items, 1 + *std::max_element(scan.items, scan.items + scan.queries));
        }
        at.resize(size_t(items * height * width));
        for (Region* region : regions)
            for (int i = 0; i < region->scan.queries; ++i) {
                const auto [row, col] = region->pixel_of(i);
                at[size_t((region->scan.items[i] * height + row) * width + col)] = {region, i};
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
        : region(region), pixels(pixels), scan(region.scan), lists(region.lists),
          bits(LOG2E / (scan.sigma * scan.sigma)), exact_bits(LOG2E / (2 * scan.exact_sigma * scan.exact_sigma)) {}

    static constexpr int ROUNDS = 2;

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
    // Barnes et al. 2009). What neighbours propose is taken for certain, whether it was scanned or not: the rest is
    // then estimated without it. One heavier than the sample's threshold has been scanned if and only if it is in the
    // sample. A lighter one that is in it by chance loses its factor too: a bias, but smaller than the spread it saves.
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
                if (heavy.log_weight < state.threshold + MARGIN_BITS) continue;
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
        const float* const q = region.q.data() + query * region.pitch;
        for (int d = 0; d < scan.used_rank; ++d) norm += double(q[d]) * double(q[d]);
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
    // in the sample may be the heaviest: how far the lead over those falls short, of 1.
    double doubt_of(const State& state) const {
        if (!(state.threshold > -INFINITY) || state.heavy.size() < 2) return 0;
        double offset = 0, squares = 0, best = -INFINITY;
        const double size = double(state.heavy.size());
        for (const Heavy& heavy : state.heavy) {
            const double exact = -double(heavy.distance) * bits / 2, apart = exact - double(heavy.log_weight);
            offset += apart / size, squares += apart * apart / size, best = std::max(best, exact);
        }
        const double deviation = std::sqrt(std::max(0., squares - offset * offset));
        const double lead = best - offset - double(state.threshold);
        if (deviation * exact_bits * 2 / bits < DISORDER) return 0;
        return std::min(1., std::max(0., 1 - lead / (4 * deviation)));
    }

    // Variance of the values of a sample.
    static double scatter(const std::vector<Heavy>& sample, int channel) {
        double mean = 0, squares = 0;
        for (const Heavy& heavy : sample) {
            const double value = double(heavy.value[channel]);
            mean += value / double(sample.size()), squares += value * value / double(sample.size());
        }
        return std::max(0., squares - mean * mean);
    }

    static constexpr double DISORDER = 3;  // bits by which weights may be off before their order is doubted
    static constexpr size_t MOST_PROPOSED = 8;
    static constexpr float MARGIN_BITS = 0.25f;  // stored features are rounded: a window so near may be in the sums
    static constexpr double FEW_DRAWN = 4;  // so many drawn windows of the rest count as much as all sure ones together

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
        for (int d = 0; d < rank; ++d) {
            const double x = double(features[size_t(d)]);
            weight += x * (double(q[d]) - 0.5 * x);
        }
        return float(weight * bits);
    }

    // The windows of a sample by their exact weights, relative to 2^top, beside those of the scan.
    struct Second {
        struct Part {
            double size = 0, rough = 0, exact = 0, rough_v[MOST_CHANNELS] = {}, exact_v[MOST_CHANNELS] = {};
        };
        std::vector<double> exact, rough, chance;  // [windows] weight with all that a window stands for; of being drawn
        double top = -INFINITY, squares = 0;       // squares of single weights
        Part sure, drawn;                          // windows that are in it for certain; the others, over their chance
    };

    // All windows but those that are sure to be in the sample: known by the scan, in part drawn.
    struct Rest {
        double rough = 0, ratio = 0;  // by the scan; exact weights by the scan's
        double share = 0;             // of the whole, by exact weights
        double spread = 0;            // relative variance of the ratio
    };

    struct Moments {
        double mean, variance;
    };

    Second weigh(const State& state) const {
        const std::vector<Heavy>& kept = state.heavy;
        const size_t size = kept.size();
        Second second;
        second.exact.resize(size), second.rough.resize(size), second.chance.resize(size);
        for (size_t j = 0; j < size; ++j) {
            const double above = double(kept[j].log_size) - double(state.threshold);
            second.chance[j] = kept[j].certain ? 1 : std::min(1., std::exp2(above));
            second.rough[j] = std::exp2(double(kept[j].log_size) - state.m);
            // In bits: the size stands for all that a window represents.
            const double stands_for = double(kept[j].log_size) - double(kept[j].log_weight);
            second.exact[j] = stands_for - double(kept[j].distance) * exact_bits;
            second.top = std::max(second.top, second.exact[j] - std::log2(second.chance[j]));
        }
        for (size_t j = 0; j < size; ++j) {
            const double single = -double(kept[j].distance) * exact_bits - second.top;
            second.exact[j] = std::exp2(second.exact[j] - second.top);
            const double exact = second.exact[j] / second.chance[j], rough = second.rough[j] / second.chance[j];
            second.squares += exact * std::exp2(single);
            Second::Part& part = second.chance[j] < 1 ? second.drawn : second.sure;
            part.size += 1, part.rough += rough, part.exact += exact;
            for (int c = 0; c < scan.channels; ++c) {
                const double value = double(kept[j].value[c]);
                part.rough_v[c] += rough * value, part.exact_v[c] += exact * value;
            }
        }
        return second;
    }

    Rest rest_of(const State& state, const Second& second) const {
        const Second::Part &sure = second.sure, &drawn = second.drawn;
        Rest rest;
        rest.rough = std::max(0., state.s - sure.rough);
        const double known = sure.rough > 0 ? sure.exact / sure.rough : 0, count = known > 0 ? FEW_DRAWN : 0;
        const double each = drawn.size > 0 ? drawn.rough / drawn.size : 1;
        rest.ratio = (drawn.exact / each + count * known) / std::max(1e-300, drawn.size + count);
        rest.share = rest.ratio * rest.rough / std::max(1e-300, sure.exact + rest.ratio * rest.rough);
        const double size = double(second.exact.size());
        for (size_t j = 0; j < second.exact.size(); ++j)
            rest.spread += std::pow(second.exact[j] / (rest.ratio * second.rough[j]) - 1, 2) / size;
        rest.spread = std::min(1., rest.spread) / (drawn.size + FEW_DRAWN);
        return rest;
    }

    // The windows that are sure to be in the sample have their exact weights; the rest keeps the scan's sums, times
    // what the drawn ones of it weigh more, and its mean moves by what their exact weights change, in proportion to how
    // well the sample knows that (Wiener's filter).
    Moments beside_the_scan(const State& state, const Second& second, const Rest& rest, int c) const {
        const Second::Part &sure = second.sure, &drawn = second.drawn;
        const bool known = rest.rough > 1e-6 * state.s;
        double rest_mean = known ? std::min(1., std::max(-1., (state.v[c] - sure.rough_v[c]) / rest.rough)) : 0;
        double change = 0, change_variance = 0, noise = 0;
        if (drawn.exact > 0 && rest.rough > 0) {
            const double whole = sure.exact + rest.ratio * rest.rough;
            const double exact_mean = drawn.exact_v[c] / drawn.exact, rough_mean = drawn.rough_v[c] / drawn.rough;
            change = exact_mean - rough_mean;
            for (size_t j = 0; j < second.exact.size(); ++j) {
                const double chance = second.chance[j], exact = second.exact[j], rough = second.rough[j];
                if (chance >= 1) continue;
                const double value = double(state.heavy[j].value[c]);
                const double d = exact / chance / drawn.exact * (value - exact_mean) -
                                 rough / chance / drawn.rough * (value - rough_mean);
                change_variance += (1 - chance) * d * d;
                const double excess = (exact - rest.ratio * rough) / whole;
                noise += excess * excess / chance * (value - rest_mean) * (value - rest_mean);
            }
        }
        // The change is measured with `measured` variance; before that, independent excesses of the rest's windows let
        // expect `noise`, and what stands out from both tells that they were not independent.
        const double measured = rest.share * rest.share * change_variance;
        const double seen = rest.share * rest.share * change * change;
        const double expected = std::max(noise, seen - STANDS_OUT * measured);
        const double kept = expected > 0 ? expected / (expected + measured) : 0;
        rest_mean += kept * change;
        const double sure_mean = sure.exact > 0 ? sure.exact_v[c] / sure.exact : rest_mean;
        const double apart = rest.share * (1 - rest.share) * (rest_mean - sure_mean);
        return {(1 - rest.share) * sure_mean + rest.share * rest_mean,
                CHANGE_DOUBT * kept * measured + NOISE_DOUBT * noise + apart * apart * rest.spread};
    }

    static Moments of_the_sample(const std::vector<Heavy>& kept, const Second& second, int c) {
        const double found = second.sure.exact + second.drawn.exact;
        Moments of = {(second.sure.exact_v[c] + second.drawn.exact_v[c]) / found, 0};
        for (size_t j = 0; j < kept.size(); ++j) {
            const double d = second.exact[j] / second.chance[j] / found * (double(kept[j].value[c]) - of.mean);
            of.variance += (1 - second.chance[j]) * d * d;
        }
        return of;
    }

    // Puts right what the features leave out. Where the scan weighed by more noise than there is, its sums are no
    // guide: the sample alone decides.
    void correct(State& total, double& log_shift) const {
        if (total.heavy.empty() || !(total.s > 0)) return;
        const Second second = weigh(total);
        const double found = second.sure.exact + second.drawn.exact;
        if (!(found > 0)) return;
        const bool guided = scan.exact_sigma >= scan.sigma;
        const Rest rest = guided ? rest_of(total, second) : Rest{};
        const double whole = guided ? second.sure.exact + rest.ratio * rest.rough : found;
        if (!(whole > 0)) return;
        const double doubt = doubt_of(total);
        for (int c = 0; c < scan.channels; ++c) {
            const Moments to = guided ? beside_the_scan(total, second, rest, c) : of_the_sample(total.heavy, second, c);
            const double error = to.variance + (doubt > 0 ? doubt * scatter(total.heavy, c) : 0);
            const double shift = to.mean - total.v[c] / total.s;
            total.vv[c] += 2 * shift * total.vs[c] + shift * shift * total.ss + error * total.s * total.s;
            total.vs[c] += shift * total.ss;
            total.v[c] += shift * total.s;
        }
        if (!guided) total.s2 = total.s * total.s * second.squares / (found * found);
        // Weights of whole windows: the scan's times what exact ones are of rough ones.
        const double rough = guided ? total.s : second.sure.rough + second.drawn.rough;
        log_shift = (second.top + std::log2(whole) - total.m - std::log2(rough)) / LOG2E;
    }

    // Fitted: with these the standard error covers what it should (docs/notes/pruned.md).
    static constexpr double STANDS_OUT = 9;    // a change of more than three standard deviations is taken for one
    static constexpr double CHANGE_DOUBT = 4;  // variance that a change adds, in units of the measured one
    static constexpr double NOISE_DOUBT = 2;   // the same of the rest's windows, in units of what excesses let expect
};

}  // namespace

}  // namespace patchscore

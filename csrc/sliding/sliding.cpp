// The sliding engine on the CPU: which part of a problem is served in which precision, and the passes over the bank.
//
// A unit of a pass is one chunk of training images against one or a few noisy images, in every competition of the pass.
// Chunks depend on the bank alone and are merged in their order, so the numbers are the same for any thread count and
// in any batch. Distances are float32. Where those would leave log-weights more than 1e-4 nats off, a few are computed
// once more from the definition; where that is too many, float64 serves: by patch size, or pixel by pixel in a second
// pass.
#include "sliding.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "../common/simd.h"
#include "../common/threads.h"
#include "plan.h"
#include "task.h"
#include "tiles.h"
#include "workers.h"

namespace patchscore {

#define PS_KERNEL "../sliding/levels-inl.h"
#include "../common/each-level-inl.h"

namespace {

constexpr Level LEVELS[] = {
#if defined(__x86_64__)
    avx512::level_named("avx512"),
    avx2::level_named("avx2"),
#endif
    plain::level_named("plain"),
};

void require(bool fine, const char* what) {
    if (!fine) throw std::invalid_argument(what);
}

void check(const Problem& problem, const Competition& competition) {
    const int k = competition.patch_size, r = k / 2;
    require(k == 0 || (k % 2 == 1 && k < 2 * std::max(problem.height, problem.width)),
            "patch_size: takes odd sizes below twice the image");
    for (const Group& group : competition.groups)
        for (const bool is_row : {true, false}) {
            const Axis& axis = is_row ? group.rows : group.cols;
            const int size = is_row ? problem.height : problem.width;
            require(axis.q0 >= 0 && axis.q0 < axis.q1 && axis.q1 <= size, "groups: queries outside the image");
            const bool windows_inside = axis.w0 >= r && axis.w1 <= size - r;
            require(axis.locked ? windows_inside || !competition.circular : windows_inside && axis.w0 < axis.w1,
                    "groups: windows must lie inside the image, but for locked axes continued by zeros");
        }
}

void check(const Problem& problem) {
    require(problem.batch > 0 && problem.channels > 0 && problem.height > 0 && problem.width > 0 && problem.count > 0,
            "z, images: nothing may be empty");
    const int64_t values = int64_t(problem.batch) * problem.channels * problem.height * problem.width;
    for (int64_t i = 0; i < values; ++i)
        require(std::abs(problem.z[i]) <= LARGEST_PIXEL, "z: takes finite values up to 1e12");
    for (int b = 0; b < problem.batch; ++b)
        require(problem.sigma[b] > 0 && std::isfinite(problem.sigma[b]), "sigma: takes positive finite numbers");
    for (const Competition& competition : problem.competitions) check(problem, competition);
}

// Whether even a window that differs by the noise alone is too distant for float32: its log-weight is C k^2 / 2 nats on
// average.
bool distant_by_size(int channels, int patch_size) {
    constexpr double NATURAL_SHARE = 0.9;  // of DISTANT_BITS: images differ by more than the noise
    const double pixels = double(channels) * patch_size * patch_size;
    return pixels / 2 * LOG2E > NATURAL_SHARE * DISTANT_BITS;
}

// Sums of a competition in memory of their own; it has no groups yet.
struct OwnSums {
    Competition competition;
    std::vector<double> m, s, s2, sl, v, v2;

    OwnSums(const Competition& like, int64_t queries, int channels)
        : competition(like),
          m(size_t(queries), -HUGE_VAL),
          s(m.size()),
          s2(m.size()),
          sl(m.size()),
          v(m.size() * size_t(channels)),
          v2(v.size()) {
        competition.groups.clear();
        competition.m = m.data(), competition.s = s.data(), competition.s2 = s2.data(), competition.v = v.data();
        if (like.moments()) competition.sl = sl.data(), competition.v2 = v2.data();
    }
    OwnSums(const OwnSums&) = delete;
};

// A problem's competitions on their way to complete sums.
class Solver {
    const Problem& problem;
    const Level& level;
    Interrupt& interrupt;
    double value_of_byte[256];
    const std::vector<Span> no_pixels;

public:
    Solver(const Problem& problem, const Level& level, Interrupt& interrupt)
        : problem(problem), level(level), interrupt(interrupt) {
        for (int u = 0; u < 256; ++u) value_of_byte[u] = u / 127.5 - 1;
    }

    // False if the interrupt stopped it.
    bool solve() {
        const int64_t pixels = int64_t(problem.height) * problem.width;
        std::vector<Target> single, exact;
        std::vector<Buffer<double>> unsure;
        for (const Competition& competition : problem.competitions) {
            unsure.emplace_back(problem.batch * pixels);
            std::fill_n(unsure.back().get(), problem.batch * pixels, std::numeric_limits<double>::infinity());
            const bool in_float64 = distant_by_size(problem.channels, competition.patch_size);
            (in_float64 ? exact : single).push_back({competition, unsure.back().get()});
        }
        if (!serve(single, false) || !serve(exact, true)) return false;
        for (const Target& target : single)
            for (int item = 0; target.competition.patch_size && item < problem.batch; ++item)
                if (!solve_unsure(target, item)) return false;
        for (const Competition& competition : problem.competitions) complete(competition);
        return true;
    }

    // Adds the product to its result; false if the interrupt stopped it. Weights of windows that are thousands of nats
    // away need float64.
    bool multiply(const JacobianProduct& product) {
        const int64_t pixels = int64_t(problem.height) * problem.width;
        const double least = *std::min_element(product.evidence, product.evidence + problem.batch * pixels);
        Job whole = job(least * LOG2E < -DISTANT_BITS);
        whole.targets.push_back({problem.competitions.front(), nullptr});
        whole.product = &product;
        return run_all(whole);
    }

private:
    Job job(bool exact) const { return job(exact, problem); }

    Job job(bool exact, const Problem& problem) const {
        const Images images = {problem.images,  problem.images_are_bytes ? 1 : 4,
                               problem.indices, problem.channels,
                               problem.height,  problem.width,
                               value_of_byte,   no_pixels};
        const int64_t chunk =
            std::max<int64_t>(LEAST_CHUNK, round_up((problem.count + CHUNKS - 1) / CHUNKS, LEAST_CHUNK));
        return {problem, exact, images, problem.count, chunk, {}};
    }

    // Adds everything that the targets ask for to their sums. False if the interrupt stopped it.
    bool serve(const std::vector<Target>& targets, bool exact) {
        Job rest = job(exact);
        for (Target target : targets) {
            std::vector<Group> groups;
            groups.swap(target.competition.groups);
            std::vector<Group> turned;
            for (const Group& group : groups) {
                if (group.cols.locked && !group.rows.locked) {
                    turned.push_back(group);
                    continue;
                }
                const Tiling tiling =
                    choose_tiling(group, target.competition.patch_size, problem.count, rest.lanes(level));
                if (tiling.tiles() == 1)
                    target.competition.groups.push_back(group);
                else if (!serve_tiled(target, group, tiling, exact))
                    return false;
            }
            if (!turned.empty() && !serve_turned(target, turned, exact)) return false;
            if (!target.competition.groups.empty() || target.competition.patch_size == 0)
                rest.targets.push_back(target);
        }
        return run_all(rest);
    }

    bool serve_tiled(const Target& target, const Group& group, const Tiling& tiling, bool exact) {
        const int k = target.competition.patch_size, r = k / 2;
        Job tiled = job(exact);
        const std::vector<double> tiles = cut_tiles(tiled.images, problem.count, group, k, tiling);
        tiled.images.data = tiles.data(), tiled.images.pixel_bytes = 8, tiled.images.indices = nullptr;
        tiled.images.height = tiling.high + 2 * r, tiled.images.width = tiling.wide + 2 * r;
        tiled.count = problem.count * tiling.tiles();
        tiled.chunk = tiled.lanes(level);
        const Axis rows = {group.rows.q0, group.rows.q1, r, r + tiling.high, false};
        const Axis cols = {group.cols.q0, group.cols.q1, r, r + tiling.wide, false};
        tiled.targets.push_back(target);
        tiled.targets.back().competition.groups = {{rows, cols}};
        return run_all(tiled);
    }

    // Groups whose columns are locked, with rows for columns: sums slide along columns, here along all windows of a row
    // instead of along the few of a locked one (2 to 5 times the pairs a second, 32 x 32 in colour).
    bool serve_turned(const Target& target, const std::vector<Group>& groups, bool exact) {
        const int height = problem.height, width = problem.width;
        const int64_t pixels = int64_t(height) * width, values = problem.batch * problem.channels * pixels;
        const auto turn = [&](const auto* from, auto* to) {  // one plane
            for (int i = 0; i < height; ++i)
                for (int j = 0; j < width; ++j) to[int64_t(j) * height + i] = from[int64_t(i) * width + j];
        };
        std::vector<float> z(static_cast<size_t>(values));
        for (int64_t plane = 0; plane < values; plane += pixels) turn(problem.z + plane, z.data() + plane);
        Problem turned = problem;
        turned.height = width, turned.width = height, turned.z = z.data();
        Job job = this->job(exact, turned);
        job.images.turned = true;
        std::vector<double> unsure(size_t(problem.batch * pixels), HUGE_VAL);
        OwnSums own(target.competition, problem.batch * pixels, problem.channels);
        for (const Group& group : groups) own.competition.groups.push_back({group.cols, group.rows});
        job.targets.push_back({own.competition, unsure.data()});
        if (!run_all(job)) return false;
        for (const Group& group : groups)
            for (int item = 0; item < problem.batch; ++item)
                for (int i = group.rows.q0; i < group.rows.q1; ++i)
                    for (int j = group.cols.q0; j < group.cols.q1; ++j) {
                        const int64_t at = int64_t(i) * width + j, turned_at = int64_t(j) * height + i;
                        copy_pixel(own.competition, item, turned_at, target.competition, item, at);
                        if (target.unsure)
                            target.unsure[item * pixels + at] = unsure[size_t(item * pixels + turned_at)];
                    }
        return true;
    }

    // The pixels of one noisy image that float32 could not serve, in float64: all within the rectangles that hold them.
    bool solve_unsure(const Target& target, int item) {
        const Competition& competition = target.competition;
        const int64_t pixels = int64_t(problem.height) * problem.width, first = item * pixels;
        const double precision = precision_of(problem.sigma[item]);
        const double rounding = rounding_bound(0x1p-24, problem.channels, competition.patch_size, precision * LOG2E);
        const auto unsure = [&](int64_t pixel) {
            const double distance = target.unsure[first + pixel];
            // Chunks much further away than the nearest window weigh nothing, whatever their sums.
            const double nearest = std::min(distance, -competition.m[first + pixel]);
            return distance <= nearest * (1 + 2 * rounding) + NOTHING_NATS / precision && distance < HUGE_VAL;
        };
        std::vector<Group> groups;
        for (const Group& group : competition.groups) {
            Group part = group;
            part.rows.q0 = part.cols.q0 = std::numeric_limits<int>::max(), part.rows.q1 = part.cols.q1 = 0;
            for (int i = group.rows.q0; i < group.rows.q1; ++i)
                for (int j = group.cols.q0; j < group.cols.q1; ++j)
                    if (unsure(int64_t(i) * problem.width + j)) {
                        part.rows.q0 = std::min(part.rows.q0, i), part.rows.q1 = std::max(part.rows.q1, i + 1);
                        part.cols.q0 = std::min(part.cols.q0, j), part.cols.q1 = std::max(part.cols.q1, j + 1);
                    }
            if (part.rows.q1 == 0) continue;
            for (Axis* axis : {&part.rows, &part.cols})
                if (axis->locked) axis->w0 = axis->q0, axis->w1 = axis->q1;
            groups.push_back(part);
        }
        if (groups.empty()) return true;
        OwnSums again(competition, pixels, problem.channels);
        again.competition.groups = groups;
        Problem one = problem;
        one.batch = 1, one.z += first * problem.channels, one.sigma += item;
        if (!Solver(one, level, interrupt).serve({{again.competition, nullptr}}, true)) return false;
        for (int64_t pixel = 0; pixel < pixels; ++pixel)
            if (unsure(pixel)) {
                copy_pixel(again.competition, 0, pixel, competition, item, pixel);
                target.unsure[first + pixel] = HUGE_VAL;
            }
        return true;
    }

    // One pixel's sums, from item and pixel of one competition to those of another.
    void copy_pixel(const Competition& from, int from_item, int64_t from_pixel, const Competition& to, int to_item,
                    int64_t to_pixel) const {
        const int64_t pixels = int64_t(problem.height) * problem.width;
        const int64_t source = from_item * pixels + from_pixel, target = to_item * pixels + to_pixel;
        to.m[target] = from.m[source], to.s[target] = from.s[source], to.s2[target] = from.s2[source];
        if (to.moments()) to.sl[target] = from.sl[source];
        for (int c = 0; c < problem.channels; ++c) {
            const int64_t value = (int64_t(from_item) * problem.channels + c) * pixels + from_pixel;
            const int64_t into = (int64_t(to_item) * problem.channels + c) * pixels + to_pixel;
            to.v[into] = from.v[value];
            if (to.moments()) to.v2[into] = from.v2[value];
        }
    }

    // References become log-weights; the effective sample size s^2 / s2 stays within what so many windows can have.
    void complete(const Competition& competition) const {
        const int64_t pixels = competition.patch_size ? int64_t(problem.height) * problem.width : 1;
        const Axis all = {0, 1, 0, 1, false};
        for (const Group& group : competition.patch_size ? competition.groups : std::vector<Group>{{all, all}}) {
            const double windows = double(problem.count) * group.rows.competing() * group.cols.competing();
            for (int item = 0; item < problem.batch; ++item)
                for (int i = group.rows.q0; i < group.rows.q1; ++i)
                    for (int j = group.cols.q0; j < group.cols.q1; ++j) {
                        const int64_t at = item * pixels + int64_t(i) * problem.width + j;
                        const double s = competition.s[at];
                        competition.m[at] *= precision_of(problem.sigma[item]);
                        if (competition.moments()) competition.sl[at] *= precision_of(problem.sigma[item]);
                        competition.s2[at] = std::max(s * s / windows, std::min(s * s, competition.s2[at]));
                    }
        }
    }

    // Pass after pass, each over as many targets as go through the bank together: what a thread keeps stays small.
    bool run_all(const Job& job) {
        const int64_t most = std::min(THREAD_BYTES, problem.memory_limit);
        for (size_t first = 0, count; first < job.targets.size(); first += count) {
            const auto small = [&](size_t more) { return Pass(job, level, first, more).bytes_per_thread() <= most; };
            const auto by_windows = [&](size_t i) { return job.targets[i].competition.patch_size > 0; };
            for (count = 1; by_windows(first) && first + count < job.targets.size() && by_windows(first + count) &&
                            small(count + 1);)
                ++count;
            if (!run(Pass(job, level, first, count))) return false;
        }
        return true;
    }

    bool run(const Pass& pass) {
        const int64_t affordable = problem.memory_limit / pass.bytes_per_thread();
        if (affordable < 1)
            throw std::invalid_argument("memory_limit: got " + std::to_string(problem.memory_limit) +
                                        " bytes, one thread takes " + std::to_string(pass.bytes_per_thread()));
        const int64_t threads = std::max<int64_t>(1, std::min({int64_t(problem.threads), affordable, pass.units()}));
        Queue queue(pass, interrupt);
        ThreadPool(threads, interrupt).run([&](int thread) { queue.work(thread == 0); });
        return !interrupt.stop;
    }

    static constexpr double NOTHING_NATS = 40;  // 1e9 windows at e^-40 of the nearest weight are negligible
};

}  // namespace

std::vector<std::string> simd_levels() {
    std::vector<std::string> names;
    for (const Level& level : LEVELS)
        if (machine_has(level.name)) names.push_back(level.name);
    return names;
}

bool sliding_posterior_sums(const Problem& problem, const std::string& simd, Poll poll) {
    const Level& level = choose_level(LEVELS, simd);
    check(problem);
    Interrupt interrupt;
    interrupt.poll = poll;
    return Solver(problem, level, interrupt).solve();
}

bool sliding_product(const Problem& problem, const JacobianProduct& product, const std::string& simd, Poll poll) {
    const Level& level = choose_level(LEVELS, simd);
    check(problem);
    require(problem.competitions.size() == 1 && problem.competitions.front().patch_size > 0,
            "competitions: a product takes one, by windows");
    Interrupt interrupt;
    interrupt.poll = poll;
    return Solver(problem, level, interrupt).multiply(product);
}

}  // namespace patchscore

// Plan and scan: which share of which cell some queries of a region take, and the sums over that. Included by
// lists_cpu.cpp alone.
#pragma once

#include "lists_region.h"

namespace patchscore {

namespace {

constexpr int AT_ONCE = 48;          // queries whose weights are foreseen together ..
constexpr int64_t FAMILIES_AT_ONCE = 24000;  // .. as long as they have no more families in all

// The families of a query's parents that matter, and what is foreseen of their cells.
struct Families {
    int64_t count;
    double windows;                  // that compete
    float top;                       // log of the greatest weight expected of a parent
    double far[1 + MOST_CHANNELS];   // what is foreseen of other parents, relative to that
    std::vector<int32_t> parents;
    Buffer<float> memory;
    float* foreseen() { return memory.room(count * 2 * SIBLINGS); }  // [families, 2, SIBLINGS] log E[w], log E[w^2]
};

// A thread's scratch, for regions of any size.
struct Workspace {
    std::vector<float> flat, squares;
    Buffer<float> parents, parent_share, ranked, share, score, competing, block, runs;
    std::array<Families, AT_ONCE> foreseen;
    std::vector<Foreseeing> asked;
    std::vector<int64_t> first_asked;
    std::vector<int32_t> order, active;
    std::vector<uint32_t> luck;
    std::vector<Planned> plan;
};

// A range of cells, and what is found there: one thread reads it for all queries of a block.
struct Stretch {
    std::vector<float> m;            // [queries] references of the sums
    Buffer<float> sums;             // [queries, LANES]
    std::vector<Samples> samples;    // [queries]
    std::vector<Entry> entries;
    std::vector<int64_t> first_entry;
    int64_t pairs = 0;

    explicit Stretch(int queries)
        : m(size_t(queries), -FAR), sums(int64_t(queries) * LANES), samples(size_t(queries)) {
        std::fill_n(sums.get(), int64_t(queries) * LANES, 0.f);
    }
};

// Some queries of one region: planned, scanned, and the windows of their samples compared. Threads share the steps by
// slices of the queries or by stretches of the cells; what a query gets does not depend on how.
class Block {
    Region& region;
    const Scan& scan;
    const Lists& lists;
    const ListLevel& level;
    const int first, count;
    Interrupt& interrupt;
    const double bits;               // log2(e) / sigma^2

    // What is foreseen of a query: weights relative to 2^(top), variances to 2^(2 top), calibrated by what is found.
    struct Foreseen {
        double sure, far[1 + MOST_CHANNELS], unseen[1 + 2 * MOST_CHANNELS];
        bool glanced = false;
        double pilot_weight = 0;     // the most that is foreseen of a cell that is surely looked into,
        Planned pilot;               // and that cell
    };
    std::vector<std::vector<Planned>> planned;  // [slices, STRETCHES]
    std::vector<Foreseen> foreseen;
    std::vector<float> calibration;
    std::vector<uint32_t> luck;
    std::vector<char> again;         // which queries are scanned: all, then those whose sample came out too small
    float* const q;                  // [count, pitch]
    std::vector<Stretch> stretches;

public:
    static constexpr int SLICE = 256, STRETCHES = 8;

    Block(Region& region, int first, int count, Interrupt& interrupt)
        : region(region), scan(region.scan), lists(region.lists), level(region.level), first(first), count(count),
          interrupt(interrupt), bits(LOG2E / (scan.sigma * scan.sigma)), planned(size_t(slices() * STRETCHES)),
          foreseen(size_t(count)), calibration(size_t(count), -1e9f), luck(size_t(count)), again(size_t(count), 1),
          q(region.q.data() + first * region.pitch) {
        for (int i = 0; i < STRETCHES; ++i) stretches.emplace_back(count);
    }

    int slices() const { return (count + SLICE - 1) / SLICE; }
    bool scans_again() const { return std::count(again.begin(), again.end(), 1) > 0; }
    int64_t pairs() const {
        int64_t all = 0;
        for (const Stretch& stretch : stretches) all += stretch.pairs;
        return all;
    }

    // Features of a slice's queries, and which share of which cell each takes.
    void plan(int slice, Workspace& space, bool calling) {
        const int begin = slice * SLICE, end = std::min(count, begin + SLICE);
        project(begin, end, space);
        const int rank = scan.foreseen_rank;
        space.squares.resize(size_t(AT_ONCE * 2 * rank));
        float* const parents = space.parents.room(AT_ONCE * region.parent_row);
        for (int i = begin; i < end; i += AT_ONCE) {
            if (interrupt.stopped(calling)) return;
            const int some = std::min(AT_ONCE, end - i);
            for (int j = 0; j < some; ++j)
                for (int d = 0; d < rank; ++d) {
                    const float x = q[(i + j) * region.pitch + d];
                    space.squares[size_t(j * 2 * rank + d)] = x, space.squares[size_t((j * 2 + 1) * rank + d)] = x * x;
                }
            level.product(space.squares.data(), 2 * rank, some, region.parent_weights.data(), region.parent_row,
                          2 * rank, region.parent_constants.data(), parents);
            for (int j = 0; j < some; ++j)
                choose(parents + j * region.parent_row, space.foreseen[size_t(j)], space);
            for (int j = 0, after; j < some; j = after) {
                int64_t families = space.foreseen[size_t(j)].count;
                for (after = j + 1; after < some && families < FAMILIES_AT_ONCE; ++after)
                    families += space.foreseen[size_t(after)].count;
                foresee(i, j, after, space);
                for (int of = j; of < after; ++of) plan_query(i + of, space.foreseen[size_t(of)], space);
            }
        }
    }

    // The steps: a glance at the most promising cell of every query tells where its weights lie and about how large
    // its sums will be, so that most windows need not be looked at closely. Then the cells that are surely looked into.
    // Those taken by chance go last, when the others have told how foreseen weights compare with real ones.
    enum Turn { GLANCE, SURE, CHANCE };

    void scan_stretch(Turn turn, int number, Workspace& space, bool calling) {
        Stretch& stretch = stretches[size_t(number)];
        const int64_t taken = group_by_cell(turn, number);
        if (turn != GLANCE) stretch.pairs += taken;
        scan_cells(number, turn == GLANCE ? 0 : scan.recheck, space, calling);
    }

    // What a step found, for the next one.
    void learn(Turn turn, int slice) {
        for (int i = slice * SLICE; i < std::min(count, (slice + 1) * SLICE); ++i) {
            if (!again[size_t(i)]) continue;
            refer_alike(i);
            calibrate(i);
            if (turn != GLANCE) continue;
            const double all = foreseen[size_t(i)].sure + foreseen[size_t(i)].far[0];
            const double size = double(calibration[size_t(i)]) + std::log2(all / std::max(1, scan.recheck));
            for (Stretch& stretch : stretches) {
                stretch.samples[size_t(i)].threshold = float(size - DOUBT_BITS);
                std::fill_n(stretch.sums.get() + int64_t(i) * LANES, LANES, 0.f);
            }
        }
    }

    // Where the glance promised far too much, hardly a window was large enough for the sample: again without it.
    void judge(int slice) {
        for (int i = slice * SLICE; i < std::min(count, (slice + 1) * SLICE); ++i) {
            again[size_t(i)] = scan.recheck && too_few(i);
            if (!again[size_t(i)]) continue;
            for (Stretch& stretch : stretches) {
                stretch.m[size_t(i)] = -FAR, stretch.samples[size_t(i)] = {};
                std::fill_n(stretch.sums.get() + int64_t(i) * LANES, LANES, 0.f);
            }
        }
    }

    // Into the region's states, and a second look at the windows of the samples.
    void finish(int slice, bool calling) {
        const int begin = slice * SLICE, end = std::min(count, begin + SLICE);
        for (int i = begin; i < end; ++i) leave(i);
        look_again(begin, end, calling);
    }

private:
    void project(int begin, int end, Workspace& space) {
        const int k = scan.patch_size;
        const int64_t pixels = int64_t(scan.channels) * k * k;
        space.flat.resize(size_t((end - begin) * pixels));
        float* flat = space.flat.data();
        for (int i = begin; i < end; ++i) {
            const float* const window = region.window(first + i);
            for (int c = 0; c < scan.channels; ++c)
                for (int y = 0; y < k; ++y, flat += k)
                    std::copy_n(window + c * region.plane() + y * region.wide(), k, flat);
            // What a query draws depends on the seed and on its own number, not on what else is in the call.
            const uint64_t number = uint64_t(scan.numbers[first + i]);
            luck[size_t(i)] = uint32_t(mix(mix(scan.seed) ^ number * 0x2545f4914f6cdd1du) >> 32);
        }
        level.product(space.flat.data(), pixels, end - begin, region.axes.data(), region.pitch, int(pixels),
                      region.shift.data(), q + begin * region.pitch);
    }

    // Cells of stretch `number`: whole families.
    int64_t first_cell(int number) const { return region.parents * number / STRETCHES * SIBLINGS; }
    int stretch_of(int64_t cell) const {
        int number = int(cell / SIBLINGS * STRETCHES / region.parents);
        while (cell >= first_cell(number + 1)) ++number;
        while (cell < first_cell(number)) --number;
        return number;
    }

    double found(int i) const {
        double all = 0;
        for (const Stretch& stretch : stretches) all += double(stretch.sums.get()[int64_t(i) * LANES]);
        return all;
    }

    // The sums of all stretches relative to the same.
    void refer_alike(int i) {
        float m = -FAR, threshold = -INFINITY;
        for (const Stretch& stretch : stretches) {
            m = std::max(m, stretch.m[size_t(i)]);
            threshold = std::max(threshold, stretch.samples[size_t(i)].threshold);
        }
        for (Stretch& stretch : stretches) {
            stretch.samples[size_t(i)].threshold = threshold;
            if (stretch.m[size_t(i)] == m) continue;
            const float f = std::exp2((stretch.m[size_t(i)] - m) * float(bits));
            float* const x = stretch.sums.get() + int64_t(i) * LANES;
            const int linear = 3 + scan.channels;  // s and v grow with the weights, the rest with their squares
            for (int part = 0; part < LANES; ++part) x[part] *= part == 0 || (part >= 3 && part < linear) ? f : f * f;
            stretch.m[size_t(i)] = m;
        }
    }

    // Whether a sample has few windows that do not hold most of the weight either.
    bool too_few(int i) const {
        size_t size = 0;
        double held = 0;
        for (const Stretch& stretch : stretches) {
            const std::vector<Sample>& kept = stretch.samples[size_t(i)].kept;
            size += kept.size();
            if (int(size) >= scan.recheck / 4) return false;
            const double m = double(stretch.m[size_t(i)]) * bits;
            for (const Sample& sample : kept) held += std::exp2(double(sample.log_size) - m);
        }
        return held < 0.75 * found(i);
    }

    // Queries i + j .. i + end: what is to be expected of the cells of their parents. Family after family, so that its
    // weights are read once for all of them.
    void foresee(int i, int j, int end, Workspace& space) {
        std::vector<int64_t>& next = space.first_asked;
        next.assign(size_t(region.parents) + 2, 0);
        for (int of = j; of < end; ++of) {
            const Families& f = space.foreseen[size_t(of)];
            for (int64_t n = 0; n < f.count; ++n) ++next[size_t(f.parents[size_t(n)]) + 2];
        }
        for (size_t p = 2; p < next.size(); ++p) next[p] += next[p - 1];
        space.asked.resize(size_t(next.back()));
        for (int of = j; of < end; ++of) {
            Families& f = space.foreseen[size_t(of)];
            const Foreseeing asked = {q + (i + of) * region.pitch, f.foreseen()};
            for (int64_t n = 0; n < f.count; ++n)
                space.asked[size_t(next[size_t(f.parents[size_t(n)]) + 1]++)] = {asked.q, asked.to + n * 2 * SIBLINGS};
        }
        const int rank = scan.foreseen_rank;
        for (int64_t p = 0; p < region.parents; ++p)
            level.foresee(space.asked.data() + next[size_t(p)], next[size_t(p) + 1] - next[size_t(p)], rank,
                          region.weights.data() + (4 * rank + 2) * p * SIBLINGS);
    }

    void choose(const float* of_parents, Families& families, Workspace& space) {
        const float parent_top = level.greatest(of_parents, region.parent_competing.data(), region.parent_row);
        float* const parent_share = space.parent_share.room(region.parent_row);
        level.exponentials(of_parents, region.parent_row, parent_top, parent_share);
        double all, rising;
        level.windows_taken(parent_share, region.parent_competing.data(), region.parent_row, 1, 0, all, rising);
        ParentsTask parents{};
        parents.share = parent_share, parents.competing = region.parent_competing.data();
        parents.moments = region.parent_moments.data(), parents.parents = region.parent_row;
        parents.channels = scan.channels, parents.least = LEAST_PARENT * float(all);
        families.parents.resize(size_t(region.parent_row));
        families.count = level.choose_parents(parents, families.parents.data());
        if (parents.far[0] > double(MOST_SKIPPED) * all) {
            parents.least = MOST_SKIPPED / float(region.parents) * float(all);
            families.count = level.choose_parents(parents, families.parents.data());
        }
        const double least = std::min(1., std::max(LEAST_FAMILIES, 4 * scan.budget));
        if (double(families.count) < least * double(region.parents)) {
            // At low noise weights are foreseen badly: about so many at least, by the rank among one parent in so many.
            const int64_t step = 1 + region.parents / 384, some = (region.parents + step - 1) / step;
            const int64_t rank = std::min(some - 1, int64_t(least * double(some)));
            float* const ranked = space.ranked.room(some);
            for (int64_t i = 0; i < some; ++i)
                ranked[i] = parent_share[i * step] * region.parent_competing[size_t(i * step)];
            std::nth_element(ranked, ranked + rank, ranked + some, std::greater<float>());
            parents.least = std::min(parents.least, std::nextafter(ranked[rank], 0.f));
            families.count = level.choose_parents(parents, families.parents.data());
        }
        families.top = parent_top;
        std::copy_n(parents.far, 1 + MOST_CHANNELS, families.far);
        families.windows = 0;
        for (int64_t f = 0; f < families.count; ++f)
            families.windows += double(region.parent_competing[size_t(families.parents[size_t(f)])]);
    }

    void plan_query(int i, Families& f, Workspace& space) {
        const int64_t families = f.count, cells = families * SIBLINGS;
        float *const share = space.share.room(cells), *const score = space.score.room(cells);
        float* const competing = space.competing.room(cells);
        CellsTask t{};
        t.share = share, t.score = score, t.competing = competing, t.foreseen = f.foreseen();
        t.all_competing = lists.competing, t.parents = f.parents.data();
        t.moments = region.moments.data(), t.families = families;
        double claimed;
        const float top = level.shares_and_scores(t, share, score, competing, claimed);
        const double wanted = std::min(f.windows, scan.budget * region.windows);
        t.channels = scan.channels;
        t.scale = float(raise(score, competing, cells, wanted, claimed > 0 ? wanted / claimed : 1));
        t.floor = scan.budget < 1 ? float(std::min(1., scan.floor)) : 1.f;
        t.top2 = 2 * top, t.luck = luck[size_t(i)];
        if (int64_t(space.plan.size()) < cells) space.plan.resize(size_t(cells));
        const int64_t taken = level.plan_cells(t, space.plan.data());
        // What lies under other parents is not looked into at all: foreseen, and in doubt by a third of it.
        constexpr double DOUBT = 1 / (9 * EXPECTED_SHARE);
        const double unit = std::exp(std::min(80., double(f.top) - double(top)));
        const double skipped = unit * f.far[0];
        t.far[0] += skipped, t.unseen[0] += DOUBT * skipped * skipped;
        for (int c = 0; c < scan.channels; ++c) {
            const double value = unit * f.far[1 + c];
            t.far[1 + c] += value;
            t.unseen[1 + c] += DOUBT * skipped * value;
            t.unseen[1 + scan.channels + c] += DOUBT * value * value;
        }
        Foreseen& known = foreseen[size_t(i)];
        known.sure = t.sure;
        std::copy_n(t.far, 1 + MOST_CHANNELS, known.far);
        std::copy_n(t.unseen, 1 + 2 * MOST_CHANNELS, known.unseen);
        const double one_group = double(LANES) / (LANES - 1);
        int stretch = 0;
        int64_t stretch_end = first_cell(1);
        for (int64_t p = 0; p < taken; ++p) {
            Planned planning = space.plan[size_t(p)];
            Entry& entry = planning.entry;
            const double n = double(lists.competing[planning.cell]), stands_for = n / entry.take;
            const bool sure = entry.chance >= 1;
            const float expected = entry.foreseen;
            entry.query = i;
            entry.factor = float(stands_for / double(entry.chance));
            const double unseen = 1 - entry.take / n;
            entry.scatter = entry.take < int(n)
                                ? float(unseen * stands_for * stands_for * one_group / double(entry.chance))
                                : 0.f;
            if (sure) entry.foreseen = 0;
            if (sure && double(expected) > known.pilot_weight)
                known.pilot_weight = double(expected), known.pilot = planning;
            while (planning.cell >= stretch_end) stretch_end = first_cell(++stretch + 1);
            planned[size_t(i / SLICE * STRETCHES + stretch)].push_back(planning);
        }
    }

    // The t at which shares min(1, max(floor, t share)) add up to `wanted` windows, by Newton steps on its logarithm.
    double raise(const float* share, const float* competing, int64_t cells, double wanted, double t) const {
        constexpr double TOLERANCE = 0.02;
        double low = 0, high = 1e38;
        for (int step = 0; step < 60; ++step) {
            double taken, rising;
            level.windows_taken(share, competing, cells, float(t), float(std::min(1., scan.floor)), taken, rising);
            (taken > wanted ? high : low) = t;
            if (std::abs(taken - wanted) <= TOLERANCE * wanted || high < low * 1.0001) break;
            double next = rising > 0 ? t * std::exp(std::min(20., (wanted - taken) / rising)) : 0;
            if (!(next > low && next < high))
                next = low > 0 && high < 1e38 ? std::sqrt(low * high) : taken > wanted ? t / 64 : t * 64;
            if (next > 1e37 || next < 1e-37) break;
            t = next;
        }
        return t;
    }

    static constexpr double MOST_FORESEEN = 4;  // weight foreseen of other cells, in units of what sure ones hold
    static constexpr double DOUBT_BITS = 1.5;  // by how much a first guess of a query's sum may be too large

    // Foreseen weights, in the scan's units: by what was found in cells of which `expected` had been foreseen.
    void calibrate(int i) {
        Foreseen& f = foreseen[size_t(i)];
        const double sum = found(i), expected = f.glanced ? f.sure : f.pilot_weight;
        f.glanced = true;
        // Where most is foreseen in cells that are not surely looked into, foresight is no guide.
        const double leading = std::max(expected, f.far[0] / MOST_FORESEEN);
        if (sum > 0 && leading > 0)
            calibration[size_t(i)] = float(std::log2(sum / leading) + double(stretches[0].m[size_t(i)]) * bits);
    }

    // Turns the plans into the lists of queries of a stretch's cells. How many windows they take.
    int64_t group_by_cell(Turn turn, int number) {
        Stretch& stretch = stretches[size_t(number)];
        const int64_t begin = first_cell(number), end = first_cell(number + 1);
        std::vector<int64_t>& first_entry = stretch.first_entry;
        first_entry.assign(size_t(end - begin) + 2, 0);
        int64_t pairs = 0;
        const auto each = [&](auto visit) {
            if (turn == GLANCE) {
                for (const Foreseen& f : foreseen)
                    if (f.pilot_weight > 0 && f.pilot.cell >= begin && f.pilot.cell < end) visit(f.pilot);
                return;
            }
            for (int slice = 0; slice < slices(); ++slice)
                for (const Planned& planning : planned[size_t(slice * STRETCHES + number)])
                    if ((planning.entry.chance < 1) == (turn == CHANCE) && again[size_t(planning.entry.query)])
                        visit(planning);
        };
        each([&](const Planned& p) { ++first_entry[size_t(p.cell - begin) + 2], pairs += p.entry.take; });
        for (size_t c = 2; c < first_entry.size(); ++c) first_entry[c] += first_entry[c - 1];
        stretch.entries.resize(size_t(first_entry.back()));
        each([&](const Planned& p) { stretch.entries[size_t(first_entry[size_t(p.cell - begin) + 1]++)] = p.entry; });
        return pairs;
    }

    void scan_cells(int number, int recheck, Workspace& space, bool calling) {
        Stretch& stretch = stretches[size_t(number)];
        std::vector<Entry>& entries = stretch.entries;
        const std::vector<int64_t>& first_entry = stretch.first_entry;
        const int64_t from_cell = first_cell(number), cells = first_cell(number + 1) - from_cell;
        int64_t largest = 0;
        space.active.clear();
        for (int64_t c = 0; c < cells; ++c) {
            const int64_t here = first_entry[size_t(c) + 1] - first_entry[size_t(c)];
            if (here) space.active.push_back(int32_t(from_cell + c));
            largest = std::max(largest, here);
        }
        const int64_t channels = scan.channels;
        CellTask t{};
        t.channels = scan.channels, t.rank = scan.used_rank, t.stored_rank = lists.rank, t.q_pitch = int(region.pitch);
        t.scale = float(bits);
        t.q = q, t.m = stretch.m.data(), t.sums = stretch.sums.get(), t.calibration = calibration.data();
        t.negligible = float(NEGLIGIBLE_BITS / bits), t.rise = float(16 / bits);
        t.samples = stretch.samples.data(), t.recheck = recheck, t.luck = luck.data();
        t.runs = space.runs.room(largest * RUN_FLOATS);
        t.block = space.block.room(BLOCK * (scan.used_rank + 2 + channels));
        t.block_squares = t.block + BLOCK * scan.used_rank, t.block_counts = t.block_squares + BLOCK;
        t.block_values = t.block_counts + BLOCK;
        space.luck.resize(BLOCK);
        t.block_luck = space.luck.data();
        t.interrupt = &interrupt, t.calling_thread = calling;
        const auto start_of = [&](int64_t cell, int64_t windows) {
            return int64_t(mix(scan.seed ^ uint64_t(cell) * 0xd6e8feb86659fd93u) % uint64_t(windows));
        };
        for (size_t n = 0; n < space.active.size(); ++n) {
            const int64_t cell = space.active[n];
            const int64_t* const of_cell = first_entry.data() + (cell - from_cell);
            const int64_t begin = of_cell[0], end = of_cell[1];
            if (n % 64 == 0 && interrupt.stopped(calling)) return;
            if (n + 1 < space.active.size() && !lists.allowed) {
                // The first windows of the next cell, meanwhile.
                const int64_t next = space.active[n + 1], row = lists.rank * 2;
                const int64_t start = start_of(next, lists.sizes[next]), size = lists.values_are_bytes ? 1 : 4;
                const uint8_t* const from = lists.data + lists.offsets[next] + start * row;
                for (int64_t at = 0; at < 2 * LANES * row; at += 64) __builtin_prefetch(from + at);
                const char* const values = static_cast<const char*>(lists.values);
                for (int64_t at = 0; at < LANES * channels * size + 64; at += 64)
                    __builtin_prefetch(values + (lists.starts[next] + start) * channels * size + at);
                if (lists.counts) __builtin_prefetch(lists.counts + lists.starts[next] + start);
            }
            std::sort(entries.begin() + begin, entries.begin() + end, [](const Entry& a, const Entry& b) {
                return a.take != b.take ? a.take > b.take : a.query < b.query;
            });
            const int64_t size = lists.sizes[cell], start = lists.starts[cell];
            t.entries = entries.data() + begin, t.entry_count = int(end - begin), t.cell = int32_t(cell);
            t.moments = lists.moments + cell * 2 * channels;
            t.features = reinterpret_cast<const uint16_t*>(lists.data + lists.offsets[cell]);
            const bool bytes = lists.values_are_bytes;
            t.value_bytes = bytes ? static_cast<const uint8_t*>(lists.values) + start * channels : nullptr;
            t.value_floats = bytes ? nullptr : static_cast<const float*>(lists.values) + start * channels;
            t.counts = lists.counts ? lists.counts + start : nullptr, t.repeats = lists.repeats;
            t.order = nullptr, t.competing = size;
            if (lists.allowed) {
                const uint8_t* const ids = region.ids(cell);
                space.order.clear();
                for (int64_t i = 0; i < size; ++i) {
                    int64_t id;
                    std::memcpy(&id, ids + i * 8, 8);
                    const int64_t image = region.image_of(id);
                    if (image < scan.image_count && lists.allowed[image]) space.order.push_back(int32_t(i));
                }
                t.order = space.order.data(), t.competing = int64_t(space.order.size());
            }
            if (t.competing == 0) continue;
            t.start = start_of(cell, t.competing);
            t.first_window = start;
            level.scan_cell(t);
        }
    }

    // A query's sums and the windows of its sample, from all stretches.
    void leave(int i) {
        const int channels = scan.channels;
        refer_alike(i);
        State& state = region.states[size_t(first + i)];
        Samples drawn;
        drawn.threshold = stretches[0].samples[size_t(i)].threshold;
        for (Stretch& stretch : stretches) {
            const float* const x = stretch.sums.get() + int64_t(i) * LANES;
            state.s += double(x[0]), state.s2 += double(x[1]), state.ss += double(x[2]);
            for (int c = 0; c < channels; ++c) {
                state.v[c] += double(x[3 + c]);
                state.vs[c] += double(x[3 + channels + c]);
                state.vv[c] += double(x[3 + 2 * channels + c]);
            }
            std::vector<Sample>& kept = stretch.samples[size_t(i)].kept;
            drawn.kept.insert(drawn.kept.end(), kept.begin(), kept.end());
            kept = {};
        }
        state.m = double(stretches[0].m[size_t(i)]) * bits;
        // Cells taken by chance were entered by how they differ from what was foreseen: here is the rest. And a part
        // of the variance that their moments let expect of the unscanned, since where nothing was seen scatter says
        // nothing.
        const Foreseen& f = foreseen[size_t(i)];
        const double unit = std::exp2(std::min(100., double(calibration[size_t(i)]) - state.m));
        state.s += unit * f.far[0];
        for (int c = 0; c < channels; ++c) state.v[c] += unit * f.far[1 + c];
        double guard = EXPECTED_SHARE * unit * unit;
        const double most = 4 * state.s * state.s;  // values' range is 2
        if (guard * f.unseen[0] > most) guard = most / f.unseen[0];
        state.ss += guard * f.unseen[0];
        for (int c = 0; c < channels; ++c) {
            state.vs[c] += guard * f.unseen[1 + c];
            state.vv[c] += guard * f.unseen[1 + channels + c];
        }

        drawn.shrink(scan.recheck);
        state.threshold = drawn.threshold;
        for (const Sample& sample : drawn.kept) __builtin_prefetch(region.ids(sample.cell) + int64_t(sample.at) * 8);
        const int64_t per_image = int64_t(lists.rows) * lists.cols;
        const int r = scan.patch_size / 2;
        state.heavy.reserve(drawn.kept.size());
        for (const Sample& sample : drawn.kept) {
            if (sample.priority <= drawn.threshold) continue;
            int64_t id;
            std::memcpy(&id, region.ids(sample.cell) + int64_t(sample.at) * 8, 8);
            if (region.image_of(id) >= scan.image_count)
                throw std::runtime_error("index: a window lies outside the bank");
            state.heavy.push_back({sample.log_size, sample.log_weight, sample.log_count, 0, int32_t(id / per_image),
                                   int32_t(id % per_image / lists.cols) + lists.row0 - r,
                                   int32_t(id % lists.cols) + lists.col0 - r, {}, false});
        }
    }

    static constexpr double EXPECTED_SHARE = 0.1;

    // Compares the sampled windows of some queries pixel by pixel, image after image, so that each is fetched once.
    void look_again(int begin, int end, bool calling) {
        struct Look {
            Heavy window;
            int query;
            Heavy* to;
        };
        std::vector<size_t> of_image(size_t(scan.image_count) + 1, 0);
        for (int i = begin; i < end; ++i)
            for (const Heavy& heavy : region.states[size_t(first + i)].heavy) ++of_image[size_t(heavy.image) + 1];
        for (size_t n = 0; n + 1 < of_image.size(); ++n) of_image[n + 1] += of_image[n];
        std::vector<Look> looks(of_image.back());
        for (int i = begin; i < end; ++i)
            for (Heavy& heavy : region.states[size_t(first + i)].heavy)
                looks[of_image[size_t(heavy.image)]++] = {heavy, first + i, &heavy};
        constexpr size_t AHEAD = 8;
        for (size_t n = 0; n < looks.size(); ++n) {
            if (n % 256 == 0 && interrupt.stopped(calling)) return;
            if (n + AHEAD < looks.size()) {
                region.prefetch(looks[n + AHEAD].window);
                __builtin_prefetch(looks[n + AHEAD].to, 1);
            }
            region.look(looks[n].query, looks[n].window);
            *looks[n].to = looks[n].window;
        }
    }
};

}  // namespace

}  // namespace patchscore

// Plan and scan: which share of which cell some queries of a region take, and the sums over that. Included by lists_cpu.cpp
// alone.
#pragma once

#include "lists_region.h"

namespace patchscore {

namespace {

// Aligned pointer into a vector that is large enough.
float* room(std::vector<float>& memory, int64_t count) {
    if (int64_t(memory.size()) < count + LANES) memory.resize(size_t(count + LANES));
    const auto at = reinterpret_cast<uintptr_t>(memory.data());
    return memory.data() + (64 - at % 64) % 64 / sizeof(float);
}

constexpr int AT_ONCE = 12;          // queries whose weights are foreseen together

// The families of a query's parents that matter, and what is foreseen of their cells.
struct Families {
    int64_t count;
    double windows;                  // that compete
    float top;                       // log of the greatest weight expected of a parent
    double far[1 + MOST_CHANNELS];   // what is foreseen of other parents, relative to that
    std::vector<int32_t> parents;
    std::vector<float> expected, expected2, competing, score;  // [families, SIBLINGS], from `at` on
    float* at(std::vector<float>& part) { return room(part, 0); }
};

// A thread's scratch, for regions of any size.
struct Workspace {
    std::vector<float> flat, squares, parents, parent_share, ranked, share;
    std::array<Families, AT_ONCE> foreseen;
    std::vector<float> few, few_competing, block, runs;
    std::vector<int32_t> order, active;
    std::vector<uint32_t> luck;
    std::vector<Planned> plan;
};

// Some queries of one region: planned, scanned, and the windows of their samples compared.
class Block {
    Region& region;
    const Scan& scan;
    const Lists& lists;
    const ListLevel& level;
    const int first, count;
    Workspace& space;
    Interrupt& interrupt;
    const bool calling;
    const double bits;               // log2(e) / sigma^2

    // What is foreseen of a query: weights relative to 2^(top), variances to 2^(2 top), calibrated by what is found.
    struct Foreseen {
        double sure, far[1 + MOST_CHANNELS], unseen[1 + 2 * MOST_CHANNELS];
        double pilot_weight = 0;
        bool glanced = false;
        int64_t pilot;               // place in `planned` of the surely taken cell of which most weight is expected
    };
    std::vector<Planned> planned;
    std::vector<Foreseen> foreseen;
    std::vector<float> m, calibration;
    std::vector<uint32_t> luck;
    std::vector<Samples> samples;
    std::vector<char> again;         // which queries are scanned: all, then those whose sample came out too small
    float* const q;                  // [count, pitch]
    Aligned<float> sums;
    std::vector<Entry> entries;
    std::vector<int64_t> first_entry;

public:
    Block(Region& region, int first, int count, Workspace& space, Interrupt& interrupt, bool calling)
        : region(region), scan(region.scan), lists(region.lists), level(region.level), first(first), count(count),
          space(space), interrupt(interrupt), calling(calling), bits(LOG2E / (scan.sigma * scan.sigma)),
          foreseen(size_t(count)), m(size_t(count), -FAR), calibration(size_t(count), -1e9f), luck(size_t(count)),
          samples(size_t(count)), again(size_t(count), 1), q(region.q.data() + first * region.pitch), sums(int64_t(count) * LANES) {
        std::fill_n(sums.get(), int64_t(count) * LANES, 0.f);
        const int k = scan.patch_size;
        const int64_t pixels = int64_t(scan.channels) * k * k;
        space.flat.resize(size_t(count * pixels));
        float* flat = space.flat.data();
        for (int i = 0; i < count; ++i) {
            const float* const window = region.window(first + i);
            for (int c = 0; c < scan.channels; ++c)
                for (int y = 0; y < k; ++y, flat += k) std::copy_n(window + c * region.plane() + y * region.wide(), k, flat);
            // What a query draws depends on the seed and on its own number, not on what else is in the call.
            luck[size_t(i)] = uint32_t(mix(mix(scan.seed) ^ uint64_t(scan.numbers[first + i]) * 0x2545f4914f6cdd1du) >> 32);
        }
        level.product(space.flat.data(), pixels, count, region.axes.data(), region.pitch, int(pixels),
                      region.shift.data(), q);
    }

    // Windows scanned, or -1 if asked to stop.
    int64_t run() {
        const int rank = scan.foreseen_rank;
        space.squares.resize(size_t(AT_ONCE * 2 * rank));
        float* const parents = room(space.parents, AT_ONCE * region.parent_row);
        for (int i = 0; i < count; i += AT_ONCE) {
            if (interrupt.stopped(calling)) return -1;
            const int some = std::min(AT_ONCE, count - i);
            for (int j = 0; j < some; ++j)
                for (int d = 0; d < rank; ++d) {
                    const float x = q[(i + j) * region.pitch + d];
                    space.squares[size_t(j * 2 * rank + d)] = x, space.squares[size_t((j * 2 + 1) * rank + d)] = x * x;
                }
            level.product(space.squares.data(), 2 * rank, some, region.parent_weights.data(), region.parent_row, 2 * rank,
                          region.parent_constants.data(), parents);
            foresee(i, some, parents);
            for (int j = 0; j < some; ++j) plan(i + j, space.foreseen[size_t(j)]);
        }
        // A glance at the most promising cell of every query tells where its weights lie and about how large its sums
        // will be, so that most windows need not be looked at closely. Cells taken by chance go last, when the others
        // have told how foreseen weights compare with real ones.
        group_by_cell(0);
        if (!scan_cells(0)) return -1;
        calibrate();
        for (int i = 0; i < count; ++i) {
            const double all = foreseen[size_t(i)].sure + foreseen[size_t(i)].far[0];
            samples[size_t(i)].threshold =
                float(double(calibration[size_t(i)]) + std::log2(all / std::max(1, scan.recheck)) - DOUBT_BITS);
        }
        std::fill_n(sums.get(), int64_t(count) * LANES, 0.f);
        int64_t pairs = scan_planned();
        if (pairs < 0) return -1;
        // Where that promised far too much, hardly a window was large enough for the sample: again without it.
        again.assign(size_t(count), 0);
        for (int i = 0; i < count; ++i)
            if (scan.recheck && too_few(i)) {
                again[size_t(i)] = 1, m[size_t(i)] = -FAR, samples[size_t(i)] = {};
                std::fill_n(sums.get() + int64_t(i) * LANES, LANES, 0.f);
            }
        if (std::count(again.begin(), again.end(), 1)) {
            const int64_t more = scan_planned();
            if (more < 0) return -1;
            pairs += more;
        }
        for (int i = 0; i < count; ++i) leave(i);
        return look_again() ? pairs : -1;
    }

private:
    // The cells that are surely looked into, then those taken by chance; windows scanned, or -1 if asked to stop.
    int64_t scan_planned() {
        int64_t pairs = group_by_cell(1);
        if (!scan_cells(scan.recheck)) return -1;
        calibrate();
        pairs += group_by_cell(2);
        return scan_cells(scan.recheck) ? pairs : -1;
    }

    // Whether a sample has few windows that do not hold most of the weight either.
    bool too_few(int i) const {
        const std::vector<Sample>& kept = samples[size_t(i)].kept;
        if (int(kept.size()) >= scan.recheck / 4) return false;
        double held = 0;
        for (const Sample& sample : kept) held += std::exp2(double(sample.log_size) - double(m[size_t(i)]) * bits);
        return held < 0.75 * double(sums.get()[int64_t(i) * LANES]);
    }

    // Queries i .. i + some: parents that matter, and what is to be expected of their cells.
    void foresee(int i, int some, const float* of_parents) {
        for (int j = 0; j < some; ++j) choose(of_parents + j * region.parent_row, space.foreseen[size_t(j)]);
        // Family after family, so that its weights are read once for all queries.
        const int rank = scan.foreseen_rank;
        std::array<size_t, AT_ONCE> next{};
        for (int32_t parent = 0; parent < int32_t(region.parents); ++parent)
            for (int j = 0; j < some; ++j) {
                Families& f = space.foreseen[size_t(j)];
                if (next[size_t(j)] == size_t(f.count) || f.parents[next[size_t(j)]] != parent) continue;
                const size_t at = next[size_t(j)]++ * SIBLINGS;
                level.foresee(q + (i + j) * region.pitch, rank,
                              region.weights.data() + (4 * rank + 2) * int64_t(parent) * SIBLINGS, f.at(f.expected) + at,
                              f.at(f.expected2) + at, f.at(f.score) + at);
                std::copy_n(lists.competing + int64_t(parent) * SIBLINGS, SIBLINGS, f.at(f.competing) + at);
            }
    }

    void choose(const float* of_parents, Families& families) {
        const float parent_top = level.greatest(of_parents, region.parent_competing.data(), region.parent_row);
        float* const parent_share = room(space.parent_share, region.parent_row);
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
            const int64_t step = 1 + region.parents / 1024, some = (region.parents + step - 1) / step;
            const int64_t rank = std::min(some - 1, int64_t(least * double(some)));
            float* const ranked = room(space.ranked, some);
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
        for (auto* part : {&families.expected, &families.expected2, &families.competing, &families.score})
            room(*part, families.count * SIBLINGS);
    }

    void plan(int i, Families& f) {
        const int64_t families = f.count, cells = families * SIBLINGS;
        const float *const expected = f.at(f.expected), *const expected2 = f.at(f.expected2);
        const float* const competing = f.at(f.competing);
        float *const share = room(space.share, cells), *const score = f.at(f.score);
        const double windows = f.windows;
        const float top = level.greatest(expected, competing, cells);
        level.exponentials(expected, cells, top, share);
        level.exponentials(score, cells, level.greatest(score, competing, cells), score);
        const double wanted = std::min(windows, scan.budget * region.windows);
        double scale = 1;
        if (families >= 8 * STRIDE) {
            space.few.clear(), space.few_competing.clear();
            double few = 0;
            for (int64_t f = 0; f < families; f += STRIDE)
                for (int64_t c = f * SIBLINGS; c < (f + 1) * SIBLINGS; ++c) {
                    space.few.push_back(score[c]), space.few_competing.push_back(competing[c]);
                    few += double(competing[c]);
                }
            scale = raise(space.few.data(), space.few_competing.data(), int64_t(space.few.size()), wanted * few / windows,
                          scale, 0.05);
        }
        scale = raise(score, competing, cells, wanted, scale, 0.02);

        CellsTask t{};
        t.share = share, t.score = score, t.competing = competing, t.expected2 = expected2, t.parents = f.parents.data();
        t.moments = region.moments.data(), t.families = families;
        t.channels = scan.channels, t.scale = float(scale), t.floor = scan.budget < 1 ? float(std::min(1., scan.floor)) : 1.f;
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
        known.pilot = -1;
        const double one_group = double(LANES) / (LANES - 1);
        for (int64_t p = 0; p < taken; ++p) {
            Planned planning = space.plan[size_t(p)];
            Entry& entry = planning.entry;
            const double n = double(lists.competing[planning.cell]), stands_for = n / entry.take;
            const bool sure = entry.chance >= 1;
            if (sure && double(entry.foreseen) > known.pilot_weight)
                known.pilot_weight = double(entry.foreseen), known.pilot = int64_t(planned.size());
            entry.query = i;
            entry.factor = float(stands_for / double(entry.chance));
            entry.scatter = entry.take < int(n)
                                ? float((1 - entry.take / n) * stands_for * stands_for * one_group / double(entry.chance))
                                : 0.f;
            if (sure) entry.foreseen = 0;
            planned.push_back(planning);
        }
    }

    // The t at which shares min(1, max(floor, t share)) add up to `wanted` windows, by Newton steps on its logarithm.
    double raise(const float* share, const float* competing, int64_t cells, double wanted, double t,
                 double tolerance) const {
        double low = 0, high = 1e38;
        for (int step = 0; step < 60; ++step) {
            double taken, rising;
            level.windows_taken(share, competing, cells, float(t), float(std::min(1., scan.floor)), taken, rising);
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

    static constexpr double MOST_FORESEEN = 4;  // weight foreseen of other cells, in units of what sure ones hold
    static constexpr double DOUBT_BITS = 1.5;  // by how much a first guess of a query's sum may be too large

    // Foreseen weights, in the scan's units: by what was found in cells of which `expected` had been foreseen.
    void calibrate() {
        for (int i = 0; i < count; ++i) {
            if (!again[size_t(i)]) continue;
            Foreseen& f = foreseen[size_t(i)];
            const double found = double(sums.get()[int64_t(i) * LANES]), expected = f.glanced ? f.sure : f.pilot_weight;
            f.glanced = true;
            // Where most is foreseen in cells that are not surely looked into, foresight is no guide.
            const double leading = std::max(expected, f.far[0] / MOST_FORESEEN);
            if (found > 0 && leading > 0)
                calibration[size_t(i)] = float(std::log2(found / leading) + double(m[size_t(i)]) * bits);
        }
    }

    // Turns the plans into each cell's list of queries: the most promising (0), the sure (1), those by chance (2).
    int64_t group_by_cell(int turn) {
        first_entry.assign(size_t(lists.cells) + 1, 0);
        int64_t pairs = 0;
        const auto each = [&](auto visit) {
            if (turn == 0) {
                for (const Foreseen& f : foreseen)
                    if (f.pilot >= 0) visit(planned[size_t(f.pilot)]);
                return;
            }
            for (const Planned& planning : planned)
                if ((planning.entry.chance < 1) == (turn == 2) && again[size_t(planning.entry.query)]) visit(planning);
        };
        each([&](const Planned& p) { ++first_entry[size_t(p.cell) + 1], pairs += p.entry.take; });
        for (int64_t c = 0; c < lists.cells; ++c) first_entry[size_t(c) + 1] += first_entry[size_t(c)];
        entries.resize(size_t(first_entry.back()));
        std::vector<int64_t> at(first_entry.begin(), first_entry.end() - 1);
        each([&](const Planned& p) { entries[size_t(at[size_t(p.cell)]++)] = p.entry; });
        return pairs;
    }

    bool scan_cells(int recheck) {
        int64_t largest = 0;
        for (int64_t c = 0; c < lists.cells; ++c)
            largest = std::max(largest, first_entry[size_t(c) + 1] - first_entry[size_t(c)]);
        const int64_t channels = scan.channels;
        CellTask t{};
        t.channels = scan.channels, t.rank = scan.used_rank, t.stored_rank = lists.rank, t.q_pitch = int(region.pitch);
        t.scale = float(bits);
        t.q = q, t.m = m.data(), t.sums = sums.get(), t.calibration = calibration.data();
        t.negligible = float(NEGLIGIBLE_BITS / bits), t.rise = float(16 / bits);
        t.samples = samples.data(), t.recheck = recheck, t.luck = luck.data();
        t.runs = room(space.runs, largest * RUN_FLOATS);
        t.block = room(space.block, BLOCK * (scan.used_rank + 2 + channels));
        t.block_squares = t.block + BLOCK * scan.used_rank, t.block_counts = t.block_squares + BLOCK;
        t.block_values = t.block_counts + BLOCK;
        space.luck.resize(BLOCK);
        t.block_luck = space.luck.data();
        t.interrupt = &interrupt, t.calling_thread = calling;
        space.active.clear();
        for (int64_t cell = 0; cell < lists.cells; ++cell)
            if (first_entry[size_t(cell)] < first_entry[size_t(cell) + 1]) space.active.push_back(int32_t(cell));
        const auto start_of = [&](int64_t cell, int64_t windows) {
            return int64_t(mix(scan.seed ^ uint64_t(cell) * 0xd6e8feb86659fd93u) % uint64_t(windows));
        };
        for (size_t n = 0; n < space.active.size(); ++n) {
            const int64_t cell = space.active[n];
            const int64_t begin = first_entry[size_t(cell)], end = first_entry[size_t(cell) + 1];
            if (n % 64 == 0 && interrupt.stopped(calling)) return false;
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
            t.value_bytes = lists.values_are_bytes ? static_cast<const uint8_t*>(lists.values) + start * channels : nullptr;
            t.value_floats = lists.values_are_bytes ? nullptr : static_cast<const float*>(lists.values) + start * channels;
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
        return true;
    }

    // A query's sums and the windows of its sample.
    void leave(int i) {
        const int channels = scan.channels;
        const float* const x = sums.get() + int64_t(i) * LANES;
        State& state = region.states[size_t(first + i)];
        state.m = double(m[size_t(i)]) * bits;
        state.s = double(x[0]), state.s2 = double(x[1]), state.ss = double(x[2]);
        for (int c = 0; c < channels; ++c) {
            state.v[c] = double(x[3 + c]);
            state.vs[c] = double(x[3 + channels + c]);
            state.vv[c] = double(x[3 + 2 * channels + c]);
        }
        // Cells taken by chance were entered by how they differ from what was foreseen: here is the rest. And a part of
        // the variance that their moments let expect of the unscanned, since where nothing was seen scatter says nothing.
        const Foreseen& f = foreseen[size_t(i)];
        const double unit = std::exp2(std::min(100., double(calibration[size_t(i)]) - state.m));
        state.s += unit * f.far[0];
        for (int c = 0; c < channels; ++c) state.v[c] += unit * f.far[1 + c];
        double guard = EXPECTED_SHARE * unit * unit;
        if (guard * f.unseen[0] > 4 * state.s * state.s) guard = 4 * state.s * state.s / f.unseen[0];  // values' range is 2
        state.ss += guard * f.unseen[0];
        for (int c = 0; c < channels; ++c) {
            state.vs[c] += guard * f.unseen[1 + c];
            state.vv[c] += guard * f.unseen[1 + channels + c];
        }

        Samples& drawn = samples[size_t(i)];
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
            if (region.image_of(id) >= scan.image_count) throw std::runtime_error("index: a window lies outside the bank");
            state.heavy.push_back({sample.log_size, sample.log_weight, sample.log_count, 0, int32_t(id / per_image),
                                   int32_t(id % per_image / lists.cols) + lists.row0 - r,
                                   int32_t(id % lists.cols) + lists.col0 - r, {}, false});
        }
        drawn = {};
    }

    static constexpr double EXPECTED_SHARE = 0.1;

    // Compares the sampled windows of all queries pixel by pixel, image after image, so that each is fetched once.
    bool look_again() {
        struct Look {
            Heavy window;
            int query;
            Heavy* to;
        };
        std::vector<size_t> of_image(size_t(scan.image_count) + 1, 0);
        for (int i = 0; i < count; ++i)
            for (const Heavy& heavy : region.states[size_t(first + i)].heavy) ++of_image[size_t(heavy.image) + 1];
        for (size_t n = 0; n + 1 < of_image.size(); ++n) of_image[n + 1] += of_image[n];
        std::vector<Look> looks(of_image.back());
        for (int i = 0; i < count; ++i)
            for (Heavy& heavy : region.states[size_t(first + i)].heavy)
                looks[of_image[size_t(heavy.image)]++] = {heavy, first + i, &heavy};
        constexpr size_t AHEAD = 8;
        for (size_t n = 0; n < looks.size(); ++n) {
            if (n % 256 == 0 && interrupt.stopped(calling)) return false;
            if (n + AHEAD < looks.size()) {
                region.prefetch(looks[n + AHEAD].window);
                __builtin_prefetch(looks[n + AHEAD].to, 1);
            }
            region.look(looks[n].query, looks[n].window);
            *looks[n].to = looks[n].window;
        }
        return true;
    }
};

}  // namespace

}  // namespace patchscore

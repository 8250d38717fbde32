// How the work on a bank is cut: into passes over the bank, units of one chunk of images, and panels of pixels.
//
// Chunks depend on the bank alone, panels on the competition alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "task.h"

namespace patchscore {

constexpr int64_t STATE_BYTES = int64_t(4) << 20;    // state of one panel: wider groups are cut into strips
constexpr int64_t LANE_BYTES = int64_t(12) << 20;    // accumulators kept from block to block; larger ones are flushed
constexpr int64_t THREAD_BYTES = int64_t(32) << 20;  // of a thread, where several noisy images would pass it
constexpr int64_t KEPT_BYTES = int64_t(16) << 20;    // of all noisy images of a unit: beyond it caches miss (measured)
constexpr int CHUNKS = 32;                           // a bank is cut into about as many ..
constexpr int64_t LEAST_CHUNK = 16;                  // .. of at least this many images
constexpr int64_t WHOLE_CHUNK = 64;                  // images that are compared whole at a time, to stay in the caches

int round_up(int64_t x, int64_t to) { return int((x + to - 1) / to * to); }

// A competition, and the queries that float32 could not serve.
struct Target {
    Competition competition;  // its m holds the nearest squared distance, negated, until all sums are complete
    double* unsure;  // [batch, height, width] nearest squared distance of the chunks that need float64, or +inf
};

// A problem as a pass serves it: in one precision, and perhaps with tiles of its images as images.
struct Job {
    const Problem& problem;
    bool exact;  // in float64
    Images images;
    int64_t count;
    int64_t chunk;  // images of a unit
    std::vector<Target> targets;
    const JacobianProduct* product = nullptr;  // instead of sums

    int lanes(const Level& level) const { return exact ? level.exact.lanes : level.single.lanes; }
    int number_bytes() const { return exact ? 8 : 4; }
};

// One competition by windows: its panels, and what a thread keeps of it for every noisy image.
struct WindowPlan {
    const Target& target;
    const Competition& competition;
    const int channels, height, width, lanes, number_bytes;
    std::vector<Panel> panels;
    int64_t queries = 0;  // of all panels together
    int64_t windows_per_image = 0;
    bool keep_lanes;  // accumulators live through a chunk, not only through a panel
    int flush_every;  // blocks
    int q_margin, q_pitch;
    int64_t q_numbers, lane_numbers;  // for each noisy image
    int64_t state_numbers = 0, scratch_numbers;

    WindowPlan(const Job& job, const Target& target, int lanes)
        : target(target),
          competition(target.competition),
          channels(job.problem.channels),
          height(job.problem.height),
          width(job.problem.width),
          lanes(lanes),
          number_bytes(job.number_bytes()) {
        plan_panels();
        plan_sizes();
    }

    void plan_panels() {
        const int k = competition.patch_size;
        for (const Group& group : competition.groups) {
            const Axis &rows = group.rows, &cols = group.cols;
            windows_per_image = std::max(windows_per_image, int64_t(rows.competing()) * cols.competing());
            const int slots = k <= FEW_ROWS ? k + 1 : std::min(k, rows.locked ? rows.queries() : rows.windows());
            const int pitch = int(round_up(cols.competing(), GROUP)) | 1;
            int strip = cols.queries();
            while (!cols.locked && strip > 8 &&
                   int64_t(strip + 2 * MARGIN) * pitch * lanes * number_bytes * (1 + slots) > STATE_BYTES)
                strip = (strip + 1) / 2;
            for (int q0 = cols.q0; q0 < cols.q1; q0 += strip) {
                Panel panel;
                panel.rows = rows;
                panel.cols = cols;
                panel.cols.q0 = q0;
                panel.cols.q1 = std::min(q0 + strip, cols.q1);
                if (cols.locked) panel.cols.w0 = panel.cols.q0, panel.cols.w1 = panel.cols.q1;
                panel.runs = runs_of(rows, height, competition.circular);
                panel.diagonals = diagonals_of(panel.cols, width, competition.circular);
                panel.entries = cols.competing();
                panel.pitch = cols.locked ? 1 : pitch;
                panel.state_row =
                    cols.locked ? panel.cols.queries() : int64_t(panel.cols.queries() + 2 * MARGIN) * panel.pitch;
                panel.slots = slots;
                panel.first_query = queries;
                queries += int64_t(rows.queries()) * panel.cols.queries();
                map_columns(panel);
                panels.push_back(panel);
            }
        }
    }

    void map_columns(Panel& panel) const {
        const bool wrapping = wraps(panel.cols, width, competition.circular);
        const int low = wrapping ? panel.cols.w0 - (width - 1) : panel.cols.q0 - MARGIN;
        const int high = wrapping ? panel.cols.w1 : panel.cols.q1 + MARGIN;
        panel.lowest = low;
        for (int j = low; j < high; ++j) {
            const int query = wrapping ? ((j % width) + width) % width : j - panel.cols.q0;
            panel.state_of.push_back(int64_t(query + MARGIN) * panel.pitch * lanes);
        }
    }

    void plan_sizes() {
        const int64_t k = competition.patch_size, parts = this->parts().count();
        q_margin = int(width + k / 2 + 8);
        q_pitch = int((width + 2 * q_margin) * channels);
        q_numbers = int64_t(height + 1) * q_pitch;
        scratch_numbers = std::max<int64_t>((k + 1) * NEIGHBOURS, 2 * (width + 2 * k)) * lanes;
        int64_t widest = 0;
        for (const Panel& panel : panels) {
            state_numbers = std::max(state_numbers, (1 + panel.slots) * panel.state_row * lanes);
            widest = std::max(widest, int64_t(panel.rows.queries()) * panel.cols.queries());
        }
        keep_lanes = queries * parts * lanes * number_bytes <= LANE_BYTES;
        lane_numbers = (keep_lanes ? queries : widest) * parts * lanes;
        if (!keep_lanes)
            for (Panel& panel : panels) panel.first_query = 0;
        flush_every = int(std::max<int64_t>(1, PAIRS_A_FLUSH / std::max<int64_t>(1, windows_per_image)));
    }

    int64_t item_bytes() const {
        return (q_numbers + lane_numbers) * number_bytes + int64_t(height) * width * ((1 + parts().count()) * 8 + 4);
    }

    Parts parts() const { return {channels, competition.moments()}; }

    // How many distances of a unit may be computed exactly: as much work as all of them in float64, at most.
    int exact_distances(int64_t images) const {
        const int64_t pixels = int64_t(channels) * competition.patch_size * competition.patch_size;
        return int(std::min<int64_t>(1 << 30, 1 + windows_per_image * images / pixels));
    }
};

// What all units of a pass over the bank share: one competition by whole images, or some by windows.
struct Pass {
    const Job& job;
    const Problem& problem;
    const Level& level;
    const int lanes;
    const Competition* const whole;  // or null
    std::vector<WindowPlan> windows;
    int64_t chunk;             // images
    int chunks, items = 1;     // units: chunks x groups of `items` noisy images
    std::vector<Span> pixels;  // of a training image that are looked at
    int64_t block_numbers, state_numbers = 0, scratch_numbers = 0;

    // Targets first .. first + count of the job.
    Pass(const Job& job, const Level& level, size_t first, size_t count)
        : job(job),
          problem(job.problem),
          level(level),
          lanes(job.lanes(level)),
          whole(job.targets[first].competition.patch_size ? nullptr : &job.targets[first].competition),
          chunk(whole ? std::min<int64_t>(job.chunk, WHOLE_CHUNK) : job.chunk),
          chunks(int((job.count + chunk - 1) / chunk)) {
        const Images& images = job.images;
        block_numbers = (int64_t(images.height + 1) * images.width + GROUP) * problem.channels * lanes;
        for (size_t i = first; !whole && i < first + count; ++i) {
            windows.emplace_back(job, job.targets[i], lanes);
            state_numbers = std::max(state_numbers, windows.back().state_numbers);
            scratch_numbers = std::max(scratch_numbers, windows.back().scratch_numbers);
        }
        plan_pixels();
        plan_items();
    }

    // The rows that some panel reads times the columns that some panel reads: corners need little of an image.
    void plan_pixels() {
        std::vector<char> rows(size_t(job.images.height)), cols(size_t(job.images.width));
        for (const WindowPlan& plan : windows)
            for (const Panel& panel : plan.panels)
                for (const bool is_row : {true, false}) {
                    const Axis& axis = is_row ? panel.rows : panel.cols;
                    std::vector<char>& read = is_row ? rows : cols;
                    const int r = plan.competition.patch_size / 2;
                    for (int i = std::max(0, axis.w0 - r); i < std::min(int(read.size()), axis.w1 + r); ++i)
                        read[size_t(i)] = 1;
                }
        for (int i = 0; i < job.images.height; ++i)
            for (int j = 0; rows[size_t(i)] && j < job.images.width; ++j) {
                if (!cols[size_t(j)]) continue;
                const int at = i * job.images.width + j;
                if (pixels.empty() || pixels.back().end < at) pixels.push_back({at, at});
                pixels.back().end = at + 1;
            }
    }

    void plan_items() {
        // Packing a block is work too: where there is little else, several noisy images share it.
        int64_t most_windows = 0;
        for (const WindowPlan& plan : windows) most_windows = std::max(most_windows, plan.windows_per_image);
        if (whole)
            items = std::min(problem.batch, 16);
        else if (most_windows < 64 && !job.product)
            items = std::min(problem.batch, 8);
        const int64_t share = std::min(THREAD_BYTES, problem.memory_limit / std::max(1, problem.threads));
        while (items > 1 && (bytes_per_thread() > share || items * kept_bytes() > KEPT_BYTES)) items /= 2;
        while (items > 1 && int64_t(chunks) * ((problem.batch + items - 1) / items) < 4 * problem.threads) items /= 2;
    }

    int64_t whole_padded() const { return round_up(int64_t(problem.channels) * problem.height * problem.width, 32); }

    // A product's further memory, in numbers.
    struct ProductSizes {
        int64_t ring = 0, row = 0, nothing = 0, boxes = 0, lanes = 0;
    };
    ProductSizes product_sizes() const {
        ProductSizes sizes;
        const WindowPlan& plan = windows.front();
        const int64_t k = plan.competition.patch_size;
        for (const Panel& panel : plan.panels) {
            const int64_t row = product_row(panel) * lanes, groups = (panel.entries + GROUP - 1) / GROUP;
            int64_t longest = 0;
            for (const Run& run : panel.runs) longest = std::max<int64_t>(longest, run.length);
            sizes.row = std::max(sizes.row, row);
            sizes.nothing = std::max(sizes.nothing, k * panel.cols.queries() * groups);
            if (job.product->transposed)
                sizes.ring = std::max(sizes.ring, k * row);
            else
                sizes.boxes = std::max(sizes.boxes, longest * panel.state_row * lanes);
        }
        sizes.lanes = int64_t(problem.height) * problem.width * (1 + problem.channels) * lanes;
        return sizes;
    }

    int64_t bytes_per_thread() const {
        if (job.product) {
            const ProductSizes sizes = product_sizes();
            const int64_t pixels = int64_t(problem.height) * problem.width;
            return (block_numbers + state_numbers + scratch_numbers + sizes.ring + sizes.row + sizes.boxes +
                    sizes.lanes + 2 * windows.front().q_numbers + pixels * (2 + 2 * problem.channels)) *
                       job.number_bytes() +
                   sizes.nothing + pixels * (1 + problem.channels) * 8;
        }
        if (whole) return (items * (whole->moments() ? 3 : 2) + chunk) * whole_padded() * 8 + chunk * 8;
        return (block_numbers + state_numbers + scratch_numbers) * job.number_bytes() + items * kept_bytes();
    }

    // Of one noisy image, in all competitions by windows.
    int64_t kept_bytes() const {
        int64_t bytes = 0;
        for (const WindowPlan& plan : windows) bytes += plan.item_bytes();
        return bytes;
    }

    int64_t units() const { return int64_t(chunks) * ((problem.batch + items - 1) / items); }
};

}  // namespace patchscore

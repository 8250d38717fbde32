// The sliding engine on the CPU: cuts a problem into units, spreads them over threads, merges the results in order.
//
// A unit is one chunk of training images against one or a few noisy images, in every competition of a pass. Chunks
// depend on the bank alone and are merged in their order, so the numbers are the same for any thread count and in any
// batch.
#include "sliding.h"

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <stdexcept>

#include "../common/memory.h"
#include "../common/simd.h"
#include "../common/threads.h"
#include "task.h"

namespace patchscore {

#define PS_KERNEL "../sliding/kernel-inl.h"
#include "../common/each-level-inl.h"

namespace {

const Level LEVELS[] = {
#if defined(__x86_64__)
    {"avx512", avx512::LANES, avx512::pack_entry, avx512::panel_entry, avx512::whole_entry},
    {"avx2", avx2::LANES, avx2::pack_entry, avx2::panel_entry, avx2::whole_entry},
#endif
    {"plain", plain::LANES, plain::pack_entry, plain::panel_entry, plain::whole_entry},
};

constexpr int64_t STATE_BYTES = int64_t(4) << 20;    // state of one panel: wider groups are cut into strips
constexpr int64_t LANE_BYTES = int64_t(12) << 20;    // accumulators kept from block to block; larger ones are flushed
constexpr int64_t THREAD_BYTES = int64_t(32) << 20;  // of a thread, where several noisy images would pass it
constexpr int64_t KEPT_BYTES = int64_t(16) << 20;    // of all noisy images of a unit: beyond it caches fail, measured
constexpr int CHUNKS = 32;                           // a bank is cut into about so many

int round_up(int64_t x, int64_t to) { return int((x + to - 1) / to * to); }

// One competition by windows: its panels, and what a thread keeps of it for every noisy image.
struct WindowPlan {
    const Competition& competition;
    const int channels, height, width, lanes;
    std::vector<Panel> panels;
    int64_t queries = 0;  // of all panels together
    int64_t windows_per_image = 0;
    bool keep_lanes;  // accumulators live through a chunk, not only through a panel
    int flush_every;  // blocks
    int q_margin, q_pitch;
    int64_t q_floats, lane_floats;  // for each noisy image
    int64_t state_floats = 0, scratch_floats;

    WindowPlan(const Problem& problem, const Competition& competition, int lanes)
        : competition(competition),
          channels(problem.channels),
          height(problem.height),
          width(problem.width),
          lanes(lanes) {
        plan_panels();
        plan_sizes();
    }

    void plan_panels() {
        const int k = competition.patch_size;
        for (const Group& group : competition.groups) {
            const Axis &rows = group.rows, &cols = group.cols;
            windows_per_image = std::max(windows_per_image, int64_t(rows.competing()) * cols.competing());
            const int slots = k <= FEW_ROWS ? k + 1 : std::min(k, rows.locked ? rows.queries() : rows.windows());
            const int pitch = round_up(cols.competing(), GROUP) | 1;
            int strip = cols.queries();
            while (!cols.locked && strip > 8 &&
                   int64_t(strip + 2 * MARGIN) * pitch * lanes * 4 * (1 + slots) > STATE_BYTES)
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
        const int64_t k = competition.patch_size, parts = 2 + channels;
        q_margin = int(width + k / 2 + 8);
        q_pitch = int((width + 2 * q_margin) * channels);
        q_floats = int64_t(height + 1) * q_pitch;
        scratch_floats = std::max<int64_t>((k + 1) * NEIGHBOURS, 2 * (width + 2 * k)) * lanes;
        int64_t widest = 0;
        for (const Panel& panel : panels) {
            state_floats = std::max(state_floats, (1 + panel.slots) * panel.state_row * lanes);
            widest = std::max(widest, int64_t(panel.rows.queries()) * panel.cols.queries());
        }
        keep_lanes = queries * parts * lanes * 4 <= LANE_BYTES;
        lane_floats = (keep_lanes ? queries : widest) * parts * lanes;
        if (!keep_lanes)
            for (Panel& panel : panels) panel.first_query = 0;
        flush_every = int(std::max<int64_t>(1, PAIRS_A_FLUSH / std::max<int64_t>(1, windows_per_image)));
    }

    int64_t item_bytes() const { return (q_floats + lane_floats) * 4 + int64_t(height) * width * (3 + channels) * 8; }
};

// What all units of a pass over the bank share: one competition by whole images, or some by windows.
struct Pass {
    const Problem& problem;
    const Level& level;
    const Competition* const whole;  // or null
    std::vector<WindowPlan> windows;
    int64_t chunk;          // images
    int chunks, items = 1;  // units: chunks x groups of `items` noisy images
    float value_of_byte[256];
    std::vector<Span> pixels;  // of a training image that are looked at
    int64_t block_floats, state_floats = 0, scratch_floats = 0;

    // Competitions first .. first + count of the problem.
    Pass(const Problem& problem, const Level& level, size_t first, size_t count)
        : problem(problem),
          level(level),
          whole(problem.competitions[first].patch_size ? nullptr : &problem.competitions[first]) {
        for (int u = 0; u < 256; ++u) value_of_byte[u] = float(u) / 127.5f - 1.f;
        chunk = std::max<int64_t>(16, round_up((problem.count + CHUNKS - 1) / CHUNKS, 16));
        if (whole) chunk = std::min<int64_t>(chunk, 64);
        chunks = int((problem.count + chunk - 1) / chunk);
        block_floats = (int64_t(problem.height + 1) * problem.width + GROUP) * problem.channels * level.lanes;
        for (size_t i = first; !whole && i < first + count; ++i) {
            windows.emplace_back(problem, problem.competitions[i], level.lanes);
            state_floats = std::max(state_floats, windows.back().state_floats);
            scratch_floats = std::max(scratch_floats, windows.back().scratch_floats);
        }
        plan_pixels();
        plan_items();
    }

    // The rows that some panel reads times the columns that some panel reads: corners need little of an image.
    void plan_pixels() {
        std::vector<char> rows(size_t(problem.height)), cols(size_t(problem.width));
        for (const WindowPlan& plan : windows)
            for (const Panel& panel : plan.panels)
                for (const bool is_row : {true, false}) {
                    const Axis& axis = is_row ? panel.rows : panel.cols;
                    std::vector<char>& read = is_row ? rows : cols;
                    const int r = plan.competition.patch_size / 2;
                    for (int i = std::max(0, axis.w0 - r); i < std::min(int(read.size()), axis.w1 + r); ++i)
                        read[size_t(i)] = 1;
                }
        for (int i = 0; i < problem.height; ++i)
            for (int j = 0; rows[size_t(i)] && j < problem.width; ++j) {
                if (!cols[size_t(j)]) continue;
                const int at = i * problem.width + j;
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
        else if (most_windows < 64)
            items = std::min(problem.batch, 8);
        const int64_t share = std::min(THREAD_BYTES, problem.memory_limit / std::max(1, problem.threads));
        while (items > 1 && (bytes_per_thread() > share || items * kept_bytes() > KEPT_BYTES)) items /= 2;
        while (items > 1 && int64_t(chunks) * ((problem.batch + items - 1) / items) < 4 * problem.threads) items /= 2;
    }

    int64_t whole_padded() const { return round_up(int64_t(problem.channels) * problem.height * problem.width, 32); }

    int64_t bytes_per_thread() const {
        if (whole) {
            const int64_t values = int64_t(problem.channels) * problem.height * problem.width;
            return items * (whole_padded() * 4 + values * 16) + chunk * (whole_padded() * 4 + 16);
        }
        return (block_floats + state_floats + scratch_floats) * 4 + items * kept_bytes();
    }

    // Of one noisy image, in all competitions by windows.
    int64_t kept_bytes() const {
        int64_t bytes = 0;
        for (const WindowPlan& plan : windows) bytes += plan.item_bytes();
        return bytes;
    }

    int64_t units() const { return int64_t(chunks) * ((problem.batch + items - 1) / items); }
};

// A thread's memory and what it does with a unit.
class Worker {
    const Pass& pass;
    Interrupt& interrupt;
    const bool calling_thread;
    const int64_t pixels;

public:
    Worker(const Pass& pass, Interrupt& interrupt, bool calling_thread)
        : pass(pass),
          interrupt(interrupt),
          calling_thread(calling_thread),
          pixels(int64_t(pass.problem.height) * pass.problem.width) {}
    virtual ~Worker() = default;
    virtual void compute(int first_item, int items, int64_t start, int64_t stop) = 0;
    virtual void merge(int first_item, int items) = 0;

protected:
    const Pass& the_pass() const { return pass; }
    const Problem& the_problem() const { return pass.problem; }
    bool stopped() const { return interrupt.stopped(calling_thread); }
    Interrupt* the_interrupt() const { return &interrupt; }
    bool on_calling_thread() const { return calling_thread; }
    int64_t pixel_count() const { return pixels; }
};

// Adds one sum to another, both relative to their own log-weights; v of `channels` values `stride` apart.
void merge_sum(double& m, double& s, double& s2, double* v, int64_t stride, double other_m, double other_s,
               double other_s2, const double* other_v, int64_t count) {
    if (other_s <= 0) return;
    const double top = std::max(m, other_m), mine = std::exp(m - top), other = std::exp(other_m - top);
    m = top;
    s = s * mine + other_s * other;
    s2 = s2 * mine * mine + other_s2 * other * other;
    for (int64_t c = 0; c < count; ++c) v[c * stride] = v[c * stride] * mine + other_v[c] * other;
}

class WindowWorker : public Worker {
    // What is kept of one competition, noisy image by noisy image.
    struct Kept {
        const WindowPlan& plan;
        Buffer<float> q, lanes;
        Buffer<double> reference, sums;
        std::vector<Task> tasks;

        Kept(const WindowPlan& plan, int64_t items, int64_t pixels)
            : plan(plan),
              q(plan.q_floats * items),
              lanes(plan.lane_floats * items),
              reference(pixels * items),
              sums(pixels * (2 + plan.channels) * items) {}
    };
    Buffer<float> block, state, scratch;
    std::vector<Kept> competitions;

public:
    WindowWorker(const Pass& pass, Interrupt& interrupt, bool calling_thread)
        : Worker(pass, interrupt, calling_thread),
          block(pass.block_floats),
          state(pass.state_floats),
          scratch(pass.scratch_floats) {
        for (const WindowPlan& plan : pass.windows) competitions.emplace_back(plan, pass.items, pixel_count());
    }

    void compute(int first_item, int items, int64_t start, int64_t stop) override {
        const Pass& pass = the_pass();
        const Problem& problem = the_problem();
        for (Kept& kept : competitions) {
            kept.tasks.clear();
            for (int item = 0; item < items; ++item) kept.tasks.push_back(task(kept, first_item + item, item));
        }
        const Images images = {
            problem.images, problem.images_are_bytes, problem.indices, problem.channels, problem.height,
            problem.width,  pass.value_of_byte,       pass.pixels};
        const int lanes = pass.level.lanes;
        for (int64_t at = start, blocks = 1; at < stop; at += lanes, ++blocks) {
            pass.level.pack(images, at, int(std::min<int64_t>(lanes, stop - at)), block.get());
            for (Kept& kept : competitions) {
                const bool flush = !kept.plan.keep_lanes || at + lanes >= stop || blocks % kept.plan.flush_every == 0;
                for (Task& task : kept.tasks) {
                    task.flush_at_end = flush;
                    for (const Panel& panel : kept.plan.panels) {
                        pass.level.panel(task, panel);
                        if (stopped()) return;
                    }
                }
            }
        }
    }

    void merge(int first_item, int items) override {
        const Problem& problem = the_problem();
        const int64_t pixels = pixel_count(), parts = 2 + problem.channels;
        for (const Kept& kept : competitions) {
            const Competition& into = kept.plan.competition;
            for (int item = 0; item < items; ++item) {
                const double sigma = problem.sigma[first_item + item], precision = 0.5 / (sigma * sigma);
                for (int64_t pixel = 0; pixel < pixels; ++pixel) {
                    const double* sum = kept.sums.get() + (item * pixels + pixel) * parts;
                    const int64_t at = (first_item + item) * pixels + pixel;
                    const double m = -kept.reference.get()[item * pixels + pixel] * precision;
                    merge_sum(into.m[at], into.s[at], into.s2[at],
                              into.v + (first_item + item) * pixels * problem.channels + pixel, pixels, m, sum[0],
                              sum[1], sum + 2, problem.channels);
                }
            }
        }
    }

private:
    // A noisy image, at its place among those of a unit, with nothing added up yet.
    Task task(const Kept& kept, int item, int place) const {
        const WindowPlan& plan = kept.plan;
        const Problem& problem = the_problem();
        const int64_t sum_count = pixel_count() * (2 + problem.channels);
        Task t{};
        t.channels = problem.channels, t.height = problem.height, t.width = problem.width;
        t.patch_size = plan.competition.patch_size, t.circular = plan.competition.circular;
        float* padded = kept.q.get() + place * plan.q_floats;
        fill_queries(plan, item, padded);
        t.q = padded, t.q_margin = plan.q_margin, t.q_pitch = plan.q_pitch;
        t.p = block.get();
        const double sigma = problem.sigma[item], scale = 1.4426950408889634 / (2 * sigma * sigma);
        t.scale = float(std::min(1e30, std::max(1e-24, scale)));
        // All windows of the bank together, each below 2^-bits, weigh less than 2^-17 of the nearest.
        const double bits = 17 + std::log2(double(plan.windows_per_image) * double(problem.count));
        t.negligible = float(-bits / double(t.scale));
        t.reference = kept.reference.get() + place * pixel_count();
        t.sums = kept.sums.get() + place * sum_count;
        t.lanes = kept.lanes.get() + place * plan.lane_floats;
        std::fill_n(t.reference, pixel_count(), double(FAR));
        std::fill_n(t.sums, sum_count, 0.0);
        std::fill_n(t.lanes, plan.lane_floats, 0.f);
        t.state = state.get(), t.scratch = scratch.get();
        t.interrupt = the_interrupt(), t.calling_thread = on_calling_thread();
        return t;
    }

    void fill_queries(const WindowPlan& plan, int item, float* padded) const {
        const Problem& problem = the_problem();
        const int width = problem.width, channels = problem.channels;
        const float* z = problem.z + int64_t(item) * channels * pixel_count();
        for (int i = 0; i < problem.height; ++i)
            for (int j = -plan.q_margin; j < width + plan.q_margin; ++j) {
                const int column = plan.competition.circular ? (j % width + width) % width : j;
                const bool inside = column >= 0 && column < width;
                for (int c = 0; c < channels; ++c)
                    padded[int64_t(i) * plan.q_pitch + int64_t(j + plan.q_margin) * channels + c] =
                        inside ? z[c * pixel_count() + int64_t(i) * width + column] : 0.f;
            }
    }
};

class WholeWorker : public Worker {
    const int64_t values, padded;
    Buffer<float> p, q, weights;
    Buffer<double> logits, v;
    std::vector<double> m, s, s2;

public:
    WholeWorker(const Pass& pass, Interrupt& interrupt, bool calling_thread)
        : Worker(pass, interrupt, calling_thread),
          values(pixel_count() * pass.problem.channels),
          padded(pass.whole_padded()),
          p(padded * pass.chunk),
          q(padded),
          weights(pass.chunk),
          logits(pass.chunk),
          v(values * pass.items),
          m(size_t(pass.items)),
          s(size_t(pass.items)),
          s2(size_t(pass.items)) {}

    void compute(int first_item, int items, int64_t start, int64_t stop) override {
        const Pass& pass = the_pass();
        const Problem& problem = the_problem();
        for (int64_t i = start; i < stop; ++i) {
            const int64_t index = problem.indices ? problem.indices[i] : i;
            float* image = p.get() + (i - start) * padded;
            if (problem.images_are_bytes) {
                const uint8_t* raw = static_cast<const uint8_t*>(problem.images) + index * values;
                for (int64_t x = 0; x < values; ++x) image[x] = pass.value_of_byte[raw[x]];
            } else {
                std::copy_n(static_cast<const float*>(problem.images) + index * values, values, image);
            }
        }
        for (int item = 0; item < items && !stopped(); ++item) {
            std::copy_n(problem.z + (first_item + item) * values, values, q.get());
            const double sigma = problem.sigma[first_item + item];
            pass.level.whole({values, padded, q.get(), p.get(), int(stop - start), 0.5 / (sigma * sigma), logits.get(),
                              weights.get(), &m[size_t(item)], &s[size_t(item)], &s2[size_t(item)],
                              v.get() + item * values});
        }
    }

    void merge(int first_item, int items) override {
        const Competition& into = *the_pass().whole;
        for (int item = 0; item < items; ++item) {
            const int64_t at = first_item + item;
            merge_sum(into.m[at], into.s[at], into.s2[at], into.v + at * values, 1, m[size_t(item)], s[size_t(item)],
                      s2[size_t(item)], v.get() + item * values, values);
        }
    }
};

// Hands out units in order and lets each merge only after those before it that share its noisy images.
class Queue {
    const Pass& pass;
    Interrupt& interrupt;
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable turned;
    std::vector<int> turn;  // per group of noisy images: the chunk that may merge now

public:
    Queue(const Pass& pass, Interrupt& interrupt)
        : pass(pass), interrupt(interrupt), turn(size_t(pass.units() / pass.chunks), 0) {}

    void work(bool calling_thread) {
        const FlushSubnormals flush_subnormals;
        std::unique_ptr<Worker> worker;
        if (pass.whole)
            worker = std::make_unique<WholeWorker>(pass, interrupt, calling_thread);
        else
            worker = std::make_unique<WindowWorker>(pass, interrupt, calling_thread);
        for (int64_t unit; (unit = next++) < pass.units() && !interrupt.stopped(calling_thread);)
            if (!serve(*worker, unit, calling_thread)) break;
    }

private:
    bool serve(Worker& worker, int64_t unit, bool calling_thread) {
        const int group = int(unit / pass.chunks), chunk = int(unit % pass.chunks);
        const int first = group * pass.items, items = std::min(pass.items, pass.problem.batch - first);
        const int64_t start = chunk * pass.chunk;
        worker.compute(first, items, start, std::min(start + pass.chunk, pass.problem.count));
        std::unique_lock<std::mutex> lock(mutex);
        while (!interrupt.stop && turn[size_t(group)] != chunk) {
            turned.wait_for(lock, std::chrono::milliseconds(20));
            lock.unlock();
            interrupt.stopped(calling_thread);
            lock.lock();
        }
        if (interrupt.stop) return false;
        lock.unlock();
        worker.merge(first, items);
        lock.lock();
        ++turn[size_t(group)];
        turned.notify_all();
        return true;
    }
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

// How many competitions, from `first` on, go through the bank together: what a thread keeps of them stays small.
size_t together(const Problem& problem, const Level& level, size_t first) {
    const int64_t most = std::min(THREAD_BYTES, problem.memory_limit);
    size_t count = 1;
    if (problem.competitions[first].patch_size == 0) return count;
    while (first + count < problem.competitions.size() && problem.competitions[first + count].patch_size &&
           Pass(problem, level, first, count + 1).bytes_per_thread() <= most)
        ++count;
    return count;
}

// False if the interrupt stopped it.
bool run(const Pass& pass, Interrupt& interrupt) {
    const Problem& problem = pass.problem;
    const int64_t affordable = problem.memory_limit / pass.bytes_per_thread();
    if (affordable < 1)
        throw std::invalid_argument("memory_limit: got " + std::to_string(problem.memory_limit) +
                                    " bytes, one thread takes " + std::to_string(pass.bytes_per_thread()));
    const int64_t threads = std::max<int64_t>(1, std::min({int64_t(problem.threads), affordable, pass.units()}));
    Queue queue(pass, interrupt);
    ThreadPool(threads, interrupt).run([&](int thread) { queue.work(thread == 0); });
    return !interrupt.stop;
}

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
    for (size_t first = 0, count; first < problem.competitions.size(); first += count) {
        count = together(problem, level, first);
        if (!run(Pass(problem, level, first, count), interrupt)) return false;
    }
    return true;
}

}  // namespace patchscore

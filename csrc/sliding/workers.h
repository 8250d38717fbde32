// What a thread does with a unit of a pass, and the order in which units are merged.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

#include "../common/memory.h"
#include "../common/simd.h"
#include "../common/threads.h"
#include "plan.h"

namespace patchscore {

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

// Log-weights are -distance^2 times this; a sigma whose square overflows or vanishes acts as the nearest whose square
// does not.
inline double precision_of(double sigma) {
    return std::min(1e30, std::max(1e-24, LOG2E / (2 * sigma * sigma))) / LOG2E;
}

// One query's sums, of a competition (double) or of a unit (const double). m is a negated squared distance and sl the
// sum of w (-distance^2 - m); values lie `stride` apart. sl and v2 are null where moments are not taken.
template <typename Double>
struct Sums {
    Double *m, *s, *s2, *sl, *v, *v2;
    int64_t stride;
};

// Adds one sum of `count` values to another.
inline void merge_sum(double precision, const Sums<double>& into, const Sums<const double>& part, int64_t count) {
    if (!(*part.s > 0)) return;
    const double top = std::max(*into.m, *part.m);
    const double mine = std::exp((*into.m - top) * precision), other = std::exp((*part.m - top) * precision);
    if (into.sl) {
        const double moved = *into.s > 0 ? *into.sl + (*into.m - top) * *into.s : 0;
        *into.sl = mine * moved + other * (*part.sl + (*part.m - top) * *part.s);
    }
    *into.m = top;
    *into.s = *into.s * mine + *part.s * other;
    *into.s2 = *into.s2 * mine * mine + *part.s2 * other * other;
    const auto add = [&](double* to, const double* from) {
        for (int64_t c = 0; c < count; ++c)
            to[c * into.stride] = to[c * into.stride] * mine + from[c * part.stride] * other;
    };
    add(into.v, part.v);
    if (into.v2) add(into.v2, part.v2);
}

// One image as the kernel reads it: channels innermost, rows continued as the competition says.
template <typename Real>
void fill_queries(const WindowPlan& plan, const Problem& problem, const float* z, Real* padded) {
    const int width = problem.width, channels = problem.channels;
    const int64_t pixels = int64_t(problem.height) * width;
    for (int i = 0; i < problem.height; ++i)
        for (int j = -plan.q_margin; j < width + plan.q_margin; ++j) {
            const int column = plan.competition.circular ? (j % width + width) % width : j;
            const bool inside = column >= 0 && column < width;
            for (int c = 0; c < channels; ++c)
                padded[int64_t(i) * plan.q_pitch + int64_t(j + plan.q_margin) * channels + c] =
                    inside ? Real(z[c * pixels + int64_t(i) * width + column]) : Real(0);
        }
}

template <typename Real>
class WindowWorker : public Worker {
    // What is kept of one competition, noisy image by noisy image.
    struct Kept {
        const WindowPlan& plan;
        Buffer<Real> q, lanes;
        Buffer<double> reference, sums;
        Buffer<int> exact_left;
        std::vector<Task<Real>> tasks;

        Kept(const WindowPlan& plan, int64_t items, int64_t pixels)
            : plan(plan),
              q(plan.q_numbers * items),
              lanes(plan.lane_numbers * items),
              reference(pixels * items),
              sums(pixels * plan.parts().count() * items),
              exact_left(pixels * items) {}
    };
    const Kernel<Real>& kernel;
    Buffer<Real> block, state, scratch;
    std::vector<Kept> competitions;

public:
    WindowWorker(const Pass& pass, const Kernel<Real>& kernel, Interrupt& interrupt, bool calling_thread)
        : Worker(pass, interrupt, calling_thread),
          kernel(kernel),
          block(pass.block_numbers),
          state(pass.state_numbers),
          scratch(pass.scratch_numbers) {
        for (const WindowPlan& plan : pass.windows) competitions.emplace_back(plan, pass.items, pixel_count());
    }

    void compute(int first_item, int items, int64_t start, int64_t stop) override {
        const Images& bank = the_pass().job.images;
        const Images images = {bank.data,  bank.pixel_bytes,   bank.indices,      bank.channels, bank.height,
                               bank.width, bank.value_of_byte, the_pass().pixels, bank.turned};
        for (Kept& kept : competitions) {
            kept.tasks.clear();
            for (int item = 0; item < items; ++item)
                kept.tasks.push_back(task(kept, first_item + item, item, stop - start));
        }
        const int lanes = kernel.lanes;
        for (int64_t at = start, blocks = 1; at < stop; at += lanes, ++blocks) {
            const int present = int(std::min<int64_t>(lanes, stop - at));
            kernel.pack(images, at, present, block.get());
            // Lanes without an image are not added up: what earlier images left in them is flushed first.
            const bool last = at + lanes >= stop, short_one_follows = !last && at + 2 * lanes > stop;
            for (Kept& kept : competitions) {
                const bool flush =
                    !kept.plan.keep_lanes || last || short_one_follows || blocks % kept.plan.flush_every == 0;
                for (Task<Real>& task : kept.tasks) {
                    task.present = present;
                    task.flush_at_end = flush;
                    for (const Panel& panel : kept.plan.panels) {
                        kernel.panel(task, panel);
                        if (stopped()) return;
                    }
                }
            }
        }
    }

    void merge(int first_item, int items) override {
        const Problem& problem = the_problem();
        const int64_t pixels = pixel_count();
        for (const Kept& kept : competitions) {
            const Competition& into = kept.plan.competition;
            const Parts parts = kept.plan.parts();
            for (int item = 0; item < items; ++item) {
                const double precision = precision_of(problem.sigma[first_item + item]);
                for (int64_t pixel = 0; pixel < pixels; ++pixel) {
                    const int64_t from = item * pixels + pixel, at = (first_item + item) * pixels + pixel;
                    const double nearest = kept.reference.get()[from];
                    if (kept.exact_left.get()[from] < 0) {
                        double& unsure = kept.plan.target.unsure[at];
                        unsure = std::min(unsure, nearest);
                        continue;
                    }
                    const double negated = -nearest, *sum = kept.sums.get() + from * parts.count();
                    const double *sl = into.moments() ? sum + 2 : nullptr, *v = sum + parts.value(0),
                                 *v2 = into.moments() ? v + 1 : nullptr;
                    const int64_t values = (first_item + item) * pixels * problem.channels + pixel;
                    merge_sum(precision,
                              {into.m + at, into.s + at, into.s2 + at, into.moments() ? into.sl + at : nullptr,
                               into.v + values, into.moments() ? into.v2 + values : nullptr, pixels},
                              {&negated, sum, sum + 1, sl, v, v2, parts.value(1) - parts.value(0)}, problem.channels);
                }
            }
        }
    }

private:
    // A noisy image, at its place among those of a unit of `images`, with nothing added up yet.
    Task<Real> task(const Kept& kept, int item, int place, int64_t images) const {
        const WindowPlan& plan = kept.plan;
        const Pass& pass = the_pass();
        const Problem& problem = the_problem();
        const int k = plan.competition.patch_size;
        const int64_t sum_count = pixel_count() * plan.parts().count();
        Task<Real> t{};
        t.channels = problem.channels, t.height = problem.height, t.width = problem.width;
        t.image_height = pass.job.images.height, t.image_width = pass.job.images.width;
        t.patch_size = k, t.circular = plan.competition.circular, t.moments = plan.competition.moments();
        Real* padded = kept.q.get() + place * plan.q_numbers;
        fill_queries(plan, problem, problem.z + int64_t(item) * problem.channels * pixel_count(), padded);
        t.q = padded, t.q_margin = plan.q_margin, t.q_pitch = plan.q_pitch;
        t.p = block.get(), t.pixels_of_bytes = problem.images_are_bytes;
        t.pixels_absent = pass.job.images.pixel_bytes == 8;
        const double scale = precision_of(problem.sigma[item]) * LOG2E;
        t.scale = Real(scale);
        // All windows of the bank together, each below 2^-bits, weigh less than 2^-17 of the nearest.
        const double bits = 17 + std::log2(double(plan.windows_per_image) * double(pass.job.count));
        t.negligible = Real(-bits / scale);
        t.rounding = rounding_bound(sizeof(Real) == 8 ? 0x1p-53 : 0x1p-24, problem.channels, k, scale);
        t.reference = kept.reference.get() + place * pixel_count();
        t.sums = kept.sums.get() + place * sum_count;
        t.exact_left = kept.exact_left.get() + place * pixel_count();
        t.lanes = kept.lanes.get() + place * plan.lane_numbers;
        std::fill_n(t.reference, pixel_count(), FAR);
        std::fill_n(t.sums, sum_count, 0.0);
        std::fill_n(t.exact_left, pixel_count(), plan.exact_distances(images));
        std::fill_n(t.lanes, plan.lane_numbers, Real(0));
        t.state = state.get(), t.scratch = scratch.get();
        t.interrupt = the_interrupt(), t.calling_thread = on_calling_thread();
        return t;
    }
};

// Products with the Jacobian, one noisy image at a time.
template <typename Real>
class ProductWorker : public Worker {
    static constexpr int64_t BEFORE = NEIGHBOURS;  // zeros before the block, in which diagonals may begin
    const Kernel<Real>& kernel;
    const WindowPlan& plan;
    const Pass::ProductSizes sizes;
    Buffer<Real> block, state, scratch, ring, running, boxes, lanes, q, padded_direction, evidence, direction, mean,
        along_mean;
    Buffer<bool> nothing;
    Buffer<double> sums;  // [height * width][1 + channels]

public:
    ProductWorker(const Pass& pass, const Kernel<Real>& kernel, Interrupt& interrupt, bool calling_thread)
        : Worker(pass, interrupt, calling_thread),
          kernel(kernel),
          plan(pass.windows.front()),
          sizes(pass.product_sizes()),
          block(pass.block_numbers + 2 * BEFORE * pass.problem.channels * kernel.lanes),
          state(pass.state_numbers),
          scratch(pass.scratch_numbers),
          ring(sizes.ring),
          running(sizes.row),
          boxes(sizes.boxes),
          lanes(sizes.lanes),
          q(plan.q_numbers),
          padded_direction(plan.q_numbers),
          evidence(pixel_count()),
          direction(pixel_count() * pass.problem.channels),
          mean(pixel_count() * pass.problem.channels),
          along_mean(pixel_count()),
          nothing(sizes.nothing),
          sums(pixel_count() * (1 + pass.problem.channels)) {}

    void compute(int item, int, int64_t start, int64_t stop) override {
        const Images& bank = the_pass().job.images;
        const Images images = {bank.data,  bank.pixel_bytes,   bank.indices,      bank.channels, bank.height,
                               bank.width, bank.value_of_byte, the_pass().pixels, bank.turned};
        const Task<Real> task = prepare(item);
        const Product<Real> product = {the_pass().job.product->transposed,
                                       evidence.get(),
                                       direction.get(),
                                       padded_direction.get(),
                                       mean.get(),
                                       along_mean.get(),
                                       lanes.get(),
                                       ring.get(),
                                       running.get(),
                                       nothing.get(),
                                       boxes.get()};
        std::fill_n(sums.get(), sums.size(), 0.0);
        for (int64_t at = start; at < stop; at += kernel.lanes) {
            const int present = int(std::min<int64_t>(kernel.lanes, stop - at));
            kernel.pack(images, at, present, const_cast<Real*>(task.p));
            for (const Panel& panel : plan.panels) {
                kernel.product(task, product, panel);
                if (stopped()) return;
            }
            for (int64_t i = 0; i < sums.size(); ++i) {
                Real* each = lanes.get() + i * kernel.lanes;
                for (int lane = 0; lane < present; ++lane) sums.get()[i] += double(each[lane]);
                std::fill_n(each, kernel.lanes, Real(0));
            }
        }
    }

    // J^T u has sum c (p - q) at every pixel, J t is complete; both are over sigma^2.
    void merge(int item, int) override {
        const Problem& problem = the_problem();
        const JacobianProduct& product = *the_pass().job.product;
        const int64_t pixels = pixel_count(), parts = 1 + problem.channels;
        const double by = product.averaging ? 1 : 2 * precision_of(problem.sigma[item]);
        for (int c = 0; c < problem.channels; ++c)
            for (int64_t pixel = 0; pixel < pixels; ++pixel) {
                const int64_t at = (int64_t(item) * problem.channels + c) * pixels + pixel;
                const double* sum = sums.get() + pixel * parts;
                const bool from_own = product.transposed && !product.averaging;
                const double own = from_own ? double(problem.z[at]) * sum[0] : 0;
                product.result[at] += by * (sum[1 + c] - own);
            }
    }

private:
    Task<Real> prepare(int item) {
        const Problem& problem = the_problem();
        const JacobianProduct& product = *the_pass().job.product;
        const int64_t pixels = pixel_count(), first = int64_t(item) * problem.channels * pixels;
        const double precision = precision_of(problem.sigma[item]);
        fill_queries(plan, problem, problem.z + first, q.get());
        fill_queries(plan, problem, product.direction + first, padded_direction.get());
        for (int64_t pixel = 0; pixel < pixels; ++pixel) {
            double along = product.transposed ? 0 : window_product(item, pixel);
            for (int c = 0; c < problem.channels; ++c) {
                const int64_t from = first + c * pixels + pixel, to = pixel * problem.channels + c;
                direction.get()[to] = Real(product.direction[from]);
                mean.get()[to] = Real(product.mean[from]);
                if (product.transposed) along += double(product.direction[from]) * product.mean[from];
            }
            along_mean.get()[pixel] = Real(product.averaging ? -1 : along);  // c = w (u.x - u.D)
            evidence.get()[pixel] = Real(-product.evidence[item * pixels + pixel] / precision);
        }
        Task<Real> t{};
        t.channels = problem.channels, t.height = problem.height, t.width = problem.width;
        t.image_height = the_pass().job.images.height, t.image_width = the_pass().job.images.width;
        t.patch_size = plan.competition.patch_size, t.circular = plan.competition.circular;
        t.q = q.get(), t.q_margin = plan.q_margin, t.q_pitch = plan.q_pitch;
        t.p = block.get() + BEFORE * problem.channels * kernel.lanes;
        t.scale = Real(precision * LOG2E);
        const double bits = 17 + std::log2(double(plan.windows_per_image) * double(the_pass().job.count));
        t.negligible = Real(-bits / (precision * LOG2E));
        t.state = state.get(), t.scratch = scratch.get();
        t.interrupt = the_interrupt(), t.calling_thread = on_calling_thread();
        return t;
    }

    // The sum of t q over the window around a pixel.
    double window_product(int item, int64_t pixel) const {
        const Problem& problem = the_problem();
        const int height = problem.height, width = problem.width, r = plan.competition.patch_size / 2;
        const int64_t pixels = pixel_count(), first = int64_t(item) * problem.channels * pixels;
        const auto place = [&](int at, int size) {
            return plan.competition.circular ? (at % size + size) % size : at >= 0 && at < size ? at : -1;
        };
        double total = 0;
        for (int y = -r; y <= r; ++y)
            for (int x = -r; x <= r; ++x) {
                const int i = place(int(pixel / width) + y, height), j = place(int(pixel % width) + x, width);
                for (int c = 0; i >= 0 && j >= 0 && c < problem.channels; ++c) {
                    const int64_t at = first + c * pixels + int64_t(i) * width + j;
                    total += double(problem.z[at]) * double(the_pass().job.product->direction[at]);
                }
            }
        return total;
    }
};

class WholeWorker : public Worker {
    const int64_t values, padded;
    Buffer<double> p, q, distances, v, v2;
    std::vector<double> nearest, s, s2, sl;

public:
    WholeWorker(const Pass& pass, Interrupt& interrupt, bool calling_thread)
        : Worker(pass, interrupt, calling_thread),
          values(pixel_count() * pass.problem.channels),
          padded(pass.whole_padded()),
          p(padded * pass.chunk),
          q(padded),
          distances(pass.chunk),
          v(padded * pass.items),
          v2(pass.whole->moments() ? padded * pass.items : 0),
          nearest(size_t(pass.items)),
          s(size_t(pass.items)),
          s2(size_t(pass.items)),
          sl(size_t(pass.items)) {}

    void compute(int first_item, int items, int64_t start, int64_t stop) override {
        const Images& bank = the_pass().job.images;
        const Problem& problem = the_problem();
        for (int64_t i = start; i < stop; ++i) {
            const int64_t index = bank.index(i);
            double* image = p.get() + (i - start) * padded;
            if (bank.pixel_bytes == 1) {
                const uint8_t* raw = static_cast<const uint8_t*>(bank.data) + index * values;
                for (int64_t x = 0; x < values; ++x) image[x] = bank.value_of_byte[raw[x]];
            } else {
                std::copy_n(static_cast<const float*>(bank.data) + index * values, values, image);
            }
        }
        for (int item = 0; item < items && !stopped(); ++item) {
            std::copy_n(problem.z + (first_item + item) * values, values, q.get());
            the_pass().level.whole(
                {values, padded, q.get(), p.get(), int(stop - start), precision_of(problem.sigma[first_item + item]),
                 distances.get(), &nearest[size_t(item)], &s[size_t(item)], &s2[size_t(item)], v.get() + item * padded,
                 &sl[size_t(item)], the_pass().whole->moments() ? v2.get() + item * padded : nullptr});
        }
    }

    void merge(int first_item, int items) override {
        const Competition& into = *the_pass().whole;
        for (int item = 0; item < items; ++item) {
            const int64_t at = first_item + item;
            const size_t i = size_t(item);
            const double negated = -nearest[i];
            merge_sum(precision_of(the_problem().sigma[at]),
                      {into.m + at, into.s + at, into.s2 + at, into.moments() ? into.sl + at : nullptr,
                       into.v + at * values, into.moments() ? into.v2 + at * values : nullptr, 1},
                      {&negated, &s[i], &s2[i], &sl[i], v.get() + item * padded, v2.get() + item * padded, 1}, values);
        }
    }
};

// Hands out units in order and lets each merge only after those before it that share its noisy images. All noisy images
// meet a chunk of training images before the next chunk, so that a bank in a mapped file is read once.
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
        if (pass.job.product && pass.job.exact)
            worker = std::make_unique<ProductWorker<double>>(pass, pass.level.exact, interrupt, calling_thread);
        else if (pass.job.product)
            worker = std::make_unique<ProductWorker<float>>(pass, pass.level.single, interrupt, calling_thread);
        else if (pass.whole)
            worker = std::make_unique<WholeWorker>(pass, interrupt, calling_thread);
        else if (pass.job.exact)
            worker = std::make_unique<WindowWorker<double>>(pass, pass.level.exact, interrupt, calling_thread);
        else
            worker = std::make_unique<WindowWorker<float>>(pass, pass.level.single, interrupt, calling_thread);
        for (int64_t unit; (unit = next++) < pass.units() && !interrupt.stopped(calling_thread);)
            if (!serve(*worker, unit, calling_thread)) break;
    }

private:
    bool serve(Worker& worker, int64_t unit, bool calling_thread) {
        const int64_t groups = int64_t(turn.size());
        const int group = int(unit % groups), chunk = int(unit / groups);
        const int first = group * pass.items, items = std::min(pass.items, pass.problem.batch - first);
        const int64_t start = chunk * pass.chunk;
        worker.compute(first, items, start, std::min(start + pass.chunk, pass.job.count));
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

}  // namespace patchscore

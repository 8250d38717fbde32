// Runs the sliding engine on awkward shapes, on every instruction set, under AddressSanitizer and UBSan.
//
// No access may leave its memory, no arithmetic may be undefined, and means must be those of the definition
// (csrc/sliding/definition.h), which tests/test_sliding.py holds to the same promises in Python.
#include "../../csrc/sliding/sliding.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "../../csrc/sliding/definition.h"

using patchscore::Axis;
using patchscore::Group;

static uint32_t state = 1;

static float uniform() {
    state = state * 1664525u + 1013904223u;
    return float(state >> 8) / float(1 << 24);
}

static Axis locked(int q0, int q1) { return {q0, q1, q0, q1, true}; }
static Axis free_axis(int q0, int q1, int w0, int w1) { return {q0, q1, w0, w1, false}; }

static std::vector<Axis> axes(int size, int k, char kind) {
    const int r = k / 2;
    if (kind == 'c') return {free_axis(0, size, r, size - r)};
    if (kind == 'l' || k >= size) return {locked(0, size)};
    if (kind == 'n') return {free_axis(1, size, r, r + 1), free_axis(0, 1, r, size - r)};
    if (r == 0) return {free_axis(0, size, 0, size)};
    return {locked(0, r), free_axis(r, size - r, r, size - r), locked(size - r, size)};
}

// The means, and with moments the variances, at every patch size (0: whole images), of one call on an instruction set,
// or by the definition for null.
static std::vector<double> run(const char* simd, int batch, int channels, int height, int width, int count,
                               const std::vector<int>& sizes, char kind, bool bytes, bool select, bool moments,
                               double sigma, int threads) {
    state = 1;
    const size_t pixels = size_t(height) * size_t(width), values = pixels * size_t(channels);
    std::vector<float> z(size_t(batch) * values), floats(size_t(count) * values);
    std::vector<uint8_t> raw(size_t(count) * values);
    for (float& value : z) value = 3 * uniform() - 1.5f;
    for (size_t i = 0; i < raw.size(); ++i) raw[i] = uint8_t(uniform() * 255), floats[i] = float(raw[i]) / 127.5f - 1.f;
    std::vector<int64_t> indices;
    for (int64_t i = 0; i < count; i += 2) indices.push_back(count - 1 - i);
    std::vector<double> sigmas(size_t(batch), sigma);

    patchscore::Problem problem{};
    problem.batch = batch, problem.channels = channels, problem.height = height, problem.width = width;
    problem.z = z.data(), problem.sigma = sigmas.data();
    problem.images = bytes ? static_cast<const void*>(raw.data()) : static_cast<const void*>(floats.data());
    problem.images_are_bytes = bytes;
    problem.indices = select ? indices.data() : nullptr;
    problem.count = select ? int64_t(indices.size()) : count;
    struct Sums {
        std::vector<double> m, s, s2, v, v2, sl;
    };
    std::vector<Sums> sums;
    for (const int k : sizes) {
        const size_t outputs = size_t(batch) * (k ? pixels : 1);
        sums.push_back({std::vector<double>(outputs, -std::numeric_limits<double>::infinity()),
                        std::vector<double>(outputs), std::vector<double>(outputs),
                        std::vector<double>(size_t(batch) * values), std::vector<double>(size_t(batch) * values),
                        std::vector<double>(outputs)});
        patchscore::Competition competition{};
        competition.patch_size = k, competition.circular = kind == 'c';
        if (k)
            for (const Axis& rows : axes(height, k, kind))
                for (const Axis& cols : axes(width, k, kind)) competition.groups.push_back({rows, cols});
        competition.m = sums.back().m.data(), competition.s = sums.back().s.data();
        competition.s2 = sums.back().s2.data(), competition.v = sums.back().v.data();
        if (moments) competition.v2 = sums.back().v2.data(), competition.sl = sums.back().sl.data();
        problem.competitions.push_back(competition);
    }
    problem.threads = threads, problem.memory_limit = int64_t(1) << 30;
    if (simd) {
        if (!patchscore::sliding_posterior_sums(problem, simd, nullptr)) std::abort();
    } else {
        for (const patchscore::Competition& competition : problem.competitions)
            patchscore::Definition(problem, competition).sum();
    }

    std::vector<double> means;
    for (size_t n = 0; n < sizes.size(); ++n)
        for (size_t b = 0; b < size_t(batch); ++b)
            for (size_t i = 0; i < values; ++i) {
                const double weight = sums[n].s[sizes[n] ? b * pixels + i % pixels : b];
                const double mean = sums[n].v[b * values + i] / weight;
                means.push_back(mean);
                if (moments) means.push_back(sums[n].v2[b * values + i] / weight - mean * mean);
            }
    return means;
}

// The patch sizes that a kind of competition has on images of that size.
static std::vector<int> sizes_of(char kind, int height, int width) {
    if (kind == 'w') return {0};
    std::vector<int> sizes;
    for (const int k : {1, 3, 5, 7, 9, 15, 21})
        if (kind == 'c' ? k <= height && k <= width : k < 2 * (height > width ? height : width)) sizes.push_back(k);
    return sizes;
}

// Products with the Jacobian and its transpose at every patch size: u.(J t) is t.(J^T u), whatever the weights are.
static bool duals_agree(const char* simd, int channels, int height, int width, int count, char kind, double sigma) {
    state = 2;
    const size_t pixels = size_t(height) * size_t(width), values = pixels * size_t(channels);
    std::vector<float> z(values), images(size_t(count) * values), u(values), t(values);
    for (std::vector<float>* some : {&z, &images, &u, &t})
        for (float& value : *some) value = 2 * uniform() - 1;
    for (const int k : sizes_of(kind, height, width)) {
        patchscore::Competition competition{};
        competition.patch_size = k, competition.circular = kind == 'c';
        for (const Axis& rows : axes(height, k, kind))
            for (const Axis& cols : axes(width, k, kind)) competition.groups.push_back({rows, cols});
        std::vector<double> m(pixels, -std::numeric_limits<double>::infinity()), s(pixels), s2(pixels), v(values);
        competition.m = m.data(), competition.s = s.data(), competition.s2 = s2.data(), competition.v = v.data();
        patchscore::Problem problem{};
        problem.batch = 1, problem.channels = channels, problem.height = height, problem.width = width;
        problem.z = z.data(), problem.sigma = &sigma, problem.images = images.data(), problem.count = count;
        problem.competitions = {competition}, problem.threads = 2, problem.memory_limit = int64_t(1) << 30;
        if (!patchscore::sliding_posterior_sums(problem, simd, nullptr)) return false;
        for (size_t i = 0; i < values; ++i) v[i] = s[i % pixels] > 0 ? v[i] / s[i % pixels] : 0;
        for (size_t i = 0; i < pixels; ++i) m[i] = s[i] > 0 ? m[i] + std::log(s[i]) : 0;
        double dots[2] = {0, 0}, scale = 1;
        for (const bool transposed : {true, false}) {
            std::vector<double> result(values);
            const patchscore::JacobianProduct product = {
                transposed, false, m.data(), v.data(), transposed ? u.data() : t.data(), result.data()};
            if (!patchscore::sliding_product(problem, product, simd, nullptr)) return false;
            for (size_t i = 0; i < values; ++i) {
                dots[transposed] += result[i] * double(transposed ? t[i] : u[i]);
                scale += std::abs(result[i]);
            }
        }
        if (!(std::abs(dots[0] - dots[1]) < 1e-4 * scale)) {
            std::printf("%s: %c k=%d C=%d: u.(J t) %g, t.(J^T u) %g\n", simd, kind, k, channels, dots[0], dots[1]);
            return false;
        }
    }
    return true;
}

int main() {
    const std::vector<std::string> levels = patchscore::simd_levels();
    int runs = 0;
    for (const char kind : {'c', 'z', 'n', 'l', 'w'})
        for (const int channels : {1, 2, 3, 4})
            for (const int width : {9, 14}) {
                const int height = 23 - width;
                std::vector<std::vector<int>> calls;
                for (const int k : sizes_of(kind, height, width)) calls.push_back({k});
                calls.push_back(sizes_of(kind, height, width));
                const double sigma = channels == 2 ? 1e-3 : channels == 4 ? 100 : 0.5;
                for (const std::vector<int>& sizes : calls) {
                    const auto means_by = [&](const char* level) {
                        return run(level, 2, channels, height, width, 19, sizes, kind, width == 9, channels == 3,
                                   width == 14, sigma, 1 + channels % 2);
                    };
                    const std::vector<double> expected = means_by(nullptr);
                    for (const std::string& level : levels) {
                        const std::vector<double> means = means_by(level.c_str());
                        for (size_t i = 0; i < means.size(); ++i)
                            if (!(std::abs(means[i] - expected[i]) < (sigma < 0.05 ? 1e-3 : 1e-4))) {
                                std::printf("%s: %c k=%d.. C=%d: %g against %g\n", level.c_str(), kind, sizes[0],
                                            channels, means[i], expected[i]);
                                return 1;
                            }
                        ++runs;
                    }
                }
            }
    for (const std::string& level : levels)
        for (const char kind : {'c', 'z', 'n', 'l'})
            for (const int channels : {1, 2, 3})
                for (const double sigma : {0.1, 0.8}) {
                    if (!duals_agree(level.c_str(), channels, 9, 14, channels == 2 ? 3 : 19, kind, sigma)) return 1;
                    ++runs;
                }
    std::printf("%d runs, no complaint\n", runs);
    return 0;
}

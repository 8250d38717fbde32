// The sums by their definition, as plain loops in float64: tests/sanitize/sliding.cpp holds the kernels to it.
#pragma once

#include <cmath>
#include <vector>

#include "sliding.h"

namespace patchscore {

// Fills in one competition of a problem.
class Definition {
    const Problem& problem;
    const Competition& competition;

public:
    Definition(const Problem& problem, const Competition& competition) : problem(problem), competition(competition) {}

    void sum() const {
        const Axis whole = {0, 1, 0, 1, false};
        const bool by_images = competition.patch_size == 0;
        for (const Group& group : by_images ? std::vector<Group>{{whole, whole}} : competition.groups)
            for (int item = 0; item < problem.batch; ++item)
                for (int i = group.rows.q0; i < group.rows.q1; ++i)
                    for (int j = group.cols.q0; j < group.cols.q1; ++j)
                        for (int64_t image = 0; image < problem.count; ++image)
                            for (int a = first(group.rows, i); a < end(group.rows, i); ++a)
                                for (int b = first(group.cols, j); b < end(group.cols, j); ++b)
                                    by_images ? add_image(item, image) : add_window(item, i, j, image, a, b);
    }

private:
    static int first(const Axis& axis, int query) { return axis.locked ? query : axis.w0; }
    static int end(const Axis& axis, int query) { return axis.locked ? query + 1 : axis.w1; }
    int64_t pixels() const { return int64_t(problem.height) * problem.width; }

    // Zero outside the image, but for a noisy image that wraps.
    double noisy(int item, int c, int i, int j) const {
        if (competition.circular) {
            i = (i % problem.height + problem.height) % problem.height;
            j = (j % problem.width + problem.width) % problem.width;
        }
        if (i < 0 || i >= problem.height || j < 0 || j >= problem.width) return 0;
        return problem.z[(int64_t(item) * problem.channels + c) * pixels() + int64_t(i) * problem.width + j];
    }

    double training(int64_t image, int c, int i, int j) const {
        if (i < 0 || i >= problem.height || j < 0 || j >= problem.width) return 0;
        const int64_t index = problem.indices ? problem.indices[image] : image;
        const int64_t at = (index * problem.channels + c) * pixels() + int64_t(i) * problem.width + j;
        return problem.images_are_bytes ? static_cast<const uint8_t*>(problem.images)[at] / 127.5 - 1
                                        : double(static_cast<const float*>(problem.images)[at]);
    }

    void add_window(int item, int i, int j, int64_t image, int a, int b) const {
        const int r = competition.patch_size / 2;
        double distance = 0;
        for (int c = 0; c < problem.channels; ++c)
            for (int y = -r; y <= r; ++y)
                for (int x = -r; x <= r; ++x) {
                    const double difference = noisy(item, c, i + y, j + x) - training(image, c, a + y, b + x);
                    distance += difference * difference;
                }
        const double w = weight(distance, item, item * pixels() + int64_t(i) * problem.width + j);
        for (int c = 0; c < problem.channels; ++c)
            add_value(item, c, int64_t(i) * problem.width + j, w, training(image, c, a, b));
    }

    void add_value(int item, int c, int64_t pixel, double w, double x) const {
        value(competition.v, item, c, pixel) += w * x;
        if (competition.moments()) value(competition.v2, item, c, pixel) += w * x * x;
    }

    void add_image(int item, int64_t image) const {
        double distance = 0;
        for (int c = 0; c < problem.channels; ++c)
            for (int i = 0; i < problem.height; ++i)
                for (int j = 0; j < problem.width; ++j) {
                    const double difference = noisy(item, c, i, j) - training(image, c, i, j);
                    distance += difference * difference;
                }
        const double w = weight(distance, item, item);
        for (int c = 0; c < problem.channels; ++c)
            for (int64_t pixel = 0; pixel < pixels(); ++pixel)
                add_value(item, c, pixel, w,
                          training(image, c, int(pixel / problem.width), int(pixel % problem.width)));
    }

    double& value(double* of, int item, int c, int64_t pixel) const {
        return of[(int64_t(item) * problem.channels + c) * pixels() + pixel];
    }

    // e^(l - m). The reference m is the largest log-weight so far; sums are rescaled when it changes.
    double weight(double distance, int item, int64_t at) const {
        const double l = -distance / (2 * problem.sigma[item] * problem.sigma[item]);
        if (l > competition.m[at]) {
            const double factor = std::exp(competition.m[at] - l);
            if (competition.moments() && competition.s[at] > 0)
                competition.sl[at] = factor * (competition.sl[at] + (competition.m[at] - l) * competition.s[at]);
            competition.m[at] = l, competition.s[at] *= factor, competition.s2[at] *= factor * factor;
            const bool by_images = competition.patch_size == 0;
            for (int c = 0; c < problem.channels; ++c)
                for (int64_t pixel = by_images ? 0 : at % pixels(); pixel < (by_images ? pixels() : at % pixels() + 1);
                     ++pixel) {
                    value(competition.v, item, c, pixel) *= factor;
                    if (competition.moments()) value(competition.v2, item, c, pixel) *= factor;
                }
        }
        const double w = std::exp(l - competition.m[at]);
        competition.s[at] += w, competition.s2[at] += w * w;
        if (competition.moments()) competition.sl[at] += w * (l - competition.m[at]);
        return w;
    }
};

}  // namespace patchscore

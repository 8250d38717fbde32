// The sums of the posterior variance and the entropy beyond those of the mean, and their errors: see naive.py.
//
// Values u are about a centre near the posterior mean, so that a variance far below its square keeps its digits in
// float; q = u^2, and x is the log2 of a weight over that of the reference.
#pragma once

#include <algorithm>
#include <cmath>

#include "pruned.h"

namespace patchscore {

namespace {

constexpr double LN2 = 0.693147180559945309;

template <int MOST>
struct VisitedMoments {  // sums over the windows of a visit
    float wu[MOST], wq[MOST], wx;
    float w2u[MOST], w2q[MOST], w2uq[MOST], w2qq[MOST], w2x, w2x2;
};

template <int MOST>
struct TotalsOf {  // of w u, w q, w x
    double u[MOST], q[MOST], x;

    void add(double times, const TotalsOf& of, int channels) {
        for (int c = 0; c < channels; ++c) u[c] += times * of.u[c], q[c] += times * of.q[c];
        x += times * of.x;
    }
};

template <int MOST>
struct ProductsOf {  // second moments of totals, w that of the weights
    double uw[MOST], uu[MOST], qw[MOST], qu[MOST], qq[MOST], xw, xx;

    void add(double times, const ProductsOf& of, int channels) {
        for (int c = 0; c < channels; ++c) {
            uw[c] += times * of.uw[c], uu[c] += times * of.uu[c], qw[c] += times * of.qw[c];
            qu[c] += times * of.qu[c], qq[c] += times * of.qq[c];
        }
        xw += times * of.xw, xx += times * of.xx;
    }

    // The outer product of (w, totals) with itself.
    void add_outer(double times, double w, const TotalsOf<MOST>& of, int channels) {
        for (int c = 0; c < channels; ++c) {
            uw[c] += times * of.u[c] * w, uu[c] += times * of.u[c] * of.u[c], qw[c] += times * of.q[c] * w;
            qu[c] += times * of.q[c] * of.u[c], qq[c] += times * of.q[c] * of.q[c];
        }
        xw += times * of.x * w, xx += times * of.x * of.x;
    }
};

// What a query has added up over the cells of one part.
template <int MOST>
struct MomentSumsOf {
    using Totals = TotalsOf<MOST>;
    using Products = ProductsOf<MOST>;

    Totals all{}, hits{};
    Products within{}, of_hits{};  // covariance in certainty strata; raw second moments of the others' totals
    Totals heavy[TRIMMED];         // weighted means of the visits in SumsOf::heavy

    // As SumsOf::heavy has put a visit at `at` among the first `count`.
    void take(int at, int count, const Totals& mean) {
        for (int i = count - 1; i > at; --i) heavy[i] = heavy[i - 1];
        heavy[at] = mean;
    }

    void add(const MomentSumsOf& from, int channels) {
        all.add(1, from.all, channels), hits.add(1, from.hits, channels);
        within.add(1, from.within, channels), of_hits.add(1, from.of_hits, channels);
    }

    // A visit of n windows with weights w, by the factor they are expanded by; it is a hit, or `a` takes what is
    // squared in the sample to the variance of the stratum's total.
    void enter(double w, const VisitedMoments<MOST>& lanes, double factor, bool hit, double a, double n, int channels) {
        const Totals visit = totals_of(lanes, channels);
        all.add(factor, visit, channels);
        if (hit) {
            hits.add(factor, visit, channels);
            of_hits.add_outer(factor * factor, w, visit, channels);
            return;
        }
        Products squares{};
        for (int c = 0; c < channels; ++c) {
            squares.uw[c] = lanes.w2u[c], squares.uu[c] = squares.qw[c] = lanes.w2q[c];
            squares.qu[c] = lanes.w2uq[c], squares.qq[c] = lanes.w2qq[c];
        }
        squares.xw = lanes.w2x, squares.xx = lanes.w2x2;
        within.add(a, squares, channels);
        within.add_outer(-a / n, w, visit, channels);
    }

    static Totals totals_of(const VisitedMoments<MOST>& lanes, int channels) {
        Totals visit{};
        for (int c = 0; c < channels; ++c) visit.u[c] = lanes.wu[c], visit.q[c] = lanes.wq[c];
        visit.x = lanes.wx;
        return visit;
    }

    // Covariance of the totals, with the strata that were visited by chance (see Scan::finish).
    Products covariance(double y, double spread, double mean, int channels) const {
        Products found = within;
        found.add(spread, of_hits, channels);
        found.add_outer(-spread * mean, y, hits, channels);
        return found;
    }
};

// Expected variances of a stratum's totals, `a` times the means over its windows; values are normal within it.
// [2 channels] v^3, v^4; then the log-weight (nats) and its square, each window as likely as its squared weight: the
// slope and curvature at t = 2 of log E[w^t], taken for a parabola.
void add_expected(double a, const float* value, const float* square, int channels, double first, double second,
                  double windows, double* to) {
    for (int c = 0; c < channels; ++c) {
        const double mean = value[c], spread = std::max(0.0, double(square[c]) - mean * mean);
        to[c] += a * mean * (mean * mean + 3 * spread);
        to[channels + c] += a * (mean * mean * (mean * mean + 6 * spread) + 3 * spread * spread);
    }
    const double twice = std::min(second, 2 * first + std::log2(std::max(1.0, windows)));
    const double log = LN2 * (1.5 * twice - 2 * first);
    to[2 * channels] += a * log;
    to[2 * channels + 1] += a * (log * log + LN2 * std::max(0.0, twice - 2 * first));
}

// The posterior variance of a channel with its sampling variance times s^2, from totals about the centre.
struct VarianceOf {
    double variance, observed;

    template <int MOST>
    VarianceOf(double s, double ss, const TotalsOf<MOST>& total, const ProductsOf<MOST>& covariance, int c) {
        const double mean = total.u[c] / s;
        variance = std::max(0.0, total.q[c] / s - mean * mean);
        // s times the derivatives by the totals of w and w u; that by the total of w q is 1.
        const double by_w = mean * mean - variance, by_u = -2 * mean;
        observed = by_w * by_w * ss + by_u * by_u * covariance.uu[c] + covariance.qq[c] +
                   2 * (by_w * by_u * covariance.uw[c] + by_w * covariance.qw[c] + by_u * covariance.qu[c]);
    }

    // The expected variance, from `a` (weights), `first` and `second` (values) and the sums of add_expected.
    double expected(double mean, double a, double first, double second, double third, double fourth) const {
        const double about2 = second - 2 * mean * first + mean * mean * a;
        const double about4 = fourth + mean * (-4 * third + mean * (6 * second + mean * (-4 * first + mean * a)));
        return about4 - 2 * variance * about2 + variance * variance * a;
    }
};

}  // namespace

}  // namespace patchscore

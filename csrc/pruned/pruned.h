// The border between Python and the engine `pruned`: plain pointers and sizes.
//
// The definition is patchscore/engines/pruned/naive.py; words and constants are those of policy.py beside it.
#pragma once

#include <cstdint>
#include <string>

#include "../sliding/sliding.h"

namespace patchscore {

constexpr int SIBLINGS = 16;  // strata whose moments are computed together; cells under one parent
constexpr int TILE = 8;       // windows side by side: the sampling unit
constexpr int MOST_CHANNELS = 16;
constexpr int MOST_KNOWN = 16;
constexpr int MOST_PILOT_CELLS = 256;
constexpr int TRIMMED = 8;  // windows of a query whose weights may be trimmed

struct Policy {
    double certain_from;   // sampling fraction from which a stratum is evaluated whole
    double prior_degrees;  // weight of the expected variance relative to the observed one, in degrees of freedom
    double trimming;       // p: an expanded weight is at most n^-p of the sum, of n windows evaluated
    double misfit;         // difference of expected and estimated log2 sums from which a sample is rejected
    double unknown;        // standard error from which a sample is rejected
    double further;        // factor on the budget of such a query
    double opened_from;    // expected tiles of a parent from which its cells are planned one by one
    double pilot;          // share of a budget that the search for heavy windows takes
    int pilot_cells;       // in which it looks, at most, at most MOST_PILOT_CELLS
    int sweeps;            // over the pixels, of neighbours proposing the windows they know
    int known;             // heavy windows of each query that are certainty units, at most MOST_KNOWN
};

// A table of moments: [groups][2][columns][SIBLINGS]; log2 E[w^t] is column 2 rank + 1, plus that before it times the
// residual norm, plus linear and quadratic terms of the features (columns rank + j and j).
struct Strata {
    int64_t count;  // strata; whole groups of SIBLINGS, those beyond hold nothing
    const float* table;
    const float* sizes;                 // [count] competing windows
    const float *value, *value_square;  // [count, channels] means over the stratum's windows
};

struct Images {
    const void* pixels;  // [count, channels, height, width], bytes or floats
    bool floats;
    int64_t count;
    int channels, height, width, patch_size;
    int rows() const { return height - patch_size + 1; }
    int cols() const { return width - patch_size + 1; }
    int values() const { return channels * patch_size * patch_size; }
    int pairs() const { return (values() + 1) / 2; }  // of values, one step of a comparison
    int64_t tile_values() const { return int64_t(pairs()) * 2 * TILE; }
};

// Queries of one noisy image at one noise level.
struct Request {
    Images images;
    int64_t cells;  // whole parents of SIBLINGS
    int rank;
    const int64_t* sizes;    // [cells] stored windows
    const int64_t* ids;      // [windows] image * rows * cols + row * cols + col, cell by cell
    const void* tiles;       // the windows, cell by cell: int8 bytes less 128 in tiles [pairs][TILE][2], or floats in
                             // tiles [2 pairs][TILE]; null reads images
    const uint8_t* allowed;  // [images] which compete, null for all
    Strata parents, children;

    int queries;
    int columns;            // of the grid of pixels that the queries are; 0 if they are none
    const float* features;  // [queries, rank]
    const float* rest;      // [queries] squared norm beyond the axes
    const void* windows;    // [queries, 2 pairs] of bytes: int16, in units of a byte, less 128, times 2^(1 + shift);
                            // of floats: float
    const int32_t* shift;   // [queries] 0 of floats
    const double* bits;     // [queries] log2 of the weight for each unit of the score: of bytes dot - 2^shift |p|^2, of
                            // floats -|q - p|^2
    const double* base;     // [queries] subtracted from that
    double budget;          // windows a query
    double largest_budget;  // up to which that of a query grows whose sample is rejected
    double least;           // log2 of the weight of its heaviest known window below which a query is not sampled
    bool whole;             // evaluate every window, whatever the budget
    uint64_t key;           // of the random draws
    int64_t* remembered;    // [queries, MOST_KNOWN] known windows, or -1: those of an earlier call, replaced; or null
    Policy policy;

    double *m, *s, *s2, *v;  // [queries], v [queries, channels]
    double *ss, *vs, *vv;    // variances and covariance of s and v
    double *v2, *sl;         // [queries, channels] and [queries], null where moments are not asked for
    double *qq, *ee;         // variances of s times the posterior variance and of s times the entropy, likewise
    uint8_t* fits;           // [queries] 0 where the sample was rejected
    int64_t* pairs;          // [queries] windows evaluated
};

// False if `poll` asked to stop.
bool pruned_scan(const Request& request, int threads, const std::string& simd, Poll poll);

// The tiles of some windows, cell by cell: sizes [cells], ids [sum of sizes]; int8 of bytes, float of floats.
void pruned_pack(const Images& images, const int64_t* ids, const int64_t* sizes, int64_t cells, void* tiles,
                 int threads);

}  // namespace patchscore

// What one call of the sliding kernel works on: one noisy image, one block of training images, one panel of pixels.
//
// A lane of a vector register is a training image, or a tile of one where they are few: a block holds as many as a
// register has lanes, pixel by pixel ([row][column][channel][lane]), so every load is aligned, every lane always holds
// a competing pair, and displacements are plain integers.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "../common/interrupt.h"
#include "diagonals.h"

namespace patchscore {

constexpr int MARGIN = NEIGHBOURS - 1;  // rows of state past either end of the queries, written but never read
constexpr int GROUP = 4;                // window columns whose weights are taken together
constexpr double FAR = 1e34;            // squared distance of a pair that does not exist
constexpr double ABSENT_PIXEL = 1e18;   // where a lane has no training pixel: squared distances pass FAR
constexpr float LARGEST_PIXEL = 1e12f;  // noisy pixels beyond would reach FAR themselves
constexpr int RISE_BITS = 16;           // a weight above 2^RISE_BITS moves the reference
constexpr int FEW_ROWS = 5;             // patch sizes whose rows are added afresh for every window
constexpr int PAIRS_A_FLUSH = 2048;     // float32 sums a lane may hold before they go to float64

constexpr double LOG2E = 1.4426950408889634;

// Largest distance of the nearest window, in bits of log-weight, for which float32 distances serve. Their rounding
// errors are 7e-8 of themselves (rms at k = 7 .. 63, by tests/attack/float32_distances.py), here 1e-4 nats.
constexpr double DISTANT_BITS = 2000;

// Bound of the rounding error of a float (unit 2^-24) or double (2^-53) distance relative to itself: each pixel's
// difference and square, k C terms a row, k rows. Pixels that were bytes are themselves rounded to half a unit, which
// matters beyond DISTANT_BITS only; there a distance d >= DISTANT_BITS / scale moves by sqrt(d C k^2) units at most.
inline double rounding_bound(double unit, int channels, int patch_size, double scale) {
    const double pixels = double(channels) * patch_size * patch_size;
    return unit * (double(channels + 1) * patch_size + 8 + std::sqrt(pixels * scale / DISTANT_BITS));
}

// A strip of query columns of one group, with the runs that serve it.
struct Panel {
    Axis rows, cols;
    std::vector<Run> runs;
    std::vector<Diagonals> diagonals;  // empty where columns are locked
    int entries;                       // windows a query meets in one training row
    int pitch;                         // vectors from one query's windows to the next's in a state row
    int64_t state_row;                 // vectors of one state row
    int slots;                         // state rows kept besides the running one
    int64_t first_query;               // where its accumulators start, in queries
    std::vector<int64_t> state_of;     // query column (from `lowest` on) -> its row in the state, in floats
    int lowest;
};

// Where a query's sums stand: s, s2, with moments sl, then each channel's v, with moments followed by its v2.
struct Parts {
    int channels;
    bool moments;
    int count() const { return 2 + channels + (moments ? 1 + channels : 0); }
    int value(int channel) const { return moments ? 3 + 2 * channel : 2 + channel; }
};

template <typename Real>
struct Task {
    int channels, height, width, patch_size;  // of the noisy image
    bool moments;
    int image_height, image_width;  // of training images
    bool circular;
    // The noisy image: rows of columns -q_margin .. width + q_margin, channels innermost, then one row of zeros.
    const Real* q;
    int q_margin, q_pitch;  // columns; numbers from row to row
    // The block: [image_height][image_width][channels][lanes], then one row of zeros.
    const Real* p;
    int present;           // lanes that hold training images
    bool pixels_of_bytes;  // training pixels are multiples of 1 / 127.5, rounded
    bool pixels_absent;    // images are tiles, some of whose pixels may be ABSENT_PIXEL
    // Log-weights in bits: l = (reference - distance^2) * scale, scale = log2(e) / (2 sigma^2).
    Real scale;
    Real negligible;    // of reference - distance^2: below it all pairs together round away
    double rounding;    // bound of a distance's rounding error, relative to itself
    double* reference;  // [height * width] a squared distance near the least one met
    double* sums;       // [height * width][parts]; sl = sum w (reference - distance^2)
    int* exact_left;    // [height * width] distances that may still be computed exactly; below 0: sums are invalid
    Real* lanes;        // [queries][parts][lanes]: not yet flushed; with moments, values are relative to `centre_of`
    bool flush_at_end;
    Real* state;    // [1 + slots][state_row][lanes]
    Real* scratch;  // [patch_size + 1][NEIGHBOURS][lanes], or a padded row for locked columns
    Interrupt* interrupt;
    bool calling_thread;

    Parts parts() const { return {channels, moments}; }
};

// A product with the Jacobian of the task's posterior mean, or with its transpose.
template <typename Real>
struct Product {
    bool transposed;
    const Real* evidence;          // [height * width] a squared distance: w = 2^((evidence - distance^2) scale), sum 1
    const Real* direction;         // transposed: [height * width][channels] u
    const Real* padded_direction;  // else: t, laid out as q
    const Real* mean;              // else: [height * width][channels] D
    const Real* along_mean;        // [height * width] transposed: u.D; else t.q, summed over the query's window
    Real*
        lanes;   // [height * width][1 + channels][lanes] transposed: the sums of c and of x c; else w (x - D) t.(p - q)
    Real* ring;  // transposed: [patch_size][product_row][lanes] c of the last rows ..
    Real* running;  // .. [product_row][lanes] and their sum
    bool* nothing;  // [patch_size][queries][groups of windows] where the ring is zero
    Real* boxes;    // else: [windows of a run][state_row][lanes]
};

// Vectors of c from one query to the next, with room for diagonals that begin before the first window or end after the
// last, and of a row of queries.
inline int64_t product_pitch(const Panel& panel) {
    return panel.cols.locked ? 1 : (panel.entries + GROUP - 1) / GROUP * GROUP + 2 * NEIGHBOURS;
}
inline int64_t product_row(const Panel& panel) { return panel.cols.queries() * product_pitch(panel); }

struct Span {
    int begin, end;
};

// The bank as blocks are packed from it, and which of its pixels are read.
struct Images {
    const void* data;
    int pixel_bytes;  // 1: bytes, 4: float, 8: double
    const int64_t* indices;
    int channels, height, width;
    const double* value_of_byte;  // [256]
    const std::vector<Span>& pixels;
    bool turned = false;  // height and width are those of the images with rows for columns
    int64_t index(int64_t i) const { return indices ? indices[i] : i; }
};

// One noisy image against `count` whole training images.
struct WholeTask {
    int64_t pixels, padded;  // channels * height * width, and rounded up to whole vectors
    const double* q;         // [padded]
    const double* p;         // [count][padded]
    int count;
    double scale;                  // 1 / (2 sigma^2)
    double* distances;             // [count]
    double *nearest, *s, *s2, *v;  // results: scalars, v [padded]
    double *sl, *v2;               // sum w (nearest - distance^2) and [padded], or null
};

// The window kernel in one precision: images start .. start + count as one block; a panel of it.
template <typename Real>
struct Kernel {
    int lanes;
    void (*pack)(const Images&, int64_t start, int count, Real* block);
    void (*panel)(const Task<Real>&, const Panel&);
    void (*product)(const Task<Real>&, const Product<Real>&, const Panel&);
};

struct Level {
    const char* name;
    Kernel<float> single;
    Kernel<double> exact;
    void (*whole)(const WholeTask&);
};

}  // namespace patchscore

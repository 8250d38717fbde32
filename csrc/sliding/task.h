// What one call of the sliding kernel works on: one noisy image, one block of training images, one panel of pixels.
//
// A lane of a vector register is a training image: a block holds as many images as a register has lanes, pixel by pixel
// ([row][column][channel][lane]), so every load is aligned, every lane always holds a competing pair, and displacements
// are plain integers.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/interrupt.h"
#include "diagonals.h"

namespace patchscore {

constexpr int MARGIN = NEIGHBOURS - 1;  // rows of state past either end of the queries, written but never read
constexpr int GROUP = 4;                // window columns whose weights are taken together
constexpr float FAR = 1e30f;            // squared distance of a pair that does not exist
constexpr float ABSENT_PIXEL = 1e15f;   // pixel of a lane without an image: its squared distance passes FAR
constexpr float LARGEST_PIXEL = 1e12f;  // noisy pixels beyond would reach FAR themselves
constexpr int RISE_BITS = 16;           // a weight above 2^RISE_BITS moves the reference
constexpr int FEW_ROWS = 5;             // patch sizes whose rows are added afresh for every window
constexpr float DISTANT_BITS = 2000;    // a nearest window beyond is summed from exact distances ..
constexpr int FEW = 8;                  // .. unless more than so many of a group matter
constexpr int PAIRS_A_FLUSH = 2048;     // float32 sums a lane may hold before they go to float64

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

struct Task {
    int channels, height, width, patch_size;
    bool circular;
    // The noisy image: rows of columns -q_margin .. width + q_margin, channels innermost, then one row of zeros.
    const float* q;
    int q_margin, q_pitch;  // columns; floats from row to row
    // The block: [height][width][channels][lanes], then one row of zeros.
    const float* p;
    // Log-weights in bits: l = (reference - distance^2) * scale, scale = log2(e) / (2 sigma^2).
    float scale;
    float negligible;   // of reference - distance^2: below it all pairs together round away
    double* reference;  // [height * width] a squared distance near the least one met
    double* sums;       // [height * width][2 + channels]: s, s2, v
    float* lanes;       // [queries][2 + channels][lanes]: the same, not yet flushed
    bool flush_at_end;
    float* state;    // [1 + slots][state_row][lanes]
    float* scratch;  // [patch_size + 1][NEIGHBOURS][lanes], or a padded row for locked columns
    Interrupt* interrupt;
    bool calling_thread;
};

struct Span {
    int begin, end;
};

// Images start .. start + count as one block, of which only some pixels are read.
struct Images {
    const void* data;
    bool bytes;
    const int64_t* indices;
    int channels, height, width;
    const float* value_of_byte;  // [256]
    const std::vector<Span>& pixels;
    int64_t index(int64_t i) const { return indices ? indices[i] : i; }
};

// One noisy image against `count` whole training images.
struct WholeTask {
    int64_t pixels, padded;  // channels * height * width, and rounded up to whole vectors
    const float* q;          // [padded]
    const float* p;          // [count][padded]
    int count;
    double scale;            // 1 / (2 sigma^2)
    double* logits;          // [count]
    float* weights;          // [count]
    double *m, *s, *s2, *v;  // results: scalars, v [pixels]
};

struct Level {
    const char* name;
    int lanes;
    void (*pack)(const Images&, int64_t start, int count, float* block);
    void (*panel)(const Task&, const Panel&);
    void (*whole)(const WholeTask&);
};

}  // namespace patchscore

// The border between Python and the pruned engine: plain pointers and sizes.
//
// Windows lie in cells (the inverted lists of a FAISS index), in random order inside each. A query scans a share of
// every cell, chosen from the weight that the cell's moments let expect; what it scans stands for what it does not.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../sliding/sliding.h"

namespace patchscore {

constexpr int SIBLINGS = 16;    // cells that divide one parent

struct Lists {
    int64_t cells;              // whole families of SIBLINGS
    int rank;                   // of the stored features
    const uint8_t* data;        // per cell its windows: `rank` half floats each, then their ids (int64)
    const int64_t* offsets;     // [cells] where a cell starts in `data`
    const int64_t* sizes;       // [cells] windows stored in a cell
    const int64_t* starts;      // [cells] where a cell starts in `values` and `counts`
    const void* values;         // [windows, channels] centre pixels, bytes or float
    bool values_are_bytes;
    const uint16_t* counts;     // [windows] how many equal windows one stands for, as a number of `repeats`; or null
    const float* repeats;       // [65536]
    const uint8_t* allowed;     // [images] which images compete, or null for all
    const float* competing;     // [cells] how many stored windows compete
    const float *mean, *variance;  // of the features: axis d of cell c at [d * pitch + c]
    int64_t pitch;
    const float *parent_mean, *parent_variance;  // the same of each SIBLINGS cells together: [d * pitch / SIBLINGS + p]
    const float* log_repeats;   // [cells] log of how many windows one stored window stands for, on average
    const float* moments;       // [cells, 2 channels] mean of the values, mean of their squares
    // Which pixel a window is centred at: id = image * rows * cols + (row - row0) * cols + (col - col0).
    int row0, col0, rows, cols;
};

// Queries of one region at one noise level.
struct Scan {
    Lists lists;
    int queries, channels, height, width, patch_size;
    double sigma;               // that the scan weighs by
    double exact_sigma;         // that the recheck weighs by, no larger
    int used_rank;              // leading axes that are compared
    int foreseen_rank;          // leading axes by which the weights of cells are foreseen, no more
    const float *axes, *centre; // [channels patch_size^2, rank] and its rows: features are (window - centre) axes
    const float* z;             // [items, channels, height + 2 r, width + 2 r] noisy images, continued beyond the border
    const int64_t *items, *numbers;  // [queries] the image and the pixel of a query: its number, which random draws
    int row0, col0, cols;            // follow, is (row - row0) * cols + col - col0
    const void* images;         // [images, channels, height, width]
    bool images_are_bytes;
    int64_t image_count;
    double budget, floor;       // shares of the competing windows: to scan in all, and of any cell at least
    int recheck;                // how many windows a query compares again, pixel by pixel
    uint64_t seed;
    // Results. Log-weights are natural logs of exp(-|q - p|^2 / (2 sigma^2)) of whole windows.
    double *m, *s, *s2, *v;     // [queries], v [queries, channels]
    double *vv, *vs, *ss;       // sampling covariance of v and s, relative to e^(2m): [queries, channels], .., [queries]
    int64_t* pairs;             // [1] windows scanned
};

// False if `poll` asked to stop.
bool scan_lists(const std::vector<Scan>& scans, int threads, const std::string& simd, Poll poll);

}  // namespace patchscore

// The border between Python and the sliding-window engine: plain pointers and sizes, no tensors.
//
// A Problem says which noisy images meet which training images and which windows compete, at one patch size or several;
// `sliding_posterior_sums` fills in the posterior sums. Coordinates and groups mean what patchscore/windows.py says.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../common/interrupt.h"

namespace patchscore {

// One axis of a group: query coordinates [q0, q1) against window centres [w0, w1), or each against itself (locked).
struct Axis {
    int q0, q1, w0, w1;
    bool locked;
    int queries() const { return q1 - q0; }
    int windows() const { return w1 - w0; }  // for a locked axis w0, w1 repeat q0, q1
    int competing() const { return locked ? 1 : windows(); }
};

struct Group {
    Axis rows, cols;
};

// Which windows compete, and their sums.
struct Competition {
    int patch_size;  // odd, or 0 for whole images
    bool circular;   // z wraps around its border; otherwise zeros lie beyond
    std::vector<Group> groups;
    double *m, *s, *s2;  // [batch, height, width], or [batch] for whole images; preset to -inf, 0, 0
    double* v;           // [batch, channels, height, width], preset to 0
    // Second moments and sums of w l, for variance and entropy: as v and as s; both null if not asked for.
    double *v2 = nullptr, *sl = nullptr;
    bool moments() const { return v2 != nullptr; }
};

struct Problem {
    int batch, channels, height, width;
    const float* z;       // [batch, channels, height, width]
    const double* sigma;  // [batch]
    const void* images;   // [.., channels, height, width], bytes (v = u / 127.5 - 1) or float
    bool images_are_bytes;
    const int64_t* indices;  // [count] positions in `images`, or null for 0 .. count - 1
    int64_t count;
    std::vector<Competition> competitions;
    int threads;
    int64_t memory_limit;  // bytes beyond z, the bank and the result
};

// A product with the Jacobian J of the posterior mean D of the one competition of a problem, by windows; or, by the
// same sums with w in the place of c, the sum of the posterior-mean windows that cover a pixel.
struct JacobianProduct {
    bool transposed;         // J^T direction, else J direction
    bool averaging;          // with transposed, a direction of zeros: the sum of windows
    const double* evidence;  // [batch, height, width] ln sum e^l, as the posterior sums say
    const double* mean;      // [batch, channels, height, width] D
    const float* direction;  // [batch, channels, height, width]
    double* result;          // [batch, channels, height, width], preset to 0
};

// False if `poll` asked to stop; the result is then incomplete. Throws std::invalid_argument where the problem or the
// instruction set named by `simd` ("" takes the widest) cannot be served.
bool sliding_posterior_sums(const Problem& problem, const std::string& simd, Poll poll);

// The same for a product; the sums of the competition are not touched.
bool sliding_product(const Problem& problem, const JacobianProduct& product, const std::string& simd, Poll poll);

// Instruction sets that this build and this machine have, the widest first.
std::vector<std::string> simd_levels();

}  // namespace patchscore

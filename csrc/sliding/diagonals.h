// Which displacements a competition visits, and along which stretch: the indexing shared by all sliding kernels.
//
// On a free axis a pair (query coordinate i, window centre a) lies on the diagonal a - i. Window distances are sums
// over k consecutive steps of one diagonal, so an axis is a list of runs: stretches of diagonals that both move along.
#pragma once

#include <algorithm>
#include <vector>

#include "sliding.h"

namespace patchscore {

// `length` pairs (query + t, window + t), t = 0, 1, ...; where the image wraps, the query counts modulo its size.
struct Run {
    int query, window, length;
};

// Every query of a circular axis competes: each diagonal wraps around and meets all the windows.
inline bool wraps(const Axis& axis, int size, bool circular) {
    return circular && !axis.locked && axis.q0 == 0 && axis.q1 == size;
}

inline std::vector<Run> runs_of(const Axis& axis, int size, bool circular) {
    if (axis.locked) return {{axis.q0, axis.q0, axis.queries()}};
    std::vector<Run> runs;
    if (wraps(axis, size, circular)) {
        for (int d = 0; d < size; ++d) runs.push_back({(axis.w0 - d + size) % size, axis.w0, axis.windows()});
        return runs;
    }
    for (int d = axis.w0 - (axis.q1 - 1); d <= axis.w1 - 1 - axis.q0; ++d) {
        int first = std::max(axis.w0, axis.q0 + d), last = std::min(axis.w1, axis.q1 + d);
        runs.push_back({first - d, first, last - first});
    }
    return runs;
}

// `count` neighbouring column displacements d, d + 1, .., walked together over window centres [first, last).
struct Diagonals {
    int displacement, count, first, last;
};

constexpr int NEIGHBOURS = 4;

// Where diagonals have ends, neighbours share the longest stretch any of them needs and run up to NEIGHBOURS - 1
// queries past their own ends: those results land in margin rows that nobody reads.
inline std::vector<Diagonals> diagonals_of(const Axis& axis, int size, bool circular) {
    std::vector<Diagonals> all;
    if (axis.locked) return all;
    if (wraps(axis, size, circular)) {
        int d = 0;
        for (; d + NEIGHBOURS <= size; d += NEIGHBOURS) all.push_back({d, NEIGHBOURS, axis.w0, axis.w1});
        for (; d < size; ++d) all.push_back({d, 1, axis.w0, axis.w1});
        return all;
    }
    for (int d = axis.w0 - (axis.q1 - 1); d <= axis.w1 - 1 - axis.q0; d += NEIGHBOURS) {
        int first = std::max(axis.w0, axis.q0 + d), last = std::min(axis.w1, axis.q1 + d + NEIGHBOURS - 1);
        all.push_back({d, NEIGHBOURS, first, last});
    }
    return all;
}

}  // namespace patchscore

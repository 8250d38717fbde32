// Tiles of training images, where images are too few to fill the lanes of a register.
//
// The windows of one image are dealt out to tiles, rectangles of neighbouring centres. A tile with the pixels its
// windows reach is an image of its own, which overlaps its neighbours by k - 1 pixels; the kernel sees a bank of those.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "plan.h"

namespace patchscore {

// How the windows of a group are dealt out: tiles down and across an image, of high x wide windows.
struct Tiling {
    int down = 1, across = 1, high, wide;
    int tiles() const { return down * across; }
};

// The tiling of least estimated cost. A window costs about two steps along a diagonal, and a tile takes k - 1 more
// steps on an axis than it has windows. A block with idle lanes costs as much as a full one. Threads share the blocks,
// so a quarter of a block is added, which favours many small ones.
inline Tiling choose_tiling(const Group& group, int patch_size, int64_t images, int lanes) {
    const int rows = group.rows.windows(), cols = group.cols.windows();
    Tiling best{1, 1, rows, cols};
    if (group.rows.locked || group.cols.locked || images >= lanes) return best;
    double least = 0;
    for (int down = 1; down <= std::min(rows, 16); down *= 2)
        for (int across = 1; across <= std::min(cols, 16); across *= 2) {
            const Tiling tiling{down, across, (rows + down - 1) / down, (cols + across - 1) / across};
            const double blocks = double((images * tiling.tiles() + lanes - 1) / lanes);
            const double steps = double(tiling.high + patch_size - 1) * (tiling.wide + patch_size - 1);
            const double cost = (blocks + 0.25) * (steps + 2.0 * tiling.high * tiling.wide);
            if (least == 0 || cost < least) least = cost, best = tiling;
        }
    return best;
}

// The tiles of all images, one after the other: [images * tiles][channels][high + k - 1][wide + k - 1]. Pixels beyond
// the last windows are ABSENT_PIXEL, so that windows that do not exist weigh nothing.
inline std::vector<double> cut_tiles(const Images& images, int64_t count, const Group& group, int patch_size,
                                     const Tiling& tiling) {
    const int r = patch_size / 2, height = tiling.high + 2 * r, width = tiling.wide + 2 * r;
    const auto pixel = [&](int64_t at) {
        return images.pixel_bytes == 1 ? images.value_of_byte[static_cast<const uint8_t*>(images.data)[at]]
                                       : double(static_cast<const float*>(images.data)[at]);
    };
    std::vector<double> all;
    all.reserve(size_t(count) * size_t(tiling.tiles()) * size_t(images.channels) * size_t(height) * size_t(width));
    for (int64_t i = 0; i < count; ++i)
        for (int tile = 0; tile < tiling.tiles(); ++tile) {
            const int top = group.rows.w0 - r + tile / tiling.across * tiling.high;
            const int left = group.cols.w0 - r + tile % tiling.across * tiling.wide;
            for (int c = 0; c < images.channels; ++c)
                for (int y = top; y < top + height; ++y)
                    for (int x = left; x < left + width; ++x) {
                        const bool present = y < group.rows.w1 + r && x < group.cols.w1 + r;
                        const int64_t row = (images.index(i) * images.channels + c) * images.height + y;
                        all.push_back(present ? pixel(row * images.width + x) : ABSENT_PIXEL);
                    }
        }
    return all;
}

}  // namespace patchscore

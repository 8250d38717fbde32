// Any bytes become calls of the C++ engines: sliding sums and products with any coordinates, noise and pixels, and
// scans of an index whose moments and stored bytes are anything, as a damaged file of an index may hold them.
//
// Whatever Python checks before the call holds here too (bindings.cpp, engines/pruned/cpu.py). Under AddressSanitizer
// and UBSan; sums of sliding must be finite. tests/fuzz/engines.sh builds this for libFuzzer; for tests/sanitize/run.sh
// (STANDALONE) the file has a main that draws bytes, or reads the files that it is given.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/pruned/pruned.h"
#include "../../csrc/sliding/sliding.h"

namespace {

using patchscore::SIBLINGS;

// Reads the input from its beginning, and again and again, so that a short one fills any array.
class Bytes {
public:
    Bytes(const uint8_t* data, size_t size) : data(data), size(size) {}

    template <typename T>
    T any() {
        T value;
        uint8_t raw[sizeof(T)];
        for (uint8_t& byte : raw) byte = next();
        std::memcpy(&value, raw, sizeof(T));
        return value;
    }

    int between(int low, int high) { return low + int(any<uint16_t>() % uint32_t(high - low + 1)); }
    bool flip() { return next() & 1; }
    float unit() { return float(any<int16_t>()) / 32768.f; }

    // A number of an ordinary size, or any bits at all.
    float wild() { return next() % 4 ? 8 * unit() : any<float>(); }

    template <typename T>
    std::vector<T> array(size_t count) {
        std::vector<T> found(count);
        for (T& value : found) value = any<T>();
        return found;
    }

private:
    uint8_t next() {
        if (at == size) at = 0, turn += 0x9d;
        return uint8_t(data[at++] + turn);
    }

    const uint8_t* data;
    size_t size, at = 0;
    uint8_t turn = 0;  // so that what is read again differs
};

const std::string& level_of(Bytes& in) {
    static const std::vector<std::string> levels = patchscore::simd_levels();
    return levels[size_t(in.between(0, int(levels.size()) - 1))];
}

void fail(const char* what) {
    std::fprintf(stderr, "%s\n", what);
    std::abort();
}

patchscore::Axis axis_of(Bytes& in, int size, int k) {
    const int r = k / 2;
    switch (in.between(0, 3)) {
        case 0:
            return {0, size, r, size - r, false};
        case 1:
            return {0, size, 0, size, true};
        case 2:
            return {in.between(-1, size), in.between(0, size + 1), 0, size, in.flip()};
        default:
            return {in.between(0, size), in.between(0, size), in.between(-1, size + 1), in.between(0, size + 1), false};
    }
}

void sliding(Bytes& in) {
    patchscore::Problem problem{};
    problem.batch = in.between(1, 2), problem.channels = in.between(1, 5);
    problem.height = in.between(1, 12), problem.width = in.between(1, 12);
    const size_t pixels = size_t(problem.height) * size_t(problem.width), values = pixels * size_t(problem.channels);
    const int64_t held = in.between(1, 20);
    problem.images_are_bytes = in.flip();
    std::vector<uint8_t> bytes;
    std::vector<float> floats;
    if (problem.images_are_bytes) {
        bytes = in.array<uint8_t>(size_t(held) * values), problem.images = bytes.data();
    } else {
        for (size_t i = 0; i < size_t(held) * values; ++i) floats.push_back(in.unit());
        problem.images = floats.data();
    }
    problem.count = held;
    std::vector<int64_t> indices;
    if (in.flip()) {
        for (int i = in.between(1, int(held)); i > 0; --i) indices.push_back(in.between(0, int(held) - 1));
        problem.indices = indices.data(), problem.count = int64_t(indices.size());
    }
    std::vector<float> z(size_t(problem.batch) * values);
    const bool tame = in.flip();
    for (float& x : z) x = tame ? 2 * in.unit() : in.wild();
    problem.z = z.data();
    std::vector<double> sigma(static_cast<size_t>(problem.batch));
    for (double& x : sigma) x = in.flip() ? std::exp2(in.between(-20, 12)) : in.any<double>();
    problem.sigma = sigma.data();
    problem.threads = in.between(1, 3), problem.memory_limit = int64_t(1) << in.between(10, 26);
    const std::string& level = level_of(in);

    struct Sums {
        std::vector<double> m, s, s2, v, v2, sl;
    };
    const bool product = in.flip();
    const int competitions = product ? 1 : in.between(1, 2);
    std::vector<Sums> sums(static_cast<size_t>(competitions));
    for (Sums& sum : sums) {
        patchscore::Competition one{};
        one.patch_size = in.between(0, 14) * 2 - 1 + in.between(0, 9) / 9;  // even in one of ten
        if (one.patch_size < 0) one.patch_size = 0;
        one.circular = in.flip();
        const bool whole = one.patch_size == 0;
        for (int g = whole ? 0 : in.between(0, 3); g > 0; --g)
            one.groups.push_back(
                {axis_of(in, problem.height, one.patch_size), axis_of(in, problem.width, one.patch_size)});
        const size_t outputs = size_t(problem.batch) * (whole ? 1 : pixels);
        sum.m.assign(outputs, -std::numeric_limits<double>::infinity());
        sum.s.assign(outputs, 0), sum.s2.assign(outputs, 0), sum.sl.assign(outputs, 0);
        sum.v.assign(size_t(problem.batch) * values, 0), sum.v2 = sum.v;
        one.m = sum.m.data(), one.s = sum.s.data(), one.s2 = sum.s2.data(), one.v = sum.v.data();
        if (in.flip()) one.v2 = sum.v2.data(), one.sl = sum.sl.data();
        problem.competitions.push_back(one);
    }
    try {
        if (!patchscore::sliding_posterior_sums(problem, level, nullptr)) fail("stopped by nobody");
        for (const Sums& sum : sums)
            for (const auto* part : {&sum.s, &sum.s2, &sum.v, &sum.v2})
                for (const double x : *part)
                    if (!std::isfinite(x)) fail("a sum of sliding is not finite");
        if (!product) return;
        Sums& sum = sums.front();
        std::vector<double> evidence(pixels * size_t(problem.batch)), result(z.size());
        if (sum.s.size() != evidence.size()) return;
        for (size_t i = 0; i < evidence.size(); ++i) evidence[i] = sum.s[i] > 0 ? sum.m[i] + std::log(sum.s[i]) : 0;
        for (size_t i = 0; i < sum.v.size(); ++i) {
            const double s = sum.s[i / values * pixels + i % pixels];
            sum.v[i] = s > 0 ? sum.v[i] / s : 0;
        }
        std::vector<float> direction(z.size());
        for (float& x : direction) x = in.unit();
        const bool transposed = in.flip(), averaging = in.flip();
        const patchscore::JacobianProduct asked = {transposed,   averaging,        evidence.data(),
                                                   sum.v.data(), direction.data(), result.data()};
        patchscore::sliding_product(problem, asked, level, nullptr);
    } catch (const std::invalid_argument&) {
        // As Python hears it.
    }
}

void pruned(Bytes& in) {
    patchscore::Request request{};
    patchscore::Images& images = request.images;
    images.floats = in.flip(), images.channels = in.between(1, patchscore::MOST_CHANNELS),
    images.patch_size = 2 * in.between(0, 4) + 1;
    images.height = images.patch_size + in.between(0, 5), images.width = images.patch_size + in.between(0, 5);
    images.count = in.between(1, 6);
    const size_t held = size_t(images.count * images.channels * images.height * images.width);
    std::vector<uint8_t> pixels;
    std::vector<float> float_pixels;
    if (images.floats) {
        for (size_t i = 0; i < held; ++i) float_pixels.push_back(in.unit());
        images.pixels = float_pixels.data();
    } else {
        pixels = in.array<uint8_t>(held), images.pixels = pixels.data();
    }
    const int parents = in.between(1, 3);
    request.cells = int64_t(parents) * SIBLINGS;
    request.rank = in.between(1, std::min(8, images.values()));
    std::vector<int64_t> sizes, ids;
    int64_t needed = 0;
    for (int64_t c = 0; c < request.cells; ++c) {
        const int size = in.between(0, 3) ? in.between(0, 9) : 0;
        for (int i = 0; i < size; ++i)
            ids.push_back(in.between(0, int(images.count) * images.rows() * images.cols() - 1));
        sizes.push_back(size), needed += (size + patchscore::TILE - 1) / patchscore::TILE;
    }
    request.sizes = sizes.data(), request.ids = ids.data();
    const size_t room = size_t(needed * images.tile_values());
    std::vector<int8_t> tiles(images.floats ? 0 : room);
    std::vector<float> float_tiles(images.floats ? room : 0);
    void* to = images.floats ? static_cast<void*>(float_tiles.data()) : static_cast<void*>(tiles.data());
    if (in.flip()) {
        patchscore::pruned_pack(images, ids.data(), sizes.data(), request.cells, to, in.between(1, 2));
        request.tiles = to;
    } else if (in.flip()) {
        for (int8_t& x : tiles) x = in.any<int8_t>();
        for (float& x : float_tiles) x = in.wild();
        request.tiles = to;
    }
    std::vector<uint8_t> allowed;
    if (in.flip()) {
        for (int64_t i = 0; i < images.count; ++i) allowed.push_back(in.flip());
        request.allowed = allowed.data();
    }

    // Moments are what a file says of the cells; how many windows compete is counted.
    std::vector<float> tables[2], competing[2], value[2], value_square[2];
    for (const int which : {0, 1}) {
        const int64_t count = which ? request.cells : parents;
        const size_t groups = size_t(count + SIBLINGS - 1) / SIBLINGS;
        for (size_t i = 0; i < groups * 2 * size_t(2 * request.rank + 2) * SIBLINGS; ++i)
            tables[which].push_back(in.wild());
        int64_t at = 0;
        for (int64_t s = 0; s < count; ++s) {
            float held = 0;
            for (int64_t c = s * (which ? 1 : SIBLINGS); c < (s + 1) * (which ? 1 : SIBLINGS); ++c)
                for (int64_t i = 0; i < sizes[size_t(c)]; ++i) {
                    const int64_t image = ids[size_t(at++)] / (images.rows() * images.cols());
                    held += float(allowed.empty() || allowed[size_t(image)]);
                }
            competing[which].push_back(held);
        }
        for (int64_t i = 0; i < count * images.channels; ++i)
            value[which].push_back(in.wild()), value_square[which].push_back(in.wild());
    }
    const auto strata = [&](int which) {
        return patchscore::Strata{int64_t(competing[which].size()), tables[which].data(), competing[which].data(),
                                  value[which].data(), value_square[which].data()};
    };
    request.parents = strata(0), request.children = strata(1);

    const int columns = in.between(1, 5);
    request.queries = columns * in.between(1, 4), request.columns = in.flip() ? columns : 0;
    const size_t count = size_t(request.queries), width = size_t(2 * images.pairs());
    std::vector<float> features, rest;
    for (size_t i = 0; i < count * size_t(request.rank); ++i) features.push_back(in.wild());
    for (size_t i = 0; i < count; ++i) rest.push_back(in.wild());
    std::vector<int16_t> digits(images.floats ? 0 : count * width);
    std::vector<float> windows(images.floats ? count * width : 0);
    std::vector<int32_t> shift;
    std::vector<double> bits, base;
    for (size_t q = 0; q < count; ++q) {
        bits.push_back(std::exp2(in.between(-60, 4))), base.push_back(double(in.wild()));
        if (images.floats) {
            // None larger than engines/pruned/cpu.py lets through.
            for (int d = 0; d < images.values(); ++d)
                windows[q * width + size_t(d)] = in.unit() * (in.flip() ? 2.f : 1e12f);
            shift.push_back(0);
            continue;
        }
        // No dot product leaves 30 bits, as engines/pruned/cpu.py sees to.
        const int doublings = in.between(0, 4), values = images.values();
        const int room = (1 << 30) - (1 << doublings) * 16384 * values, most = std::min(32767, room / 128 / values - 1);
        for (int d = 0; d < values; ++d) digits[q * width + size_t(d)] = int16_t(in.any<int16_t>() % (most + 1));
        shift.push_back(doublings);
    }
    request.features = features.data(), request.rest = rest.data(), request.windows = digits.data();
    if (images.floats) request.windows = windows.data();
    request.shift = shift.data(), request.bits = bits.data(), request.base = base.data();
    request.budget = std::exp2(in.between(0, 12)), request.largest_budget = std::exp2(in.between(0, 12));
    request.least = in.flip() ? -1e9 : -10;
    request.whole = in.between(0, 5) == 0, request.key = in.any<uint64_t>();
    request.policy = {0.75,
                      10,
                      in.flip() ? 0.5 : 0,
                      7.2,
                      0.1,
                      8,
                      8,
                      0.25,
                      in.between(0, patchscore::MOST_PILOT_CELLS),
                      in.between(0, 4),
                      in.between(0, patchscore::MOST_KNOWN)};
    const size_t colours = count * size_t(images.channels);
    std::vector<double> m(count), s(count), s2(count), ss(count), v(colours), vs(colours), vv(colours);
    std::vector<uint8_t> fits(count);
    std::vector<int64_t> pairs(count);
    request.m = m.data(), request.s = s.data(), request.s2 = s2.data(), request.v = v.data(), request.ss = ss.data();
    request.vs = vs.data(), request.vv = vv.data(), request.fits = fits.data(), request.pairs = pairs.data();
    std::vector<double> v2(colours), sl(count), qq(colours), ee(count);
    if (in.flip()) request.v2 = v2.data(), request.sl = sl.data(), request.qq = qq.data(), request.ee = ee.data();
    if (!patchscore::pruned_scan(request, in.between(1, 3), level_of(in), nullptr)) fail("stopped by nobody");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size < 8) return 0;
    Bytes in(data, size);
    in.flip() ? sliding(in) : pruned(in);
    return 0;
}

#ifdef STANDALONE
int main(int count, char** words) {
    const int drawn = count == 2 ? std::atoi(words[1]) : 0;
    for (int i = 1; !drawn && i < count; ++i) {
        std::FILE* file = std::fopen(words[i], "rb");
        if (!file) return std::perror(words[i]), 1;
        std::vector<uint8_t> data(1 << 20);
        data.resize(std::fread(data.data(), 1, data.size(), file));
        std::fclose(file);
        LLVMFuzzerTestOneInput(data.data(), data.size());
    }
    uint64_t state = 1;
    for (int i = 0; i < drawn; ++i) {
        std::vector<uint8_t> data(64 + size_t(i % 200));
        for (uint8_t& byte : data)
            state = state * 6364136223846793005u + 1442695040888963407u, byte = uint8_t(state >> 56);
        LLVMFuzzerTestOneInput(data.data(), data.size());
    }
    std::printf("%d inputs, no complaint\n", drawn ? drawn : count - 1);
}
#endif

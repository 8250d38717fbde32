// Python module patchscore._native: checks what buffers hold, then hands pointers and sizes to the engines.
//
// Everything arrives through the buffer protocol, so nothing of torch or numpy is included or linked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <limits>
#include <list>
#include <optional>
#include <tuple>

#include "pruned/pruned.h"
#include "sliding/sliding.h"

namespace py = pybind11;

namespace {

std::string shape_text(const std::vector<py::ssize_t>& shape) {
    std::string text = "[";
    for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

// The data of a contiguous, aligned array of type T; ValueError, naming the argument, for anything else.
template <typename T>
T* data_of(const char* name, const py::buffer_info& info, const std::vector<py::ssize_t>& shape, bool writable) {
    const std::string got = std::string(name) + ": got ";
    if (info.itemsize != sizeof(T) || !info.item_type_is_equivalent_to<T>())
        throw py::value_error(got + "buffer format \"" + info.format + "\", takes \"" +
                              py::format_descriptor<T>::format() + "\"");
    if (info.shape != shape)
        throw py::value_error(got + "shape " + shape_text(info.shape) + ", takes " + shape_text(shape));
    py::ssize_t stride = sizeof(T);
    for (size_t i = shape.size(); i-- > 0; stride *= shape[i])
        if (shape[i] > 1 && info.strides[i] != stride)
            throw py::value_error(got + "a strided array, takes a contiguous one");
    if (reinterpret_cast<uintptr_t>(info.ptr) % alignof(T)) throw py::value_error(got + "unaligned memory");
    if (writable && info.readonly) throw py::value_error(got + "read-only memory");
    return static_cast<T*>(info.ptr);
}

int size_of(const char* name, py::ssize_t size) {
    if (size < 1 || size > 1 << 24)
        throw py::value_error(std::string(name) + ": got a size of " + std::to_string(size));
    return int(size);
}

patchscore::Axis axis_of(const int64_t* four) {
    for (int i = 0; i < 4; ++i)
        if (four[i] < -1 || four[i] > 1 << 24)
            throw py::value_error("groups: got a coordinate of " + std::to_string(four[i]));
    const int q0 = int(four[0]), q1 = int(four[1]);
    const bool locked = four[2] < 0;
    return {q0, q1, locked ? q0 : int(four[2]), locked ? q1 : int(four[3]), locked};
}

bool interrupted() {
    const py::gil_scoped_acquire gil;
    return PyErr_CheckSignals() != 0;
}

// patch_size, circular, groups, and m, s, s2, v and, where moments are asked for, v2, sl to add to.
using CompetitionArguments = std::tuple<int, bool, py::buffer, py::buffer, py::buffer, py::buffer, py::buffer,
                                        std::optional<py::buffer>, std::optional<py::buffer>>;

// Which windows compete, without sums.
patchscore::Competition rule_of(int patch_size, bool circular, const py::buffer& groups) {
    if (patch_size < 0) throw py::value_error("patch_size: got " + std::to_string(patch_size));
    patchscore::Competition competition{};
    competition.patch_size = patch_size, competition.circular = circular;
    const py::buffer_info groups_info = groups.request();
    if (groups_info.ndim != 2)
        throw py::value_error("groups: got shape " + shape_text(groups_info.shape) + ", takes [G, 8]");
    const int64_t* group = data_of<int64_t>("groups", groups_info, {groups_info.shape[0], 8}, false);
    for (py::ssize_t g = 0; g < groups_info.shape[0]; ++g, group += 8)
        competition.groups.push_back({axis_of(group), axis_of(group + 4)});
    return competition;
}

patchscore::Competition competition_of(const CompetitionArguments& arguments, const std::vector<py::ssize_t>& shape) {
    const auto& [patch_size, circular, groups, m, s, s2, v, v2, sl] = arguments;
    patchscore::Competition competition = rule_of(patch_size, circular, groups);
    const bool whole = patch_size == 0;
    const std::vector<py::ssize_t> one = {shape[0], 1, whole ? 1 : shape[2], whole ? 1 : shape[3]};
    competition.m = data_of<double>("m", m.request(true), one, true);
    competition.s = data_of<double>("s", s.request(true), one, true);
    competition.s2 = data_of<double>("s2", s2.request(true), one, true);
    competition.v = data_of<double>("v", v.request(true), shape, true);
    if (v2.has_value() != sl.has_value()) throw py::value_error("v2, sl: takes both or none");
    if (v2) competition.v2 = data_of<double>("v2", v2->request(true), shape, true);
    if (sl) competition.sl = data_of<double>("sl", sl->request(true), one, true);
    return competition;
}

// Images and noise levels; the buffers are held by the caller.
patchscore::Problem problem_of(const py::buffer& z, const py::buffer& sigma, const py::buffer& images,
                               const std::optional<py::buffer>& indices, int threads, int64_t memory_limit) {
    const py::buffer_info z_info = z.request(), images_info = images.request(), sigma_info = sigma.request();
    if (z_info.ndim != 4) throw py::value_error("z: got shape " + shape_text(z_info.shape) + ", takes [B, C, H, W]");
    if (images_info.ndim != 4)
        throw py::value_error("images: got shape " + shape_text(images_info.shape) + ", takes [N, C, H, W]");
    const auto &shape = z_info.shape, &bank = images_info.shape;

    patchscore::Problem problem{};
    problem.batch = size_of("z", shape[0]), problem.channels = size_of("z", shape[1]);
    problem.height = size_of("z", shape[2]), problem.width = size_of("z", shape[3]);
    problem.z = data_of<float>("z", z_info, shape, false);
    problem.sigma = data_of<double>("sigma", sigma_info, {shape[0]}, false);
    problem.images_are_bytes = images_info.itemsize == 1;
    const std::vector<py::ssize_t> bank_shape = {bank[0], shape[1], shape[2], shape[3]};
    problem.images = problem.images_are_bytes
                         ? static_cast<const void*>(data_of<uint8_t>("images", images_info, bank_shape, false))
                         : static_cast<const void*>(data_of<float>("images", images_info, bank_shape, false));
    problem.count = bank[0];
    if (indices) {
        const py::buffer_info indices_info = indices->request();
        if (indices_info.ndim != 1) throw py::value_error("indices: takes one dimension");
        problem.count = indices_info.shape[0];
        problem.indices = data_of<int64_t>("indices", indices_info, {indices_info.shape[0]}, false);
        for (int64_t i = 0; i < problem.count; ++i)
            if (problem.indices[i] < 0 || problem.indices[i] >= bank[0])
                throw py::value_error("indices: got " + std::to_string(problem.indices[i]) + " for a bank of " +
                                      std::to_string(bank[0]) + " images");
    }
    problem.threads = threads, problem.memory_limit = memory_limit;
    return problem;
}

void sliding(const py::buffer& z, const py::buffer& sigma, const py::buffer& images,
             const std::optional<py::buffer>& indices, const std::vector<CompetitionArguments>& competitions,
             int threads, int64_t memory_limit, const std::string& simd) {
    patchscore::Problem problem = problem_of(z, sigma, images, indices, threads, memory_limit);
    const std::vector<py::ssize_t> shape = z.request().shape;
    for (const CompetitionArguments& arguments : competitions)
        problem.competitions.push_back(competition_of(arguments, shape));

    bool finished;
    {
        const py::gil_scoped_release release;
        finished = patchscore::sliding_posterior_sums(problem, simd, interrupted);
    }
    // The poll that asked to stop has left KeyboardInterrupt, or what else a signal handler raised, behind.
    if (!finished) throw py::error_already_set();
}

void sliding_product(bool transposed, bool averaging, const py::buffer& z, const py::buffer& sigma,
                     const py::buffer& images, const std::optional<py::buffer>& indices, int patch_size, bool circular,
                     const py::buffer& groups, const py::buffer& evidence, const py::buffer& mean,
                     const py::buffer& direction, const py::buffer& result, int threads, int64_t memory_limit,
                     const std::string& simd) {
    patchscore::Problem problem = problem_of(z, sigma, images, indices, threads, memory_limit);
    const std::vector<py::ssize_t> shape = z.request().shape;
    problem.competitions.push_back(rule_of(patch_size, circular, groups));
    const std::vector<py::ssize_t> one = {shape[0], 1, shape[2], shape[3]};
    const patchscore::JacobianProduct product = {transposed,
                                                 averaging,
                                                 data_of<double>("evidence", evidence.request(), one, false),
                                                 data_of<double>("mean", mean.request(), shape, false),
                                                 data_of<float>("direction", direction.request(), shape, false),
                                                 data_of<double>("result", result.request(true), shape, true)};

    bool finished;
    {
        const py::gil_scoped_release release;
        finished = patchscore::sliding_product(problem, product, simd, interrupted);
    }
    if (!finished) throw py::error_already_set();
}

patchscore::Images images_of(const py::buffer& images, int patch_size, std::list<py::buffer_info>& held) {
    const py::buffer_info& info = held.emplace_back(images.request());
    if (info.ndim != 4) throw py::value_error("images: got shape " + shape_text(info.shape) + ", takes [N, C, H, W]");
    patchscore::Images found{};
    found.floats = info.itemsize != 1;
    found.pixels = found.floats ? static_cast<const void*>(data_of<float>("images", info, info.shape, false))
                                : static_cast<const void*>(data_of<uint8_t>("images", info, info.shape, false));
    found.count = info.shape[0], found.channels = size_of("images", info.shape[1]);
    found.height = size_of("images", info.shape[2]), found.width = size_of("images", info.shape[3]);
    found.patch_size = patch_size;
    if (found.channels > patchscore::MOST_CHANNELS)
        throw py::value_error("images: got " + std::to_string(found.channels) + " channels");
    if (patch_size < 1 || patch_size % 2 == 0 || patch_size > std::min(found.height, found.width))
        throw py::value_error("patch_size: got " + std::to_string(patch_size));
    return found;
}

// Sizes of cells, which with the ids of their windows must fit the images: [cells], [sum].
int64_t check_ids(const patchscore::Images& images, const int64_t* sizes, int64_t cells, const int64_t* ids,
                  int64_t count, bool each) {
    int64_t total = 0, tiles = 0;
    for (int64_t c = 0; c < cells; ++c) {
        if (sizes[c] < 0 || sizes[c] > INT32_MAX || sizes[c] > count - total)
            throw py::value_error("sizes: got " + std::to_string(sizes[c]) + " for cell " + std::to_string(c) + " of " +
                                  std::to_string(count) + " windows");
        total += sizes[c], tiles += (sizes[c] + patchscore::TILE - 1) / patchscore::TILE;
    }
    if (total != count)
        throw py::value_error("sizes: got a sum of " + std::to_string(total) + ", ids has " + std::to_string(count) +
                              " windows");
    const int64_t most = images.count * images.rows() * images.cols();
    for (int64_t i = 0; each && i < count; ++i)
        if (ids[i] < 0 || ids[i] >= most) throw py::value_error("ids: got " + std::to_string(ids[i]));
    return tiles;
}

void pruned_pack(const py::buffer& images, const py::buffer& ids, const py::buffer& sizes, int patch_size,
                 const py::buffer& tiles, int threads) {
    std::list<py::buffer_info> held;
    const patchscore::Images source = images_of(images, patch_size, held);
    const py::buffer_info &ids_info = held.emplace_back(ids.request()),
                          &sizes_info = held.emplace_back(sizes.request());
    if (ids_info.ndim != 1 || sizes_info.ndim != 1) throw py::value_error("ids, sizes: take one dimension");
    const int64_t* windows = data_of<int64_t>("ids", ids_info, ids_info.shape, false);
    const int64_t* counts = data_of<int64_t>("sizes", sizes_info, sizes_info.shape, false);
    const int64_t needed = check_ids(source, counts, sizes_info.shape[0], windows, ids_info.shape[0], true);
    const py::buffer_info& tiles_info = held.emplace_back(tiles.request(true));
    const std::vector<py::ssize_t> room = {needed * source.tile_values()};
    void* out = source.floats ? static_cast<void*>(data_of<float>("tiles", tiles_info, room, true))
                              : static_cast<void*>(data_of<int8_t>("tiles", tiles_info, room, true));
    const py::gil_scoped_release release;
    patchscore::pruned_pack(source, windows, counts, sizes_info.shape[0], out, threads);
}

// Tables and moments of strata: (table [groups, 2, 2 rank + 2, SIBLINGS], sizes, value, value_square).
using StrataArguments = std::tuple<py::buffer, py::buffer, py::buffer, py::buffer>;

patchscore::Strata strata_of(const char* name, const StrataArguments& given, int64_t count, int rank, int channels,
                             std::list<py::buffer_info>& held) {
    const auto& [table, sizes, value, value_square] = given;
    const int64_t groups = (count + patchscore::SIBLINGS - 1) / patchscore::SIBLINGS;
    patchscore::Strata strata{};
    strata.count = count;
    strata.table = data_of<float>(name, held.emplace_back(table.request()),
                                  {groups, 2, 2 * rank + 2, patchscore::SIBLINGS}, false);
    strata.sizes = data_of<float>(name, held.emplace_back(sizes.request()), {count}, false);
    strata.value = data_of<float>(name, held.emplace_back(value.request()), {count, channels}, false);
    strata.value_square = data_of<float>(name, held.emplace_back(value_square.request()), {count, channels}, false);
    return strata;
}

// A Policy of policy.py.
patchscore::Policy policy_of(const py::object& policy) {
    const auto number = [&](const char* name) { return policy.attr(name).cast<double>(); };
    const auto count = [&](const char* name, int most) {
        const int found = policy.attr(name).cast<int>();
        if (found < 0 || found > most)
            throw py::value_error(name + (": got " + std::to_string(found)) + ", takes 0 to " + std::to_string(most));
        return found;
    };
    const double further = number("further");
    if (!(further > 1)) throw py::value_error("further: got " + std::to_string(further) + ", takes a factor above 1");
    return {number("certain_from"),
            number("prior_degrees"),
            number("trimming"),
            number("misfit"),
            number("unknown"),
            further,
            number("opened_from"),
            number("pilot"),
            count("pilot_cells", patchscore::MOST_PILOT_CELLS),
            count("sweeps", 100),
            count("known", patchscore::MOST_KNOWN)};
}

void pruned_scan(const py::buffer& images, int patch_size, const py::buffer& sizes, const py::buffer& ids,
                 const std::optional<py::buffer>& tiles, const std::optional<py::buffer>& allowed,
                 const StrataArguments& parents, const StrataArguments& children, const py::buffer& features,
                 const py::buffer& rest, const py::buffer& windows, const py::buffer& shift, const py::buffer& bits,
                 const py::buffer& base, int columns, double budget, double largest_budget, double least, bool whole,
                 uint64_t key, const py::object& policy, const py::buffer& m, const py::buffer& s, const py::buffer& s2,
                 const py::buffer& v, const py::buffer& ss, const py::buffer& vs, const py::buffer& vv,
                 const std::optional<py::buffer>& v2, const std::optional<py::buffer>& sl,
                 const std::optional<py::buffer>& qq, const std::optional<py::buffer>& ee, const py::buffer& fits,
                 const py::buffer& pairs, const std::optional<py::buffer>& remembered, int threads,
                 const std::string& simd) {
    std::list<py::buffer_info> held;
    patchscore::Request request{};
    request.images = images_of(images, patch_size, held);
    const auto info = [&](const py::buffer& buffer, bool writable = false) -> const py::buffer_info& {
        return held.emplace_back(buffer.request(writable));
    };
    const py::buffer_info &sizes_info = info(sizes), &ids_info = info(ids), &features_info = info(features);
    if (sizes_info.ndim != 1 || ids_info.ndim != 1) throw py::value_error("sizes, ids: take one dimension");
    if (features_info.ndim != 2) throw py::value_error("features: takes [queries, rank]");
    request.cells = sizes_info.shape[0];
    if (request.cells < 1 || request.cells % patchscore::SIBLINGS || request.cells > INT32_MAX)
        throw py::value_error("sizes: got " + std::to_string(request.cells) + " cells, takes a multiple of " +
                              std::to_string(patchscore::SIBLINGS));
    request.sizes = data_of<int64_t>("sizes", sizes_info, {request.cells}, false);
    request.ids = data_of<int64_t>("ids", ids_info, ids_info.shape, false);
    const int64_t needed =
        check_ids(request.images, request.sizes, request.cells, request.ids, ids_info.shape[0], !tiles);
    // Of the type that the images ask for.
    const auto typed = [&](auto of_bytes, auto of_floats, const char* name, const py::buffer& buffer,
                           const std::vector<py::ssize_t>& shape) -> const void* {
        if (request.images.floats) return data_of<decltype(of_floats)>(name, info(buffer), shape, false);
        return data_of<decltype(of_bytes)>(name, info(buffer), shape, false);
    };
    if (tiles) request.tiles = typed(int8_t(), float(), "tiles", *tiles, {needed * request.images.tile_values()});
    if (allowed) request.allowed = data_of<uint8_t>("allowed", info(*allowed), {request.images.count}, false);
    const py::ssize_t queries = features_info.shape[0], channels = request.images.channels;
    request.queries = size_of("features", queries), request.rank = size_of("features", features_info.shape[1]);
    request.children = strata_of("children", children, request.cells, request.rank, int(channels), held);
    request.parents =
        strata_of("parents", parents, request.cells / patchscore::SIBLINGS, request.rank, int(channels), held);
    request.features = data_of<float>("features", features_info, features_info.shape, false);
    request.rest = data_of<float>("rest", info(rest), {queries}, false);
    request.windows = typed(int16_t(), float(), "windows", windows, {queries, 2 * request.images.pairs()});
    request.shift = data_of<int32_t>("shift", info(shift), {queries}, false);
    for (py::ssize_t q = 0; q < queries; ++q)
        if (request.shift[q] < 0 || request.shift[q] > 13)
            throw py::value_error("shift: got " + std::to_string(request.shift[q]));
    request.bits = data_of<double>("bits", info(bits), {queries}, false);
    request.base = data_of<double>("base", info(base), {queries}, false);
    if (!(budget > 0))
        throw py::value_error("budget: got " + std::to_string(budget) + ", takes a positive number of windows");
    if (!std::isfinite(largest_budget))
        throw py::value_error("largest_budget: got " + std::to_string(largest_budget) + ", takes a number of windows");
    if (columns < 0 || (columns && request.queries % columns))
        throw py::value_error("columns: got " + std::to_string(columns) + ", which does not divide " +
                              std::to_string(request.queries) + " queries");
    request.columns = columns, request.budget = budget, request.largest_budget = largest_budget, request.least = least;
    request.whole = whole, request.key = key;
    request.policy = policy_of(policy);
    request.m = data_of<double>("m", info(m, true), {queries}, true);
    request.s = data_of<double>("s", info(s, true), {queries}, true);
    request.s2 = data_of<double>("s2", info(s2, true), {queries}, true);
    request.v = data_of<double>("v", info(v, true), {queries, channels}, true);
    request.ss = data_of<double>("ss", info(ss, true), {queries}, true);
    request.vs = data_of<double>("vs", info(vs, true), {queries, channels}, true);
    request.vv = data_of<double>("vv", info(vv, true), {queries, channels}, true);
    if (v2.has_value() != sl.has_value() || v2.has_value() != qq.has_value() || v2.has_value() != ee.has_value())
        throw py::value_error("v2, sl, qq, ee: takes all or none");
    if (v2) {
        request.v2 = data_of<double>("v2", info(*v2, true), {queries, channels}, true);
        request.sl = data_of<double>("sl", info(*sl, true), {queries}, true);
        request.qq = data_of<double>("qq", info(*qq, true), {queries, channels}, true);
        request.ee = data_of<double>("ee", info(*ee, true), {queries}, true);
    }
    request.fits = data_of<uint8_t>("fits", info(fits, true), {queries}, true);
    request.pairs = data_of<int64_t>("pairs", info(pairs, true), {queries}, true);
    if (remembered) {
        request.remembered =
            data_of<int64_t>("remembered", info(*remembered, true), {queries, patchscore::MOST_KNOWN}, true);
        const int64_t most = request.images.count * request.images.rows() * request.images.cols();
        for (py::ssize_t i = 0; i < queries * patchscore::MOST_KNOWN; ++i)
            if (request.remembered[i] >= most)
                throw py::value_error("remembered: got window " + std::to_string(request.remembered[i]) + " of " +
                                      std::to_string(most));
    }
    bool finished;
    {
        const py::gil_scoped_release release;
        finished = patchscore::pruned_scan(request, threads, simd, interrupted);
    }
    if (!finished) throw py::error_already_set();
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "The engines of patchscore in C++.";
    module.def("simd_levels", &patchscore::simd_levels, "Instruction sets that can serve here, the widest first.");
    module.def("sliding", &sliding, py::arg("z"), py::arg("sigma"), py::arg("images"), py::arg("indices"),
               py::arg("competitions"), py::arg("threads"), py::arg("memory_limit"), py::arg("simd"),
               "Adds the posterior sums of z [B, C, H, W] over images [N, C, H, W] to those of competitions, a list of "
               "(patch_size, circular, groups, m, s, s2, v, v2, sl): m, s, s2, sl [B, 1, H, W], v, v2 [B, C, H, W], v2 "
               "and sl None where moments are not asked for; groups [G, 8] are "
               "rows and columns as (first query, end, first window, end), -1 locks.");
    module.def("sliding_product", &sliding_product, py::arg("transposed"), py::arg("averaging"), py::arg("z"),
               py::arg("sigma"), py::arg("images"), py::arg("indices"), py::arg("patch_size"), py::arg("circular"),
               py::arg("groups"), py::arg("evidence"), py::arg("mean"), py::arg("direction"), py::arg("result"),
               py::arg("threads"), py::arg("memory_limit"), py::arg("simd"),
               "Adds the Jacobian of the posterior mean times direction [B, C, H, W], or its transpose times it, to "
               "result; evidence [B, 1, H, W] is ln sum e^l and mean [B, C, H, W] the posterior mean.");
    module.def("pruned_pack", &pruned_pack, py::arg("images"), py::arg("ids"), py::arg("sizes"), py::arg("patch_size"),
               py::arg("tiles"), py::arg("threads"), "Copies windows into tiles, cell by cell.");
    module.def("pruned_scan", &pruned_scan, py::kw_only(), py::arg("images"), py::arg("patch_size"), py::arg("sizes"),
               py::arg("ids"), py::arg("tiles"), py::arg("allowed"), py::arg("parents"), py::arg("children"),
               py::arg("features"), py::arg("rest"), py::arg("windows"), py::arg("shift"), py::arg("bits"),
               py::arg("base"), py::arg("columns"), py::arg("budget"), py::arg("largest_budget"), py::arg("least"),
               py::arg("whole"), py::arg("key"), py::arg("policy"), py::arg("m"), py::arg("s"), py::arg("s2"),
               py::arg("v"), py::arg("ss"), py::arg("vs"), py::arg("vv"), py::arg("v2"), py::arg("sl"), py::arg("qq"),
               py::arg("ee"), py::arg("fits"), py::arg("pairs"), py::arg("remembered"), py::arg("threads"),
               py::arg("simd"), "Estimates the posterior sums of queries; see struct Request in csrc/pruned/pruned.h.");
}

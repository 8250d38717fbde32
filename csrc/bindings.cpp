// Python module patchscore._native: checks what buffers hold, then hands pointers and sizes to the engines.
//
// Everything arrives through the buffer protocol, so nothing of torch or numpy is included or linked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <limits>
#include <list>
#include <optional>
#include <tuple>

#include "pruned/lists.h"
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

void sliding_product(bool transposed, const py::buffer& z, const py::buffer& sigma, const py::buffer& images,
                     const std::optional<py::buffer>& indices, int patch_size, bool circular, const py::buffer& groups,
                     const py::buffer& evidence, const py::buffer& mean, const py::buffer& direction,
                     const py::buffer& result, int threads, int64_t memory_limit, const std::string& simd) {
    patchscore::Problem problem = problem_of(z, sigma, images, indices, threads, memory_limit);
    const std::vector<py::ssize_t> shape = z.request().shape;
    problem.competitions.push_back(rule_of(patch_size, circular, groups));
    const std::vector<py::ssize_t> one = {shape[0], 1, shape[2], shape[3]};
    const patchscore::JacobianProduct product = {transposed,
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

// A region's scan from a dictionary of arrays and numbers; the arrays' buffers are held as long as this is.
class HeldScan {
    const py::dict& given;
    std::list<py::buffer_info> held;

    template <typename T>
    T get(const char* name) const {
        if (!given.contains(name)) throw py::value_error(std::string(name) + ": missing");
        try {
            return given[name].cast<T>();
        } catch (const py::cast_error&) {
            throw py::value_error(std::string(name) + ": got an object of another kind");
        }
    }

    const py::buffer_info& info(const char* name, bool writable = false) {
        held.push_back(get<py::buffer>(name).request(writable));
        return held.back();
    }

    template <typename T>
    T* data(const char* name, const std::vector<py::ssize_t>& shape, bool writable = false) {
        return data_of<T>(name, info(name, writable), shape, writable);
    }

    template <typename T>
    const T* optional(const char* name, const std::vector<py::ssize_t>& shape) {
        return get<py::object>(name).is_none() ? nullptr : data<T>(name, shape);
    }

    // Bytes or floats, whichever it is.
    const void* pixels(const char* name, const std::vector<py::ssize_t>& shape, bool& are_bytes) {
        const py::buffer_info& found = info(name);
        are_bytes = found.itemsize == 1;
        if (are_bytes) return data_of<uint8_t>(name, found, shape, false);
        return data_of<float>(name, found, shape, false);
    }

public:
    patchscore::Scan scan{};

    explicit HeldScan(const py::dict& given) : given(given) {
        patchscore::Lists& lists = scan.lists;
        const py::buffer_info &all = info("data"), &sizes = info("sizes"), &images = info("images");
        const py::buffer_info &z = info("z"), &items = info("items");
        if (sizes.ndim != 1) throw py::value_error("sizes: takes one dimension");
        if (all.ndim != 1) throw py::value_error("data: takes one dimension");
        if (images.ndim != 4)
            throw py::value_error("images: got shape " + shape_text(images.shape) + ", takes [N, C, H, W]");
        if (z.ndim != 4) throw py::value_error("z: takes [items, C, H + k - 1, W + k - 1]");
        if (items.ndim != 1) throw py::value_error("items: takes [queries]");
        const py::ssize_t cells = sizes.shape[0], queries = items.shape[0], channels = images.shape[1];

        // The cells.
        const int rank = get<int>("rank");
        lists.cells = size_of("sizes", cells), lists.rank = size_of("rank", rank);
        lists.data = data_of<uint8_t>("data", all, {all.shape[0]}, false);
        lists.offsets = data<int64_t>("offsets", {cells});
        lists.sizes = data_of<int64_t>("sizes", sizes, {cells}, false);
        lists.starts = data<int64_t>("starts", {cells});
        int64_t stored = 0;
        for (py::ssize_t c = 0; c < cells; ++c) {
            const int64_t size = lists.sizes[c], at = lists.offsets[c];
            if (size < 0 || size > INT32_MAX || lists.starts[c] != stored || at < 0 || at % 2 ||
                size > (all.shape[0] - at) / (2 * int64_t(rank) + 8) || at > all.shape[0])
                throw py::value_error("offsets, sizes, starts: cell " + std::to_string(c) + " lies outside the data");
            stored += size;
        }
        lists.values = pixels("values", {stored, channels}, lists.values_are_bytes);
        lists.counts = optional<uint16_t>("counts", {stored});
        if (lists.counts) lists.repeats = data<float>("repeats", {1 << 16});
        lists.allowed = optional<uint8_t>("allowed", {images.shape[0]});
        lists.competing = data<float>("competing", {cells});
        if (cells % patchscore::SIBLINGS) throw py::value_error("sizes: takes whole families of cells");
        const int64_t first = get<int64_t>("first_cell");
        const py::buffer_info& mean = info("mean");
        const std::vector<py::ssize_t> all_cells = {rank, mean.ndim == 2 ? mean.shape[1] : 0};
        const std::vector<py::ssize_t> parents = {rank, all_cells[1] / patchscore::SIBLINGS};
        if (first < 0 || first % patchscore::SIBLINGS || first + cells > all_cells[1])
            throw py::value_error("mean: got " + std::to_string(all_cells[1]) + " cells");
        lists.pitch = all_cells[1];
        lists.mean = data_of<float>("mean", mean, all_cells, false) + first;
        lists.variance = data<float>("variance", all_cells) + first;
        lists.parent_mean = data<float>("parent_mean", parents) + first / patchscore::SIBLINGS;
        lists.parent_variance = data<float>("parent_variance", parents) + first / patchscore::SIBLINGS;
        lists.log_repeats = data<float>("log_repeats", {cells});
        lists.moments = data<float>("moments", {cells, 2 * channels});
        const auto place = get<std::array<int, 4>>("place");
        lists.row0 = place[0], lists.col0 = place[1], lists.rows = place[2], lists.cols = place[3];
        if (place[0] < 0 || place[1] < 0 || place[2] < 1 || place[3] < 1 || place[0] + place[2] > images.shape[2] ||
            place[1] + place[3] > images.shape[3])
            throw py::value_error("place: windows outside the images");

        // The queries.
        scan.queries = size_of("items", queries), scan.channels = size_of("images", channels);
        scan.height = size_of("images", images.shape[2]), scan.width = size_of("images", images.shape[3]);
        scan.patch_size = get<int>("patch_size");
        if (scan.patch_size < 1 || scan.patch_size % 2 == 0 || scan.patch_size > 1 << 12)
            throw py::value_error("patch_size: got " + std::to_string(scan.patch_size));
        scan.sigma = get<double>("sigma"), scan.exact_sigma = get<double>("exact_sigma");
        scan.budget = get<double>("budget"), scan.floor = get<double>("floor");
        if (!(scan.sigma > 0) || !(scan.exact_sigma > 0) || !(scan.budget > 0) || !(scan.floor >= 0))
            throw py::value_error("sigma, budget: takes positive numbers");
        scan.used_rank = get<int>("used_rank"), scan.recheck = get<int>("recheck"), scan.seed = get<uint64_t>("seed");
        if (scan.used_rank < 1 || scan.used_rank > rank)
            throw py::value_error("used_rank: takes 1 to " + std::to_string(rank));
        if (scan.recheck < 0 || scan.recheck > 1 << 16)
            throw py::value_error("recheck: got " + std::to_string(scan.recheck));
        scan.foreseen_rank = get<int>("foreseen_rank");
        if (scan.foreseen_rank < 1 || scan.foreseen_rank > scan.used_rank)
            throw py::value_error("foreseen_rank: takes 1 to used_rank");
        const py::ssize_t k = scan.patch_size, pixels_of = channels * k * k;
        scan.axes = data<float>("axes", {pixels_of, rank}), scan.centre = data<float>("centre", {pixels_of});
        const py::ssize_t high = images.shape[2] + k - 1, wide = images.shape[3] + k - 1;
        scan.z = data_of<float>("z", z, {z.shape[0], channels, high, wide}, false);
        scan.items = data_of<int64_t>("items", items, {queries}, false);
        scan.numbers = data<int64_t>("numbers", {queries});
        const auto pixels_at = get<std::array<int, 4>>("pixels");
        scan.row0 = pixels_at[0], scan.col0 = pixels_at[1], scan.cols = pixels_at[3];
        if (pixels_at[0] < 0 || pixels_at[1] < 0 || pixels_at[2] < 1 || pixels_at[3] < 1 ||
            pixels_at[0] + pixels_at[2] > images.shape[2] || pixels_at[1] + pixels_at[3] > images.shape[3])
            throw py::value_error("pixels: outside the images");
        for (py::ssize_t i = 0; i < queries; ++i)
            if (scan.items[i] < 0 || scan.items[i] >= z.shape[0] || scan.numbers[i] < 0 ||
                scan.numbers[i] >= int64_t(pixels_at[2]) * pixels_at[3])
                throw py::value_error("items, numbers: query " + std::to_string(i) + " lies outside z");
        scan.images = pixels("images", images.shape, scan.images_are_bytes), scan.image_count = images.shape[0];

        // Results.
        scan.m = data<double>("m", {queries}, true), scan.s = data<double>("s", {queries}, true);
        scan.s2 = data<double>("s2", {queries}, true), scan.ss = data<double>("ss", {queries}, true);
        scan.v = data<double>("v", {queries, channels}, true), scan.vv = data<double>("vv", {queries, channels}, true);
        scan.vs = data<double>("vs", {queries, channels}, true), scan.pairs = data<int64_t>("pairs", {1}, true);
    }
};

void scan_lists(const std::vector<py::dict>& scans, int threads, const std::string& simd) {
    std::list<HeldScan> held;
    std::vector<patchscore::Scan> all;
    for (const py::dict& given : scans) all.push_back(held.emplace_back(given).scan);
    bool finished;
    {
        const py::gil_scoped_release release;
        finished = patchscore::scan_lists(all, threads < 1 ? 1 : threads, simd, interrupted);
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
    module.def("sliding_product", &sliding_product, py::arg("transposed"), py::arg("z"), py::arg("sigma"),
               py::arg("images"), py::arg("indices"), py::arg("patch_size"), py::arg("circular"), py::arg("groups"),
               py::arg("evidence"), py::arg("mean"), py::arg("direction"), py::arg("result"), py::arg("threads"),
               py::arg("memory_limit"), py::arg("simd"),
               "Adds the Jacobian of the posterior mean times direction [B, C, H, W], or its transpose times it, to "
               "result; evidence [B, 1, H, W] is ln sum e^l and mean [B, C, H, W] the posterior mean.");
    module.def(
        "scan_lists", &scan_lists, py::arg("scans"), py::arg("threads"), py::arg("simd"),
        "Estimates the posterior sums of windows from a share of the cells; a scan is a dictionary of what struct "
        "Scan in csrc/lists.h holds.");
}

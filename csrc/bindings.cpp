// Python module patchscore._native: checks what buffers hold, then hands pointers and sizes to the engines.
//
// Everything arrives through the buffer protocol, so nothing of torch or numpy is included or linked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <limits>
#include <optional>
#include <tuple>

#include "lists.h"
#include "sliding.h"

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

// patch_size, circular, groups, and m, s, s2, v to add to.
using CompetitionArguments =
    std::tuple<int, bool, py::buffer, py::buffer, py::buffer, py::buffer, py::buffer>;

patchscore::Competition competition_of(const CompetitionArguments& arguments, const std::vector<py::ssize_t>& shape) {
    const auto& [patch_size, circular, groups, m, s, s2, v] = arguments;
    if (patch_size < 0) throw py::value_error("patch_size: got " + std::to_string(patch_size));
    patchscore::Competition competition{};
    competition.patch_size = patch_size, competition.circular = circular;
    const py::buffer_info groups_info = groups.request();
    if (groups_info.ndim != 2)
        throw py::value_error("groups: got shape " + shape_text(groups_info.shape) + ", takes [G, 8]");
    const int64_t* group = data_of<int64_t>("groups", groups_info, {groups_info.shape[0], 8}, false);
    for (py::ssize_t g = 0; g < groups_info.shape[0]; ++g, group += 8)
        competition.groups.push_back({axis_of(group), axis_of(group + 4)});
    const bool whole = patch_size == 0;
    const std::vector<py::ssize_t> one = {shape[0], 1, whole ? 1 : shape[2], whole ? 1 : shape[3]};
    competition.m = data_of<double>("m", m.request(true), one, true);
    competition.s = data_of<double>("s", s.request(true), one, true);
    competition.s2 = data_of<double>("s2", s2.request(true), one, true);
    competition.v = data_of<double>("v", v.request(true), shape, true);
    return competition;
}

void sliding(const py::buffer& z, const py::buffer& sigma, const py::buffer& images,
             const std::optional<py::buffer>& indices, const std::vector<CompetitionArguments>& competitions,
             int threads, int64_t memory_limit, const std::string& simd) {
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
    py::buffer_info indices_info;
    if (indices) {
        indices_info = indices->request();
        if (indices_info.ndim != 1) throw py::value_error("indices: takes one dimension");
        problem.count = indices_info.shape[0];
        problem.indices = data_of<int64_t>("indices", indices_info, {indices_info.shape[0]}, false);
        for (int64_t i = 0; i < problem.count; ++i)
            if (problem.indices[i] < 0 || problem.indices[i] >= bank[0])
                throw py::value_error("indices: got " + std::to_string(problem.indices[i]) + " for a bank of " +
                                      std::to_string(bank[0]) + " images");
    }
    for (const CompetitionArguments& arguments : competitions)
        problem.competitions.push_back(competition_of(arguments, shape));
    problem.threads = threads, problem.memory_limit = memory_limit;

    bool finished;
    {
        const py::gil_scoped_release release;
        finished = patchscore::sliding_posterior_sums(problem, simd, interrupted);
    }
    // The poll that asked to stop has left KeyboardInterrupt, or what else a signal handler raised, behind.
    if (!finished) throw py::error_already_set();
}

// A table of numbers that may be absent.
template <typename T>
const T* optional_data(const char* name, const std::optional<py::buffer>& buffer, py::buffer_info& info,
                       const std::vector<py::ssize_t>& shape) {
    if (!buffer) return nullptr;
    info = buffer->request();
    return data_of<T>(name, info, shape, false);
}

void scan_lists(const py::buffer& data, const py::buffer& offsets, const py::buffer& sizes, const py::buffer& starts,
                const py::buffer& values, const std::optional<py::buffer>& counts,
                const std::optional<py::buffer>& allowed, const py::buffer& competing, const py::buffer& mean,
                const py::buffer& variance, const py::buffer& log_repeats, const py::buffer& moments, int rank, const std::array<int, 4>& place, const py::buffer& images, const py::buffer& numbers,
                const py::buffer& q,
                const py::buffer& windows, const py::buffer& expected, int used_rank,
                double sigma, double exact_sigma, double budget, double floor, int recheck, uint64_t seed,
                const py::buffer& m,
                const py::buffer& s, const py::buffer& s2, const py::buffer& v, const py::buffer& vv,
                const py::buffer& vs, const py::buffer& ss, const py::buffer& pairs, int threads,
                const std::string& simd) {
    const py::buffer_info data_info = data.request(), sizes_info = sizes.request(), values_info = values.request();
    const py::buffer_info images_info = images.request(), q_info = q.request(), windows_info = windows.request();
    if (sizes_info.ndim != 1) throw py::value_error("sizes: takes one dimension");
    if (data_info.ndim != 1) throw py::value_error("data: takes one dimension");
    if (images_info.ndim != 4)
        throw py::value_error("images: got shape " + shape_text(images_info.shape) + ", takes [N, C, H, W]");
    if (q_info.ndim != 2) throw py::value_error("q: takes [queries, rank]");
    if (windows_info.ndim != 4) throw py::value_error("windows: takes [queries, C, k, k]");
    const py::ssize_t cells = sizes_info.shape[0], queries = q_info.shape[0], channels = images_info.shape[1];
    const py::buffer_info offsets_info = offsets.request(), starts_info = starts.request();
    const py::buffer_info competing_info = competing.request(), moments_info = moments.request();
    const py::buffer_info expected_info = expected.request(), mean_info = mean.request();
    const py::buffer_info variance_info = variance.request(), repeats_info = log_repeats.request();
    py::buffer_info counts_info, allowed_info;

    patchscore::Lists lists{};
    lists.cells = size_of("sizes", cells), lists.rank = size_of("rank", rank);
    lists.data = data_of<uint8_t>("data", data_info, {data_info.shape[0]}, false);
    lists.offsets = data_of<int64_t>("offsets", offsets_info, {cells}, false);
    lists.sizes = data_of<int64_t>("sizes", sizes_info, {cells}, false);
    lists.starts = data_of<int64_t>("starts", starts_info, {cells}, false);
    int64_t stored = 0;
    for (py::ssize_t c = 0; c < cells; ++c) {
        const int64_t size = lists.sizes[c], at = lists.offsets[c];
        if (size < 0 || lists.starts[c] != stored || at < 0 || at % 2 ||
            size > (data_info.shape[0] - at) / (2 * int64_t(rank) + 8) || at > data_info.shape[0])
            throw py::value_error("offsets, sizes, starts: cell " + std::to_string(c) + " lies outside the data");
        stored += size;
    }
    lists.values_are_bytes = values_info.itemsize == 1;
    const std::vector<py::ssize_t> values_shape = {stored, channels};
    lists.values = lists.values_are_bytes
                       ? static_cast<const void*>(data_of<uint8_t>("values", values_info, values_shape, false))
                       : static_cast<const void*>(data_of<float>("values", values_info, values_shape, false));
    lists.counts = optional_data<float>("counts", counts, counts_info, {stored});
    lists.allowed = optional_data<uint8_t>("allowed", allowed, allowed_info, {images_info.shape[0]});
    lists.competing = data_of<float>("competing", competing_info, {cells}, false);
    lists.mean = data_of<float>("mean", mean_info, {cells, rank}, false);
    lists.variance = data_of<float>("variance", variance_info, {cells, rank}, false);
    lists.log_repeats = data_of<float>("log_repeats", repeats_info, {cells}, false);
    lists.moments = data_of<float>("moments", moments_info, {cells, 2 * channels}, false);
    lists.row0 = place[0], lists.col0 = place[1], lists.rows = place[2], lists.cols = place[3];
    if (place[0] < 0 || place[1] < 0 || place[2] < 1 || place[3] < 1 || place[0] + place[2] > images_info.shape[2] ||
        place[1] + place[3] > images_info.shape[3])
        throw py::value_error("place: windows outside the images");

    patchscore::Scan scan{};
    scan.queries = size_of("q", queries), scan.channels = size_of("images", channels);
    scan.height = size_of("images", images_info.shape[2]), scan.width = size_of("images", images_info.shape[3]);
    scan.patch_size = size_of("windows", windows_info.shape[2]);
    if (!(sigma > 0) || !(exact_sigma > 0) || !(budget > 0) || !(floor >= 0))
        throw py::value_error("sigma, budget: takes positive numbers");
    scan.sigma = sigma, scan.exact_sigma = exact_sigma, scan.budget = budget, scan.floor = floor;
    if (used_rank < 1 || used_rank > rank) throw py::value_error("used_rank: takes 1 to " + std::to_string(rank));
    if (recheck < 0 || recheck > 1 << 16) throw py::value_error("recheck: got " + std::to_string(recheck));
    scan.used_rank = used_rank, scan.recheck = recheck, scan.seed = seed, scan.threads = threads < 1 ? 1 : threads;
    const py::buffer_info numbers_info = numbers.request();
    scan.numbers = data_of<int64_t>("numbers", numbers_info, {queries}, false);
    scan.q = data_of<float>("q", q_info, {queries, rank}, false);
    const py::ssize_t k = scan.patch_size;
    scan.windows = data_of<float>("windows", windows_info, {queries, channels, k, k}, false);
    scan.expected = data_of<float>("expected", expected_info, {queries, cells}, false);
    scan.images_are_bytes = images_info.itemsize == 1, scan.image_count = images_info.shape[0];
    scan.images = scan.images_are_bytes
                      ? static_cast<const void*>(data_of<uint8_t>("images", images_info, images_info.shape, false))
                      : static_cast<const void*>(data_of<float>("images", images_info, images_info.shape, false));
    const py::buffer_info m_info = m.request(true), s_info = s.request(true), s2_info = s2.request(true);
    const py::buffer_info v_info = v.request(true), vv_info = vv.request(true), vs_info = vs.request(true);
    const py::buffer_info ss_info = ss.request(true), pairs_info = pairs.request(true);
    scan.m = data_of<double>("m", m_info, {queries}, true), scan.s = data_of<double>("s", s_info, {queries}, true);
    scan.s2 = data_of<double>("s2", s2_info, {queries}, true);
    scan.ss = data_of<double>("ss", ss_info, {queries}, true);
    scan.v = data_of<double>("v", v_info, {queries, channels}, true);
    scan.vv = data_of<double>("vv", vv_info, {queries, channels}, true);
    scan.vs = data_of<double>("vs", vs_info, {queries, channels}, true);
    scan.pairs = data_of<int64_t>("pairs", pairs_info, {1}, true);

    bool finished;
    {
        const py::gil_scoped_release release;
        finished = patchscore::scan_lists(lists, scan, simd, interrupted);
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
               "(patch_size, circular, groups, m, s, s2, v): m, s, s2 [B, 1, H, W], v [B, C, H, W]; groups [G, 8] are "
               "rows and columns as (first query, end, first window, end), -1 locks.");
    module.def("scan_lists", &scan_lists, py::kw_only(), py::arg("data"), py::arg("offsets"), py::arg("sizes"),
               py::arg("starts"), py::arg("values"), py::arg("counts"), py::arg("allowed"), py::arg("competing"),
               py::arg("mean"), py::arg("variance"), py::arg("log_repeats"), py::arg("moments"), py::arg("rank"), py::arg("place"), py::arg("images"), py::arg("numbers"), py::arg("q"),
               py::arg("windows"), py::arg("expected"), py::arg("used_rank"), py::arg("sigma"), py::arg("exact_sigma"),
               py::arg("budget"), py::arg("floor"), py::arg("recheck"), py::arg("seed"), py::arg("m"), py::arg("s"),
               py::arg("s2"), py::arg("v"), py::arg("vv"), py::arg("vs"), py::arg("ss"), py::arg("pairs"),
               py::arg("threads"), py::arg("simd"),
               "Estimates the posterior sums of `queries` windows from a share of the cells; see csrc/lists.h.");
}

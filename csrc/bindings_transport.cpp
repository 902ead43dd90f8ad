// Sinkhorn transport between pairs of frames, and the memory of large results.
#include "bindings.h"
#include "objslot/transport.h"
#include "objslot/workspace.h"

namespace py = pybind11;

namespace objslot {

namespace {

// Memory of one result, handed to Python through the buffer protocol.
class ResultMemory {
 public:
  explicit ResultMemory(int64_t bytes) : bytes_(bytes), data_(take_result(bytes)) {}
  ~ResultMemory() { give_result(data_, bytes_); }
  ResultMemory(const ResultMemory&) = delete;
  ResultMemory& operator=(const ResultMemory&) = delete;
  py::buffer_info info() const {
    return py::buffer_info(data_, 1, py::format_descriptor<unsigned char>::format(), bytes_);
  }

 private:
  int64_t bytes_;
  void* data_;
};

}  // namespace

void bind_transport(py::module_& module) {
  using Address = std::uintptr_t;
  py::class_<ResultMemory>(module, "ResultMemory", py::buffer_protocol())
      .def(py::init([](int64_t bytes) {
        if (bytes < 1) throw std::invalid_argument("ResultMemory: expected at least one byte");
        return new ResultMemory(bytes);
      }))
      .def_buffer(&ResultMemory::info);
  module.def("release_results", &release_results, "Hands the kept memory of large results back to the system.");
  module.def("multiplies_tokens", &multiplies_tokens, "Whether transport_pairs can do without scores.");
  module.def(
      "transport_pairs",
      [](bool wide, Address scores, Address tokens, std::array<int64_t, 2> layout, double shortest, Address values,
         Address masses, Address firsts, Address seconds, std::array<int64_t, 3> sizes, double eps, int64_t n_iters,
         Address forth, Address back, Address lost, int threads) {
        const auto [pairs, n, channels] = sizes;
        const auto [frames, features] = layout;
        if (pairs < 0 || n < 1 || channels < 1 || n_iters < 1 || frames < 1 || features < 1)
          throw std::invalid_argument("transport_pairs: sizes out of range");
        if (scores == 0 && (wide || tokens == 0 || !multiplies_tokens()))
          throw std::invalid_argument("transport_pairs: expected scores");
        const int64_t bytes = wide ? 8 : 4;
        check_dense("scores", scores, bytes, {pairs, n, n});
        check_dense("tokens", tokens, bytes, {frames, n, features});
        check_dense("values", values, bytes, {frames, n, channels});
        check_dense("masses", masses, bytes, {frames, n});
        check_dense("forth", forth, bytes, {pairs, n, channels});
        check_dense("back", back, bytes, {pairs, n, channels});
        check_dense("firsts", firsts, 8, {pairs});
        check_dense("seconds", seconds, 8, {pairs});
        check_dense("lost", lost, 1, {pairs});
        const bool some = pairs > 0;
        const int64_t* rows = pointer<const int64_t>("firsts", firsts, some);
        const int64_t* columns = pointer<const int64_t>("seconds", seconds, some);
        for (int64_t pair = 0; pair < pairs; ++pair)
          if (rows[pair] < 0 || rows[pair] >= frames || columns[pair] < 0 || columns[pair] >= frames)
            throw std::invalid_argument("transport_pairs: a frame out of range");
        const PairsProblem problem{wide,
                                   elements("scores", scores, bytes, false),
                                   pointer<const float>("tokens", tokens, false),
                                   frames,
                                   features,
                                   shortest,
                                   elements("values", values, bytes, some),
                                   elements("masses", masses, bytes, false),
                                   rows,
                                   columns,
                                   pairs,
                                   n,
                                   channels,
                                   eps,
                                   n_iters};
        const PairsResult result{elements("forth", forth, bytes, some), elements("back", back, bytes, some),
                                 pointer<unsigned char>("lost", lost, some)};
        transport_pairs(problem, result, checked_threads(threads));
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace objslot

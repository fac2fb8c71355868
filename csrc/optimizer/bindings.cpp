// merit_fast._C: the Python door of optimizer.h.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <vector>

#include "bindings.h"

namespace nb = nanobind;

namespace {

// Size, then the addresses of weight, gradient, moments, their scales, master, average (0: none); the key.
using Row = std::tuple<int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t,
                       uintptr_t, uintptr_t, uint64_t>;
using Rates = std::tuple<double, double, double>;  // step size, root, share in the average
using Kinds =
    std::tuple<bool, bool, int, int, bool, bool>;  // as in AdamWJob, from weight_bf16 to zero_grad
using Numbers =
    std::tuple<double, double, double, double, double>;  // decay, beta1, beta2, epsilon, clip

template <class T>
T* address(uintptr_t place) {
  return reinterpret_cast<T*>(place);
}

AdamWTensor tensor(const Row& r, const Rates& rates) {
  return {std::get<0>(r),
          address<void>(std::get<1>(r)),
          address<void>(std::get<2>(r)),
          address<void>(std::get<3>(r)),
          address<void>(std::get<4>(r)),
          address<float>(std::get<5>(r)),
          address<float>(std::get<6>(r)),
          address<void>(std::get<7>(r)),
          address<float>(std::get<8>(r)),
          std::get<9>(r),
          float(std::get<0>(rates)),
          float(std::get<1>(rates)),
          float(std::get<2>(rates))};
}

}  // namespace

void define_optimizer(nb::module_& m, const Level& level) {
  m.def("adamw", [&level](const std::vector<Row>& rows, const std::vector<Rates>& rates,
                          const Kinds& kinds, const Numbers& numbers, int threads) {
    if (rows.size() != rates.size() || threads < 1)
      throw std::invalid_argument("adamw: bad rows, rates or threads");
    std::vector<AdamWTensor> tensors;
    for (size_t k = 0; k < rows.size(); k++) tensors.push_back(tensor(rows[k], rates[k]));
    const auto [weight_bf16, grad_bf16, moments, master, stochastic, zero_grad] = kinds;
    const auto [decay, beta1, beta2, epsilon, clip] = numbers;
    if (moments < 0 || moments > 2 || master < 0 || master > 2)
      throw std::invalid_argument("adamw: bad kinds");
    const AdamWJob job{tensors.data(),     int64_t(tensors.size()),
                       weight_bf16,        grad_bf16,
                       Moments(moments),   Master(master),
                       stochastic,         zero_grad,
                       float(decay),       float(beta1),
                       float(1.0 - beta1), float(beta2),
                       float(1.0 - beta2), float(epsilon),
                       float(clip),        threads};
    nb::gil_scoped_release release;
    level.optimizer->adamw(job);
  });

  m.def("square_sum", [&level](const std::vector<uintptr_t>& data,
                               const std::vector<int64_t>& sizes, bool bf16, int threads) {
    if (data.size() != sizes.size() || threads < 1)
      throw std::invalid_argument("square_sum: bad sizes or threads");
    std::vector<const void*> places;
    for (uintptr_t place : data) places.push_back(address<const void>(place));
    int64_t blocks = 0;
    for (int64_t n : sizes) blocks += update_items(n);
    std::vector<double> sums(static_cast<size_t>(blocks));
    nb::gil_scoped_release release;
    level.optimizer->square_sums(
        {places.data(), sizes.data(), int64_t(sizes.size()), bf16, threads, sums.data()});
    double total = 0.0;
    for (double sum : sums) total += sum;
    return total;
  });
}

// merit_fast._C: one step of AdamW for many tensors, and the sum of squares of gradients.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/bindings.h"
#include "optimizer/optimizer.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

using Addresses = std::vector<uintptr_t>;

// AdamWTensor by columns, one entry per tensor: Python builds 14 lists faster than one object per
// tensor.
struct AdamWTensors {
  std::vector<int64_t> sizes;
  Addresses weights, grads, exp_avgs, exp_avg_sqs;
  Addresses exp_avg_scales, exp_avg_sq_scales, masters, averages;  // empty: the tensors have none
  std::vector<uint64_t> keys;
  std::vector<int64_t> firsts;
  std::vector<double> rates, roots, average_weights;
};

void check_length(const char* name, size_t length, size_t count, bool optional) {
  if (length == count || (optional && length == 0)) return;
  throw std::invalid_argument("adamw: " + std::string(name) + " must have " +
                              std::to_string(count) + " entries, has " + std::to_string(length));
}

void check(const AdamWTensors& t) {
  const size_t count = t.sizes.size();
  check_length("weights", t.weights.size(), count, false);
  check_length("grads", t.grads.size(), count, false);
  check_length("exp_avgs", t.exp_avgs.size(), count, false);
  check_length("exp_avg_sqs", t.exp_avg_sqs.size(), count, false);
  check_length("exp_avg_scales", t.exp_avg_scales.size(), count, true);
  check_length("exp_avg_sq_scales", t.exp_avg_sq_scales.size(), count, true);
  check_length("masters", t.masters.size(), count, true);
  check_length("averages", t.averages.size(), count, true);
  check_length("keys", t.keys.size(), count, false);
  check_length("firsts", t.firsts.size(), count, false);
  check_length("rates", t.rates.size(), count, false);
  check_length("roots", t.roots.size(), count, false);
  check_length("average_weights", t.average_weights.size(), count, false);
}

template <class T>
T* entry(const Addresses& column, size_t k) {
  return column.empty() ? nullptr : pointer<T>(column[k]);
}

std::vector<AdamWTensor> rows_of(const AdamWTensors& t, std::vector<uint8_t>& won) {
  std::vector<AdamWTensor> rows;
  rows.reserve(t.sizes.size());
  for (size_t k = 0; k < t.sizes.size(); k++)
    rows.push_back({.n = t.sizes[k],
                    .weight = entry<void>(t.weights, k),
                    .grad = entry<void>(t.grads, k),
                    .exp_avg = entry<void>(t.exp_avgs, k),
                    .exp_avg_sq = entry<void>(t.exp_avg_sqs, k),
                    .exp_avg_scale = entry<float>(t.exp_avg_scales, k),
                    .exp_avg_sq_scale = entry<float>(t.exp_avg_sq_scales, k),
                    .master = entry<void>(t.masters, k),
                    .average = entry<float>(t.averages, k),
                    .won = &won[k],
                    .key = t.keys[k],
                    .first = t.firsts[k],
                    .rate = float(t.rates[k]),
                    .root = float(t.roots[k]),
                    .average_weight = float(t.average_weights[k])});
  return rows;
}

void define_tensors(nb::module_& m) {
  nb::class_<AdamWTensors>(m, "AdamWTensors")
      .def(
          "__init__",
          [](AdamWTensors* self, std::vector<int64_t> sizes, Addresses weights, Addresses grads,
             Addresses exp_avgs, Addresses exp_avg_sqs, Addresses exp_avg_scales,
             Addresses exp_avg_sq_scales, Addresses masters, Addresses averages,
             std::vector<uint64_t> keys, std::vector<int64_t> firsts, std::vector<double> rates,
             std::vector<double> roots, std::vector<double> average_weights) {
            AdamWTensors tensors{.sizes = std::move(sizes),
                                 .weights = std::move(weights),
                                 .grads = std::move(grads),
                                 .exp_avgs = std::move(exp_avgs),
                                 .exp_avg_sqs = std::move(exp_avg_sqs),
                                 .exp_avg_scales = std::move(exp_avg_scales),
                                 .exp_avg_sq_scales = std::move(exp_avg_sq_scales),
                                 .masters = std::move(masters),
                                 .averages = std::move(averages),
                                 .keys = std::move(keys),
                                 .firsts = std::move(firsts),
                                 .rates = std::move(rates),
                                 .roots = std::move(roots),
                                 .average_weights = std::move(average_weights)};
            check(tensors);
            new (self) AdamWTensors(std::move(tensors));
          },
          nb::kw_only(), "sizes"_a, "weights"_a, "grads"_a, "exp_avgs"_a, "exp_avg_sqs"_a,
          "exp_avg_scales"_a, "exp_avg_sq_scales"_a, "masters"_a, "averages"_a, "keys"_a,
          "firsts"_a, "rates"_a, "roots"_a, "average_weights"_a);
}

}  // namespace

void define_optimizer(nb::module_& m, const OptimizerKernels& kernels) {
  define_tensors(m);

  m.def(
      "adamw",
      [&kernels](const AdamWTensors& tensors, bool weight_bf16, bool grad_bf16, int moments,
                 int master, bool stochastic, bool zero_grad, double decay, double beta1,
                 double beta2, double epsilon, double clip, int threads) {
        if (threads < 1) throw std::invalid_argument("adamw: bad threads");
        if (moments < 0 || moments > 2 || master < 0 || master > 3)
          throw std::invalid_argument("adamw: bad moments or master");
        std::vector<uint8_t> won(tensors.sizes.size());
        const std::vector<AdamWTensor> rows = rows_of(tensors, won);
        const AdamWJob job{.tensors = rows.data(),
                           .count = int64_t(rows.size()),
                           .weight_bf16 = weight_bf16,
                           .grad_bf16 = grad_bf16,
                           .moments = Moments(moments),
                           .master = Master(master),
                           .stochastic = stochastic,
                           .zero_grad = zero_grad,
                           .decay = float(decay),
                           .beta1 = float(beta1),
                           .rest1 = float(1.0 - beta1),
                           .beta2 = float(beta2),
                           .rest2 = float(1.0 - beta2),
                           .epsilon = float(epsilon),
                           .clip = float(clip),
                           .threads = threads};
        {
          nb::gil_scoped_release release;
          kernels.adamw(job);
        }
        return won;
      },
      nb::kw_only(), "tensors"_a, "weight_bf16"_a, "grad_bf16"_a, "moments"_a, "master"_a,
      "stochastic"_a, "zero_grad"_a, "decay"_a, "beta1"_a, "beta2"_a, "epsilon"_a, "clip"_a,
      "threads"_a);

  m.def(
      "square_sum",
      [&kernels](const Addresses& data, const std::vector<int64_t>& sizes, bool bf16, int threads) {
        if (data.size() != sizes.size() || threads < 1)
          throw std::invalid_argument("square_sum: bad sizes or threads");
        std::vector<const void*> pointers;
        for (uintptr_t address : data) pointers.push_back(pointer<const void>(address));
        int64_t items = 0;
        for (int64_t n : sizes) items += update_items(n);
        std::vector<double> sums(static_cast<size_t>(items));
        nb::gil_scoped_release release;
        kernels.square_sums({.data = pointers.data(),
                             .sizes = sizes.data(),
                             .count = int64_t(sizes.size()),
                             .bf16 = bf16,
                             .threads = threads,
                             .sums = sums.data()});
        double total = 0.0;
        for (double sum : sums) total += sum;
        return total;
      },
      nb::kw_only(), "data"_a, "sizes"_a, "bf16"_a, "threads"_a);
}

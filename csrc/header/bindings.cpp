// merit_fast._C: headers of safetensors files.
#include <nanobind/nanobind.h>

#include "common/bindings.h"
#include "header/header.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

nb::object text(std::string_view value) { return nb::str(value.data(), value.size()); }

nb::tuple tuple(const std::vector<int64_t>& values) {
  nb::list list;
  for (const int64_t value : values) list.append(value);
  return nb::tuple(list);
}

}  // namespace

void define_header(nb::module_& m) {
  // (tensors, error, too_many); tensors: [(name, dtype, shape, first byte, end)], by their bytes.
  m.def(
      "parse_header",
      [](const nb::bytes& header_text, size_t most_tensors) {
        const Header header = parse_header({header_text.c_str(), header_text.size()}, most_tensors);
        nb::list tensors;
        nb::dict dtypes;  // one string for all tensors of a dtype
        if (header.error < 0)
          for (const HeaderTensor& tensor : header.tensors) {
            nb::object dtype = text(tensor.dtype);
            if (dtypes.contains(dtype))
              dtype = dtypes[dtype];
            else
              dtypes[dtype] = dtype;
            tensors.append(nb::make_tuple(text(tensor.name), dtype, tuple(tensor.shape),
                                          tensor.begin, tensor.end));
          }
        return nb::make_tuple(tensors, header.error, header.too_many);
      },
      nb::kw_only(), "text"_a, "most_tensors"_a);
}

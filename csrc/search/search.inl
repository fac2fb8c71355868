// Table of the search's kernels at one level.
#include "search/products.inl"

extern const SearchKernels search_kernels = {
    .row_products = row_products,
};

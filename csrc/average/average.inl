// Table of the average's kernels at one level.
#include "average/convert.inl"
#include "average/exact.inl"
#include "average/sums.inl"
#include "average/elect.inl"
#include "average/deltas.inl"
#include "average/elements.inl"

extern const AverageKernels average_kernels = {
    .weighted_average = weighted_average,
    .delta_gram = delta_gram,
    .delta_sizes = delta_sizes,
    .count_sizes = count_sizes,
    .pick_sizes = pick_sizes,
    .mix_deltas = mix_deltas,
    .kept_squares = kept_squares,
    .low_rank_rows = low_rank_rows,
    .kept_sizes = kept_sizes,
    .mix_near = mix_near,
    .tally_active = tally_active,
    .mix_active = mix_active,
    .row_importance = row_importance,
    .mix_important = mix_important,
    .add_products = add_products,
    .weighted_columns = weighted_columns,
};

// Table of the average's kernels at one level.
#include "average/sums.inl"
#include "average/elect.inl"
#include "average/deltas.inl"

extern const AverageKernels average_kernels = {
    .weighted_average = weighted_average,
    .delta_gram = delta_gram,
    .delta_sizes = delta_sizes,
    .count_sizes = count_sizes,
    .pick_sizes = pick_sizes,
    .mix_deltas = mix_deltas,
    .kept_squares = kept_squares,
    .low_rank_rows = low_rank_rows,
};

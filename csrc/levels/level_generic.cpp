// Level "generic": any processor.
#include <omp.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "levels/levels.h"
namespace level_generic {
#include "levels/all_kernels.inl"
}

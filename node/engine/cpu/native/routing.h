// Which experts a row goes to.
#pragma once

#include "swarmd_native.h"

namespace swarmd {

// The router's outputs of one row [experts] -> the numbers of the chosen experts, ascending, and their weights. `scores` is
// overwritten; `candidates` is room for experts + groups numbers. Of equal scores the lower number is chosen.
void route(const SwarmdRouting &routing, const float *selection_bias, float *scores, float *candidates, int *chosen,
           float *shares);

}  // namespace swarmd

// The norm of gradients on the CPU, for whoever has their pointers.
#pragma once
#include <vector>

#include "grad_norm_args.h"

namespace fastft {
// The sum of the squares of all elements of gradients of so many chunks together.
double squares_of(const std::vector<Gradient>& gradients, int64_t chunks);
}  // namespace fastft

// New memory, in pages of 2 MiB where Linux has them.
#pragma once
#include <cstddef>

namespace fastft {
// To be called before memory is first touched: getting it in pages of 4 KiB takes longer than a
// pass over it. Only pages that lie within it become large: no more memory is used.
void expect_use(void* memory, size_t bytes);
}  // namespace fastft

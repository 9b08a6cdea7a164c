// Finds where a place lies in what is laid end to end, by where each part begins: the tensor of a
// block or of an element, the segment of a token.
#pragma once
#include "host_device.h"

// Returns the last of `count` ascending starts that is not after `place`; the first one is not.
template <class Index, class Start, class Place>
FASTFT_HD Index last_not_after(const Start* starts, Index count, Place place) {
  Index low = 0;
  for (Index end = count; end - low > 1;) {
    const Index middle = (low + end) / 2;
    (starts[middle] <= place ? low : end) = middle;
  }
  return low;
}

#if defined(__CUDACC__)
// Does so by all threads of a warp, which ask 32 places at a time: two loads from device memory,
// one after the other, find one of a thousand.
template <class Start>
static __device__ int last_not_after_of_warp(const Start* starts, int count, Start place) {
  constexpr int kWarp = 32;
  const int lane = int(threadIdx.x) % kWarp;
  int low = 0;
  for (int end = count; end - low > 1;) {
    const int part = (end - low + kWarp - 1) / kWarp, asked = low + lane * part;
    const bool not_after = asked < end && starts[asked] <= place;
    low += (__popc(__ballot_sync(0xffffffffu, not_after)) - 1) * part;
    end = end - low < part ? end : low + part;
  }
  return low;
}
#endif

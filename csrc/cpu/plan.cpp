// plan_packs(Tensor lengths, int max_tokens, int max_sequences, Tensor(a!) indices, Tensor(b!) entry_lengths,
//            Tensor(c!) offsets, Tensor(d!) count) -> ()
// Best-fit decreasing over all lengths at once. The lengths are put in decreasing order by a counting sort (ties in the
// order they came); each goes to the open pack with the smallest remaining capacity that takes it, the one waiting
// longest among equals. Capacities are small integers: a bitset of those in use, with a second one over its words,
// finds it in a few instructions.
#include <algorithm>
#include <vector>

#include "shim.h"

namespace {
using fastft::as_int;
using fastft::Tensor;

constexpr int64_t kNone = INT64_MAX;

class Capacities {  // FIFO queues of packs, one per remaining capacity
 public:
  explicit Capacities(int64_t largest)
      : used_(largest / 64 + 1, 0),
        used_words_(largest / 4096 + 1, 0),
        head_(largest + 1, -1),
        tail_(largest + 1, -1) {}

  int32_t open_pack() {
    next_.push_back(-1);
    return static_cast<int32_t>(next_.size() - 1);
  }

  bool waiting(int64_t capacity) const { return head_[capacity] >= 0; }

  int64_t smallest_from(int64_t need) const {  // kNone where no open pack has this much room
    size_t word = static_cast<size_t>(need) / 64;
    if (uint64_t bits = used_[word] & (~0ULL << (need % 64))) return lowest(word, bits);
    if (++word >= used_.size()) return kNone;
    size_t block = word / 64;
    uint64_t words = used_words_[block] & (~0ULL << (word % 64));
    while (!words) {
      if (++block >= used_words_.size()) return kNone;
      words = used_words_[block];
    }
    word = static_cast<size_t>(lowest(block, words));
    return lowest(word, used_[word]);
  }

  void push(int64_t capacity, int32_t pack) {
    next_[pack] = -1;
    if (tail_[capacity] >= 0) {
      next_[tail_[capacity]] = pack;
    } else {
      head_[capacity] = pack;
      used_[capacity / 64] |= 1ULL << (capacity % 64);
      used_words_[capacity / 4096] |= 1ULL << (capacity / 64 % 64);
    }
    tail_[capacity] = pack;
  }

  int32_t pop(int64_t capacity) {
    const int32_t pack = head_[capacity];
    head_[capacity] = next_[pack];
    if (head_[capacity] < 0) {
      tail_[capacity] = -1;
      uint64_t& word = used_[capacity / 64];
      word &= ~(1ULL << (capacity % 64));
      if (!word) used_words_[capacity / 4096] &= ~(1ULL << (capacity / 64 % 64));
    }
    return pack;
  }

 private:
  static int64_t lowest(size_t word, uint64_t bits) { return static_cast<int64_t>(word) * 64 + __builtin_ctzll(bits); }

  std::vector<uint64_t> used_, used_words_;
  std::vector<int32_t> head_, tail_, next_;
};

// The numbers of the lengths from the longest to the shortest; counts[l] becomes how many have length l.
std::vector<int32_t> decreasing(const int64_t* lengths, int64_t n, std::vector<int64_t>& counts) {
  const int64_t largest = static_cast<int64_t>(counts.size()) - 1;
  for (int64_t i = 0; i < n; i++) {
    FT_CHECK(lengths[i] > 0 && lengths[i] <= largest, "plan_packs: length %lld at %lld is not in [1, %lld]",
             static_cast<long long>(lengths[i]), static_cast<long long>(i), static_cast<long long>(largest));
    counts[lengths[i]]++;
  }
  std::vector<int64_t> next(largest + 1);
  int64_t sum = 0;
  for (int64_t length = largest; length > 0; length--) {
    next[length] = sum;
    sum += counts[length];
  }
  std::vector<int32_t> order(n);
  for (int64_t i = 0; i < n; i++) order[next[lengths[i]]++] = static_cast<int32_t>(i);
  return order;
}

// Writes pack_of[k] for the k-th longest length and the size of pack p at offsets[p + 1]; returns the number of packs.
int64_t assign(const std::vector<int64_t>& counts, int64_t max_tokens, int64_t max_sequences, int32_t* pack_of,
               int64_t* offsets) {
  Capacities capacities(max_tokens);
  int64_t packs = 0;
  for (int64_t length = static_cast<int64_t>(counts.size()) - 1; length > 0; length--) {
    int64_t capacity = max_tokens;
    for (int64_t left = counts[length]; left > 0;) {
      if (!capacities.waiting(capacity)) capacity = capacities.smallest_from(length);
      int32_t pack;
      if (capacity > max_tokens) {
        capacity = max_tokens;
        pack = capacities.open_pack();
        offsets[++packs] = 0;
      } else {
        pack = capacities.pop(capacity);
      }
      // what it has left is less than any other capacity that takes this length: it stays the best fit until it is none
      int64_t many = capacity < 2 * length ? 1 : std::min(left, capacity / length);
      if (max_sequences > 0) many = std::min(many, max_sequences - offsets[pack + 1]);
      for (int64_t i = 0; i < many; i++) *pack_of++ = pack;
      left -= many;
      offsets[pack + 1] += many;
      const int64_t rest = capacity - many * length;
      if (rest > 0 && offsets[pack + 1] != max_sequences) capacities.push(rest, pack);
    }
  }
  return packs;
}

void plan_packs(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 7, "plan_packs takes 7 arguments, got %d", static_cast<int>(nargs));
  const Tensor lengths(stack[0]), indices(stack[3]), entry_lengths(stack[4]), offsets(stack[5]), count(stack[6]);
  const int64_t n = lengths.numel(), max_sequences = as_int(stack[2]);
  for (const Tensor* tensor : {&lengths, &indices, &entry_lengths, &offsets, &count})
    FT_CHECK(tensor->dtype() == aoti_torch_dtype_int64() && tensor->contiguous(), "plan_packs: needs contiguous int64");
  FT_CHECK(indices.numel() == n && entry_lengths.numel() == n && offsets.numel() == n + 1 && count.numel() == 1,
           "plan_packs: outputs do not fit %lld lengths", static_cast<long long>(n));
  FT_CHECK(n < INT32_MAX && as_int(stack[1]) > 0 && as_int(stack[1]) <= INT32_MAX, "plan_packs: more than 2^31 - 1");

  const int64_t* length = static_cast<const int64_t*>(lengths.data());
  int64_t total = 0;
  for (int64_t i = 0; i < n; i++) total += length[i];
  // a capacity beyond the sum of all lengths makes no difference, but the tables grow with it
  const int64_t max_tokens = std::max<int64_t>(1, std::min(as_int(stack[1]), total));
  std::vector<int64_t> counts(max_tokens + 1, 0);
  const std::vector<int32_t> order = decreasing(length, n, counts);
  std::vector<int32_t> pack_of(n);
  int64_t* offset = static_cast<int64_t*>(offsets.mutable_data());
  offset[0] = 0;
  const int64_t packs = assign(counts, max_tokens, max_sequences, pack_of.data(), offset);
  for (int64_t p = 0; p < packs; p++) offset[p + 1] += offset[p];

  std::vector<int64_t> next(offset, offset + packs);
  int64_t* index = static_cast<int64_t*>(indices.mutable_data());
  int64_t* entry_length = static_cast<int64_t*>(entry_lengths.mutable_data());
  int64_t k = 0;
  for (int64_t l = max_tokens; l > 0; l--) {
    for (int64_t left = counts[l]; left > 0; left--, k++) {
      const int64_t place = next[pack_of[k]]++;
      index[place] = order[k];
      entry_length[place] = l;
    }
  }
  *static_cast<int64_t*>(count.mutable_data()) = packs;
}

fastft::Kernel kernel("plan_packs", plan_packs);
}  // namespace

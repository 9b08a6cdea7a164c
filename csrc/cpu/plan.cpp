// plan_packs(Tensor lengths, Tensor windows, int max_tokens, int max_sequences, Tensor(a!) indices,
//            Tensor(b!) entry_lengths, Tensor(c!) offsets, Tensor(d!) counts) -> ()
//
// Best-fit decreasing over the lengths of one window after another. They are put in decreasing
// order by a counting sort (ties in the order they came); each goes to the open pack with the
// smallest remaining capacity that takes it, the one waiting longest among equals. Capacities are
// small integers: a bitset of those in use, with a second one over its words, finds it in a few
// instructions.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "pages.h"
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

  void clear() {  // touches only what is in use: a window may be small
    for (size_t block = 0; block < used_words_.size(); block++) {
      for (uint64_t& words = used_words_[block]; words; words &= words - 1) {
        const int64_t word = lowest(block, words);
        for (uint64_t& bits = used_[word]; bits; bits &= bits - 1)
          head_[lowest(word, bits)] = tail_[lowest(word, bits)] = -1;
      }
    }
    next_.clear();
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
  static int64_t lowest(size_t word, uint64_t bits) {
    return static_cast<int64_t>(word) * 64 + __builtin_ctzll(bits);
  }

  std::vector<uint64_t> used_, used_words_;
  std::vector<int32_t> head_, tail_, next_;
};

struct Tables {  // what every window needs again
  Tables(int64_t most, int64_t max_tokens)
      : order(new int32_t[most]),
        pack_of(new int32_t[most]),
        counts(max_tokens + 1, 0),
        next(max_tokens + 1) {
    fastft::expect_use(order.get(), most * sizeof(int32_t));
    fastft::expect_use(pack_of.get(), most * sizeof(int32_t));
  }

  // the numbers of the window's lengths from the longest to the shortest
  std::unique_ptr<int32_t[]> order;
  std::unique_ptr<int32_t[]> pack_of;  // the pack of each of these
  std::vector<int32_t> counts;         // how many have a length; all zero between windows
  std::vector<int32_t> next;           // where the next of a length goes in order
  std::vector<int32_t> places;         // where the next entry of a pack goes
};

// Fills order and counts; the longest length is returned.
template <class Length>
int64_t decreasing(const Length* lengths, int64_t n, Tables& tables) {
  const int64_t largest = static_cast<int64_t>(tables.counts.size()) - 1;
  int64_t longest = 0;
  for (int64_t i = 0; i < n; i++) {
    const int64_t length = lengths[i];
    FT_CHECK(length > 0 && length <= largest,
             "plan_packs: length %lld at %lld of a window is not in [1, %lld]",
             static_cast<long long>(length), static_cast<long long>(i),
             static_cast<long long>(largest));
    tables.counts[length]++;
    longest = std::max(longest, length);
  }
  int32_t sum = 0;
  for (int64_t length = longest; length > 0; length--) {
    tables.next[length] = sum;
    sum += tables.counts[length];
  }
  for (int64_t i = 0; i < n; i++) tables.order[tables.next[lengths[i]]++] = static_cast<int32_t>(i);
  return longest;
}

// Fills pack_of and writes the size of pack p at offsets[p + 1]; returns the number of packs.
int64_t assign(Capacities& capacities, Tables& tables, int64_t longest, int64_t max_tokens,
               int64_t max_sequences, int64_t* offsets) {
  int32_t* pack_of = tables.pack_of.get();
  int64_t packs = 0;
  for (int64_t length = longest; length > 0; length--) {
    int64_t capacity = max_tokens;
    for (int64_t left = tables.counts[length]; left > 0;) {
      if (!capacities.waiting(capacity)) capacity = capacities.smallest_from(length);
      int32_t pack;
      if (capacity > max_tokens) {
        capacity = max_tokens;
        pack = capacities.open_pack();
        offsets[++packs] = 0;
      } else {
        pack = capacities.pop(capacity);
      }
      // what it has left is less than any other capacity that takes this length: it stays the best
      // fit until it is none
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

// Writes the entries of the packs of a window that begins with example `first`, and clears counts.
void gather(Tables& tables, int64_t longest, int64_t first, const int64_t* offsets, int64_t packs,
            int64_t* indices, int64_t* entry_lengths) {
  indices += offsets[0];
  entry_lengths += offsets[0];
  tables.places.resize(packs);
  for (int64_t p = 0; p < packs; p++)
    tables.places[p] = static_cast<int32_t>(offsets[p] - offsets[0]);
  int64_t k = 0;
  for (int64_t length = longest; length > 0; length--) {
    for (int32_t& left = tables.counts[length]; left > 0; left--, k++) {
      const int32_t place = tables.places[tables.pack_of[k]]++;
      indices[place] = first + tables.order[k];
      entry_lengths[place] = length;
    }
  }
}

// Plans all windows; offsets[0] is 0, counts receives the packs of each window.
template <class Length>
void plan(const Length* lengths, const int64_t* windows, int64_t many, int64_t max_tokens,
          int64_t max_sequences, int64_t* indices, int64_t* entry_lengths, int64_t* offsets,
          int64_t* pack_counts) {
  int64_t total = 0, most = 0;
  // lengths are checked later: no sum overflows
  for (int64_t i = 0; i < windows[many] && total < max_tokens; i++)
    total += std::max<int64_t>(0, std::min<int64_t>(lengths[i], max_tokens));
  for (int64_t w = 0; w < many; w++) most = std::max(most, windows[w + 1] - windows[w]);
  // a capacity beyond the sum of all lengths makes no difference, but the tables grow with it
  max_tokens = std::max<int64_t>(1, std::min(max_tokens, total));
  fastft::expect_use(indices, windows[many] * sizeof(int64_t));
  fastft::expect_use(entry_lengths, windows[many] * sizeof(int64_t));
  Tables tables(most, max_tokens);
  Capacities capacities(max_tokens);
  offsets[0] = 0;
  for (int64_t w = 0; w < many; w++) {
    const int64_t longest = decreasing(lengths + windows[w], windows[w + 1] - windows[w], tables);
    const int64_t packs = assign(capacities, tables, longest, max_tokens, max_sequences, offsets);
    capacities.clear();
    for (int64_t p = 0; p < packs; p++) offsets[p + 1] += offsets[p];
    gather(tables, longest, windows[w], offsets, packs, indices, entry_lengths);
    pack_counts[w] = packs;
    offsets += packs;
  }
}

void plan_packs(StableIValue* stack, uint64_t nargs, uint64_t) {
  FT_CHECK(nargs == 8, "plan_packs takes 8 arguments, got %d", static_cast<int>(nargs));
  const Tensor lengths(stack[0]), windows(stack[1]), indices(stack[4]), entry_lengths(stack[5]),
      offsets(stack[6]), counts(stack[7]);
  const int64_t n = lengths.numel(), max_tokens = as_int(stack[2]);
  const int64_t max_sequences = as_int(stack[3]);
  for (const Tensor* tensor : {&windows, &indices, &entry_lengths, &offsets, &counts})
    FT_CHECK(tensor->dtype() == aoti_torch_dtype_int64() && tensor->contiguous(),
             "plan_packs: needs contiguous int64");
  const bool wide = lengths.dtype() == aoti_torch_dtype_int64();
  FT_CHECK((wide || lengths.dtype() == aoti_torch_dtype_int32()) && lengths.contiguous(),
           "plan_packs: needs contiguous lengths, int32 or int64");
  FT_CHECK(indices.numel() == n && entry_lengths.numel() == n && offsets.numel() == n + 1 &&
               counts.numel() == windows.numel() - 1,
           "plan_packs: outputs do not fit %lld lengths", static_cast<long long>(n));
  FT_CHECK(n < INT32_MAX && max_tokens > 0 && max_tokens <= INT32_MAX,
           "plan_packs: more than 2^31 - 1");
  const int64_t* window = static_cast<const int64_t*>(windows.data());
  const int64_t many = counts.numel();
  bool fits = window[0] == 0 && window[many] == n;
  for (int64_t w = 0; w < many; w++) fits &= window[w] <= window[w + 1];
  FT_CHECK(fits, "plan_packs: the windows do not cover %lld lengths", static_cast<long long>(n));

  const auto run = [&](const auto* length) {
    plan(length, window, many, max_tokens, max_sequences,
         static_cast<int64_t*>(indices.mutable_data()),
         static_cast<int64_t*>(entry_lengths.mutable_data()),
         static_cast<int64_t*>(offsets.mutable_data()),
         static_cast<int64_t*>(counts.mutable_data()));
  };
  wide ? run(static_cast<const int64_t*>(lengths.data()))
       : run(static_cast<const int32_t*>(lengths.data()));
}

fastft::Kernel kernel("plan_packs", plan_packs);
}  // namespace

// A handle that an operator gives to Python and takes back later: a number that stands for an
// object here, and is no address.
#pragma once
#include <memory>
#include <mutex>
#include <unordered_map>

#include "shim.h"

namespace fastft {
// Objects by number, from any thread. A number is never given twice, and one that is unknown is an
// error, not a crash. An object which is let go of while another thread uses it lives until that
// thread is done.
template <class T>
class LiveTable {
 public:
  // `first`: the first number; those of two tables differ, so that none takes the other's for its
  // own.
  explicit LiveTable(int64_t first) : next_(first) {}

  int64_t add(std::unique_ptr<T> object) {
    const std::lock_guard<std::mutex> lock(mutex_);
    objects_.emplace(next_, std::move(object));
    return next_++;
  }

  std::shared_ptr<T> get(int64_t number, const char* what) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = objects_.find(number);
    FT_CHECK(found != objects_.end(), "%s: %lld is nothing that it has bound, or was released",
             what, static_cast<long long>(number));
    return found->second;
  }

  void remove(int64_t number) {
    std::shared_ptr<T> last;  // destroyed after the lock is given back
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = objects_.find(number);
    if (found == objects_.end()) return;
    last = std::move(found->second);
    objects_.erase(found);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<T>> objects_;
  int64_t next_;
};
}  // namespace fastft

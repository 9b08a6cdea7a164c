// Integers out of Python's lists, for ctypes, which holds Python's lock meanwhile. The functions of
// Python's stable ABI are handed in: the library is built without Python and fits every one.
#include "shim.h"

namespace {
struct Python {
  void* (*item)(void* list, ptrdiff_t index);         // PyList_GetItem, not counted as a reference
  ptrdiff_t (*size)(void* list);                      // PyList_Size
  long long (*integer)(void* object, int* overflow);  // PyLong_AsLongLongAndOverflow
  void* (*error)();                                   // PyErr_Occurred
};
}  // namespace

// Writes the numbers of all lists in `lists` to out[0 .. room). Less than `room` is returned where
// one of them is no integer, which Python has as an error then, or is beyond int64.
FASTFT_EXPORT int64_t fastft_integers_of_lists(const Python* python, void* lists, int64_t* out,
                                               int64_t room) {
  int64_t written = 0;
  const ptrdiff_t count = python->size(lists);
  for (ptrdiff_t of_all = 0; of_all < count; of_all++) {
    void* list = python->item(lists, of_all);
    // an object's own __index__ may change the list: each item is looked for anew
    for (ptrdiff_t place = 0; place < python->size(list) && written < room; place++) {
      int beyond = 0;
      const long long number = python->integer(python->item(list, place), &beyond);
      if (beyond || (number == -1 && python->error())) return written;
      out[written++] = number;
    }
  }
  return written;
}

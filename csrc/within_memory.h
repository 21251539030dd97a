// How a lack of memory becomes an error of one line, where the engine is entered.
#pragma once
#include <new>
#include <string>

#include "aligned.h"

namespace qdeploy {

// work(), where an Error says which memory there was not. What can be known before is checked before: here a limit on
// the address space, or on all processes together, came in between.
template <class Error, class Work>
auto within_memory(const std::string& where, const Work& work) {
  try {
    return work();
  } catch (const NoMemory& error) {
    throw Error("expected " + std::to_string(error.bytes) + " bytes of memory, got none - at " + where);
  } catch (const std::bad_alloc&) {
    throw Error("expected more memory, got none - at " + where);
  }
}

}  // namespace qdeploy

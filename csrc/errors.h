// The two errors that the engine throws on purpose; bindings.cc turns them into qdeploy.errors.ModelError and
// InputError.
#pragma once
#include <stdexcept>
#include <string>

namespace qdeploy {

// A file that is missing, damaged, hostile or beyond this engine. The text says: expected X, got Y - at Z.
struct ModelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// An input or an option that does not fit the model or the machine.
struct InputError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace qdeploy

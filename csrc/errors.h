// The two errors that the engine throws on purpose, and the words they are made of; bindings.cc turns them into
// qdeploy.errors.ModelError and InputError.
//
// A text says "expected X, got Y - at Z". Z leads from the inside out: "key `bias` of node `fc` of member `net` in
// FILE".
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace qdeploy {

// A file that is missing, damaged, hostile or beyond this engine.
struct ModelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// An input or an option that does not fit the model or the machine.
struct InputError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws a ModelError.
[[noreturn]] void fail(const std::string& expected, const std::string& got, const std::string& where);

// Does so unless `ok`.
void require(bool ok, const std::string& expected, const std::string& got, const std::string& where);

// "[64, 3, 7, 7]"
std::string shape_text(const std::vector<int64_t>& shape);

// At most 60 printable characters of a name out of a file, in backquotes.
std::string name_text(const std::string& name);

// "a, b or c"
std::string alternatives(const std::vector<std::string>& texts);

// Three digits: "0.5", "5.36e+12".
std::string number_text(double number);

}  // namespace qdeploy
